"""Downloads that end soon, check what came and leave no half of a file."""

import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

from funcloss.app.data.idx import check_md5
from funcloss.errors import DataError, UnavailableError

_ANSWER_SECONDS = 3.0  # for the first sign of life of a mirror
_STALL_SECONDS = 20.0  # for the next bytes of a download


def fetch(urls: list[str], md5: str, target: Path) -> None:
    """Download a file from the first mirror that answers, whole and checked, or not at all.

    Args:
        urls: The file on several mirrors, in order of preference.
        md5: Its published checksum.
        target: Where it goes; the folder is made.

    Raises:
        UnavailableError: no mirror answers, the download breaks off, the checksum is wrong, or the
            folder cannot be written.
    """
    from torchvision.datasets.utils import download_url

    alive = answering(urls)
    if not alive:
        raise UnavailableError(f"there is no network: no answer from {' or '.join(urls)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
            with stall_timeout():
                download_url(alive[0], folder, filename=target.name)
            check_md5(Path(folder) / target.name, md5)
            (Path(folder) / target.name).replace(target)
    except DataError:
        raise UnavailableError(
            f"what came from {alive[0]} is not the published file: it broke off or was altered"
        ) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        raise UnavailableError(f"cannot fetch {alive[0]} to {target.parent}: {reason}") from None


def check_network(urls: list[str]) -> None:
    """Raise ``UnavailableError`` unless a host of these addresses answers, with an error even."""
    hosts = list({urlsplit(url).netloc: url for url in urls}.values())
    if hosts and not answering(hosts, refusals=True):
        raise UnavailableError(f"there is no network: no answer from {' or '.join(hosts)}")


def answering(
    urls: list[str], seconds: float = _ANSWER_SECONDS, *, refusals: bool = False
) -> list[str]:
    """Return those of ``urls`` that answer a HEAD request within ``seconds``, in their order.

    All are asked at once, in threads that nobody waits for: a resolver can hang far longer than
    any time-out of a socket. ``refusals``: an error that the server reports is an answer, too.
    """
    alive: dict[str, bool] = {}

    def ask(url: str) -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                alive[url] = answer.status < 400
        except HTTPError:
            alive[url] = refusals
        except (OSError, ValueError, HTTPException):
            alive[url] = False

    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return [url for url in urls if alive.get(url)]


@contextmanager
def stall_timeout() -> Iterator[None]:
    """Give torchvision's downloader, which sets no time-out, one for each read."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
