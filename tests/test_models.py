import pytest
import torch

from funcloss import models
from funcloss.app.registry import MODELS

SHAPES = {"lenet5": (1, 32, 32), "cifar-cnn": (3, 32, 32)}
PARAMETERS = {
    "linear": 7_850,
    "mlp": 269_322,
    "article-cnn": 21_840,
    "lenet5": 61_706,
    "fast-cnn": 215_194,
    "cifar-cnn": 605_578,
}


@pytest.mark.parametrize("name", MODELS)
def test_images_become_logits(name):
    shape = SHAPES.get(name, (1, 28, 28))
    model = MODELS[name].load()(shape, 7).eval()
    images = torch.randn(3, *shape)
    logits = model(images)
    assert logits.shape == (3, 7)
    # Channels-last images give the same, whatever the order of the features in memory.
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(last), logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_parameters_is_the_published_one(name):
    model = MODELS[name].load()(SHAPES.get(name, (1, 28, 28)), 10)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["article-cnn", "lenet5", "fast-cnn", "cifar-cnn"])
def test_images_that_are_too_small_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"1×6×6 are too small for its convolutions"):
        MODELS[name].load()((1, 6, 6), 10)


def test_making_a_model_draws_its_weights_and_nothing_more():
    torch.manual_seed(3)
    models.article_cnn()
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.nn.Conv2d(1, 10, 5), torch.nn.Conv2d(10, 20, 5)
    torch.nn.Linear(320, 50), torch.nn.Linear(50, 10)
    assert torch.rand(1) == after
