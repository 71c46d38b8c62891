import subprocess
import sys

import pytest

from funcloss import config, models
from funcloss.errors import ConfigError
from funcloss.training.objective import LOSSES


def test_later_layers_win():
    made = config.make_config({"epochs": 1, "seed": 3}, {"epochs": 2})
    assert (made.epochs, made.seed, made.batch_size) == (2, 3, 128)


def test_numbers_become_the_type_of_their_field():
    made = config.make_config({"learning_rate": 1, "epochs": 2.0, "betas": [0, 0.5]})
    assert isinstance(made.learning_rate, float)
    assert isinstance(made.epochs, int)
    assert made.betas == (0.0, 0.5)


def test_the_names_are_those_of_what_they_name():
    choices = {field.name: field.option.choices for field in config.fields()}
    assert choices["model"] == tuple(models.MODELS)
    assert choices["loss"] == tuple(LOSSES)
    assert choices["dataset"][1:] == config.DATASETS


REFUSED = [
    ({"epoch": 3}, r"unknown option 'epoch' \(did you mean 'epochs'\?\)"),
    ({"model": "lenet"}, r"model must be one of .*; got 'lenet' \(did you mean 'lenet5'\?\)"),
    ({"model": 3}, "model must be a str, got 3"),
    ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
    ({"epochs": "3"}, "epochs must be a whole number, got '3'"),
    ({"epochs": True}, "epochs must be a whole number, got True"),
    ({"epochs": -1}, r"epochs must be at least 0 and at most 1e\+06, got -1"),
    ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
    ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
    ({"val_fraction": 1.0}, "val_fraction must be at least 0 and at most 0.8, got 1.0"),
    ({"class_weight": {"9": -1}}, "class_weight 9 must be at least 0, got -1"),
    ({"class_weight": {"9": float("nan")}}, "class_weight 9 must be finite, got nan"),
    ({"class_weight": 5}, "class_weight must be a table of numbers, got 5"),
    ({"betas": [0.9]}, "betas must be two numbers, got 1"),
    ({"betas": 0.9}, "betas must be a list of numbers, got 0.9"),
    ({"pixel_mean": [0.5]}, "pixel_mean and pixel_std must be given together"),
    ({"pixel_mean": [0.5], "pixel_std": [0]}, "pixel_std must be above 0, got 0"),
    ({"nesterov": "yes"}, "nesterov must be a bool, got 'yes'"),
    ({"nesterov": True, "momentum": 0}, "nesterov needs momentum above 0"),
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


def test_recipes_are_the_published_trainings():
    article = config.make_config(config.read_recipe("article"))
    assert article[config.TrainConfig._fields.index("model")] == "article-cnn"
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
    with pytest.raises(ConfigError, match="c.toml is not TOML"):
        config.read_toml(path)
    with pytest.raises(ConfigError, match="cannot read .*: No such file"):
        config.read_toml(tmp_path / "none.toml")


def test_the_table_loads_without_torch():
    code = "import sys, funcloss.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
