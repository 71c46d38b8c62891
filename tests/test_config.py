import inspect
import subprocess
import sys

import pytest

from funcloss import reduction
from funcloss.app import config, registry
from funcloss.decisions import read_cost_matrix
from funcloss.errors import ConfigError


def test_later_layers_win():
    made = config.make_config({"epochs": 1, "seed": 3}, {"epochs": 2})
    assert (made.epochs, made.seed, made.batch_size) == (2, 3, 0)


def test_numbers_become_the_type_of_their_field():
    made = config.make_config({"learning_rate": 1, "epochs": 2.0, "betas": [0, 0.5]})
    assert isinstance(made.learning_rate, float)
    assert isinstance(made.epochs, int)
    assert made.betas == (0.0, 0.5)


def test_the_choices_are_the_names_of_the_registry():
    choices = {row.name: row.option.choices for row in config.fields()}
    for option, rows in registry.ROWS.items():
        assert tuple(name for name in choices[option] if name != "auto") == tuple(rows)
    assert choices["dataset"][1:] == config.DATASETS
    assert set(registry.REDUCTIONS) < set(reduction.REDUCTIONS)


ROWS = [row for rows in registry.ROWS.values() for row in rows.values()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_name_is_an_alias_of_an_address_and_takes_what_that_takes(row):
    thing = row.load()
    assert callable(thing)
    option = next(o for o, rows in registry.ROWS.items() if rows.get(row.name) is row)
    made = config.make_config({option: row.address, **NEEDED.get(row.name, {})})
    assert getattr(made, option) == row.name
    if option in ("optimizer", "schedule"):  # whose arguments are options of a run
        options = {"every": "decay_every", "factor": "decay_factor"}
        own = {"steps", "final", "start"}  # of a run's length, or left at their defaults
        taken = {options.get(name, name) for name in inspect.signature(thing).parameters}
        assert taken - own == set(row.takes)


NEEDED = {"weighted_mean": {"class_weight": {"9": 5}}}


REFUSED = [
    ({"epoch": 3}, r"unknown option 'epoch' \(did you mean 'epochs'\?\)"),
    ({"model": "lenet"}, r"model must be one of .*; got 'lenet' \(did you mean 'lenet5'\?\)"),
    ({"model": 3}, "model must be a str, got 3"),
    ({"epochs": 1.5}, "epochs must be a whole number or auto, got 1.5"),
    ({"epochs": "3"}, "epochs must be a whole number or auto, got '3'"),
    ({"epochs": True}, "epochs must be a whole number or auto, got True"),
    ({"epochs": -1}, r"epochs must be at least 0 and at most 1e\+06, got -1"),
    ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
    ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
    ({"val_fraction": 1.0}, "val_fraction must be at least 0 and at most 0.8, got 1.0"),
    ({"class_weight": {"9": -1}}, "class_weight 9 must be at least 0, got -1"),
    ({"class_weight": {"9": float("nan")}}, "class_weight 9 must be finite, got nan"),
    ({"class_weight": 5}, "class_weight must be a table of numbers, got 5"),
    ({"class_weight": "balance"}, "a table of numbers, balanced or balanced:POWER with a power"),
    ({"class_weight": "balanced:11"}, "above 0 and at most 10; got 'balanced:11'"),
    ({"imbalance": 0.5}, "imbalance must be at least 1, got 0.5"),
    ({"loss_option": {"gamma": "2"}}, "loss_option gamma must be a number, got '2'"),
    ({"loss_option": {"gamma": True}}, "loss_option gamma must be a number, got True"),
    ({"cost_matrix": 5}, "cost_matrix must be a table of tables, got 5"),
    ({"cost_matrix": {"9": 5}}, "cost_matrix 9 must be a table of numbers, got 5"),
    ({"cost_matrix": {"9": {"4": "x"}}}, "cost_matrix 9 4 must be a number, got 'x'"),
    ({"cost_matrix": {"9": {"4": float("inf")}}}, "cost_matrix 9 4 must be finite, got inf"),
    ({"prior": {"9": 1.5}}, "prior 9 must be at least 0 and at most 1, got 1.5"),
    ({"class_cost": {"9": -1}}, "class_cost 9 must be at least 0, got -1"),
    ({"floor": {"9": float("nan")}}, "floor 9 must be finite, got nan"),
    ({"betas": [0.9]}, "betas must be two numbers, got 1"),
    ({"betas": 0.9}, "betas must be a list of numbers, got 0.9"),
    ({"pixel_mean": [0.5]}, "pixel_mean and pixel_std must be given together"),
    ({"pixel_mean": [0.5], "pixel_std": [0]}, "pixel_std must be above 0, got 0"),
    ({"nesterov": "yes"}, "nesterov must be a bool, got 'yes'"),
    ({"optimizer": "sgd", "nesterov": True, "momentum": 0}, "nesterov needs momentum above 0"),
    ({"reduction": "weighted_mean"}, "reduction weighted_mean needs a class_weight"),
    ({"amp": "bf16", "device": "cpu"}, "amp bf16 needs device cuda, got cpu"),
]


@pytest.mark.parametrize(("layer", "message"), REFUSED, ids=[str(layer) for layer, _ in REFUSED])
def test_a_wrong_option_says_what_was_expected_and_what_came(layer, message):
    with pytest.raises(ConfigError, match=message):
        config.make_config(layer)


@pytest.mark.parametrize("name", config.recipe_names())
def test_recipes_are_valid(name):
    made = config.make_config(config.read_recipe(name))
    assert made.val_fraction == 0.0


OF_ONE_CHOICE = {  # layers, the earliest first, and what is refused; empty: nothing
    "of another optimiser": (
        [{"optimizer": "adam", "momentum": 0.5}],
        "momentum is an option of optimizer sgd, and the optimizer is adam: leave momentum out, or "
        "use optimizer sgd",
    ),
    "at its default": ([{"optimizer": "adamw", "momentum": 0.9}], "momentum is an option of opt"),
    "of another than the default": ([{"nesterov": True}], "nesterov is an option of optimizer sgd"),
    "of two": ([{"optimizer": "sgd", "eps": 1e-3}], "eps is an option of optimizer adam or adamw"),
    "later": ([{"optimizer": "sgd"}, {"betas": [0.1, 0.2]}], "betas is an option of optimizer ad"),
    "of another schedule": (
        [{"schedule": "step", "warmup": 0.2}],
        "warmup is an option of schedule one-cycle, and the schedule is step",
    ),
    "of the schedule step": ([{"decay_every": 2}], "decay_every is an option of schedule step"),
    "typed": (
        [config.Typed(decay_every=2)],
        "^--decay-every is an option of --schedule step, and the schedule is auto: leave "
        "--decay-every out, or use --schedule step$",
    ),
    "earlier than the choice": ([{"optimizer": "sgd", "momentum": 0.5}, {"optimizer": "adam"}], ""),
    "its own": ([{"optimizer": "sgd"}, {"momentum": 0.5, "weight_decay": 0.1}], ""),
    "of all": ([{"optimizer": "adamw", "weight_decay": 0.1}], ""),
    "its schedule's": ([{"schedule": "step", "decay_every": 2, "decay_factor": 0.5}], ""),
}


@pytest.mark.parametrize(("layers", "message"), OF_ONE_CHOICE.values(), ids=OF_ONE_CHOICE.keys())
def test_an_option_that_the_choice_ignores_is_refused(layers, message):
    if message:
        with pytest.raises(ConfigError, match=message):
            config.make_config(*layers)
        return
    made = config.make_config(*layers)
    written = config.option_values(made)
    assert config.make_config(written) == made
    dropped = {name for layer in layers for name in layer} - written.keys()
    assert dropped == ({"momentum"} if made.optimizer == "adam" and len(layers) > 1 else set())
    assert all(getattr(made, name) == getattr(config.TrainConfig, name) for name in dropped)


def test_the_help_says_which_choice_takes_an_option():
    said = {row.name: row.option.help for row in config.fields()}
    assert said["momentum"] == "Momentum (sgd)."
    assert said["eps"] == "Added to the denominator (adam, adamw)."
    assert said["weight_decay"] == "Weight decay."
    assert said["decay_factor"] == "Factor of a decay (step)."


def test_recipes_are_the_published_trainings():
    article = config.make_config(config.read_recipe("article"))
    assert article.model == "article-cnn"
    assert (article.batch_size, article.learning_rate, article.momentum) == (32, 0.01, 0.5)
    assert (article.epochs, article.optimizer, article.schedule) == (10, "sgd", "constant")
    lenet = config.make_config(config.read_recipe("lenet5-fashion"))
    assert (lenet.image_size, lenet.pixel_mean, lenet.pixel_std) == (32, (0.5,), (0.5,))
    assert (lenet.optimizer, lenet.learning_rate, lenet.betas) == ("adam", 0.001, (0.9, 0.999))
    assert (lenet.batch_size, lenet.epochs) == (128, 5)
    fast = config.make_config(config.read_recipe("fast"))
    assert (fast.batch_size, fast.epochs, fast.learning_rate) == (256, 1, 0.01)
    assert (fast.betas, fast.schedule) == ((0.7, 0.9), "one-cycle")


def test_an_unknown_recipe_names_the_others():
    with pytest.raises(ConfigError, match="no recipe 'fat' .*'fast'.*; there are article, fast"):
        config.read_recipe("fat")


def test_toml_files_are_read_and_refused_in_words(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('epochs = 2\n[class_weight]\n9 = 5\n[run]\ncommand = "x"\n')
    assert config.read_toml(path) == {"epochs": 2, "class_weight": {"9": 5}}
    path.write_text("epochs =")
    with pytest.raises(ConfigError, match="c.toml is not TOML"):
        config.read_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="c.toml is not text in UTF-8"):
        config.read_toml(path)
    with pytest.raises(ConfigError, match="cannot read .*: No such file"):
        config.read_toml(tmp_path / "none.toml")


def test_the_table_and_the_commands_load_without_torch():
    code = "import sys, funcloss.app.config, funcloss.app.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


CATS = {"cat": {"cat": 0.0, "dog": 1.5}, "dog": {"cat": -2.0, "dog": 0.0}}
READ = {
    "commas": "true\\decided,cat,dog\ncat,0,1.5\ndog,-2,0\n",
    "semicolons": "truth / decision;cat;dog\ncat;0;1.5\ndog;-2;0\n",
    "tabs": "actual vs predicted\tcat\tdog\ncat\t0\t1.5\ndog\t-2\t0",
    "quotes and spaces": '"Label, Prediction", cat ,dog\r\n"cat", 0 ,1.5e0\r\n dog,-2,0\r\n',
    "a mark of the order of bytes": b"\xef\xbb\xbfTRUE LABEL\\PREDICTED LABEL,cat,dog\n"
    b"cat,0,1.5\ndog,-2,0\n",
    "blank rows": "\ntrue\\decided,cat,dog\n,,\ncat,0,1.5\n\ndog,-2,0\n,,\n\n",
    "plurals": "true labels -> decisions,cat,dog\ncat,0,1.5\ndog,-2,0\n",
}


@pytest.mark.parametrize("content", READ.values(), ids=READ.keys())
def test_a_cost_matrix_is_read_as_spreadsheets_write_it(tmp_path, content):
    assert read_cost_matrix(write(tmp_path / "c.csv", content)) == CATS


def test_a_cost_matrix_may_be_of_numbered_classes_and_further_decisions(tmp_path):
    path = write(tmp_path / "c.csv", "true\\decided,0,1,abstain\n0,0,1,0.5\n1,9,0,0.5\n")
    expected = {"0": {"0": 0, "1": 1, "abstain": 0.5}, "1": {"0": 9, "1": 0, "abstain": 0.5}}
    read = read_cost_matrix(path)
    assert read == expected
    assert list(read["0"]) == ["0", "1", "abstain"]
    semicolons = write(tmp_path / "d.csv", "true\\decided;a, b;c\na, b;0;1\nc;1;0\n")
    assert list(read_cost_matrix(semicolons)) == ["a, b", "c"]


TO_WRITE = r"write true\\decided into the first cell, the decisions after it and a true class"
SPOILT = {
    "empty": ("", "c.csv is empty"),
    "blank": ("\n , ,\n\n", "c.csv is empty"),
    "no corner": (",cat,dog\ncat,0,1\ndog,1,0\n", f"its first cell is ''; {TO_WRITE}"),
    "another corner": ("class,cat,dog\ncat,0,1\n", f"its first cell is 'class'; {TO_WRITE}"),
    "half a corner": ("true,cat,dog\ncat,0,1\n", f"its first cell is 'true'; {TO_WRITE}"),
    "one word of two": ("untrue decided,cat\ncat,0\n", "its first cell is 'untrue decided'"),
    "no header row": ("cat,0,1\ndog,1,0\n", f"its first cell is 'cat'; {TO_WRITE}"),
    "no header column": ("cat,dog\n0,1\n1,0\n", f"its first cell is 'cat'; {TO_WRITE}"),
    "no header at all": ("0,1\n5,0\n", f"has no names: its first row is all numbers; {TO_WRITE}"),
    "no column under a corner": (
        "true\\decided,cat,dog\n0,1\n5,0\n",
        "row '0' has 2 cells, row 1 3",
    ),
    "transposed": (
        "decided\\true,cat,dog\ncat,0,1\ndog,1,0\n",
        r"c.csv is transposed: its first cell 'decided\\\\true' makes the decisions its rows; swap "
        "its two axes, so that rows are the truth and columns the decision",
    ),
    "transposed in words": ("predicted vs actual,cat\ncat,0\n", "c.csv is transposed"),
    "no decision": ("true\\decided\ncat\n", "row 1, the decisions, has no name"),
    "no truth": ("true\\decided,cat,dog\n", "column 1, the true classes, has no name"),
    "unnamed decision": (
        "true\\decided,cat,\ncat,0,1\n",
        "row 1, the decisions, has no name in cell 3",
    ),
    "unnamed truth": (
        "true\\decided,cat,dog\ncat,0,1\n,1,0\n",
        "column 1, the true classes, has no name in cell 3",
    ),
    "decision twice": ("true\\decided,cat,cat\ncat,0,1\n", "the decisions, has 'cat' twice"),
    "truth twice": (
        "true\\decided,cat,dog\ncat,0,1\ncat,0,1\n",
        "the true classes, has 'cat' twice",
    ),
    "short row": ("true\\decided,cat,dog\ncat,0,1\ndog,1\n", "row 'dog' has 2 cells, row 1 3"),
    "long row": ("true\\decided,cat,dog\ncat,0,1,2\n", "row 'cat' has 4 cells, row 1 3"),
    "no cost": (
        "true\\decided,cat,dog\ncat,0,\ndog,1,0\n",
        "row 'cat', column 'dog': the cost is missing",
    ),
    "words": (
        "true\\decided,cat,dog\ncat,0,much\ndog,1,0\n",
        "row 'cat', column 'dog': 'much' is not a number$",
    ),
    "decimal commas": (
        "true\\decided;cat;dog\ncat;0;1,5\ndog;1;0\n",
        r"row 'cat', column 'dog': '1,5' is not a number \(write a decimal point, not a comma\)",
    ),
    "nan": (
        "true\\decided,cat,dog\ncat,0,1\ndog,nan,0\n",
        "row 'dog', column 'cat': the cost must be finite, got nan",
    ),
    "inf": ("true\\decided,cat,dog\ncat,0,-inf\n", "must be finite, got -inf"),
    "1e999": ("true\\decided,cat,dog\ncat,0,1e999\n", "must be finite, got 1e999"),
    "Latin 1": (b"true\\decided,caf\xe9\n", "c.csv is not text in UTF-8"),
    "UTF-16": ("true\\decided,cat\n".encode("utf-16"), "c.csv is not text in UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", "c.csv is not text in UTF-8"),
    "a cell without end": ('true\\decided,"' + "x" * 200_000, "c.csv is not CSV: field larger"),
}


@pytest.mark.parametrize(("content", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_cost_matrix_is_one_line_that_names_the_place(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_cost_matrix(write(tmp_path / "c.csv", content))
    assert "\n" not in str(caught.value)
    assert "c.csv" in str(caught.value)


def test_a_cost_matrix_that_is_no_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*: Is a directory"):
        read_cost_matrix(tmp_path)
    with pytest.raises(ConfigError, match="cannot read .*none.csv: No such file"):
        read_cost_matrix(tmp_path / "none.csv")
