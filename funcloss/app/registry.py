"""The short names that options have: a row for each, and what it is an alias of.

A fact about a named thing is on the thing itself or on its row here; the choices of the options,
their help and the tables of the documentation are made of the rows. Nothing here loads torch, so
that ``--help`` answers at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from funcloss.app.addresses import imported
from funcloss.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """A short name, which behaves as its address does."""

    name: str
    address: str  # ``module:name``
    takes: tuple[
        str, ...
    ] = ()  # options of a run that are ignored where no row that takes them is chosen
    image_size: int = 0  # height and width that a model needs; 0: any
    of_length: bool = False  # whether a schedule needs the number of steps

    def load(self) -> Any:
        """Return what the name stands for."""
        return imported(self.address, what=self.name, refused={})


def _by_name(*rows: Row) -> dict[str, Row]:
    return {row.name: row for row in rows}


LOSSES = _by_name(  # of logits and labels, one value per example
    Row("cross_entropy", "funcloss.losses:cross_entropy"),
    Row("nll", "funcloss.app.losses:nll"),
    Row("squared_error", "funcloss.app.losses:squared_error"),
    Row("softmax_focal", "funcloss.losses:softmax_focal"),
    Row("poly1", "funcloss.losses:poly1"),
    Row("asymmetric_single_label", "funcloss.losses:asymmetric_single_label"),
    Row("multiclass_hinge", "funcloss.losses:multiclass_hinge"),
    Row("multi_margin", "funcloss.losses:multi_margin"),
    Row("generalized_cross_entropy", "funcloss.losses:generalized_cross_entropy"),
    Row("symmetric_cross_entropy", "funcloss.losses:symmetric_cross_entropy"),
    Row("normalized_cross_entropy", "funcloss.losses:normalized_cross_entropy"),
    Row("mean_absolute_error", "funcloss.losses:mean_absolute_error"),
    Row("bi_tempered", "funcloss.losses:bi_tempered"),
    Row("earth_mover", "funcloss.losses:earth_mover"),
    Row("sord", "funcloss.losses:sord"),
    Row("class_balanced", "funcloss.losses:class_balanced"),
    Row("balanced_softmax", "funcloss.losses:balanced_softmax"),
    Row("logit_adjusted", "funcloss.losses:logit_adjusted"),
    Row("ldam", "funcloss.losses:ldam"),
    Row("vector_scaling", "funcloss.losses:vector_scaling"),
    Row("equalization", "funcloss.losses:equalization"),
    Row("expected_cost", "funcloss.losses:expected_cost"),
    Row("log_bilinear", "funcloss.losses:log_bilinear"),
    Row("softmax_margin", "funcloss.losses:softmax_margin"),
    Row("cost_hinge", "funcloss.losses:cost_hinge"),
    Row("cross_entropy_with_cost", "funcloss.app.losses:cross_entropy_with_cost"),
)
MODELS = _by_name(  # functions of the shape of an input and the number of classes
    Row("linear", "funcloss.models:linear"),
    Row("mlp", "funcloss.models:mlp"),
    Row("article-cnn", "funcloss.models:article_cnn"),
    Row("lenet5", "funcloss.models:lenet5", image_size=32),
    Row("fast-cnn", "funcloss.models:fast_cnn"),
    Row("cifar-cnn", "funcloss.models:cifar_cnn"),
)
OPTIMIZERS = _by_name(  # functions of the options that they take
    Row("sgd", "funcloss.optim:sgd", ("momentum", "dampening", "nesterov", "weight_decay")),
    Row("adam", "funcloss.optim:adam", ("betas", "eps", "weight_decay")),
    Row("adamw", "funcloss.optim:adamw", ("betas", "eps", "weight_decay")),
)
SCHEDULES = _by_name(
    Row("constant", "funcloss.optim:constant"),
    Row("step", "funcloss.optim:step_decay", ("decay_every", "decay_factor")),
    Row("cosine", "funcloss.optim:cosine", of_length=True),
    Row("one-cycle", "funcloss.optim:one_cycle", ("warmup",), of_length=True),
)
REDUCTIONS = _by_name(
    Row("mean", "funcloss.objectives:mean_of"),
    Row("weighted_mean", "funcloss.objectives:weighted_mean_of"),
)
ROWS = {  # by the option that chooses among them
    "loss": LOSSES,
    "model": MODELS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "reduction": REDUCTIONS,
}


def takers(option: str) -> tuple[str, tuple[str, ...]]:
    """Return the option on which another depends, and the names there that take the other.

    Example:
        >>> takers("momentum"), takers("warmup")
        (('optimizer', ('sgd',)), ('schedule', ('one-cycle',)))
    """
    return next(
        (choice, names)
        for choice, rows in ROWS.items()
        if (names := tuple(row.name for row in rows.values() if option in row.takes))
    )


def short_name(option: str, text: Any) -> Any:
    """Return the short name of an address that has one, all else as it is.

    Example:
        >>> short_name("loss", "funcloss.losses:poly1"), short_name("loss", "mine:loss")
        ('poly1', 'mine:loss')
    """
    rows = ROWS.get(option, {}).values()
    return next((row.name for row in rows if row.address == text), text)


def loss_named(name: str, *, refused: Mapping[str, str]) -> Callable[..., Any]:
    """Return a loss of labels by its short name or by ``module:function``.

    Args:
        name: What a configuration's ``loss`` may be.
        refused: Its ``refused_code``.

    Returns:
        The loss, one value per example.

    Raises:
        ConfigError: it is refused, or cannot be imported or called.

    Example:
        >>> loss_named("cross_entropy", refused={}).__name__
        'cross_entropy'
    """
    address = LOSSES[name].address if name in LOSSES else name
    found = imported(address, what="loss", refused=refused)
    if isinstance(found, type) or not callable(found):
        kind = "a class" if isinstance(found, type) else f"a {type(found).__name__}"
        raise ConfigError(
            f"loss {name} must be a function of logits and labels that gives one value per "
            f"example; got {kind}"
        )
    return found
