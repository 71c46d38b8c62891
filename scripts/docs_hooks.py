"""What the site holds beside ``docs/``: notebooks, what commands say of themselves, names.

mkdocs calls these functions by name; ``mkdocs.yml`` names this file.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from names_table import losses_of, names_table  # noqa: E402 - beside this file

NOTEBOOKS = "notebooks"
# On disk the notebooks lie beside docs/, in the site beneath its root: one level less of "../".
TO_NOTEBOOKS = re.compile(r"\]\(\.\./((?:\.\./)*notebooks/)")
MADE = re.compile(r"^<!-- (help|names|losses): (.+) -->$", re.M)
LINK = re.compile(r'(href|src)="(?!\w+:|#)([^"#]+)(#[^"]*)?"')
HERE = re.compile(r'href="#([^"]+)"')
# What the notebooks' template would fetch from other hosts; formulas are text here.
FETCHING = re.compile(
    r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->"
    r'|<script type="module">(?:(?!</script>).)*mermaid.*?</script>',
    re.S,
)


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks to the files of the site."""
    for path in sorted((ROOT / NOTEBOOKS).glob("*.ipynb")):
        source = path.relative_to(ROOT).as_posix()
        files.append(File(source, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the notebooks of the site, and put what is made in its place.

    ``help``: of a command; ``names``: the table of an option's names; ``losses``: the reference of
    a file of ``funcloss/losses``.
    """
    make = {"help": help_block, "names": names_table, "losses": reference_of}
    return MADE.sub(lambda found: make[found[1]](found[2]), TO_NOTEBOOKS.sub(r"](\1", markdown))


def reference_of(family: str) -> str:
    """Return the directives that show the losses of a family."""
    shown = "::: funcloss.losses.{}\n    options: {{heading_level: 3}}"
    return "\n\n".join(shown.format(name) for name in losses_of(family))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point a notebook's links at the pages of the site, and take out what it would fetch.

    A notebook's Markdown never passes through mkdocs, which therefore resolves none of its links.
    """
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html = LINK.sub(lambda found: _resolved(found, page, files), FETCHING.sub("", html))
    # Jupyter's anchors keep their capitals, those of the site do not.
    return HERE.sub(lambda found: f'href="#{found[1].lower()}"', html)


def help_block(command: str) -> str:
    """Return what a command prints for ``--help``, as a block of text."""
    program, *words = command.split()
    entry = "main_train" if program == "funcloss-train" else "main"
    code = f"import sys; sys.argv = {[program, *words, '--help']!r}; "
    code += f"from funcloss.app.cli import {entry}; {entry}()"
    wide = {"COLUMNS": "110", "TERMINAL_WIDTH": "110", "NO_COLOR": "1", "PYTHONUTF8": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **wide},
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    lines = "\n".join(line.rstrip() for line in said.strip("\n").splitlines())
    return f"```text\n{lines}\n```"


def _resolved(found: re.Match[str], page: Page, files: Files) -> str:
    kind, target, anchor = found[1], found[2], found[3] or ""
    beside = os.path.normpath(os.path.join(os.path.dirname(page.file.src_uri), target))
    file = files.get_file_from_path(Path(beside).as_posix().removeprefix("docs/"))
    if file is None:
        return found[0]
    return f'{kind}="{get_relative_url(file.url, page.url)}{anchor}"'
