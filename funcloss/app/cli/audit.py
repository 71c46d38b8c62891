"""``funcloss audit``: who owns the updates of a run, and what its costs bought."""

from pathlib import Path
from typing import Annotated

import typer

from funcloss.app.cli.parsing import pairs
from funcloss.app.cli.table import AllowImport
from funcloss.app.config import fields, make_config
from funcloss.errors import ConfigError

_SPLITS = ("train", "validation", "test")
_METHODS = ("auto", "products", "examples", "classes", "loop")
_CHOICES = {field.name: "|".join(field.option.choices) for field in fields()}


def audit(
    run: Annotated[Path | None, typer.Argument(help="Run folder.")] = None,
    *,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Audit a safetensors file of a model instead of a run.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Network of --checkpoint.", metavar=_CHOICES["model"])
    ] = "",
    dataset: Annotated[
        str, typer.Option(help="Data set of --checkpoint.", metavar=_CHOICES["dataset"])
    ] = "",
    loss: Annotated[
        str, typer.Option(help="Loss of --checkpoint.", metavar="NAME", show_default=False)
    ] = "",
    class_weight: Annotated[
        list[str] | None,
        typer.Option(help="Cost of a true class, of --checkpoint.", metavar="CLASS=WEIGHT"),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split to audit.", metavar="|".join(_SPLITS))
    ] = "train",
    examples: Annotated[int, typer.Option(help="Examples of it, at most.", min=2)] = 10_000,
    evaluation_mode: Annotated[
        bool, typer.Option("--eval", help="Without dropout; else as the training goes.")
    ] = False,
    method: Annotated[
        str, typer.Option(help="How to measure.", metavar="|".join(_METHODS))
    ] = "auto",
    memory: Annotated[
        float, typer.Option(help="MiB that may be held beside the model.", min=1)
    ] = 2048.0,
    data_dir: Annotated[str, typer.Option(help="Folder of the data.")] = "",
    device: Annotated[
        str, typer.Option(help="Where to measure.", metavar="auto|cpu|cuda|mps")
    ] = "auto",
    allow_import: AllowImport = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report.", show_default="the run folder")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the plain words only.")] = False,
) -> None:
    """Say who owns the updates of a run, class by class, and what its costs bought.

    Prints plain words and a table, and writes audit.html, audit.json, CSV tables and figures.
    """
    for name, value, known in (("split", split, _SPLITS), ("method", method, _METHODS)):
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    if not memory < float("inf"):
        raise ConfigError(f"memory must be a number of MiB, got {memory}")
    described = {"model": model, "dataset": dataset, "loss": loss}
    given = {name: value for name, value in described.items() if value}
    given |= {"class_weight": pairs("class_weight", class_weight)} if class_weight else {}
    if (run is None) == (checkpoint is None):
        raise ConfigError("name a run folder, or a model's file with --checkpoint")
    if run is not None and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"a run says itself what it is: leave out {flags}")
    if checkpoint is not None and out is None:
        raise ConfigError("say with --out where the report of a --checkpoint goes")
    config = make_config(given, {"data_dir": data_dir, "device": device})

    from funcloss.app import audits
    from funcloss.app.cli.console import print_audit

    how = {"split": split, "examples": examples, "evaluation_mode": evaluation_mode}
    how |= {"method": method, "memory": memory}
    if run is not None:
        found = audits.audit_run(
            run, data_dir=data_dir, device=device, allow_import=allow_import, **how
        )
        files = audits.write_report(found, out or run)
    else:
        assert checkpoint is not None
        assert out is not None
        found = audits.audit_checkpoint(checkpoint, config, **how)
        files = audits.write_report(found, out)
    print_audit(found, files, quiet=quiet)
