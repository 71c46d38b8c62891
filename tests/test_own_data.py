"""Somebody's own data: what is read is what was written, and what cannot be read is one line."""

import csv
import gc
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import StopAt, but_learning, resume, swept
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close
from torch.utils.data import Dataset

from funcloss.app import data, runs, sweep
from funcloss.app.audits import audit_run
from funcloss.app.config import make_config
from funcloss.app.data.columns import encoded
from funcloss.app.data.records import Column
from funcloss.app.data.table import _MISSING, read_table
from funcloss.app.options import AuditOptions, EvaluateOptions
from funcloss.app.train import train
from funcloss.errors import ConfigError, DataError

PREAMBLE = """
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from funcloss.app import data

n = 40
labels = torch.arange(n) % 2
features = torch.linspace(-1, 1, n * 3).reshape(n, 3) + labels[:, None]
images = (torch.arange(n * 48) * 7 % 256).to(torch.uint8).reshape(n, 4, 4, 3)
"""
_numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module under a name of its own into the current folder; return its name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = []

    def write(text, preamble=PREAMBLE):
        names.append(f"own_data_{os.getpid()}_{next(_numbers)}")
        (tmp_path / f"{names[-1]}.py").write_text(preamble + textwrap.dedent(text))
        return names[-1]

    yield write
    for name in [n for n in sys.modules if any(own in n for own in names)]:
        del sys.modules[name]


@pytest.fixture
def no_figures(monkeypatch):
    """Most of the time of runs as small as these would go into drawing."""
    monkeypatch.setattr("funcloss.app.report.run_figures.save_figure", lambda figure, path: None)


@pytest.fixture
def in_time():
    """Fail, rather than hang, on what never ends."""

    def fail(*_):
        pytest.fail("it does not end")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def none_left():
    """Return whether no process that reads ahead is left, once Python has tidied up."""
    if multiprocessing.active_children():
        gc.collect()  # the traceback of an error holds what was going on
    return not multiprocessing.active_children()


def load(dataset, **options):
    return data.load_dataset(data.LoadOptions(dataset, **options))


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_csv(path, header, rows, encoding="utf-8", **form):
    text = io.StringIO(newline="")
    writer = csv.writer(text, **form)
    writer.writerow(header)
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def write_folder(folder, images):
    """Write ``{class: [PIL image or array, ...]}``; the arrays become PNG files."""
    for name, group in images.items():
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(group):
            image = image if isinstance(image, Image.Image) else Image.fromarray(image)
            image.save(folder / name / f"{i}.png")
    return folder


def held(examples, classes):
    """Return the examples of a split as sorted pairs of a class name and an input's bytes."""
    inputs = examples.inputs
    if isinstance(inputs, data.Stream):
        inputs = torch.cat([*inputs.batches([torch.arange(len(inputs))])])
    names = [classes[i] for i in examples.labels.tolist()]
    return sorted(zip(names, (x.numpy().tobytes() for x in inputs), strict=True))


def pairs(inputs, names):
    return sorted(zip(names, (x.tobytes() for x in inputs), strict=True))


def everything(dataset):
    splits = dataset.splits.values()
    return sorted(pair for split in splits for pair in held(split, dataset.classes))


# --- what is read, against what was written ---

LETTERS = ["cat", "dog", "eel", "fly"]
NAMED = [LETTERS[i % 4] for i in range(48)]
INDEX = np.arange(48) % 4
GREY, RGB, FEATURES = pixels(48, 6, 5), pixels(48, 6, 5, 3), numbers(48, 7)
ONE_HOT = np.eye(4)[INDEX]
BINARY = np.random.default_rng(1).normal(size=(48, 3))  # numbers that float32 would round
UNIX = 1_700_000_000 + np.arange(48 * 2).reshape(48, 2)


def npz(**arrays):
    def write(folder, module):
        np.savez(folder / "own.npz", **arrays)
        return str(folder / "own.npz"), {}

    return write


def safetensors(metadata=None, **tensors):
    def write(folder, module):
        there = {name: torch.as_tensor(t).contiguous() for name, t in tensors.items()}
        save_file(there, folder / "own.safetensors", metadata=metadata)
        return str(folder / "own.safetensors"), {}

    return write


def table(**form):
    def write(folder, module):
        rows = [[*map(repr, x.tolist()), name] for x, name in zip(FEATURES, NAMED, strict=True)]
        write_csv(folder / "own.csv", [*"abcdefg", "kind"], rows, **form)
        return str(folder / "own.csv"), {"target": "kind"}

    return write


def folder_of(images):
    def write(folder, module):
        groups = {name: images[i == INDEX] for i, name in enumerate(LETTERS)}
        return str(write_folder(folder / "own", groups)), {}

    return write


def code(text):
    def write(folder, module):
        np.savez(folder / "kept.npz", grey=GREY, rgb=RGB, features=FEATURES, index=INDEX)
        kept = "with np.load('kept.npz') as file:\n    kept = dict(file)\n"
        return f"{module(kept + textwrap.dedent(text))}:load", {}

    return write


DIGITS = [str(i) for i in INDEX]
PAIRS = """
class Pairs(Dataset):
    def __len__(self): return 48
    def __getitem__(self, i): return torch.tensor(kept["features"][i]), int(kept["index"][i])
"""
# writer, inputs as they are to be, names of their classes, whether they are scaled
FORMS = [
    pytest.param(folder_of(GREY), GREY[..., None], NAMED, True, id="folder, grey"),
    pytest.param(folder_of(RGB), RGB, NAMED, True, id="folder, colour"),
    pytest.param(npz(images=GREY, labels=INDEX), GREY[..., None], DIGITS, True, id="npz, grey"),
    pytest.param(npz(images=RGB, labels=INDEX[:, None]), RGB, DIGITS, True, id="npz, (n, 1)"),
    pytest.param(npz(images=RGB, labels=np.array(NAMED)), RGB, NAMED, True, id="npz, strings"),
    pytest.param(
        npz(images=RGB, labels=np.array(NAMED, dtype="S")), RGB, NAMED, True, id="npz, bytes"
    ),
    pytest.param(
        npz(images=RGB, labels=INDEX.astype(np.uint8), classes=np.array(LETTERS)),
        RGB, NAMED, True, id="npz, classes",
    ),
    pytest.param(
        npz(images=RGB / 255, labels=INDEX.astype(float)),
        (RGB / 255).astype(np.float32), DIGITS, True, id="npz, float",
    ),
    pytest.param(
        npz(images=RGB.astype(np.int32), labels=INDEX),
        RGB.astype(np.float32), DIGITS, True, id="npz, whole numbers",
    ),
    pytest.param(npz(images=FEATURES, labels=INDEX), FEATURES, DIGITS, True, id="npz, features"),
    pytest.param(npz(X=FEATURES, y=INDEX), FEATURES, DIGITS, True, id="npz, X and y"),
    pytest.param(npz(x_train=RGB, y_train=INDEX), RGB, DIGITS, True, id="npz, Keras"),
    pytest.param(npz(images=RGB, labels=ONE_HOT), RGB, DIGITS, True, id="npz, one-hot"),
    pytest.param(
        npz(images=RGB, labels=ONE_HOT.astype(bool), classes=np.array(LETTERS)),
        RGB, NAMED, True, id="npz, one-hot of named classes",
    ),
    pytest.param(
        npz(images=BINARY, labels=INDEX), BINARY, DIGITS, True, id="npz, features in float64"
    ),
    pytest.param(safetensors(images=RGB, labels=INDEX), RGB, DIGITS, True, id="safetensors"),
    pytest.param(
        safetensors(images=BINARY, labels=torch.tensor(ONE_HOT).bfloat16()),
        BINARY, DIGITS, True, id="safetensors, one-hot and float64",
    ),
    pytest.param(
        safetensors({"classes": json.dumps(LETTERS)}, images=FEATURES, labels=INDEX),
        FEATURES, NAMED, True, id="safetensors, classes",
    ),
    pytest.param(
        safetensors(images=FEATURES, labels=torch.tensor(INDEX).bfloat16()),
        FEATURES, DIGITS, True, id="safetensors, bfloat16 labels",
    ),
    pytest.param(table(), FEATURES.astype(float), NAMED, True, id="csv"),
    pytest.param(table(delimiter=";"), FEATURES.astype(float), NAMED, True, id="csv, semicolons"),
    pytest.param(table(delimiter="\t"), FEATURES.astype(float), NAMED, True, id="csv, tabs"),
    pytest.param(table(encoding="utf-8-sig"), FEATURES.astype(float), NAMED, True, id="csv, BOM"),
    pytest.param(
        table(quoting=csv.QUOTE_ALL), FEATURES.astype(float), NAMED, True, id="csv, quoted"
    ),
    pytest.param(table(lineterminator="\n"), FEATURES.astype(float), NAMED, True, id="csv, Unix"),
    pytest.param(
        code("def load(): return torch.tensor(kept['features']), torch.tensor(kept['index'])"),
        FEATURES, DIGITS, False, id="code, tensors",
    ),
    pytest.param(
        code("def load(): return kept['features'].astype(float), kept['index']"),
        FEATURES, DIGITS, False, id="code, arrays",
    ),
    pytest.param(
        code("def load(): return kept['rgb'], kept['index']"),
        RGB, DIGITS, True, id="code, images",
    ),
    pytest.param(
        code("def load(): return [torch.tensor(kept['features']).requires_grad_(), kept['index']]"),
        FEATURES, DIGITS, False, id="code, with a gradient",
    ),
    pytest.param(
        code(f"{PAIRS}\ndef load(): return Pairs()"), FEATURES, DIGITS, False, id="code, Dataset"
    ),
    pytest.param(
        code("def load(): return TensorDataset(*map(torch.tensor, (kept['features'],"
             " kept['index'])))"),
        FEATURES, DIGITS, False, id="code, TensorDataset",
    ),
    pytest.param(
        code(f"{PAIRS}\nclass Named(Pairs):\n    classes = {LETTERS}\n    targets = kept['index']\n"
             "def load(): return Named()"),
        FEATURES, NAMED, False, id="code, Dataset that knows its labels",
    ),
    pytest.param(
        code(f"{PAIRS}\nclass Named(Pairs):\n    targets = {NAMED}\ndef load(): return Named()"),
        FEATURES, NAMED, False, id="code, Dataset that knows the names of its labels",
    ),
    pytest.param(
        code("def load(): return kept['features'], np.eye(4)[kept['index']]"),
        FEATURES, DIGITS, False, id="code, one-hot",
    ),
    pytest.param(
        code(f"{PAIRS}\nclass Hot(Pairs):\n    targets = torch.eye(4)[kept['index']]\n"
             "def load(): return Hot()"),
        FEATURES, DIGITS, False, id="code, Dataset of one-hot targets",
    ),
    pytest.param(
        code("def load(): return TensorDataset(torch.tensor(kept['features']),"
             " torch.eye(4)[kept['index']])"),
        FEATURES, DIGITS, False, id="code, Dataset of one-hot items",
    ),
    pytest.param(
        code(f"{PAIRS}\nclass Floats(Pairs):\n    def __getitem__(self, i): return"
             " super().__getitem__(i)[0], float(kept['index'][i])\ndef load(): return Floats()"),
        FEATURES, DIGITS, False, id="code, Dataset of whole floats",
    ),
    pytest.param(
        code(f"{PAIRS}\ndef load():\n    classes = {LETTERS}\n"
             "    return {'train': Pairs(), 'classes': classes}"),
        FEATURES, NAMED, False, id="code, dict",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("write", "inputs", "names", "scaled"), FORMS)
def test_every_example_is_read_as_it_was_written_and_scaled_by_the_training_split(
    write, inputs, names, scaled, tmp_path, module, in_time
):
    address, options = write(tmp_path, module)
    read = load(address, workers=0, **options)
    assert read.classes == tuple(sorted(set(names)))
    assert read.name.rpartition(":")[0] or read.name == "own"
    shape = inputs.shape[1:]
    assert read.input_shape == ((shape[2], *shape[:2]) if len(shape) == 3 and scaled else shape)
    assert not any(
        isinstance(p.inputs, torch.Tensor) and p.inputs.requires_grad for p in read.splits.values()
    )
    assert everything(read) == pairs(inputs, names)
    assert [len(p.labels) for p in read.splits.values()] == [38, 5, 5]
    assert (len(read.mean) > 0) is scaled

    chosen = torch.tensor([3, 1, 20])
    batch = data.get_batch(read, read.train, chosen)
    kept = np.frombuffer(b"".join(b for _, b in held(read.train, read.classes)), inputs.dtype)
    kept = kept.reshape(-1, inputs.shape[-1]).astype(float)
    unit = 255.0 if inputs.dtype == np.uint8 else 1.0
    mean, std = (kept / unit).mean(0), (kept / unit).std(0)
    if not scaled:
        mean, std = np.zeros_like(mean), np.ones_like(std)
    raw = read.train.inputs
    raw = raw[chosen] if isinstance(raw, torch.Tensor) else next(raw.batches([chosen]))
    expected = (raw.double().numpy() / unit - mean) / std
    if expected.ndim == 4:
        expected = np.moveaxis(expected, -1, 1)
    assert_close(batch.inputs.numpy(), expected.astype(np.float32), rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.targets, read.train.labels[chosen])


SUBSETS = """
from torch.utils.data import Subset, random_split

class Named(Dataset):
    classes = ["even", "odd"]
    amount = np.arange(n)

    def __init__(self): self.targets = labels.tolist()
    def __len__(self): return n
    def __getitem__(self, i):
        READ.append(i)
        return features[i], labels[i]

READ = []

def subset(): return Subset(Subset(Named(), range(1, n)), torch.tensor([3, 0, 7, 7, 12, 21, 30]))
def split():
    train, test = random_split(Named(), [30, 10], torch.Generator().manual_seed(0))
    return {"train": train, "test": test}
"""


def test_names_and_labels_of_a_subset_are_those_of_the_whole(module, in_time):
    name = module(SUBSETS)
    whole = dict(val_fraction=0.0, test_fraction=0.2, workers=0)
    one = load(f"{name}:subset", amounts=("amount",), **whole)
    assert one.classes == ("even", "odd")
    found = [
        (s.inputs.positions.tolist(), s.labels, s.amounts["amount"]) for s in (one.train, one.test)
    ]
    places = torch.tensor([4, 1, 8, 8, 13, 22, 31])
    for positions, labels, amounts in found:
        assert torch.equal(labels, places[positions] % 2)
        assert torch.equal(amounts, places[positions].double())
    two = load(f"{name}:split", **whole)
    assert two.classes == ("even", "odd")
    assert (len(two.train.labels), len(two.test.labels)) == (30, 10)
    parts = sys.modules[name].split().values()
    assert [4, *(part.indices[0] for part in parts)] == sys.modules[name].READ  # none for labels


def test_features_of_many_digits_are_held_whole(tmp_path):
    np.savez(tmp_path / "own.npz", X=UNIX, y=INDEX)
    assert everything(load(str(tmp_path / "own.npz"))) == pairs(UNIX.astype(float), DIGITS)


PARTED = {
    "train": (RGB[:24], INDEX[:24]),
    "validation": (RGB[24:36], INDEX[24:36]),
    "test": (RGB[36:], INDEX[36:]),
}


def _parted_folder(validation):
    def write(folder, module):
        for part, (images, labels) in PARTED.items():
            groups = {name: images[labels == i] for i, name in enumerate(LETTERS)}
            write_folder(folder / "own" / (validation if part == "validation" else part), groups)
        return str(folder / "own"), {}

    return write


def _parted_arrays(write, validation):
    arrays = {}
    for part, (images, labels) in PARTED.items():
        prefix = validation if part == "validation" else part
        arrays |= {f"{prefix}_images": images, f"{prefix}_labels": labels}
    return write(arrays)


def _parted_code(text):
    return code(
        "def part(a, b): return kept['rgb'][a:b], kept['index'][a:b]\n"
        "parts = {'train': part(0, 24), 'validation': part(24, 36), 'test': part(36, 48)}\n" + text
    )


_NPZ_CLASSES = {"classes": np.array(LETTERS)}
PARTS = [
    *(
        pytest.param(_parted_folder(name), id=f"folder, {name}")
        for name in ("val", "valid", "validation")
    ),
    *(
        pytest.param(_parted_arrays(lambda a: npz(**a, **_NPZ_CLASSES), name), id=f"npz, {name}")
        for name in ("val", "validation")
    ),
    pytest.param(
        _parted_arrays(lambda a: safetensors({"classes": json.dumps(LETTERS)}, **a), "val"),
        id="safetensors",
    ),
    pytest.param(
        _parted_code(f"def load(): return {{**parts, 'classes': {LETTERS}}}"), id="code, dict"
    ),
    pytest.param(
        _parted_code(
            "def load():\n"
            "    tensors = {p: data.Examples(*map(torch.tensor, xy)) for p, xy in parts.items()}\n"
            f"    return data.Dataset('mine', {tuple(LETTERS)}, **tensors,\n"
            "                        mean=torch.zeros(3), std=torch.ones(3))"
        ),
        id="code, funcloss Dataset",
    ),
]


@pytest.mark.parametrize("write", PARTS)
def test_parts_that_are_there_are_taken(write, tmp_path, module):
    read = load(write(tmp_path, module)[0])
    assert read.classes == tuple(LETTERS)
    for part, (images, labels) in PARTED.items():
        there = getattr(read, part)
        assert held(there, read.classes) == pairs(images, [LETTERS[i] for i in labels])


def test_numbers_that_name_classes_are_in_the_order_of_their_values(tmp_path):
    rows = [[i, (10, 9, -2)[i % 3]] for i in range(12)]
    read = load(str(write_csv(tmp_path / "t.csv", ["a", "y"], rows)), target="y")
    assert read.classes == ("-2", "9", "10")


# --- CSV, of any content ---

printable = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), min_size=1
).filter(lambda text: text.isprintable() and text.strip() not in ("", *_MISSING))
finite = st.floats(-3e38, 3e38) | st.integers(-(10**9), 10**9)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(finite, finite, printable), min_size=1, max_size=20),
    form=st.fixed_dictionaries(
        {
            "delimiter": st.sampled_from(",;\t"),
            "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
            "lineterminator": st.sampled_from(["\n", "\r\n"]),
            "encoding": st.sampled_from(["utf-8", "utf-8-sig"]),
        }
    ),
)
def test_a_table_is_read_back_exactly(rows, form, tmp_path):
    path = write_csv(
        tmp_path / "t.csv", ["a", "kind", "b"], [(a, c, b) for a, b, c in rows], **form
    )
    read = read_table(path, target="kind")
    inputs = encoded(read.inputs, [Column("a", "number"), Column("b", "number")])
    assert np.array_equal(inputs.numpy(), np.array([[float(a), float(b)] for a, b, _ in rows]))
    assert [read.classes[i] for i in read.labels.tolist()] == [c.strip() for *_, c in rows]
    assert sorted(read.classes) == sorted({c.strip() for *_, c in rows})


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(printable.map(str.strip), min_size=2, max_size=6, unique=True),
    delimiter=st.sampled_from(",;\t"),
)
def test_columns_may_have_any_quoted_name(names, delimiter, tmp_path):
    header = [f"n{name}" for name in names]  # a header of numbers would be no header
    form = {"delimiter": delimiter, "quoting": csv.QUOTE_ALL}
    path = write_csv(tmp_path / "t.csv", header, [range(len(header))] * 3, **form)
    read = read_table(path, target=header[-1])
    columns = [Column(name, "number") for name in header[:-1]]
    assert encoded(read.inputs, columns).tolist() == [list(range(len(header) - 1))] * 3


def test_separators_within_the_quotes_of_a_header_do_not_count(tmp_path):
    (tmp_path / "t.csv").write_text('"size, cm";"weight, kg";kind\n' + "1;2;a\n3;4;b\n" * 5)
    read = load(str(tmp_path / "t.csv"), target="kind")
    assert [column.name for column in read.columns] == ["size, cm", "weight, kg"]


def test_columns_are_left_out_and_blank_rows_skipped(tmp_path):
    (tmp_path / "t.csv").write_text("id,a,kind,note\n" + "7,1,x,text\n\n8,2,y,\n" * 4)
    read = load(str(tmp_path / "t.csv"), target="kind", ignore=("id", "note"))
    assert [column.name for column in read.columns] == ["a"]
    assert everything(read) == pairs(np.float64([[1], [2]] * 4), "xy" * 4)


# --- parts that are cut ---


def counted(examples, classes):
    return data.class_counts(examples, classes).tolist()


def uneven(folder, *counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    features = np.arange(len(labels), dtype=np.float32)[:, None].repeat(2, 1)
    np.savez(folder / "uneven.npz", images=features, labels=labels)
    return str(folder / "uneven.npz")


# examples by class, fractions; examples by class of each part
CUTS = [
    pytest.param((60, 30, 10), 0.1, 0.2, [(42, 21, 7), (6, 3, 1), (12, 6, 2)], id="exact"),
    pytest.param((60, 30, 10), 0.0, 0.2, [(48, 24, 8), (0, 0, 0), (12, 6, 2)], id="two parts"),
    pytest.param((20, 1, 1), 0.1, 0.1, [(16, 1, 1), (2, 0, 0), (2, 0, 0)], id="one each"),
    pytest.param((10, 1, 1), 0.3, 0.6, None, id="hardly any left"),
]


@pytest.mark.parametrize(("counts", "val", "test", "expected"), CUTS)
def test_parts_are_cut_class_by_class(counts, val, test, expected, tmp_path):
    path = uneven(tmp_path, *counts)
    read, again = (load(path, val_fraction=val, test_fraction=test) for _ in range(2))
    ids = [set(part.inputs[:, 0].tolist()) for part in read.splits.values()]
    assert sum(map(len, ids)) == len(set.union(*ids)) == sum(counts)
    found = [counted(part, len(counts)) for part in read.splits.values()]
    assert min(found[0]) >= 1
    if expected is not None:
        assert found == [list(row) for row in expected]
    for part, other in zip(read.splits.values(), again.splits.values(), strict=True):
        assert torch.equal(part.inputs, other.inputs)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_part_may_be_apart(part, tmp_path):
    train, other = numbers(40, 2), numbers(10, 2, seed=1)
    np.savez(tmp_path / "a.npz", images=train, labels=np.array(["x", "y"] * 20))
    np.savez(tmp_path / "b.npz", images=other, labels=np.array(["y", "x"] * 5))
    where = {f"{part}_dataset": str(tmp_path / "b.npz")}
    read = load(str(tmp_path / "a.npz"), **where)
    assert held(getattr(read, part), read.classes) == pairs(other, "yx" * 5)
    rest = [p for p in ("train", "validation", "test") if p != part]
    left = sorted(pair for p in rest for pair in held(getattr(read, p), read.classes))
    assert left == pairs(train, "xy" * 20)


def test_a_table_that_is_apart_may_have_its_columns_in_another_order(tmp_path):
    a = write_csv(tmp_path / "a.csv", ["p", "q", "kind"], [(i, -i, "xy"[i % 2]) for i in range(20)])
    b = write_csv(
        tmp_path / "b.csv", ["kind", "q", "more", "p"], [("y", -9, "text", 9), ("x", -8, "", 8)]
    )
    read = load(str(a), target="kind", test_dataset=str(b))
    assert held(read.test, read.classes) == pairs(np.float64([[9, -9], [8, -8]]), "yx")


def test_own_data_is_made_long_tailed(tmp_path):
    read = load(uneven(tmp_path, 100, 100, 100), imbalance=16, val_fraction=0.2, test_fraction=0.2)
    # n_max * factor^(-c / (C - 1)) of what is left to train on
    assert counted(read.train, 3) == [60, 15, 3]
    assert counted(read.validation, 3) == counted(read.test, 3) == [20, 20, 20]


def test_a_dataset_with_its_own_parts_takes_no_further_ones(tmp_path, module):
    text = """
    def load():
        part = data.Examples(features, labels)
        empty = torch.zeros(0)
        return data.Dataset("mine", ("a", "b"), part, part, part, empty, empty)
    """
    np.savez(tmp_path / "b.npz", images=numbers(10, 3), labels=np.arange(10) % 2)
    with pytest.raises(ConfigError, match="splits of its own"):
        load(f"{module(text)}:load", test_dataset=str(tmp_path / "b.npz"))


# --- what cannot be read is one line, by the command ---


def of_csv(text, *args, name="own.csv", encoding="utf-8", target="y"):
    def write(folder, module):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return ["--dataset", folder / name, *(["--target", target] if target else []), *args]

    return write


def of_npz(*args, test=None, **arrays):
    def write(folder, module):
        if test is not None:
            np.savez(folder / "test.npz", **test)
        return ["--dataset", npz(**arrays)(folder, module)[0], *args]

    return write


def of_bytes(name, content):
    def write(folder, module):
        (folder / name).write_bytes(content)
        return ["--dataset", folder / name]

    return write


def of_folder(images, *args, spoil=None):
    def write(folder, module):
        write_folder(folder / "own", images)
        if spoil is not None:
            spoil(folder / "own")
        return ["--dataset", folder / "own", *args]

    return write


def of_code(text, *args, function="load"):
    def write(folder, module):
        return ["--dataset", f"{module(text)}:{function}", *args]

    return write


def zipped(**trials):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, trial in trials.items():
            archive.writestr(f"{name}.npy", trial)
    return content.getvalue()


def whole_npz():
    content = io.BytesIO()
    np.savez_compressed(content, images=RGB, labels=INDEX)
    return content.getvalue()


def spoilt(archive):
    """Return an archive whose compressed pixels do not unpack."""
    middle = len(archive) // 3
    return archive[:middle] + bytes(64) + archive[middle + 64 :]


def lying(shape):
    """Return an array in NumPy's format that is shorter than its header says."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)


def bomb():
    """Return an archive that says of its one array that it unpacks to a terabyte."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("images.npy", b"0" * 64)
        archive.infolist()[0].file_size = 2**40
    return content.getvalue()


def lying_tensors(**entry):
    """Return a .safetensors file of eight bytes and a header of somebody's making."""
    header = {"images": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def truncated(own):
    path = own / "a" / "0.png"
    path.write_bytes(path.read_bytes()[:-40])


def deep(own):
    Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5)).save(own / "a" / "0.png")


ROWS = "a,b,y\n" + "1,2,p\n3,4,n\n" * 10
SEMI = ROWS.replace(",", ";")
TWO = {"a": RGB[:6], "b": RGB[6:12]}
_BIG = pixels(2, 8, 8, 3)
PAIR = """
class Own(Dataset):
    def __len__(self): return n
    def __getitem__(self, i): return {item}

def load(): return Own()
"""


def fifo(folder, module):
    os.mkfifo(folder / "own.npz")
    return ["--dataset", folder / "own.npz"]


TABLES = [
    (fifo, 1, r"own\.npz is no regular file", "FIFO"),
    (lambda folder, module: ["--dataset", folder / "nowhere.csv", "--target", "y"],
     1, r"there is no .*nowhere\.csv", "missing"),
    (lambda folder, module: ["--dataset", folder / "own.xlsx"], 1, r"own\.xlsx.*\.csv", "no xlsx"),
    (of_bytes("own.xlsx", b"PK"), 1, r"own\.xlsx is of no form.*\.csv", "xlsx"),
    (of_csv(ROWS, target="z"), 2, r"own\.csv has no target column 'z'; it has a, b, y", "column"),
    (of_csv(ROWS.replace("y", "kind", 1), target="kin"), 2, r"did you mean 'kind'", "near column"),
    (of_csv(ROWS, target=""), 2, r"own\.csv needs a target.*it has a, b, y", "no target"),
    (of_csv(ROWS, "--ignore", "c"), 2, r"own\.csv has no column to ignore, 'c'", "ignored column"),
    (of_csv(ROWS, "--ignore", "y"), 2, r"target 'y' cannot be ignored", "ignored target"),
    (of_csv(ROWS, "--ignore", "a", "--ignore", "b"),
     2, r"own\.csv has no column but", "no feature"),
    (of_csv("a,y\n" + "1,p\n" * 20), 1, r"own has one class, 'p'", "one class"),
    (of_csv(""), 1, r"own\.csv is empty", "empty"),
    (of_csv("\n\n"), 1, r"own\.csv is empty", "blank"),
    (of_csv("a,b,y\n"), 1, r"own\.csv has a header and no rows", "header only"),
    (of_csv(ROWS + "1,-inf,p\n"), 1, r"row 21, column 'b': '-inf' is not a finite number", "inf"),
    (of_csv(ROWS + "1,1e309,p\n"), 1, r"'1e309' is not a finite number", "too large"),
    (of_csv(ROWS + "1,2,\n"), 1, r"no 'y', the class, in 1 rows \(21\).*leave", "empty class"),
    (of_csv("a,y\n1,NA\n2,p\n3,\n"), 1, r"in 2 rows \(1, 3\): fill it in, or leave", "NA class"),
    (of_csv(ROWS + "1,red,p\n"), 1, r"row 21, column 'b': 'red' is not a number.*ignore", "text"),
    (of_csv(SEMI + "1.234,5;2;p\n"), 1, r"'1\.234,5' among numbers.*two ways", "comma"),
    (of_csv(ROWS + "1,p\n"), 1, r"own\.csv: row 21 has 2 cells, the first line 3", "short row"),
    (of_csv(ROWS + "1,2,3,p\n"), 1, r"own\.csv: row 21 has 4 cells, the first line 3", "long row"),
    (of_csv(ROWS + "1,2,Zürich\n", encoding="latin-1"),
     1, r"own\.csv is not text in UTF-8", "8859"),
    (of_csv(ROWS, encoding="utf-16"), 1, r"own\.csv is not text in UTF-8", "UTF-16"),
    (of_csv("1,2,3\n2,4,3\n" * 9, target="y"),
     2, r"has no target column 'y'; it has column_1, column_2, column_3", "no header"),
    (of_csv("day,y\n" + "1/2/2024,p\n3/4/2024,n\n" * 9),
     1, r"may be day/month or month/day", "dates"),
    (of_csv("a,a,y\n1,2,p\n"), 1, r"own\.csv: two columns are called 'a'", "column twice"),
    (of_csv("a,,y\n1,2,p\n"), 1, r"own\.csv: column 2 has no name", "column without name"),
    (of_csv("a,y\n" + "".join(f"1,{i / 7}\n" for i in range(300))),
     1, r"own has 300 classes in 300 examples.*is the target a number", "numeric target"),
    (of_csv(ROWS + "1,2,bell\x07\n"),
     1, r"own has a class named 'bell\\x07', which cannot be", "bell"),
    (of_csv(ROWS + '1,2,"two\nlines"\n'), 1, r"own has a class named 'two\\nlines'", "two lines"),
    (of_csv(ROWS, "--val-fraction", 0.6, "--test-fraction", 0.5),
     2, r"val_fraction 0.6 and test_fraction 0.5 leave nothing", "fractions"),
    (of_csv(ROWS, "--batch-size", 999), 2, r"batch_size 999 is more than the 16 training", "batch"),
    (of_csv(ROWS, "--image-size", 8), 2, r"image_size.*own has none.*linear", "image size"),
    (of_csv(ROWS, "--model", "fast-cnn"), 2, r"takes images.*use linear or mlp", "cnn"),
    (of_csv(ROWS, "--model", "lenet5"), 2, r"lenet5.*(linear|mlp)", "lenet5"),
    (of_csv(ROWS, "--model", "torchvision:resnet18"), 2, r"resnet18 takes images", "resnet18"),
    (of_csv(ROWS, "--pixel-mean", "0.5", "--pixel-std", "1"), 2, r"are for images", "pixel mean"),
    (of_csv(ROWS, "--class-weight", "q=2"), 2, r"class_weight.*'q'.*n, p", "class weight"),
    (of_csv(ROWS, "--imbalance", "0.5"), 2, r"imbalance must be at least 1", "imbalance"),
    (of_csv(ROWS, "--test-dataset", "none.csv"), 1, r"there is no .*none\.csv", "no test file"),
]  # fmt: skip
FOLDERS = [
    (of_folder(TWO, "--target", "y"),
     2, r"target: for a table, and .*own is none", "target"),
    (of_folder({"a": RGB[:6]}), 1, r"own has one class, 'a'", "one class"),
    (of_folder({"a": RGB[:6], "b": []}),
     1, r"own/b: the folder of a class has no image", "empty class"),
    (of_folder({"": RGB[:6]}), 1, r"own holds no class folders: put the images of each", "flat"),
    (of_folder({"a": RGB[:3], "b": _BIG}), 2, r"several sizes, 6x5 .* 8x8 .*image_size", "sizes"),
    (of_folder(TWO, spoil=truncated), 1, r"cannot read .*own/a/0\.png", "truncated"),
    (of_folder(TWO, spoil=lambda f: (f / "a/0.png").write_text("no image")),
     1, r"own/a/0\.png is not an image", "text"),
    (of_folder(TWO, spoil=lambda f: (f / "a/0.png").write_bytes(b"")),
     1, r"own/a/0\.png is not an image", "empty file"),
    (of_folder(TWO, spoil=deep), 1, r"own/a/0\.png has more than 8 bits per pixel", "16 bits"),
    (of_folder(TWO, "--stream", "on", spoil=truncated),
     1, r"cannot read .*own/a/0\.png", "streamed"),
    (of_folder({"train/a": RGB[:6], "train/b": RGB[6:9], "test/a": RGB[:3], "test/c": RGB[3:6]}),
     1, r"own, test: unknown class 'c'; the classes are a, b", "unknown class"),
    (of_folder({"train/a": RGB[:6], "train/b": RGB[6:9], "test/a": _BIG}),
     2, r"several sizes.*image_size", "parts of several sizes"),
    (of_folder(TWO, "--test-dataset", "own/a"), 1, r"own/a holds no class folders", "test part"),
    (of_folder(TWO, "--batch-size", 4, "--model", "fast-cnn"),
     2, r"too small.*12x12 and larger: use image_size", "small"),
    (of_folder({" ": RGB[:6], "b": RGB[6:9]}), 1, r"a class named ' '", "blank name"),
]  # fmt: skip
ARRAYS = [
    (of_npz(images=RGB), 1, r"own\.npz has images but no labels", "no labels"),
    (of_npz(pictures=RGB, labels=INDEX), 1, r"must hold images and labels.*pictures", "no images"),
    (of_npz(images=RGB, labels=np.array(NAMED, dtype=object)),
     1, r"own\.npz: labels holds Python objects.*dtype=str", "object labels"),
    (of_npz(images=np.array([*RGB, None], dtype=object), labels=INDEX),
     1, r"own\.npz: images holds Python objects", "object images"),
    (of_bytes("own.npz", b"no archive"), 1, r"own\.npz is not an \.npz file", "no archive"),
    (of_bytes("own.npz", b""), 1, r"own\.npz is not an \.npz file", "empty file"),
    (of_bytes("own.npz", whole_npz()[:-200]), 1, r"own\.npz is not an \.npz file", "cut short"),
    (of_bytes("own.npz", spoilt(whole_npz())), 1, r"own\.npz: images cannot be read", "spoilt"),
    (of_bytes("own.npz", zipped(images=b"hello", labels=b"hello")),
     1, r"own\.npz: images", "no arrays"),
    (of_bytes("own.npz", zipped(images=lying((10**13,)), labels=b"")),
     1, r"own\.npz: images cannot be read: .* bytes where its header says", "80 TB"),
    (of_bytes("own.npz", zipped(images=lying((8, -2)), labels=b"")),
     1, r"images cannot", "negative"),
    (of_bytes("own.npz", bomb()), 1, r"own\.npz unpacks to .* GiB", "bomb"),
    (of_bytes("own.npz", zipped()), 1, r"own\.npz must hold images.*nothing", "empty archive"),
    (of_npz(images=np.moveaxis(RGB, -1, 1), labels=INDEX),
     1, r"channels, last; got \(48, 3, 6, 5\): .*np\.moveaxis", "channels first"),
    (of_npz(images=RGB[None], labels=INDEX), 1, r"own\.npz: images must be \(n, height", "5 axes"),
    (of_npz(images=np.array(NAMED), labels=INDEX), 1, r"images must be numbers, got <U3", "text"),
    (of_npz(images=RGB + 1j, labels=INDEX), 1, r"images must be numbers, got complex", "complex"),
    (of_npz(images=RGB, labels=np.eye(4)[INDEX] * 2), 1, r"shape \(n,\).*one-hot", "two-hot"),
    (of_npz(images=RGB, labels=np.ones((48, 4))), 1, r"shape \(n,\).*one-hot", "all-hot"),
    (of_npz(images=RGB, labels=np.eye(4)[INDEX], classes=np.array(["a", "b"])),
     1, r"one-hot of 4 classes, and there are 2 names", "one-hot, names"),
    (of_npz(images=RGB, labels=INDEX * 1e300), 1, r"must be whole numbers", "huge labels"),
    (of_npz(x_train=RGB, labels=INDEX), 1, r"own\.npz has x_train but no y_train", "half Keras"),
    (of_npz(images=RGB, labels=INDEX / 2), 1, r"labels must be whole numbers or strings", "halves"),
    (of_npz(images=RGB, labels=np.where(INDEX == 3, np.inf, INDEX)),
     1, r"own\.npz: labels must be whole numbers", "inf labels"),
    (of_npz(images=RGB, labels=np.where(INDEX == 3, np.nan, INDEX)),
     1, r"own\.npz: labels must be whole numbers", "nan labels"),
    (of_npz(images=RGB, labels=np.array([b"\xe9", b"e"] * 24)), 1, r"own\.npz: labels", "bytes"),
    (of_npz(images=RGB, labels=INDEX, classes=np.array(["a", "b", "c"])),
     1, r"labels must be in 0\.\.2, as there are 3 classes; got 0\.\.3", "out of range"),
    (of_npz(images=RGB, labels=INDEX - 1, classes=np.array(LETTERS)),
     1, r"labels must be in 0\.\.3.*got -1\.\.2", "below 0"),
    (of_npz(images=RGB, labels=np.array(NAMED), classes=np.array(LETTERS[1:])),
     1, r"labels: 'cat' is not among its classes", "not among the classes"),
    (of_npz(images=RGB, labels=INDEX, classes=np.array(["a", "b", "a", "c"])),
     1, r"own has a class twice", "class twice"),
    (of_npz(images=RGB, labels=INDEX[1:]), 1, r"48 inputs but 47 labels", "one label short"),
    (of_npz(images=np.where(np.arange(48) == 7, np.nan, 1.0)[:, None], labels=INDEX),
     1, r"own\.npz: images has a value that is not finite, in example 7", "nan"),
    (of_npz(images=RGB[:0], labels=INDEX[:0]), 1, r"own has no class", "no examples"),
    (of_npz(images=RGB[:1], labels=[0], classes=np.array(["a", "b"]), test_images=RGB,
            test_labels=INDEX * 0), 2, r"batch_size 4 is more than the 1 ", "one example"),
    (of_npz(train_images=RGB, train_labels=INDEX, test_images=GREY, test_labels=INDEX),
     1, r"own: the test split has inputs of .*\(6, 5, 1\)", "shapes"),
    (of_npz(train_images=RGB, train_labels=INDEX, test_images=RGB / 255, test_labels=INDEX),
     1, r"own: the test split.*float.*uint8", "dtypes"),
    (of_npz(train_images=RGB, train_labels=INDEX * 0, test_images=RGB, test_labels=INDEX),
     1, r"own has one class, '0'", "one class"),
    (of_npz(train_images=RGB, train_labels=INDEX % 3, test_images=RGB, test_labels=INDEX),
     1, r"own, test: unknown class '3'", "unknown class"),
    (of_npz("--test-dataset", "test.npz", images=RGB, labels=INDEX,
            test={"train_images": RGB, "train_labels": INDEX, "test_images": RGB,
                  "test_labels": INDEX}), 2, r"has splits of its own: name one", "splits twice"),
    (of_npz("--test-dataset", "test.npz", images=RGB, labels=INDEX,
            test={"images": GREY, "labels": INDEX}), 1, r"the test split has inputs", "test shape"),
    (of_npz("--target", "y", images=RGB, labels=INDEX),
     2, r"target: for a table, and .*own\.npz is none", "target"),
    (of_bytes("own.safetensors", b"nothing"),
     1, r"own\.safetensors is not a \.safet", "no tensors"),
    (of_bytes("own.safetensors", struct.pack("<Q", 2**62)), 1, r"own\.safetensors", "huge header"),
    *(
        (of_bytes("own.safetensors", lying_tensors(**entry)), 1, r"own\.safetensors", f"{entry}")
        for entry in (
            {"shape": [10**12]}, {"data_offsets": [0, 10**12], "shape": [10**12 // 4]},
            {"data_offsets": [8, 0]}, {"dtype": "F4", "shape": [16]}, {"shape": [-2]},
        )
    ),
    (lambda *at: ["--dataset", safetensors({"classes": "a,b"}, images=RGB, labels=INDEX)(*at)[0]],
     1, r"own\.safetensors.*classes.*JSON", "classes are no list"),
]  # fmt: skip
CODE = [
    (of_code("def load(): raise KeyError('no such row')"),
     1, r":load\(\) raised KeyError", "raises"),
    (of_code("def load(): raise SystemExit(0)"), 1, r":load\(\) raised SystemExit", "ends all"),
    (of_code("def load(): return None"), 1, r"must be \(inputs, labels\).*got NoneType", "None"),
    (of_code("def load(): return 3"), 1, r"must be \(inputs, labels\).*got int", "a number"),
    (of_code("def load(): yield 1"), 1, r"must be \(inputs, labels\).*got generator", "generator"),
    (of_code("def load(): return features, labels, 1"), 1, r"must be \(inputs, labels\)", "three"),
    (of_code("def load(): return [[1.0]] * n, [0, 1] * 20"),
     1, r"inputs must be a tensor", "lists"),
    (of_code("def load(): return np.array([['a']] * n), labels"), 1, r":load.*inputs", "strings"),
    (of_code("def load(): return torch.tensor(1.0), torch.tensor(1)"), 1, r":load", "scalars"),
    (of_code("def load(): return features, labels[1:]"),
     1, r"40 inputs but 39 labels", "one short"),
    (of_code("def load(): return features, labels + 0.5"), 1, r"labels must be whole", "halves"),
    (of_code("def load(): return features / 0 * 0, labels"),
     1, r":load.*not finite.*example", "nan"),
    (of_code("def load(): return torch.where(features > 1.5, torch.inf, features), labels"),
     1, r":load.*not finite.*example", "inf"),
    (of_code("def load(): return {'training': (features, labels)}"),
     1, r"got 'training' \(did you mean 'train'\?\)", "wrong part"),
    (of_code("def load(): return {'test': (features, labels)}"),
     1, r"must return train", "no train"),
    (of_code("def load(): return {'train': (features, labels), 'classes': ['a']}"),
     1, r"labels must be in 0\.\.0", "too few classes"),
    (of_code("def load(): return {'train': (features, labels), 'test': (features[:, :2], labels)}"),
     1, r"the test split has inputs of .*\(2,\).*\(3,\)", "shapes"),
    (of_code("load = 3"), 2, r":load must be a function that returns data, got 3", "no function"),
    (of_code("def lod(): pass"), 2, r"has no 'load'; did you mean lod\?", "near name"),
    (of_code("1 / 0"), 2, r"cannot import own_data_\w+: ZeroDivisionError", "no import"),
    (of_code("def ("), 2, r"cannot import own_data_\w+: SyntaxError", "no syntax"),
    (of_code("raise SystemExit(0)"), 2, r"cannot import own_data_\w+: SystemExit", "exits"),
    (lambda f, m: ["--dataset", "nowhere_at_all:load"], 2, r"cannot import nowhere_at_all", "gone"),
    (lambda f, m: ["--dataset", "nowhere.py:load"], 2, r"no file .*nowhere\.py", "no file"),
    (lambda f, m: ["--dataset", f"{m('')}:"], 1, r"no .*:: .*module:function", "no name"),
    (of_code("class I(IterableDataset):\n    def __iter__(self): yield features[0], 0\n"
             "def load(): return I()"), 1, r"an IterableDataset has no order.*__len__", "iterable"),
    (of_code("class E(Dataset):\n    def __getitem__(self, i): return features[i], 0\n"
             "def load(): return E()"), 1, r"a Dataset without __len__", "no length"),
    (of_code(PAIR.format(item="features[i], 0").replace("return n", "return 0")),
     1, r"no examples", "length 0"),
    (of_code(PAIR.format(item="features[i]")), 1, r"an item must be \(inputs, label\)", "no label"),
    (of_code(PAIR.format(item="(features[i], 0.5)")), 1, r"must be whole numbers", "half a label"),
    (of_code(PAIR.format(item="(features[i], 'cat')")), 1, r"an item must be", "text label"),
    (of_code(PAIR.format(item="('0.png', i % 2)")),
     1, r"an item must be \(inputs, label\)", "a path"),
    (of_code(PAIR.format(item="((), i % 2)")), 1, r"an item must be \(inputs, label\)", "no input"),
    (of_code(PAIR.format(item="(features[i], i // 0)")),
     1, r"reading the first: ZeroDiv", "raises"),
    (of_code(PAIR.format(item="(features[i][:1 + (i > 9)], i % 2)")),
     1, r"stack expects each tensor to be equal size", "items of several shapes"),
]  # fmt: skip
BAD = [
    pytest.param(*case[:3], id=f"{form}, {case[3]}")
    for form, cases in (("csv", TABLES), ("folder", FOLDERS), ("arrays", ARRAYS), ("code", CODE))
    for case in cases
]
QUICK = ("--model", "linear", "--epochs", 1, "--compile", "off", "--audit-every", 0)


@pytest.mark.parametrize(("write", "code", "match"), BAD)
def test_what_cannot_be_learnt_from_is_one_line(
    write, code, match, tmp_path, module, run_cli, in_time, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = write(tmp_path, module)
    batch = () if "--batch-size" in args else ("--batch-size", 4)
    ended, _, err = run_cli("train", "--run-dir", "run", *QUICK, *batch, *args)
    (error,) = err.splitlines()
    assert error.startswith("error: ")
    assert re.search(match, error)
    assert ended == code
    assert not (tmp_path / "run").exists()
    assert none_left()


@pytest.mark.parametrize(("shape", "model", "least"), [
    ((1, 1, 3), "auto", 0), ((1, 9, 1), "lenet5", 0), ((9, 1, 3), "torchvision:squeezenet1_1", 24),
    ((1, 9, 3), "cifar-cnn", 8),
])  # fmt: skip
def test_images_of_a_pixel_each_way_are_learnt_or_the_least_size_is_named(
    shape, model, least, tmp_path, run_cli
):
    images = np.arange(20)[:, None, None, None] % 2 * 99 + pixels(20, *shape) // 2
    np.savez(tmp_path / "own.npz", images=images.astype(np.uint8), labels=np.arange(20) % 2)
    args = ("--dataset", tmp_path / "own.npz", "--model", model, "--batch-size", 4, *QUICK[2:])
    code, _, err = run_cli("train", "--run-dir", tmp_path / "run", *args)
    if least:
        assert code == 2
        assert f"{least}" in err.partition("image")[2]
        code, _, err = run_cli("train", "--run-dir", tmp_path / "run", *args, "--image-size", least)
    assert (code, but_learning(err)) == (0, "")


def test_one_test_example_is_judged(tmp_path, run_cli):
    arrays = {"x_train": FEATURES, "y_train": INDEX, "x_test": FEATURES[:1], "y_test": INDEX[:1]}
    np.savez(tmp_path / "own.npz", **arrays)
    args = ("--dataset", tmp_path / "own.npz", "--batch-size", 4, *QUICK)
    code, _, err = run_cli("train", "--run-dir", tmp_path / "run", *args)
    assert (code, but_learning(err)) == (0, "")
    for command in ("evaluate", "audit"):
        assert run_cli(command, tmp_path / "run")[0] == 0


@pytest.mark.usefixtures("no_figures")
def test_one_example_is_enough_to_take_a_step(tmp_path, run_cli):
    arrays = {"train_images": RGB[:1], "train_labels": [0], "classes": np.array(["a", "b"])}
    np.savez(tmp_path / "own.npz", test_images=RGB, test_labels=INDEX % 2, **arrays)
    args = ("--dataset", tmp_path / "own.npz", "--batch-size", 1, "--val-fraction", 0)
    code, _, err = run_cli("train", "--run-dir", tmp_path / "run", *QUICK, *args)
    assert (code, but_learning(err)) == (0, "")


# --- what is streamed ---

STREAMED = """
class Own(Dataset):
    def __init__(self, fails=lambda i: False):
        self.fails, self.targets = fails, labels

    def __len__(self): return n

    def __getitem__(self, i):
        if self.fails(i):
            raise BROKEN
        return features[i], int(labels[i])

BROKEN = ValueError("row 7 is torn")

def seven(i): return i == 7

def held(): return features, labels
def streamed(): return Own()
def broken(): return Own(seven)
"""
OPTIONS = {"model": "linear", "epochs": 2, "batch_size": 8, "compile": "off", "device": "cpu"}
OPTIONS |= {"workers": 0, "log_every": 1, "val_fraction": 0.2, "test_fraction": 0.2}


def in_two_forms(form, folder, module):
    """Return options of the same data held and streamed."""
    if form == "folder":
        write_folder(folder / "own", {name: RGB[i == INDEX] for i, name in enumerate(LETTERS)})
        own = {"dataset": str(folder / "own")}
        return own | {"stream": "off"}, own | {"stream": "on"}
    name = module(STREAMED)
    return {"dataset": f"{name}:held"}, {"dataset": f"{name}:streamed"}


def final(run):
    files = "checkpoint.safetensors", "model.safetensors"
    return {f"{f} {n}": t for f in files for n, t in runs.load_tensors(run / f)[0].items()}


def assert_same(run, other):
    a, b = final(run), final(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["folder", "code"])
def test_a_streamed_data_set_trains_to_the_bits_of_one_that_is_held(
    form, workers, tmp_path, module
):
    held, streamed = in_two_forms(form, tmp_path, module)
    streamed |= {"workers": workers}
    for name, options in (("held", held), ("streamed", streamed)):
        train(make_config(OPTIONS, options), tmp_path / name)
    assert_same(tmp_path / "held", tmp_path / "streamed")
    part, stop = tmp_path / "stopped", StopAt(3)
    assert not train(make_config(OPTIONS, streamed), part, should_stop=stop).finished
    assert none_left()
    assert resume(part, allow_import=True).finished
    assert_same(tmp_path / "held", part)
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text())
        for name in ("held", "streamed", "stopped")
    ]
    assert summaries[0]["test"] == summaries[1]["test"] == summaries[2]["test"]
    assert none_left()


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("form", ["folder", "code"])
def test_a_streamed_run_is_judged_and_audited_as_a_held_one(form, tmp_path, module, run_cli):
    for name, options in zip(
        ("held", "streamed"), in_two_forms(form, tmp_path, module), strict=True
    ):
        train(make_config(OPTIONS, options), tmp_path / name)
    both = tmp_path / "held", tmp_path / "streamed"
    for part in ("train", "validation", "test"):
        held, streamed = (
            runs.evaluate_run(run, EvaluateOptions(split=part, allow_import=True)) for run in both
        )
        assert torch.equal(held.evaluation.logits, streamed.evaluation.logits)
        assert torch.equal(held.evaluation.labels, streamed.evaluation.labels)
    held, streamed = (audit_run(run, AuditOptions(allow_import=True)).audit for run in both)
    assert torch.equal(held.balance.share, streamed.balance.share)
    assert torch.equal(held.balance.conflict, streamed.balance.conflict)
    assert held.count.tolist() == streamed.count.tolist()
    for command in ("evaluate", "audit"):
        assert run_cli(command, both[1], "--allow-import")[0] == 0
    assert none_left()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("form", ["folder", "code"])
def test_a_streamed_data_set_is_swept_as_a_held_one(form, tmp_path, module):
    key = "cat" if form == "folder" else "0"
    axes = [sweep.Axis("class_weight", key, (1.0, 4.0))]
    found = []
    for name, options in zip(
        ("held", "streamed"), in_two_forms(form, tmp_path, module), strict=True
    ):
        ended = swept(make_config(OPTIONS, options), axes, tmp_path / name)
        found.append([replace(p, chosen=False) for p in ended.choice.points])
    assert found[0] == found[1]
    assert_same(tmp_path / "held" / "chosen", tmp_path / "streamed" / "chosen")
    assert none_left()


def of_broken(raising, match, workers):
    """Return data of which one item raises, with what is said of it."""

    def write(folder, module):
        return ["--dataset", f"{module(STREAMED.replace('raise BROKEN', raising))}:broken"]

    return pytest.param(write, match, workers, id=f"{raising}, {workers} workers")


# to be read while it trains: the scale of the images is given
GIVEN = ("--stream", "on", "--pixel-mean", "0,0,0", "--pixel-std", "1,1,1")
TORN = [
    *(
        of_broken(f"raise {error}", match, workers)
        for workers in (0, 2)
        for error, match in (
            ("ValueError('row 7 is torn')", "ValueError: row 7 is torn"),
            ("KeyError('row 7')", "KeyError: 'row 7'"),
            ("ValueError('row 7\\nis torn')", "is torn"),
            ("StopIteration('row 7')", "StopIteration"),
        )
    ),
    of_broken(
        "import os; os._exit(9)",
        "^error: (a process that reads the data ended|reading ahead failed): .*workers 0", 2,
    ),
    *(
        pytest.param(
            of_folder({"a": RGB[:20], "b": RGB[20:40]}, *GIVEN, spoil=truncated),
            r"^error: cannot read .*own/a/0\.png: ", workers, id=f"image, {workers} workers",
        )
        for workers in (0, 2)
    ),
]  # fmt: skip


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("write", "match", "workers"), TORN)
def test_an_item_that_cannot_be_read_is_one_line(
    write, match, workers, tmp_path, module, run_cli, in_time
):
    args = ("--workers", workers, "--batch-size", 4, *write(tmp_path, module))
    code, _, err = run_cli("train", "--run-dir", tmp_path / "run", *QUICK, *args)
    (line,) = err.splitlines()
    assert code == 1
    assert re.search(match, line)
    assert none_left()


def test_nothing_else_is_said_when_the_command_ends(tmp_path, module):
    text = PAIR.format(item="(features[i][: 1 + (i > 9)], i % 2)")
    args = ["train", "--dataset", f"{module(text)}:load", "--workers", "2", "--run-dir", "run"]
    ran = subprocess.run(
        [sys.executable, "-m", "funcloss", *args], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert re.fullmatch(r"error: reading the data raised RuntimeError: stack .*\n", ran.stderr)


class Deadly(Dataset):
    """Its third item ends the process that reads it."""

    def __init__(self, number):
        self.number, self.targets = number, torch.arange(8)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 3:
            os.kill(os.getpid(), self.number)
        return torch.zeros(2), i


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE])
def test_a_process_that_dies_leaves_one_line(number, in_time, capfd):
    stream = data.Stream(Deadly(number), torch.arange(8), (2,), workers=1)
    with pytest.raises((DataError, RuntimeError), match=r"process|worker"):
        [*stream.batches(torch.arange(8).split(2))]
    assert capfd.readouterr() == ("", "")
    assert none_left()


def test_labels_of_items_that_are_not_those_told_are_refused(tmp_path, module):
    text = STREAMED.replace("int(labels[i])", "1 - int(labels[i])")
    with pytest.raises(DataError, match="label"):
        load(f"{module(text)}:streamed", workers=0)


# --- names of classes ---

ODD = [
    "<img src=x onerror=alert(1)>",
    "[red]no[/red]",
    "a, b=c",
    "猫 😀",
    "[/]",
    ":smile:",
    "$\\frac{$ & $2",
    "back\\",
    "=1+1",
]


@pytest.fixture
def odd_run(tmp_path, run_cli):
    """A run on classes of odd names, and what the command said."""
    rows = [[*x.tolist(), ODD[i % 9]] for i, x in enumerate(numbers(90, 2))]
    own = write_csv(tmp_path / "own.csv", ["a", "b", "kind"], rows)
    weights = [arg for name in ODD[:5] for arg in ("--class-weight", f"{name}=2")]
    said = run_cli(
        "train", "--run-dir", tmp_path / "run", *QUICK, "--dataset", own, "--target", "kind",
        *weights, "--batch-size", 8, "--audit-every", 3,
    )  # fmt: skip
    return tmp_path / "run", said


def test_names_of_classes_are_kept_in_a_run_and_printed_as_they_are(odd_run, tmp_path, run_cli):
    run, (code, out, err) = odd_run
    assert (code, but_learning(err)) == (0, "")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["class_weight"] == dict.fromkeys(ODD[:5], 2.0)
    assert sorted(summary["test"]["rules"]["argmax"]["recall"]) == sorted(ODD)
    assert list(runs.load(run).classes) == sorted(ODD)
    assert (run / "confusion.png").exists()
    assert {*ODD} >= line_of(run) > set()
    code, out, err = run_cli("evaluate", run, "--csv", tmp_path / "guesses.csv")
    assert (code, but_learning(err)) == (0, "")
    firsts = [line for line in out.splitlines() if re.search(r" +\d+ +\d+\.\d+% +", line)]
    for name in ODD:
        assert any(re.match(re.escape(name) + " {2}", line) for line in firsts), name
    with (tmp_path / "guesses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"].removeprefix("'") for row in rows} <= set(ODD)
    assert len(rows) == 9


def line_of(run):
    """Return the names of the classes that audits of steps were recorded of."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["class"] for r in records if r["kind"] == "audit"}


def test_names_of_classes_are_harmless_in_an_audit(odd_run, run_cli):
    run, _ = odd_run
    code, out, err = run_cli("audit", run)
    assert (code, but_learning(err)) == (0, "")
    rows = [line for line in out.splitlines() if re.search(r"\d%", line)]
    for name in ODD:
        assert any(line.startswith(f"{name} ") for line in rows), name
    page = (run / "audit.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    with (run / "audit_classes.csv").open(newline="") as file:
        found = [row["name"] for row in csv.DictReader(file)]
    assert sorted(name.removeprefix("'") for name in found) == sorted(ODD)  # "'=1+1", no formula
    named = json.loads((run / "audit.json").read_text())["classes"]
    assert [row["name"] for row in named] == sorted(ODD)


def test_names_of_classes_are_harmless_in_a_sweep(odd_run, tmp_path, run_cli):
    axis = ("--class-weight", f"{ODD[0]}=1,3", "--class-weight", f"{ODD[2]}=1,2")
    args = ("--dataset", tmp_path / "own.csv", "--target", "kind", "--batch-size", 8)
    code, out, err = run_cli("sweep", "--out", tmp_path / "sweep", *QUICK, *args, *axis)
    assert (code, but_learning(err)) == (0, "")
    assert f"class_weight {ODD[0]}=3" in out
    assert f"recall {ODD[2]}" in out
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page


@pytest.mark.parametrize("name", ["$a$ and $b$", "$\\frac{$", "$", "5 $ to 6 $", "a_b^c", "\\$x$"])
def test_names_of_classes_are_no_mathematics_in_figures(name):
    from funcloss.app.report import run_figures as figures

    figure = figures.confusion(torch.tensor([[1, 2], [3, 4]]), (name, "other"))
    figure.canvas.draw()
    label = figure.axes[0].get_xticklabels()[0]
    # what matplotlib draws, and whether as mathematics
    assert label._preprocess_math(label.get_text()) == (name, False)
    images = torch.zeros(1, 4, 4, 1, dtype=torch.uint8)
    drawn = figures.predictions(images, [name], ["other"])
    drawn.canvas.draw()
    title = drawn.axes[0].title
    assert title._preprocess_math(title.get_text())[0].endswith(f"Truth: {name}")
    assert not title._preprocess_math(title.get_text())[1]


# --- a model on other data ---


@pytest.mark.usefixtures("no_figures")
def test_a_model_of_many_classes_is_judged_on_a_few_examples(tmp_path, run_cli):
    rows = [[*x.tolist(), f"k{i % 6}"] for i, x in enumerate(numbers(60, 2))]
    header = ["a", "b", "kind"]
    own = write_csv(tmp_path / "own.csv", header, rows)
    run = tmp_path / "run"
    args = ("--dataset", own, "--target", "kind", "--batch-size", 8)
    assert run_cli("train", "--run-dir", run, *QUICK, *args)[0] == 0
    few = write_csv(tmp_path / "few.csv", header, rows[:3])
    code, out, err = run_cli("evaluate", run, "--dataset", few)
    assert (code, but_learning(err)) == (0, "")
    assert "on 3 examples of few, test" in out
    other = write_csv(tmp_path / "other.csv", header, [[1, 2, "k9"]])
    code, _, err = run_cli("evaluate", run, "--dataset", other)
    assert code == 1
    assert re.fullmatch(r"error: .*unknown class 'k9'; the classes are k0, .*k5\n", err)


@pytest.mark.usefixtures("no_figures")
def test_the_rows_of_a_table_are_predicted_without_their_classes(tmp_path, run_cli):
    rows = [[*x.tolist(), f"k{i % 2}"] for i, x in enumerate(numbers(60, 2))]
    own = write_csv(tmp_path / "own.csv", ["a", "b", "kind"], rows)
    run = tmp_path / "run"
    args = ("--dataset", own, "--target", "kind", "--batch-size", 8)
    assert run_cli("train", "--run-dir", run, *QUICK, *args)[0] == 0
    bare = write_csv(tmp_path / "bare.csv", ["b", "a"], [[b, a] for a, b, _ in rows[:4]])
    loaded = runs.load(run)
    scaled = data.normalised(torch.tensor([row[:2] for row in rows[:4]]), loaded.mean, loaded.std)
    expected = loaded.rule.log_probs(loaded.model(scaled)).exp().max(-1)
    code, out, _ = run_cli("predict", run, bare)
    assert code == 0
    assert out.splitlines() == [
        f"{bare}:{i + 1}: k{guess} ({probability:.1%})"
        for i, (probability, guess) in enumerate(
            zip(expected.values.tolist(), expected.indices.tolist(), strict=True)
        )
    ]


# --- memory ---

MEASURE = """
import sys, time
import torch
from pathlib import Path
from funcloss.app.data import LoadOptions, load_dataset

def resident(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])

small, large = sys.argv[1:3]
options = {"target": "y"} if large.endswith(".csv") else {"image_size": 0}
load_dataset(LoadOptions(small, **options))  # what is imported on the way is not the data
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before, begin = resident("VmRSS"), time.perf_counter()
read = load_dataset(LoadOptions(large, **options))
seconds, grown = time.perf_counter() - begin, resident("VmHWM") - before
tensors = [t for part in read.splits.values() for t in (part.inputs, part.labels)]
print(grown, sum(t.numel() * t.element_size() for t in tensors), seconds)
"""
# Indices of the examples and a permutation of them, 8 bytes an example each; a million values at a
# time in float64 for the scale; buffers of the file; what the allocator keeps.
ALLOWED = 64 * 2**20


def measured(small, large):
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown, held, seconds = ran.stdout.split()
    print(f"{Path(large).name}: {int(grown) / 2**20:.0f} MiB more at the peak, for "
          f"{int(held) / 2**20:.0f} MiB of tensors, in {float(seconds):.1f} s")  # fmt: skip
    return int(grown), int(held)


def _large_csv(path, rows, columns=12):
    lines = [",".join(f"{x:.6g}" for x in row) for row in numbers(1000, columns)]
    block = "".join(f"{line},{'np'[i % 2]}\n" for i, line in enumerate(lines))
    header = ",".join(f"c{i}" for i in range(columns)) + ",y\n"
    path.write_text(header + block * (rows // 1000))


def _large_npz(path, rows, dtype=np.uint8):
    np.savez(path, images=pixels(rows, 32, 32, 3).astype(dtype), labels=np.arange(rows) % 10)


def _large_folder(path, rows):
    one = Image.fromarray(pixels(200, 200, 3))
    for name in "ab":
        (path / name).mkdir(parents=True)
        one.save(path / name / "0.png")
        for i in range(1, rows // 2):
            os.link(path / name / "0.png", path / name / f"{i}.png")


LARGE = [
    pytest.param(_large_csv, ".csv", 1_000_000, 6, id="csv", marks=pytest.mark.slow),
    pytest.param(_large_csv, ".csv", 200_000, 6, id="csv, a fifth"),
    pytest.param(_large_npz, ".npz", 60_000, 2, id="npz", marks=pytest.mark.slow),
    pytest.param(
        lambda path, rows: _large_npz(path, rows, np.float32), ".npz", 20_000, 2, id="npz, float",
        marks=pytest.mark.slow,
    ),
    pytest.param(_large_folder, "", 2_000, 2, id="folder", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's accounts")
@pytest.mark.parametrize(("write", "suffix", "rows", "times"), LARGE)
def test_reading_takes_no_more_than_a_few_times_the_memory(write, suffix, rows, times, tmp_path):
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    write(small, 1000 if suffix else 10)
    write(large, rows)
    grown, held = measured(small, large)
    assert grown <= times * held + ALLOWED


def test_what_is_said_of_the_own_data_of_a_run_is_not_asked_of_other_data(tmp_path, run_cli):
    of_folder({"p": RGB[:20], "q": RGB[20:40]})(tmp_path, None)
    np.savez(tmp_path / "new.npz", images=RGB[:6], labels=np.array(["p", "q"] * 3))
    args = ("--dataset", tmp_path / "own", "--stream", "on", "--test-fraction", 0.2)
    code, _, err = run_cli("train", "--run-dir", tmp_path / "run", *QUICK, "--batch-size", 4, *args)
    assert (code, but_learning(err)) == (0, "")
    code, out, err = run_cli("evaluate", tmp_path / "run", "--dataset", tmp_path / "new.npz")
    assert (code, but_learning(err)) == (0, "")
    assert "on 6 examples of new, test" in out
    code, _, err = run_cli("evaluate", tmp_path / "run", "--dataset", "mnist-sample")
    assert code == 2
    assert "the model tells 2 classes" in err
