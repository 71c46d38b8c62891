"""The site: it builds, loads nothing from elsewhere, names everything, and what it says is so."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import funcloss
from funcloss import losses
from funcloss.app.registry import ROWS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIALS = [
    "01_losses",
    "02_mnist_costly_nine",
    "03_per_sample_gradients",
    "04_choosing_costs",
    "05_your_own_problem",
]
SELF_CONTAINED = [
    "how-to/gpu.md",
    "how-to/read-an-audit.md",
    "how-to/resume.md",
    "reference/run-folder.md",
    "explanation/first-order-limits.md",
    "explanation/why-the-mean-divides-by-n.md",
]


def cells_of(notebook: Path) -> str:
    """Return the Markdown of a notebook."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def text_of(document: Path) -> str:
    """Return a document without its blocks of code, of which none is a heading or a link."""
    plain = document.suffix == ".md"
    text = document.read_text(encoding="utf-8") if plain else cells_of(document)
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]


# What is built


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", folder]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's, about its successor
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Loads(HTMLParser):
    """Collect the addresses that a page loads by itself."""

    def __init__(self):
        super().__init__()
        self.addresses, self.classes = [], set()

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.classes |= set(given.get("class", "").split())
        leads_only = tag == "a" or given.get("rel") in ("canonical", "next", "prev")
        for name in ("src", "srcset", "href", "data", "poster", "action"):
            if name in given and not leads_only:
                self.addresses.append(given[name])


@pytest.mark.slow
def test_the_pages_load_nothing_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loads = Loads()
        loads.feed(text)
        assert loads.addresses
        assert not [a for a in loads.addresses if re.match(r"\s*(https?:)?//", a)], page.name
        assert "mermaid" not in loads.classes  # whose script the theme would fetch
        assert not re.search(r"import\(['\"]https?:", text), page.name
        styles = "".join(re.findall(r"<style.*?</style>", text, re.S))
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", styles), page.name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", sheet.read_text())


def shown(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html).replace("&quot;", '"').replace("&gt;", ">")


@pytest.mark.slow
def test_the_reference_shows_signatures_examples_and_fields(site):
    page = (site / "reference" / "losses.html").read_text(encoding="utf-8")
    at = page.index('id="funcloss.losses.cross_entropy"')
    entry = shown(page[at : page.index('id="funcloss.losses.soft_cross_entropy"')])
    assert 'logits: Float[Tensor, "*batch classes"],\n' in entry
    assert 'where: Bool[Tensor, "*batch"] | None = None,\n) -> Float[Tensor, "*batch"]' in entry
    assert '<span class="gp">&gt;&gt;&gt; </span>' in page[at : at + 20_000]
    state = shown((site / "reference" / "training.html").read_text(encoding="utf-8"))
    assert re.search(r"opt_state\s+\(\s*\S+\s*\)", state)
    for html in (site / "reference").glob("*.html"):
        text = shown(html.read_text(encoding="utf-8"))
        assert not re.search(
            r":(?:func|class|mod|meth|math):|\\(?:sum|partial|bar|hat|tfrac)", text
        ), html.name


@pytest.mark.slow
def test_the_commands_speak_for_themselves(site):
    said = shown((site / "reference" / "commands.html").read_text(encoding="utf-8"))
    for command in ("train", "evaluate", "predict", "export", "check", "audit", "sweep"):
        assert f"Usage: funcloss {command} " in said
    for option in ("--class-weight", "--floor", "--amp", "--checkpoint", "--cost-matrix"):
        assert option in said
    for row in (row for option, rows in ROWS.items() if option != "loss" for row in rows.values()):
        assert row.address in said  # in the tables of names


@pytest.mark.slow
def test_every_public_name_has_its_place_on_a_page(site):
    ids = set()
    for html in (site / "reference").glob("*.html"):
        ids |= set(re.findall(r'id="(funcloss[\w.]*)"', html.read_text(encoding="utf-8")))
    missing = public_names() - ids
    assert not missing


# What the pages name


def public_names() -> set[str]:
    """Return the names that the reference must have, each by its one public path."""
    rooms = ("audit", "decisions", "laws", "losses", "objectives", "optim", "training")
    names = {f"funcloss.{r}.{n}" for r in rooms for n in getattr(funcloss, r).__all__}
    names |= {f"funcloss.app.{r}.{n}" for r in ("data", "sweep") for n in _all_of(r)}
    own = {n for n in funcloss.__all__ if type(getattr(funcloss, n)) is not type(funcloss)}
    return (names | {f"funcloss.{n}" for n in own}) - ELSEWHERE


def _all_of(room: str) -> list[str]:
    return getattr(funcloss.app, room).__all__


# A module of its own, and the names of things in another room that this one hands on.
ELSEWHERE = {"funcloss.app.runs.folder", "funcloss.app.runs.load"}


def test_the_nav_names_every_page_and_no_other():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\nhooks:")[0]
    named = re.findall(r"[\w./-]+\.(?:md|ipynb)", nav)
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    tutorials = {f"notebooks/{name}.ipynb" for name in TUTORIALS}
    assert len(named) == len(set(named))
    assert set(named) == pages | tutorials
    assert all((ROOT / name).exists() for name in tutorials)


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and the site make it."""
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    text = text_of(document)
    headings = re.findall(r"^#+ +(.+?) *#*$", text, re.M)
    if document.suffix == ".ipynb":  # as Jupyter makes them
        return {heading.replace(" ", "-") for heading in headings}
    return {slug(heading) for heading in headings} | set(re.findall(r"^::: (\S+)", text, re.M))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if re.match(r"\w+:", target):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", target), target
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_formulas_are_text_as_nothing_renders_them(document):
    assert not re.search(r"\$[^$\n]+\$|\\\(|\\\[", text_of(document))


# What the pages show


def steps_of(page: str) -> list[tuple[str, str | None]]:
    """Return the Python of a page, each block with the output that is shown right below it."""
    found = re.findall(
        r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", (DOCS / page).read_text(), re.M | re.S
    )
    return [(code, output or None) for code, output in found]


@pytest.mark.slow
@pytest.mark.parametrize("page", SELF_CONTAINED)
def test_each_block_runs_alone_and_prints_what_is_shown(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for code, output in steps_of(page):
        exec(compile(code, page, "exec"), {})
        said = capsys.readouterr().out
        assert output is None or said == output


# Torch's names


def rows_of(page: str) -> list[tuple[str, str, str]]:
    """Return torch's call, ours and torch's divisor, of each row of the page."""
    rows = re.findall(r"^\| `(F\..+?)` \| `(.+?)` \| `(.+?)`", (DOCS / page).read_text(), re.M)
    assert len(rows) > 30
    return rows


def example(n: int, k: int) -> dict:
    """Return tensors by the names that the page uses, in float64."""
    torch.manual_seed(n)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    def positive(*shape):
        return 0.1 + 0.8 * torch.rand(*shape, dtype=torch.float64)

    labels = torch.arange(n) % (k - 1) + 1
    labels[n // 2 : n // 2 + n // 3] = 0  # that one row ignores
    indices = torch.full((n, k), -1)
    indices[:, 0] = torch.arange(n) % k
    indices[0, :2] = torch.tensor([1, 0])
    hot = (indices[:, :, None] == torch.arange(k)).any(1).double()
    names = {"N": n, "K": k, "labels": labels, "indices": indices, "hot": hot}
    names |= {name: normal(n, k) for name in ("logits", "values", "others")}
    names |= {name: positive(n, k) for name in ("probabilities", "weights", "variances")}
    names |= {name: normal(n, 4) for name in ("first", "second", "third", "features")}
    names |= {"log_probs": normal(n, k).log_softmax(-1), "targets": normal(n, k).softmax(-1)}
    names |= {"class_weights": positive(k), "head": normal(k, 4), "distances": positive(n, k)}
    names |= {"images": normal(n, k, 2, 3), "maps": torch.randint(k, (n, 2, 3))}
    names |= {"counts": torch.randint(5, (n, k)).double(), "signs": normal(n, k).sign()}
    return names | {"same": normal(n).sign()}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize(("n", "k"), [(1, 3), (4, 5), (7, 3)])
@pytest.mark.parametrize(("torchs", "ours", "divisor"), rows_of("reference/torch-names.md"))
def test_torch_divides_by_what_the_table_says(torchs, ours, divisor, n, k):
    if not hasattr(F, torchs[2 : torchs.index("(")]):
        pytest.skip(f"torch {torch.__version__} has no such loss")
    names = {name: getattr(funcloss, name) for name in funcloss.__all__} | {"F": F}
    names |= example(n, k)
    by_torch = eval(torchs, names)
    summed = re.sub(r', reduction="\w+"|\)$', "", torchs) + ', reduction="sum")'
    torch.testing.assert_close(by_torch, eval(f"{summed} / ({divisor})", names))
    torch.testing.assert_close(eval(ours, names), by_torch)


def test_every_loss_of_torch_has_its_divisor():
    kinds = ("_loss", "cross_entropy", "cross_entropy_with_logits", "kl_div")
    there = {name for name in dir(F) if name.endswith(kinds) and not name.startswith("_")}
    page = (DOCS / "reference" / "torch-names.md").read_text()
    assert there <= set(re.findall(r"`F\.(\w+)", page))
    assert set(re.findall(r"\blosses\.(\w+)[()]", page)) <= set(losses.__all__)
