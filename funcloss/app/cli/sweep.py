"""``funcloss sweep``: many trainings side by side, and the one to choose."""

import dataclasses
from collections import ChainMap
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from funcloss.app.cli.parsing import as_number
from funcloss.app.cli.table import (
    AllowImport,
    ConfigFile,
    Recipe,
    check_resume,
    given_of,
    layers_of,
    parsed,
    with_table,
)
from funcloss.app.config import fields, gives_word, make_config
from funcloss.errors import ConfigError

_CLASS_WEIGHT = next(row.option for row in fields() if row.name == "class_weight")
_SWEPT = ("class_weight", "loss_option", "learning_rate")


def sweep(
    *,
    recipe: Recipe = "",
    config: ConfigFile = None,
    seeds: Annotated[int, typer.Option(help="Seeds each trial is trained with.", min=1)] = 1,
    method: Annotated[
        str,
        typer.Option(
            help="All trials in one program, or one after another; auto: a loop for "
            "convolutions off CUDA, else one program.",
            metavar="auto|vmap|loop",
        ),
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder to make.", show_default="a new one under sweeps/")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a sweep to go on with.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the sweep in --out.")
    ] = False,
    allow_import: AllowImport = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    **options: Any,
) -> None:
    """Train with many costs at once, and choose by validation data.

    --class-weight, --loss-option and --learning-rate take values to sweep: 9=1:100:log16 is sixteen
    from 1 to 100 in equal ratios, tau=0:2:5 five in equal steps, 0.01,0.1 a list. Under --floor and
    --ceiling the weight nearest to 1 that keeps them is chosen, else the trial of least expected
    cost. With --folds the choice is by out-of-fold predictions, and the chosen trial is trained on
    all of the data at the end.
    """
    given = given_of(options)
    swept, fixed = _parted(given)
    layers = [*layers_of(recipe, config, allow_import=allow_import), parsed(fixed)]
    if resume is not None:
        others = {"recipe": recipe, "config": config, "out": out, "overwrite": overwrite}
        check_resume("sweep", given, **others, seeds=seeds != 1, method=method != "auto")
    chosen = make_config(*layers, _swept_weights(layers, swept))

    from funcloss.app import sweep  # torch, from here on
    from funcloss.app.cli.console import watched

    if resume is None:
        axes = [
            sweep.Axis(option, key, sweep.parse_values(f"{option} {key}".strip(), text))
            for option, key, text in swept
        ]
        spec = sweep.SweepSpec(chosen, axes, seeds, method)
    else:
        spec = sweep.read_spec(resume.expanduser(), allow_import=allow_import)
        moved = dataclasses.replace(spec.config, data_dir=chosen.data_dir or spec.config.data_dir)
        spec = dataclasses.replace(spec, config=moved)
    place = out if resume is None else resume
    start = partial(sweep.sweep, spec, place, resume=resume is not None, overwrite=overwrite)
    watched(start, again="funcloss sweep", quiet=quiet)


def _parted(given: dict[str, Any]) -> tuple[list[tuple[str, str, str]], dict[str, Any]]:
    """Part what is swept, as option, key and text of the values, from what is fixed."""
    swept, fixed = [], dict(given)
    for option in _SWEPT:
        if option not in given:
            continue
        texts = [given[option]] if isinstance(given[option], str) else given[option]
        kept = []
        for text in texts:
            key, _, values = text.rpartition("=")
            if not gives_word(_CLASS_WEIGHT, text) and (":" in values or "," in values):
                swept.append((option, key, values))
            else:
                kept.append(text)
        fixed.pop(option)
        if kept:
            fixed[option] = (
                as_number("learning_rate", kept[0]) if option == "learning_rate" else kept
            )
    return swept, fixed


def _swept_weights(
    layers: list[dict[str, Any]], swept: list[tuple[str, str, str]]
) -> dict[str, Any]:
    """Return the class weights with those swept among them, which a weighted mean may need."""
    for option, key, _ in swept:
        fixed = layers[-1].get(option, {})
        if not isinstance(fixed, str) and key in fixed:
            raise ConfigError(f"{option} {key} is given a value and swept: leave out one of them")
    keys = [key for option, key, _ in swept if option == "class_weight" and key]
    fixed = ChainMap(*reversed(layers)).get("class_weight", {})
    if not keys or not isinstance(fixed, dict):
        return {}
    return {"class_weight": {**fixed, **dict.fromkeys(keys, 1.0)}}


with_table(sweep, as_text=("learning_rate",))
