"""``funcloss export``: a run's model and its decisions as one graph, for use without funcloss."""

from pathlib import Path
from typing import Annotated

import typer

from funcloss.app.cli.output import say
from funcloss.app.cli.table import AllowImport, Rule


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    *,
    onnx: Annotated[
        Path | None,
        typer.Option(help="Write an ONNX file, .onnx: pip install 'funcloss[export]'."),
    ] = None,
    torch: Annotated[Path | None, typer.Option(help="Write a torch.export program, .pt2.")] = None,
    rule: Rule = "",
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the inputs: uint8, float32 or int64. Default: uint8 for images, float32 "
            "for all else."
        ),
    ] = "",
    allow_import: AllowImport = False,
) -> None:
    """Export a run as one graph, from inputs as the data set has them to decisions.

    Normalisation, calibration, costs and the decision rule are in the graph; its outputs are
    logits, probabilities, expected_costs and decision. Each file is read back and checked against
    the run before it is kept.
    """
    from funcloss.app import runs

    made = runs.export_run(
        run, onnx=onnx, torch=torch, rule=rule, dtype=dtype, allow_import=allow_import
    )
    shape = ", ".join(map(str, ("batch", *made.shape)))
    say(f"inputs: {made.dtype} ({shape}); decisions by {made.rule}")
    for path, difference in made.files.items():
        say(f"{path}: checked on random inputs, largest relative difference {difference:.1g}")
    if made.note:
        say(f"note: {made.note}")
