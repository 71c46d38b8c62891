"""Try every law on every row of the table of losses and write the table of the documentation.

    python scripts/laws_table.py            # writes docs/laws.md
    python scripts/laws_table.py --check    # compares, and fails where the table is another

Rows are tried side by side in processes of their own, since the default compiler is among the laws.
"""

import os
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer

from funcloss.laws import LAWS, try_law

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from catalogue import CASES  # noqa: E402 - the table of losses is test data

PAGE = ROOT / "docs" / "laws.md"
SIGNS = {"pass": "✓", "fail": "✗"}
HEAD = """# The laws, loss by loss

What every loss must keep. The laws are property tests: each is tried on random data of growing size
until one breaks it. `python scripts/laws_table.py` tries each law on each row of `tests/catalogue/`
and writes this page; the tests try the same laws, and `funcloss check module:name` tries them on a
loss of yours. ✓: it holds. A number alone: it does not apply, for the reason below; beside
a ✓ it says how the law was tried. `linear_cross_entropy` has tests of its own instead of a row: it
takes the weights of the last layer, which belong to no example, and has first derivatives only.

"""


def tried(name: str) -> list[tuple[str, str]]:
    """Return a row's verdicts and reasons, law by law."""
    findings = [try_law(law, CASES[name]) for law in LAWS]
    for f in findings:
        if f.verdict == "fail":
            print(f"{name}: {f.law}: {f.detail}", file=sys.stderr)
    noted = ("not applicable", "extremes")
    return [(f.verdict, f.detail if {f.verdict, f.law} & {*noted} else "") for f in findings]


def page(rows: dict[str, list[tuple[str, str]]]) -> str:
    """Return the page of all rows."""
    reasons: dict[str, int] = {}
    lines = ["| loss | " + " | ".join(LAWS) + " |", "|---" * (len(LAWS) + 1) + "|"]
    for name, cells in rows.items():
        shown = [
            f"{SIGNS.get(verdict, '')} {reasons.setdefault(why, len(reasons) + 1) if why else ''}"
            for verdict, why in cells
        ]
        shown = [cell.strip() for cell in shown]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    laws = [f"- **{name}**: {law.meaning}." for name, law in LAWS.items()]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    parts = ["\n".join(lines), "## The laws\n\n" + "\n".join(laws), "## The numbers\n"]
    return HEAD + "\n\n".join(parts) + "\n" + "\n".join(notes) + "\n"


def main(
    check: Annotated[bool, typer.Option("--check", help="Compare, write nothing.")] = False,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = os.cpu_count() or 1,
) -> None:
    with get_context("spawn").Pool(workers) as pool:
        rows = dict(zip(CASES, pool.imap(tried, CASES), strict=True))
    text = page(rows)
    if check and text != PAGE.read_text():
        sys.exit(f"{PAGE} is not what the laws give: run scripts/laws_table.py")
    if not check:
        PAGE.write_text(text)
    failed = sum(verdict == "fail" for cells in rows.values() for verdict, _ in cells)
    cells = len(CASES) * len(LAWS)
    print(f"{len(CASES)} rows, {len(LAWS)} laws, {cells} cells, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    typer.run(main)
