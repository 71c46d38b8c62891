"""The size of the project, as numbers that can be compared between two commits.

    python scripts/code_size.py                 # of this checkout
    python scripts/code_size.py --base COMMIT   # beside another commit

Lines and files are those of Python, public names the sum over every ``__all__``, and the
modules of a room those that importing it in a fresh interpreter loads of this package.
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MANY = 7  # parameters, from which a function is counted


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def lines_of(folder: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(folder))


def public_names(tree: ast.Module) -> int:
    """Return how many names ``__all__`` lists."""
    return sum(
        len(node.value.elts)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.List | ast.Tuple)
        and any(getattr(target, "id", "") == "__all__" for target in node.targets)
    )


def long_signatures(tree: ast.Module) -> int:
    """Return how many functions take seven parameters or more, ``self`` aside."""
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found += sum(a.arg not in ("self", "cls") for a in listed) >= MANY
    return found


def rooms_of(package: Path) -> list[str]:
    """Return the public rooms of the library: what lies directly in the package."""
    rooms = [p.stem for p in package.iterdir() if p.suffix == ".py"]
    rooms += [p.name for p in package.iterdir() if (p / "__init__.py").exists()]
    return sorted(room for room in rooms if not room.startswith("_"))


def loaded_by(root: Path, room: str) -> int:
    """Return how many of the package's modules importing a room loads."""
    code = f"import sys, funcloss.{room}; print(sum(m.startswith('funcloss') for m in sys.modules))"
    here = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=here, capture_output=True,
                          text=True, check=True)  # fmt: skip
    return int(done.stdout)


def measured(root: Path) -> dict[str, int]:
    package = root / "funcloss"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in python_files(package)]
    numbers = {
        "lines of the package": lines_of(package),
        "lines of the tests": lines_of(root / "tests"),
        "files of the package": len(trees),
        "public names": sum(map(public_names, trees)),
        f"functions with {MANY} or more parameters": sum(map(long_signatures, trees)),
    }
    for room in rooms_of(package):
        numbers[f"modules loaded by funcloss.{room}"] = loaded_by(root, room)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="commit to compare with")
    asked = parser.parse_args()
    tables = {"here": measured(ROOT)}
    if asked.base:
        with tempfile.TemporaryDirectory() as folder:
            there = Path(folder) / "base"
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "-q", "--detach", there, asked.base], check=True)
            try:
                tables = {asked.base: measured(there), **tables}
            finally:
                subprocess.run([*git, "remove", "--force", there], check=True)
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    print(f"| | {' | '.join(tables)} |\n|---|{'---|' * len(tables)}")
    for name in names:
        cells = (f"{table[name]:,}" if name in table else "-" for table in tables.values())
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
