"""Try every law on every row of the table of losses and write the table of the documentation.

    python scripts/laws_table.py            # writes docs/laws.md
    python scripts/laws_table.py --check    # compares, and fails where the table is another

Rows are tried side by side in processes of their own, since the default compiler is among the laws.
"""

import os
import sys
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer

from funcloss.laws import LAWS, Finding, try_law

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from catalogue import CASES  # noqa: E402 - the table of losses is test data
from test_check_cases import BROKEN, ON_BATCHES, RIGHT  # noqa: E402

PAGE = ROOT / "docs" / "laws.md"
SHOWN = 6  # losses that are named where a law does not apply
HEAD = """# The laws, loss by loss

A loss keeps the laws below. They are property tests: each is tried on random data of growing size
until one breaks it. `python scripts/laws_table.py` tries each law on each row of `tests/catalogue/`
and writes this page; the tests try the same laws, and `funcloss check module:name` tries them on a
loss of yours. `linear_cross_entropy` has tests of its own instead of a row: it takes the weights of
the last layer, which belong to no example, and has first derivatives only.

"""


def tried(name: str) -> list[Finding]:
    """Return what every law says of a row."""
    findings = [try_law(law, CASES[name]) for law in LAWS]
    for f in findings:
        if f.verdict == "fail":
            print(f"{name}: {f.law}: {f.detail}", file=sys.stderr)
    return findings


def page(rows: dict[str, list[Finding]]) -> str:
    """Return the page: how much holds, what does not and why, the laws, the cases of the check."""
    cells = [f for findings in rows.values() for f in findings]
    counts = Counter(f.verdict for f in cells)
    lines = [
        f"**{len(rows)} losses × {len(LAWS)} laws: {len(cells)} cells, {counts['pass']} hold, "
        f"{counts['not applicable']} do not apply, {counts['fail']} fail.**",
        "",
        "## What does not hold, and why",
        "",
        "| law | reason | losses |",
        "|---|---|---|",
        *_exceptions(rows),
        "",
        "## The laws",
        "",
        *(f"- **{name}**: {law.meaning}." for name, law in LAWS.items()),
        "",
        "## The verdict of `funcloss check`",
        "",
        "The first line is one of three. *Works everywhere*: every law that applies holds. *Works "
        "on batches*: it trains and can be audited; what is broken is one of "
        f"{', '.join(name for name, law in LAWS.items() if law.everywhere)}. *Wrong*: any other "
        "law is broken. The root cause comes first, with its cure; what only follows from it is "
        "no finding of its own.",
        "",
        f"`tests/check_cases.py` has {len(BROKEN)} wrong losses, {len(RIGHT)} right ones and "
        f"{len(ON_BATCHES)} that work on batches alone, as people write them. The tests hold the "
        f"check to the verdict and the cause of each of the {len(BROKEN | RIGHT | ON_BATCHES)}.",
    ]
    return HEAD + "\n".join(lines) + "\n"


def _exceptions(rows: dict[str, list[Finding]]) -> list[str]:
    """Return a line per law and reason: where it fails, does not apply, or is tried elsewhere."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, findings in rows.items():
        for f in findings:
            if f.verdict == "fail" or f.verdict == "not applicable" or f.law == "extremes":
                reason = f"**fails**: {f.detail}" if f.verdict == "fail" else f.detail
                if reason:
                    found.setdefault((f.law, reason.replace("|", "/")), []).append(name)
    order = sorted(found.items(), key=lambda item: list(LAWS).index(item[0][0]))
    return [
        f"| {law} | {reason} | "
        + (f"{len(names)} losses" if len(names) > SHOWN else "; ".join(names))
        + " |"
        for (law, reason), names in order
    ]


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
    failed = sum(f.verdict == "fail" for findings in rows.values() for f in findings)
    cells = len(CASES) * len(LAWS)
    print(f"{len(CASES)} rows, {len(LAWS)} laws, {cells} cells, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    typer.run(main)
