"""Tables as people have them: read right, or refused with the place and the cure."""

import csv
import gzip
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import but_learning, resume
from safetensors import safe_open
from safetensors.torch import save_file

from funcloss.app import runs, sweep
from funcloss.app.config import make_config
from funcloss.app.data import Column, LoadOptions, load_dataset
from funcloss.app.train import train
from funcloss.errors import ConfigError, DataError, RunError

LINEAR = {"model": "linear", "target": "y", "compile": "off", "device": "cpu"}

# --- look-alikes of public tables, in the form in which they are published ---


def german(path, pick):
    """UCI's german.data: no header, codes and numbers apart by spaces, one at the end of a line."""
    rows = [
        f"A1{pick(4)} {4 + pick(50)} A3{pick(5)} A4{pick(9)} {250 + pick(9000)} {1 + pick(2)} "
        for _ in range(200)
    ]
    path.write_text("\n".join(rows) + "\n")


def adult(path, pick):
    """UCI's adult.data: no header, a space after each comma, ``?`` where nothing is known."""
    rows = []
    for _ in range(200):
        age = 17 + pick(70)
        work, pay = ["Private", "State-gov", "?"][pick(3)], [" <=50K", " >50K"][age > 50]
        rows.append(f"{age}, {work}, {10_000 + pick(90_000)}, {['Male', 'Female'][pick(2)]},{pay}")
    path.write_text("\n".join(rows) + "\n\n")


def titanic(path, pick):
    """Kaggle's train.csv: names with commas and quotes, empty cells, tickets that hardly repeat."""
    rows = ["PassengerId,Survived,Pclass,Name,Sex,Age,Ticket,Fare,Cabin,Embarked"]
    for i in range(200):
        sex = ["male", "female"][pick(2)]
        age, cabin = ["", "22", "0.42"][pick(3)], ["", "C85"][pick(2)]
        name = f'"Braund{i}, Mr. ""Owen"" {i}"'
        rows.append(f"{i},{int(sex == 'female')},{1 + pick(3)},{name},{sex},{age},A/5 {i},"
                    f"{pick(9000) / 100},{cabin},{'SCQ'[pick(3)]}")  # fmt: skip
    path.write_text("\n".join(rows))


def wine(path, pick):
    """UCI's winequality-red.csv: semicolons, quoted names with spaces, a grade as the class."""
    rows = ['"fixed acidity";"volatile acidity";"quality"']
    rows += [f"{q + pick(9) / 10};{pick(99) / 100};{q}" for q in (5, 6, 7) for _ in range(60)]
    path.write_text("\n".join(rows))


def bank(path, pick):
    """UCI's bank.csv: semicolons, quoted text, negative numbers."""
    rows = ['"age";"job";"balance";"y"']
    for _ in range(200):
        age = 18 + pick(70)
        job = ["admin.", "unknown", "services"][pick(3)]
        rows.append(f'{age};"{job}";{pick(9000) - 900};"{["no", "yes"][age > 50]}"')
    path.write_text("\n".join(rows))


PUBLIC = {
    "german.data": (german, "column_6", 5, "no header"),
    "adult.data": (adult, "column_5", 4, "column_2 3 categories"),
    "titanic.csv": (titanic, "Survived", 7, "Age numbers, .* set to the median"),
    "wine.csv": (wine, "quality", 2, ""),
    "bank.csv": (bank, "y", 3, "job 3 categories"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_tables_are_read_as_they_are(name, tmp_path):
    write, target, columns, said = PUBLIC[name]
    write(tmp_path / name, random.Random(0).randrange)
    read = load_dataset(LoadOptions(str(tmp_path / name), target=target))
    assert len(read.columns) == columns
    features = [feature for column in read.columns for feature in column.features]
    assert read.input_shape == (len(features),)
    assert re.search(said, " ".join((*read.notes, *features)))
    assert sum(len(part.labels) for part in read.splits.values()) in (180, 200)


def test_a_table_of_text_dates_and_gaps_trains_predicts_and_evaluates_alike(tmp_path, run_cli):
    titanic(tmp_path / "t.csv", random.Random(0).randrange)
    run = tmp_path / "run"
    options = ("--dataset", tmp_path / "t.csv", "--target", "Survived", "--model", "linear")
    code, out, err = run_cli("train", "--run-dir", run, *options, "--epochs", 30, "--batch-size", 8)
    assert (code, but_learning(err)) == (0, "")
    assert "Name left out, as its" in out
    summary = runs.folder.read_summary(run)
    assert summary["test"]["rules"]["argmax"]["accuracy"][0] > 0.95  # the sex decides
    # Unknown categories, a gap where training had none, columns in another order and more of them.
    (tmp_path / "new.csv").write_text(
        "Sex,Embarked,Pclass,Fare,Age,Cabin,Ticket,Name,PassengerId,more\n"
        "female,X,3,7.5,,Z99,new,Who,900,1\nmale,,,,30,,,,,\n"
    )
    code, out, err = run_cli("predict", run, tmp_path / "new.csv")
    assert (code, err) == (0, "")
    assert [line.split(": ")[1].split(" ")[0] for line in out.splitlines()] == ["1", "0"]
    pandas = pytest.importorskip("pandas")
    model = runs.load(run)
    frame = pandas.read_csv(tmp_path / "new.csv")
    assert model.decide(frame).names == ["1", "0"]
    assert {column.name for column in model.columns} >= {"Sex", "Age", "Embarked"}


# --- one column at a time ---

WAYS = {  # the cells of a column, how it is read, and its first two features
    "numbers": (["1", "2.5"], "number", [1.0, 2.5]),
    "signs and powers": (["+1", "-2e3"], "number", [1.0, -2000.0]),
    "decimal commas": (["1,5", "-2,25"], "number", [1.5, -2.25]),
    "a gap": (["1", "NA", "3"], "number", [1.0, 2.0]),  # the median of 1 and 3
    "iso dates": (["1970-01-02", "1970-01-03"], "date", [1.0, 2.0]),
    "dates with a time": (["1970-01-02 12:00", "1970-01-03T00:00"], "date", [1.5, 2.0]),
    "dotted dates": (["02.01.1970", "03.01.1970"], "date", [1.0, 2.0]),
    "days first": (["13/01/1970", "03/01/1970"], "date", [12.0, 2.0]),
    "booleans": (["True", "False"], "category", [0.0, 1.0]),
    "text": (["red", "blue"], "category", [0.0, 1.0]),
    "text and gaps": (["red", ""], "category", [0.0, 1.0]),
}


@pytest.mark.parametrize(("cells", "kind", "expected"), WAYS.values(), ids=WAYS.keys())
def test_a_column_becomes_what_it_holds(cells, kind, expected, tmp_path):
    rows = [f"{cells[i % len(cells)]};{'pq'[i % 2]}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["a;y", *rows]))
    options = LoadOptions(str(tmp_path / "t.csv"), target="y", val_fraction=0, test_fraction=0.1)
    read = load_dataset(options)
    (column,) = read.columns
    assert column.kind == kind
    first = {tuple(row) for row in torch.cat([read.train.inputs, read.test.inputs]).tolist()}
    if kind == "category":
        assert len(column.features) == len(cells)
        assert first == {tuple(float(i == j) for j in range(len(cells))) for i in range(len(cells))}
    else:
        assert {row[0] for row in first} >= set(expected)


def test_thousands_are_apart_by_commas_in_a_file_of_commas(tmp_path):
    rows = [f'"{n},{i:03}",{"pq"[i % 2]}' for i in range(40) for n in (1, 12)]
    (tmp_path / "t.csv").write_text("\n".join(["a,y", *rows]))
    read = load_dataset(LoadOptions(str(tmp_path / "t.csv"), target="y"))
    assert {float(x) for x in read.train.inputs[:, 0]} <= {
        1000.0 * n + i for n in (1, 12) for i in range(40)
    }


def test_rare_categories_are_pooled_and_unknown_ones_fall_among_them(tmp_path):
    cells = ["often"] * 60 + ["also"] * 30 + [f"once{i}" for i in range(10)]
    rows = [f"{cell},{'pq'[i % 2]}" for i, cell in enumerate(cells)]
    (tmp_path / "t.csv").write_text("\n".join(["a,y", *rows]))
    options = LoadOptions(str(tmp_path / "t.csv"), target="y", val_fraction=0, test_fraction=0)
    read = load_dataset(options)
    assert read.columns[0].features == ("a=also", "a=often", "a=(others)")
    assert read.train.inputs.sum(0).tolist() == [30, 60, 10]


def test_medians_and_categories_are_those_of_the_training_split(tmp_path):
    rows = ["a,b,y"] + [f"{i},{'uv'[i % 2]},{'pq'[i % 2]}" for i in range(40)]
    other = ["a,b,y"] + [f"{1000 + i},w,{'pq'[i % 2]}" for i in range(40)] + [",,p"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    (tmp_path / "o.csv").write_text("\n".join(other))
    options = LoadOptions(
        str(tmp_path / "t.csv"), target="y", val_fraction=0, test_dataset=str(tmp_path / "o.csv")
    )
    read = load_dataset(options)
    assert read.columns == (
        Column("a", "number", 19.5),
        Column("b", "category", levels=("u", "v")),
    )
    assert read.test.inputs[-1].tolist() == [19.5, 0.0, 0.0]


def test_large_numbers_are_kept_apart(tmp_path):
    """Float32 rounds 1,700,000,000 + 0..59 to one number."""
    rows = ["t,y"] + [
        f"{1_700_000_000 + i % 60},{'no' if i % 60 < 30 else 'yes'}" for i in range(2000)
    ]
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write("\n".join(rows))
    made = make_config(LINEAR, {"dataset": str(tmp_path / "t.csv.gz"), "epochs": 20})
    outcome = train(made, tmp_path / "run", show=lambda event: None)
    assert outcome.summary["test"]["rules"]["argmax"]["accuracy"][0] > 0.97


def test_a_parquet_file_is_read_as_the_csv_file_of_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    titanic(tmp_path / "t.csv", random.Random(0).randrange)
    frame = pandas.read_csv(tmp_path / "t.csv")
    frame["when"] = pandas.to_datetime("2024-01-01") + pandas.to_timedelta(frame.index % 9, "D")
    frame["old"] = frame["Age"] > 20
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    csv, parquet = (
        load_dataset(LoadOptions(str(tmp_path / f"t{suffix}"), target="Survived"))
        for suffix in (".csv", ".parquet")
    )
    assert csv.columns == parquet.columns
    assert csv.train.inputs.equal(parquet.train.inputs)
    assert csv.test.labels.equal(parquet.test.labels)


def test_an_index_without_a_name_is_left_out(tmp_path):
    (tmp_path / "t.csv").write_text(
        ",a,y\n" + "".join(f"{i},{i % 7},{'pq'[i % 2]}\n" for i in range(40))
    )
    read = load_dataset(LoadOptions(str(tmp_path / "t.csv"), target="y"))
    assert [column.name for column in read.columns] == ["a"]
    assert "no name" in " ".join(read.notes)


def test_what_is_in_an_ignored_column_does_not_matter(tmp_path):
    long = f'"{"x" * 200_000}\n,;"'
    rows = "".join(f"{i},{long},{'pq'[i % 2]}\n" for i in range(20))
    (tmp_path / "t.csv").write_text(f"a,note,y\n{rows}")
    read = load_dataset(LoadOptions(str(tmp_path / "t.csv"), target="y", ignore=("note",)))
    assert [column.name for column in read.columns] == ["a"]


def test_rows_without_a_class_are_left_out_on_request(tmp_path):
    rows = [f"{i},{['p', 'q', 'NA', ''][i % 4]}" for i in range(80)]
    (tmp_path / "t.csv").write_text("\n".join(["a,y", *rows]))
    with pytest.raises(DataError, match=r"no 'y', the class, in 40 rows \(3, 4, 7, .*drop_unlab"):
        load_dataset(LoadOptions(str(tmp_path / "t.csv"), target="y"))
    options = LoadOptions(str(tmp_path / "t.csv"), target="y", drop_unlabelled=True)
    read = load_dataset(options)
    assert read.classes == ("p", "q")
    assert sum(len(part.labels) for part in read.splits.values()) == 40
    assert {int(x) % 4 for x in read.train.inputs[:, 0]} == {0, 1}


@pytest.mark.parametrize(
    ("names", "order", "expected"),
    [
        (["1.0", "11.0", "2.0"], (), ("1.0", "2.0", "11.0")),
        (["low", "high", "medium"], (), ("high", "low", "medium")),
        (["low", "high", "medium"], ("low", "medium", "high"), ("low", "medium", "high")),
    ],
)
def test_classes_are_in_the_order_of_their_values_or_the_one_that_is_asked_for(
    names, order, expected, tmp_path
):
    rows = [f"{i},{names[i % 3]}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["a,y", *rows]))
    options = LoadOptions(str(tmp_path / "t.csv"), target="y", class_order=order)
    read = load_dataset(options)
    assert read.classes == expected
    for x, label in zip(read.train.inputs[:, 0].tolist(), read.train.labels.tolist(), strict=True):
        assert expected[label] == names[int(x) % 3]


def test_an_order_that_misses_a_class_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,y\n" + "1,low\n2,high\n" * 20)
    options = LoadOptions(str(tmp_path / "t.csv"), target="y", class_order=("low", "hgih"))
    with pytest.raises(
        ConfigError, match=r"class_order must name every class of t once: high, low"
    ):
        load_dataset(options)


REFUSED = {
    "a typo among numbers": (
        "a,y\n" + "1,p\n2,q\n" * 20 + "12O,p\n",
        "row 41, column 'a': '12O' is not a number",
    ),
    "text that never repeats": (
        "a,y\n" + "".join(f"t{i},{'pq'[i % 2]}\n" for i in range(40)),
        "no column but its target",
    ),
    "two columns of one name": ("a,a,y\n1,2,p\n3,4,q\n", "two columns are called 'a'"),
    "a cut-off row": ("a,b,y\n" + "1,2,p\n3,4,q\n" * 20 + "5,6", "row 41 has 2 cells"),
    "bytes of 0": ("a,y\n1,p\n\0\0\n", "bytes of 0"),
    "an open quote": ('a,y\n1,p\n2,"q\n' * 3, "is not a table of text|cells"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_table_that_cannot_be_right_is_refused(text, message, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises((DataError, ConfigError), match=message):
        load_dataset(LoadOptions(str(tmp_path / "t.csv"), target="y"))


@pytest.mark.parametrize("where", [0, 12, 40])
def test_a_packed_file_that_is_damaged_is_one_line(where, tmp_path):
    packed = bytearray(gzip.compress("".join(f"{i},{'pq'[i % 2]}\n" for i in range(90)).encode()))
    packed[where : where + 20] = bytes(20)
    (tmp_path / "t.csv.gz").write_bytes(packed)
    with pytest.raises(DataError, match="t.csv.gz is not a table of text|cannot read"):
        load_dataset(LoadOptions(str(tmp_path / "t.csv.gz"), target="column_2"))


def test_without_pandas_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    (tmp_path / "t.csv").write_text("a,y\n1,p\n2,q\n")
    with pytest.raises(
        ConfigError, match=r"pandas is not installed: pip install 'funcloss\[tables\]"
    ):
        load_dataset(LoadOptions(str(tmp_path / "t.csv"), target="y"))


# --- what is said first ---


def test_a_training_begins_with_the_classes_of_each_split_and_what_is_doubtful(tmp_path, run_cli):
    rows = ["1,p"] * 30 + ["2,q"] * 25 + ["3,rare"] * 2
    (tmp_path / "t.csv").write_text("\n".join(["a,y", *rows]))
    args = ("--dataset", tmp_path / "t.csv", "--target", "y", "--epochs", 1, "--batch-size", 8)
    code, out, err = run_cli("train", "--run-dir", tmp_path / "run", *args)
    assert code == 0
    table = [line.split() for line in out.splitlines()[:5]]
    assert ["class", "training", "validation", "test"] in table
    assert ["p", "24", "3", "3"] in table
    assert "answering p always: accuracy" in out
    assert "split has no example of rare" in err
    assert "fewer than 10 training examples of rare" in err
    assert "test inputs occur in the training split too" in err


@pytest.mark.parametrize("n", [1, 5])
def test_times_in_float64_survive_the_run_folder(n, tmp_path):
    rows = ["t,y"] + [f"{1_700_000_000.25 + i},{'pq'[i % 2]}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    made = make_config(LINEAR, {"dataset": str(tmp_path / "t.csv"), "epochs": 1})
    train(made, tmp_path / "run", show=lambda event: None)
    model = runs.load(tmp_path / "run")
    assert model.mean.dtype == torch.float64
    inputs = torch.tensor([[1_700_000_000.25 + i] for i in range(n)], dtype=torch.float64)
    scaled = (inputs - model.mean) / model.std
    assert np.ptp(scaled.numpy()) > 0 or n == 1
    assert Path(tmp_path / "run" / "model.safetensors").exists()


# --- the data of a run, later ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a table, its folder and the rows."""
    place = tmp_path_factory.mktemp("trained")
    rows = [(i % 7, 9 - i % 5, "pq"[(i % 7) > (9 - i % 5) - 4]) for i in range(120)]
    write_rows(place / "t.csv", ["a", "b", "y"], rows)
    made = make_config(LINEAR, {"dataset": str(place / "t.csv"), "epochs": 20})
    outcome = train(made, place / "run", show=lambda event: None)
    return place, rows, outcome.summary["test"]["rules"]["argmax"]["accuracy"][0]


def write_rows(path, header, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")


def test_columns_in_another_order_are_matched_by_name(trained, run_cli):
    place, rows, accuracy = trained
    write_rows(place / "t.csv", ["y", "b", "a"], [(y, b, a) for a, b, y in rows])
    code, out, err = run_cli("evaluate", place / "run")
    assert code == 0
    assert f"accuracy {accuracy:.2%}" in out
    write_rows(place / "t.csv", ["a", "b", "y"], rows)


def test_a_class_that_was_renamed_is_refused(trained, run_cli):
    place, rows, _ = trained
    write_rows(place / "t.csv", ["a", "b", "y"], [(a, b, {"p": "r"}.get(y, y)) for a, b, y in rows])
    for command in ("evaluate", "audit"):
        code, _, err = run_cli(command, place / "run")
        assert code == 1
        assert re.search("t has the classes q, r, and the run was trained on p, q", err)
    write_rows(place / "t.csv", ["a", "b", "y"], rows)


def test_a_sweep_does_not_go_on_with_changed_data(tmp_path):
    rows = [(i % 7, i % 3, "pn"[i % 2]) for i in range(60)]
    write_rows(tmp_path / "t.csv", ["a", "b", "y"], rows)
    made = make_config(
        LINEAR, {"dataset": str(tmp_path / "t.csv"), "epochs": 3, "batch_size": 8, "check": False}
    )
    axis = sweep.Axis("class_weight", "n", (2.0, 4.0))
    spec = sweep.SweepSpec(made, [axis], method="loop")
    asked = iter([False] * 3)
    out = tmp_path / "s"
    assert not sweep.sweep(spec, out, should_stop=lambda: next(asked, True)).finished
    write_rows(tmp_path / "t.csv", ["a", "b", "y"], [(a + 1, b, y) for a, b, y in rows])
    with pytest.raises(RunError, match="t has changed since .* begin another sweep"):
        sweep.sweep(sweep.read_spec(out), out, resume=True)
    write_rows(tmp_path / "t.csv", ["a", "b", "y"], rows)
    assert sweep.sweep(sweep.read_spec(out), out, resume=True).finished


def test_data_that_has_changed_is_said_and_no_run_goes_on_with_it(trained, run_cli, tmp_path):
    place, rows, _ = trained
    stop = tmp_path / "stopped"
    made = make_config(LINEAR, {"dataset": str(place / "t.csv"), "epochs": 20})
    asked = iter([False, True])
    outcome = train(made, stop, show=lambda event: None, should_stop=lambda: next(asked, True))
    assert not outcome.finished
    write_rows(place / "t.csv", ["a", "b", "y"], [(a + 1, b, y) for a, b, y in rows])
    _, out, err = run_cli("evaluate", place / "run")
    assert "t has changed since the run was trained" in out + err
    with pytest.raises(RunError, match="t has changed since"):
        resume(stop)
    write_rows(place / "t.csv", ["a", "b", "y"], rows)
    assert resume(stop).finished


def test_decisions_name_the_row_of_the_file(trained, run_cli, tmp_path):
    place, rows, _ = trained
    assert run_cli("evaluate", place / "run", "--csv", tmp_path / "out.csv")[0] == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        decided = list(csv.DictReader(file))
    assert {row["file"] for row in decided} == {str(place / "t.csv")}
    assert len({row["row"] for row in decided}) == len(decided) == 12
    for row in decided:
        assert row["label"] == rows[int(row["row"]) - 1][2]


def test_weights_that_are_no_numbers_predict_nothing(trained, run_cli, tmp_path):
    place, _, _ = trained
    run = shutil.copytree(place / "run", tmp_path / "run")
    with safe_open(run / "model.safetensors", framework="pt") as file:
        names, header = list(file.keys()), file.metadata()
        spoilt = {name: torch.full_like(file.get_tensor(name), torch.nan) for name in names}
    save_file(spoilt, run / "model.safetensors", header)
    code, out, err = run_cli("predict", run, place / "t.csv")
    assert (code, out) == (1, "")
    assert "is not a number" in err


def test_what_arrow_says_of_a_damaged_file_is_one_line(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"a": [1.0] * 20, "y": ["p", "q"] * 10}).to_parquet(tmp_path / "t.parquet")
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    said = []
    for place in range(len(content) - 300, len(content) - 8, 7):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        (tmp_path / "t.parquet").write_bytes(damaged)
        try:
            load_dataset(LoadOptions(str(tmp_path / "t.parquet"), target="y"))
        except (DataError, ConfigError) as error:
            said.append(str(error))
    assert said
    assert not any("\n" in text for text in said)
