"""What reads a page strictly, and opens it in a headless browser where there is one."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

VOID = {"meta", "link", "br", "img", "input"}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


class Reader(HTMLParser):
    """Reads a page strictly: every element is closed in its turn."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.figures: list[set[str]] = []
        self.svgs: list[tuple[dict, set[str]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.seen.append((tag, dict(attrs)))
        if tag == "figure":
            self.figures.append(set())
        elif "figure" in self.open:
            self.figures[-1].add(tag)
        if tag == "svg":
            self.svgs.append((dict(attrs), set()))
        elif "svg" in self.open:
            self.svgs[-1][1].add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)


def assert_offline(page: str) -> None:
    """Assert that a page is well formed and asks nothing of a network."""
    for tag, attrs in Reader(page).seen:
        assert tag not in {"iframe", "object", "embed", "base", "form", "use", "audio", "video"}
        assert tag != "script" or "src" not in attrs
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in {"src", "href", "srcset", "action", "data", "poster", "background"}:
                assert value.startswith("data:")
    assert not re.search(r"url\(|@import|https?:|//", page[: page.index("</style>")])


def assert_told(reader: Reader) -> None:
    """Assert that every figure has a table, and every drawing a title."""
    assert all("table" in inside for inside in reader.figures)
    for attrs, inside in reader.svgs:
        assert attrs.get("aria-hidden") == "true" or "title" in inside


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the path"
)
PROBE = """<script>
(() => {
  const seen = { errors: [], reads: [], width: [] };
  addEventListener("error", (event) => seen.errors.push(String(event.message)));
  addEventListener("securitypolicyviolation", (event) => seen.errors.push(event.blockedURI));
  const read = () => seen.reads.push({
    rows: [...document.querySelectorAll("#sliders [data-row]")].map((tr) => Object.fromEntries(
      [...tr.querySelectorAll("[data-k]")].map((cell) => [cell.dataset.k, cell.textContent]))),
    fields: [...document.querySelectorAll("#sliders input[type=number]")].map((f) => f.value),
    bars: [...document.querySelectorAll("#sliders .bar")].map((b) => b.getAttribute("width")),
    length: document.getElementById("length").textContent,
    paste: document.getElementById("paste").textContent,
  });
  const put = (row, kind, value) => {
    const input = document.querySelector(`#sliders [data-row="${row}"] input[type=${kind}]`);
    input.value = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  addEventListener("load", () => {
    if (document.getElementById("sliders")) {
      read();
      for (const [row, kind, value] of MOVES) { put(row, kind, value); read(); }
      document.getElementById("reset").click();
      read();
    }
    document.querySelectorAll("details").forEach((d) => { d.open = true; });
    seen.width = [document.documentElement.scrollWidth, innerWidth];
    seen.resources = performance.getEntriesByType("resource").map((entry) => entry.name);
    parent.postMessage(btoa(unescape(encodeURIComponent(JSON.stringify(seen)))), "*");
  });
})();
</script>"""


# A headless window is at least 500 px wide, a frame is as wide as it is told to be.
FRAME = """<!doctype html><script>
addEventListener("message", (event) => {
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = event.data;
  document.body.append(out);
});
</script><body><iframe src="page.html" style="width: 320px; height: 800px; border: 0"></iframe>"""


def run_browser(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a headless browser without a network."""
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=10000",
            *arguments,
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


def browse(page: str, folder: Path, moves=(), width: int = 320) -> dict:
    """Open a page in a window of ``width`` pixels, move its sliders, return what it shows."""
    file = folder / "frame.html"
    file.write_text(FRAME.replace("320px", f"{width}px"), encoding="utf-8")
    probe = PROBE.replace("MOVES", json.dumps(list(moves)))
    probed = page.replace("<body>", f"<body>{probe}")
    (folder / "page.html").write_text(probed, encoding="utf-8")
    done = run_browser(folder, "--dump-dom", file.as_uri())
    found = re.search(r'<pre id="probe">([^<]+)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(base64.b64decode(found[1]))


def photograph(page: str, folder: Path, *arguments: str) -> Path:
    """Return a picture of a page as PNG."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    picture = folder / "page.png"
    run_browser(folder, f"--screenshot={picture}", *arguments, (folder / "page.html").as_uri())
    return picture
