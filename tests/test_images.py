"""Images: what is found in folders, how files become pixels, and in how much memory."""

import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import PEAK
from PIL import Image
from test_own_data import GREY, RGB, everything, held, load, pairs, pixels, write_folder

from funcloss.app import data, runs
from funcloss.app.config import TrainConfig
from funcloss.app.options import EvaluateOptions
from funcloss.app.train import train
from funcloss.errors import DataError


def opaque(image, alpha):
    return np.where(alpha[..., None] > 0, image, 0)


def _palette(transparent=None):
    colours, places = pixels(256, 3, seed=3), pixels(6, 5, seed=4)
    places[0, 0], places[0, 1] = 7, 8
    image = Image.frombytes("P", (5, 6), places.tobytes())
    image.putpalette(colours.tobytes())
    expected = colours[places]
    if transparent is not None:
        image.info["transparency"] = transparent
        expected = opaque(expected, places != transparent)
    return image, expected


ALPHA = np.where(pixels(6, 5, seed=2) > 100, 255, 0).astype(np.uint8)
# what is written as PNG, and the pixels that it must be read as
IMAGES = [
    pytest.param(lambda: (Image.fromarray(GREY[0]), GREY[0][..., None]), id="grey"),
    pytest.param(lambda: (Image.fromarray(RGB[0]), RGB[0]), id="colour"),
    pytest.param(
        lambda: (
            Image.fromarray(np.dstack([RGB[0], ALPHA])),
            opaque(RGB[0], ALPHA),
        ),
        id="colour, transparent",
    ),
    pytest.param(
        lambda: (Image.fromarray(np.dstack([GREY[0], ALPHA])), opaque(GREY[0][..., None], ALPHA)),
        id="grey, transparent",
    ),
    pytest.param(_palette, id="palette"),
    pytest.param(lambda: _palette(7), id="palette, transparent"),
    pytest.param(
        lambda: (Image.fromarray(GREY[0] > 99), 255 * (GREY[0] > 99)[..., None]), id="black, white"
    ),
]


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("make", IMAGES)
def test_every_kind_of_png_is_read_as_its_pixels(make, stream, tmp_path):
    image, expected = make()
    other = Image.fromarray(GREY[1])  # grey, so that the kind in question decides on the channels
    write_folder(tmp_path / "own", {"a": [image] * 3, "b": [other] * 3})
    read = load(str(tmp_path / "own"), stream=stream, workers=0)
    grey = GREY[1][..., None].repeat(expected.shape[-1], -1)
    assert everything(read) == pairs([expected.astype(np.uint8)] * 3 + [grey] * 3, "aaabbb")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_what_pillow_decodes(mode, tmp_path):
    for name, array in (("a", RGB[0]), ("b", RGB[1])):
        (tmp_path / "own" / name).mkdir(parents=True)
        for suffix in ("jpg", "JPEG", "jpeg"):
            path = tmp_path / "own" / name / f"0.{suffix}"
            Image.fromarray(array).convert(mode).save(path, "jpeg")
    read = load(str(tmp_path / "own"))
    with Image.open(tmp_path / "own" / "a" / "0.jpg") as image:
        expected = np.asarray(image.convert("L" if mode == "L" else "RGB")).reshape(6, 5, -1)
    assert [b for name, b in everything(read) if name == "a"] == [expected.tobytes()] * 3


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 5 6
%%EndComments
{ } loop
%%EOF
"""


def as_bytes(image, kind):
    content = io.BytesIO()
    Image.fromarray(image).save(content, kind)
    return content.getvalue()


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A path at which a file appears when Ghostscript is run."""
    ran, here = tmp_path / "ran", tmp_path / "bin"
    here.mkdir()
    (here / "gs").write_text(f"#!/bin/sh\ntouch {ran}\nexit 1\n")
    (here / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked up again, and forgotten
    return ran


def test_an_eps_would_be_run_by_pillow_alone(ghostscript, tmp_path):
    (tmp_path / "x.png").write_bytes(EPS)
    with Image.open(tmp_path / "x.png") as image, pytest.raises(Exception, match="exit status"):
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize(
    "content",
    [EPS, b"%PDF-1.4\n%%EOF\n", as_bytes(RGB[0], "gif"), as_bytes(RGB[0], "ppm")],
    ids=["eps", "pdf", "gif", "ppm"],
)
def test_other_formats_are_not_looked_into_whatever_a_file_is_called(
    content, ghostscript, tmp_path
):
    own = write_folder(tmp_path / "own", {"a": [RGB[0]] * 3, "b": [RGB[1]] * 3})
    path = own / "a" / "0.png"
    path.write_bytes(content)
    said = r"0\.png is not an image that can be read: PNG, .* and TIFF are$"
    for options in ({}, {"image_size": 8}, {"stream": "on"}):
        with pytest.raises(DataError, match=said):
            load(str(own), **options)
    with pytest.raises(DataError, match=said):
        data.read_images([path], (4, 4), 3)
    assert not ghostscript.exists()


def test_what_torchvision_opens_is_not_run_either(ghostscript, tmp_path):
    folder = write_folder(tmp_path / "eurosat" / "2750", {"a": RGB[:4], "b": RGB[4:8]})
    read = load("torchvision:EuroSAT", data_dir=str(tmp_path))
    assert everything(read) == pairs(RGB[:8], "aaaabbbb")
    (folder / "b" / "3.png").write_bytes(EPS)
    with pytest.raises(DataError, match="image 7 cannot be read: OSError: .*Ghostscript"):
        load("torchvision:EuroSAT", data_dir=str(tmp_path))
    assert not ghostscript.exists()


def test_images_are_brought_to_the_size_asked_for(tmp_path):
    write_folder(tmp_path / "own", {"a": [RGB[0]] * 3, "b": [pixels(9, 9, 3)] * 3})
    read = load(str(tmp_path / "own"), image_size=8)
    resized = np.asarray(Image.fromarray(RGB[0]).resize((8, 8)))
    assert read.input_shape == (3, 8, 8)
    assert [b for name, b in everything(read) if name == "a"] == [resized.tobytes()] * 3


def test_only_images_in_folders_that_are_not_hidden_count(tmp_path):
    own = write_folder(tmp_path / "own", {"a": [RGB[0]] * 3, "b": [RGB[1]] * 3})
    (own / ".cache").mkdir()
    (own / "a" / "notes.txt").write_text("taken in May")
    (own / "a" / ".0.png").write_text("what another system leaves")
    (own / "a" / "more").mkdir()
    Image.fromarray(RGB[2]).save(own / "a" / "more" / "deep.png")
    assert everything(load(str(own))) == pairs(RGB[[0, 0, 0, 2, 1, 1, 1]], "aaaabbb")


def test_two_folders_for_one_part_are_refused(tmp_path):
    for part in ("train", "val", "validation"):
        write_folder(tmp_path / "own" / part, {"a": RGB[:4], "b": RGB[4:8]})
    with pytest.raises(DataError, match=r"val.*validation"):
        load(str(tmp_path / "own"))


# --- what is found in a folder ---

NAMES = [
    pytest.param(("Train", "Test"), id="capitals"),
    pytest.param(("TRAINING", "Val", "Testing"), id="long names"),
    pytest.param(("train", "VALID", "test"), id="mixed"),
]


@pytest.mark.parametrize("names", NAMES)
def test_folders_of_splits_may_have_any_case(names, tmp_path):
    for k, name in enumerate(names):
        first = 4 * k
        groups = {"a": RGB[first : first + 2], "b": RGB[first + 2 : first + 4]}
        write_folder(tmp_path / "own" / name, groups)
    read = load(str(tmp_path / "own"), val_fraction=0.0)
    assert read.classes == ("a", "b")
    splits = [read.train, *([read.validation] if len(names) == 3 else []), read.test]
    for k, split in enumerate(splits):
        assert held(split, "ab") == pairs(RGB[4 * k : 4 * k + 4], "aabb")


# folders with an image in each, and what is said
LAYOUTS = [
    (("Train/a", "Train/b", "extra/a"), r"own has folders of splits \(Train\) beside .*extra"),
    (("Test/a", "Test/b", "val/a"), r"own has folders of splits \(Test, val\) and none is train"),
    (("train/a", "train/b", "Training/a"), r"two folders of one split: Training, train"),
    (("fold1/a", "fold1/b", "fold2/a", "fold2/b"), r"fold1 and fold2 both hold the folders a, b"),
    (("train/x/a", "train/x/b", "train/y/a", "train/y/b"), r"own/train: x and y both hold"),
    (("pets/cat", "pets/dog"), r"own holds one folder, pets, with the folders cat, dog.*own/pets"),
    (("train", "test"), r"own/t\w+ holds no class folders: put"),
]


@pytest.mark.parametrize(("folders", "match"), LAYOUTS, ids=[", ".join(f) for f, _ in LAYOUTS])
def test_folders_that_are_neither_splits_nor_classes_are_explained(folders, match, tmp_path):
    write_folder(tmp_path / "own", dict.fromkeys(folders, RGB[:1]))
    with pytest.raises(DataError, match=match):
        load(str(tmp_path / "own"))


TAKEN = [
    (("car", "train", "bus"), ("bus", "car", "train")),  # PASCAL VOC has a class of trains
    (("n01/images", "n02/images", "n03/images"), ("n01", "n02", "n03")),  # Tiny ImageNet
    (("a/2021", "a/2022", "b/2022", "b/more/deep"), ("a", "b")),
]


@pytest.mark.parametrize(("folders", "classes"), TAKEN, ids=["train", "images", "years"])
def test_folders_of_classes_are_taken(folders, classes, tmp_path):
    write_folder(tmp_path / "own", dict.fromkeys(folders, RGB[:3]))
    assert load(str(tmp_path / "own")).classes == classes


def test_what_is_passed_over_is_counted(tmp_path):
    own = write_folder(tmp_path / "own", {"a": RGB[:3], "b": RGB[3:6]})
    for hidden in (".ipynb_checkpoints", "a/.ipynb_checkpoints", "a/more/__MACOSX", "__MACOSX"):
        write_folder(own, {hidden: RGB[6:7]})
    for name in ("a/notes.txt", "a/more/film.gif", "b/README", "labels.csv", ".DS_Store"):
        (own / name).write_text("no image")
    os.mkfifo(own / "b" / "fifo.png")
    (own / "a" / "up").symlink_to(own)
    (own / "b" / "self.png").symlink_to(own / "b" / "self.png")
    (own / "loop").symlink_to(own / "loop")
    read = load(str(own))
    assert everything(read) == pairs(RGB[:6], "aaabbb")
    (note,) = read.notes
    said = note.rpartition(": ")[2].split(", ")
    counted = {kind: n for n, _, kind in (one.partition(" ") for one in said)}
    assert counted == {
        "hidden": "5", ".txt": "1", ".gif": "1", "without suffix": "1", "links to folders": "1",
        "outside the class folders": "2", "broken links or no regular files": "2",
    }  # fmt: skip
    (own / "whole").symlink_to(own)
    with pytest.raises(DataError, match="own/whole is a link to a folder that it is in"):
        load(str(own))


def test_a_file_may_have_a_name_that_is_not_utf_8(tmp_path):
    own = write_folder(tmp_path / "own", {"a": RGB[:3], "b": RGB[3:6]})
    os.rename(own / "a" / "0.png", os.fsencode(own / "a") + b"/caf\xe9.png")
    assert everything(load(str(own))) == pairs(RGB[:6], "aaabbb")
    own.joinpath("b", "0.png").write_bytes(b"")
    own.joinpath(os.fsdecode(b"a/caf\xe9.png")).write_bytes(b"")
    with pytest.raises(DataError, match="2 of 6 images"):
        load(str(own))


# --- how a file becomes pixels ---

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
LOSSLESS = {"png": {}, "webp": {"lossless": True}, "tiff": {}, "tif": {}, "bmp": {}}


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array)).save(path, **options)


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_every_format_is_read_alike(suffix, tmp_path):
    for i in range(6):
        save(tmp_path / "own" / "ab"[i % 2] / f"{i}.{suffix}", RGB[i], **LOSSLESS[suffix])
    expected = pairs(RGB[:6], "ababab")
    assert everything(load(str(tmp_path / "own"))) == expected
    assert everything(load(str(tmp_path / "own"), stream="on", workers=0)) == expected
    files = sorted((tmp_path / "own").rglob("*.*"))
    assert data.read_images(files, (6, 5), 3).numpy().tobytes() == RGB[[0, 2, 4, 1, 3, 5]].tobytes()


def test_the_first_page_of_many_is_read(tmp_path):
    for name in "ab":
        (tmp_path / "own" / name).mkdir(parents=True)
        pages = [Image.fromarray(RGB[i]) for i in range(2)]
        for i in range(3):
            path = tmp_path / "own" / name / f"{i}.tiff"
            pages[0].save(path, save_all=True, append_images=pages[1:])
    assert everything(load(str(tmp_path / "own"))) == pairs([RGB[0]] * 6, "aaabbb")


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
def test_images_are_turned_upright(suffix, tmp_path):
    """All eight orientations of the same image, among them four that swap height and width."""
    upright = np.kron(RGB[0][:, :, :1].repeat(3, -1), np.ones((16, 16, 1), np.uint8))
    for number, turn in TURNS.items():
        stored = next(s for t in TURNS.values() if np.array_equal(turn(s := t(upright)), upright))
        exif = Image.Exif()
        exif[0x0112] = number
        options = {"quality": 100} if suffix == "jpg" else LOSSLESS[suffix]
        path = tmp_path / "own" / "ab"[number % 2] / f"{number}.{suffix}"
        save(path, stored, exif=exif, **options)
    read = load(str(tmp_path / "own"), val_fraction=0.0, test_fraction=0.2)
    every = np.concatenate([read.train.inputs, read.test.inputs])
    files = sorted((tmp_path / "own").rglob("*.*"))
    for images in (every, data.read_images(files, upright.shape[:2], 3).numpy()):
        assert images.shape == (8, *upright.shape)
        assert np.abs(images.astype(int) - upright).max() <= (3 if suffix == "jpg" else 0)


def test_a_broken_exif_block_turns_nothing(tmp_path):
    block = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"
    for i in range(6):
        save(tmp_path / "own" / "ab"[i % 2] / f"{i}.jpg", RGB[0], exif=block)
    assert load(str(tmp_path / "own")).input_shape == (3, 6, 5)


def test_one_image_in_colour_among_thousands_makes_all_so(tmp_path):
    own = write_folder(tmp_path / "own", {"a": [GREY[0]], "b": [GREY[1]]})
    for i in range(1, 1050):
        for name in "ab":
            os.link(own / name / "0.png", own / name / f"{i}.png")
    save(own / "a" / "1000.5.png", RGB[0])
    read = load(str(own), stream="on", workers=0)
    assert read.input_shape == (3, 6, 5)


@pytest.mark.parametrize("spoil", ["headers", "pixels", "both"])
def test_all_that_are_broken_are_listed_at_once(spoil, tmp_path):
    own = write_folder(tmp_path / "own", {"a": RGB[:12], "b": RGB[12:24]})
    for i in range(12):
        path = own / "a" / f"{i}.png"
        whole = spoil == "pixels" or (spoil == "both" and i % 2)
        path.write_bytes(path.read_bytes()[:-40] if whole else b"no image")
    with pytest.raises(DataError) as raised:
        load(str(own))
    said = str(raised.value)
    assert said.startswith("12 of 24 images cannot be read, ")
    listed = said.partition(" and 2 more")[0]
    assert sum(f"own/a/{i}.png" in listed for i in range(12)) == 10
    assert "\n" not in said


# --- memory ---

LOADING = """
from funcloss.app import data, runs
read = data.load_dataset(data.LoadOptions(sys.argv[1], image_size=32))
print(len(read.train.labels), peak())
"""


def test_large_images_are_read_in_a_bound_of_memory(tmp_path):
    """Six JPEGs of 64 megapixels, and a PNG of 36 with transparency."""
    own = tmp_path / "own"
    for name in "ab":
        (own / name).mkdir(parents=True)
    Image.new("RGB", (8000, 8000), "red").save(own / "a" / "0.jpg")
    for i in range(1, 6):
        os.link(own / "a" / "0.jpg", own / "ab"[i % 2] / f"{i}.jpg")
    Image.new("P", (6000, 6000)).save(own / "b" / "clear.png", transparency=0)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK + LOADING, own], capture_output=True, text=True
    )
    n, most = ran.stdout.split()
    assert (int(n), ran.stderr) == (5, "")
    assert float(most) < 2000  # MiB, of which importing torch is a third


def test_an_image_too_large_to_decode_is_refused_by_name(tmp_path):
    own = write_folder(tmp_path / "own", {"a": RGB[:3], "b": RGB[:3]})
    for size, path in ((13_000, "a/3.png"), (9_600, "b/3.png")):
        Image.new("1", (size, size)).save(own / path)
    with pytest.raises(DataError, match=r"2 of 8 images .*a/3\.png, .*b/3\.png.*megapixels"):
        load(str(own), image_size=8)
    with pytest.raises(DataError, match=r"a/3\.png has more than 90 megapixels: save it smaller"):
        data.read_images([own / "a" / "3.png"], (8, 8), 3)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("x: can't allocate memory: you")])
def test_running_out_of_memory_is_one_line(error, tmp_path, monkeypatch):
    def empty(*_, **__):
        raise error

    own = write_folder(tmp_path / "own", {"a": RGB[:3], "b": RGB[:3]})
    monkeypatch.setattr("funcloss.app.data.pictures.torch.empty", empty)
    with pytest.raises(DataError, match=r"own does not fit into memory: .*image_size, stream on"):
        load(str(own))


# --- what is predicted ---


def test_a_flat_folder_and_a_folder_of_folders_are_predicted(tmp_path, run_cli):
    own = write_folder(tmp_path / "own", {"a": RGB[:8], "b": RGB[8:16]})
    write_folder(own, {"a/.ipynb_checkpoints": RGB[:1]})
    options = ("--model", "linear", "--epochs", 1, "--batch-size", 4, "--audit-every", 0)
    code, out, _ = run_cli("train", "--dataset", own, "--run-dir", tmp_path / "run", *options)
    assert code == 0
    assert "own: skipped what is no image of a class: 1 hidden" in out
    for folder, n in ((own / "a", 8), (own, 16)):
        code, out, _ = run_cli("predict", tmp_path / "run", folder, "--csv", tmp_path / "out.csv")
        assert (code, len(out.splitlines())) == (0, n)
    os.rename(own / "a" / "0.png", os.fsencode(own / "a") + b"/caf\xe9.png")
    for i in (2, 5):
        (own / "b" / f"{i}.png").write_bytes(b"")
    code, out, err = run_cli("predict", tmp_path / "run", own)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "2 of 16 images cannot be read, " in err
    (own / "b" / "2.png").unlink()
    (own / "b" / "5.png").unlink()
    assert runs.predict_files(tmp_path / "run", [own]).sources[7][0].endswith("caf\udce9.png")
    runs.write_decisions(tmp_path / "out.csv", *_decided(tmp_path / "run", own))
    assert r"caf\udce9.png," in (tmp_path / "out.csv").read_text()


def _decided(run, folder):
    found = runs.predict_files(run, [folder])
    return found.decisions, found.sources


def test_an_evaluation_names_the_file_of_each_image(tmp_path):
    own, run = tmp_path / "own", tmp_path / "run"
    for name, colour in (("a", 30), ("b", 220)):
        (own / name).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), colour + i).save(own / name / f"{i}.png")
    train(TrainConfig(dataset=str(own), model="linear", epochs=1, check=False), run)
    report = runs.evaluate_run(run, EvaluateOptions(split="validation"))
    files = [pathlib.Path(file) for file, row in report.sources if row is None]
    assert len(files) == len(report.sources) == len(report.evaluation.labels)
    named = [sorted("ab").index(file.parent.name) for file in files]
    assert named == report.evaluation.labels.tolist()


def test_streamed_files_that_change_are_other_data(tmp_path):
    images = {name: [pixels(6, 5, seed=i) for i in range(20)] for name in "ab"}
    own = write_folder(tmp_path / "own", images)
    first = load(str(own), stream="on", workers=0).fingerprint
    assert load(str(own), stream="on", workers=0).fingerprint == first
    with (own / "a" / "3.png").open("ab") as file:
        file.write(b"more")
    assert load(str(own), stream="on", workers=0).fingerprint != first
