"""The laws, tried on a loss of the user's before it trains anything."""

import contextlib
import functools
import sys
import warnings

from funcloss import laws
from funcloss.app.registry import LOSSES
from funcloss.app.runs.options import chosen_loss
from funcloss.app.runs.setup import Setup
from funcloss.combinators import options_of
from funcloss.errors import ConfigError

_MOST_CLASSES = 10  # that the laws are tried with


def check_loss(setup: Setup) -> tuple[str, ...]:
    """Raise ``ConfigError`` if the loss is the user's own and wrong.

    Args:
        setup: The training; its configuration's ``check`` says whether to try at all.

    Returns:
        What the user should read: that nothing was tried, or that it works on batches alone.
    """
    config = setup.config
    if config.loss in LOSSES:
        return ()
    if not config.check:
        return (f"the laws were not tried on the loss {config.loss}",)
    loss = chosen_loss(config)
    takes = options_of(loss)
    given = {name: t.cpu() for name, t in setup.hyper.items() if name in takes}
    if setup.costs.amounts and "cost_matrix" in takes:
        given["cost_matrix"] = setup.costs.matrix.nan_to_num(1.0).float()
    given.pop("class_weights", None)  # put on its values from outside
    # What comes from the data is of as many classes as the data has.
    classes = len(setup.dataset.classes) if given else min(len(setup.costs.classes), _MOST_CLASSES)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # of the loss, at inputs that it was not made for
        tried = functools.partial(loss, **given) if given else loss
        findings = laws.check(laws.adapt(tried, task="classification", classes=classes).case)
    verdict = laws.verdict_of(findings)
    if verdict.degree == laws.WRONG:
        lines = "".join(f"\n  {f.law}: {f.detail}\n    -> {f.advice}" for f in verdict.causes)
        raise ConfigError(
            f"loss {config.loss} is wrong:{lines}\n"
            "fix it (funcloss check shows all laws), or pass no-check to train with it all the same"
        )
    if verdict.degree == laws.BATCHES:
        return (f"loss {config.loss} {verdict.sentence}; {verdict.causes[0].advice}",)
    return ()
