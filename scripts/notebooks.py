"""Run the notebooks top to bottom and write them back with their outputs, whole or not at all.

    FUNCLOSS_DATA_DIR=../shared/data python scripts/notebooks.py
    python scripts/notebooks.py 01_losses somewhere/else.ipynb

Each runs in a temporary folder of its own. What would change from run to run is left out, so that
a second run gives a small difference. An error of a cell ends it, and the notebook stays as it was.
"""

import argparse
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from funcloss._files import write_text
from funcloss.errors import RunError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(Exception):
    """A notebook that cannot be rendered, and where."""


def found(names: list[str]) -> list[Path]:
    """Return the notebooks of some names or paths; of none, all."""
    if not names:
        return sorted(NOTEBOOKS.glob("*.ipynb"))
    paths = [Path(name) for name in names]
    paths = [
        p if p.is_file() else NOTEBOOKS / f"{p.name.removesuffix('.ipynb')}.ipynb" for p in paths
    ]
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            raise NotebookError(f"no notebook {name!r} in {NOTEBOOKS.name}/, and no such file")
    return paths


def executed(notebook: NotebookNode, *, timeout: float) -> NotebookNode:
    """Return the notebook with the outputs of a run in an empty folder.

    Raises:
        NotebookError: a cell fails, takes longer than ``timeout`` seconds or ends its kernel.
    """
    # A message that is on its way when the kernel ends is logged by its transport.
    logging.getLogger("tornado").setLevel(logging.CRITICAL)
    begun: list[NotebookNode] = []
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            extra_arguments=["--IPKernelApp.log_level=50"],  # else it speaks of its transport
            resources={"metadata": {"path": folder}},
            on_cell_execute=lambda cell, cell_index: begun.append(cell),
        )
        try:
            return client.execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise NotebookError(told(begun, error)) from None


def told(begun: list[NotebookNode], error: Exception) -> str:
    """Return in one line which cell failed, the last that was begun, and of what."""
    last = begun[-1].get("id", len(begun)) if begun else "none"
    if isinstance(error, CellExecutionError):
        why = f"{error.ename}: {error.evalue}"
    elif isinstance(error, CellTimeoutError):
        why = "it took too long"
    else:
        why = "its kernel died"
    return f"cell {last}: {COLOURS.sub('', why).strip().splitlines()[0]}"


def settled(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook without what changes from run to run: versions, times, widgets."""
    language = {"name": "python"}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info=language)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    return notebook


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Return outputs with what was printed in one piece: where it was cut hangs on the clock."""
    whole: list[NotebookNode] = []
    for output in outputs:
        before = whole[-1] if whole else None
        streams = output.output_type == "stream" and before and before.output_type == "stream"
        if streams and before.name == output.name:
            before.text += output.text
        else:
            whole.append(output)
    return whole


def render(path: Path, *, timeout: float = 600.0) -> float:
    """Run a notebook and write it back with its outputs; return the seconds that it took.

    Raises:
        NotebookError: a cell fails; the file is as it was.
        RunError: it cannot be written.
    """
    started = time.perf_counter()
    notebook = executed(nbformat.read(path, as_version=4), timeout=timeout)
    write_text(path, nbformat.writes(settled(notebook)) + "\n")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks by name or path; none: all of them")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a cell may take")
    asked = parser.parse_args()
    if folder := os.environ.get("FUNCLOSS_DATA_DIR"):  # a relative one would be lost elsewhere
        os.environ["FUNCLOSS_DATA_DIR"] = str(Path(folder).resolve())
    try:
        for path in found(asked.names):
            try:
                seconds = render(path, timeout=asked.timeout)
            except NotebookError as error:
                raise NotebookError(f"{path.stem}: {error}") from None
            print(f"{path.stem}: {seconds:.0f} s", flush=True)
    except (NotebookError, RunError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
