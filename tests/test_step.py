import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close

from funcloss import class_weighted, losses, models, optim
from funcloss._trees import flatten
from funcloss.app.data import get_batch
from funcloss.app.registry import MODELS
from funcloss.keys import example_keys
from funcloss.objectives import make_forward, mean_of, sum_of, supervised, weighted_mean_of
from funcloss.training import init_state, make_train_step
from funcloss.typing import Batch

HYPER = {"learning_rate": torch.tensor(0.1)}


class Everything(nn.Module):
    """Convolution, BatchNorm, dropout, a frozen and a tied parameter, an assigned buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 5, stride=3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout2d(0.25)
        self.fc1 = nn.Linear(6 * 8 * 8, 12)
        self.fc2 = nn.Linear(12, 12)
        self.fc3 = nn.Linear(12, 12)
        self.fc3.weight = self.fc2.weight
        self.head = nn.Linear(12, 10)
        self.head.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1  # by assignment, not in place
        x = self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1)
        x = F.dropout(torch.relu(self.fc1(x)), training=self.training)
        return self.head(torch.relu(self.fc3(torch.relu(self.fc2(x)))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Everything()


@pytest.fixture
def batch(sample):
    return get_batch(sample, sample.train, torch.arange(0, 4000, 125))


def copied(tree):
    return {path: t.clone() for path, t in flatten(tree).items()}


def equal(a, b):
    a, b = (x if isinstance(x, dict) else flatten(x) for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, **tolerance):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert_close(a[path], b[path], msg=lambda m, p=path: f"{p}: {m}", **tolerance)


def make_step(model, optimizer, criterion=None, **options):
    objective = supervised(model, criterion or mean_of(losses.cross_entropy))
    return make_train_step(objective, optimizer, **options)


def test_the_step_is_pure(model, batch):
    optimizer = optim.adam(weight_decay=0.1)
    step = make_step(model, optimizer, clip_norm=1.0, schedule=optim.cosine(steps=10))
    state = init_state(model, optimizer, seed=3)
    before, outside = copied(state), torch.get_rng_state()
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    first, metrics = step(state, batch, HYPER)
    second, again = step(state, batch, HYPER)
    assert equal(first, second)
    assert torch.equal(metrics["loss"], again["loss"])
    assert equal(before, state)
    assert torch.equal(torch.get_rng_state(), outside)
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert all(not t.requires_grad for t in flatten(first).values())


def test_every_kind_of_tensor_moves_as_it_should(model, batch):
    optimizer = optim.sgd()
    state = init_state(model, optimizer)
    after, _ = make_step(model, optimizer)(state, batch, HYPER)
    assert "head.bias" not in after.params
    assert torch.equal(after.buffers["head.bias"], model.head.bias)
    assert "fc3.weight" not in {**after.params, **after.buffers}
    assert not torch.equal(after.params["fc2.weight"], state.params["fc2.weight"])
    assert after.buffers["calls"] == 1
    assert after.buffers["norm.num_batches_tracked"] == 1
    assert after.step == 1


def test_a_net_without_dropout_takes_the_steps_of_plain_torch(sample):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    ).double()
    optimizer = optim.sgd(momentum=0.9)
    state = init_state(net, optimizer)
    step = make_step(net, optimizer)
    twin = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    rate = {"learning_rate": torch.tensor(0.1, dtype=torch.float64)}
    for i in range(5):
        batch = get_batch(sample, sample.train, torch.arange(i, 4000, 100))
        batch = batch._replace(inputs=batch.inputs.double())
        state, metrics = step(state, batch, rate)
        twin.zero_grad()
        loss = F.cross_entropy(net(batch.inputs), batch.targets)
        loss.backward()
        twin.step()
        assert_close(metrics["loss"], loss.detach(), rtol=1e-10, atol=0)
    for name, tensor in net.state_dict().items():
        ours = {**state.params, **state.buffers}[name]
        assert_close(ours, tensor, rtol=1e-8, atol=1e-10)


def test_class_gradients_sum_to_the_batch_gradient_because_masks_are_keyed(batch):
    model = models.article_cnn()
    state = init_state(model, optim.sgd())
    objective = supervised(model, sum_of(losses.cross_entropy))
    keys = example_keys(state.key, state.step, 32)

    def gradient(which):
        part = Batch(batch.inputs[which], batch.targets[which])
        return grad(lambda p: objective(p, {}, part, keys[which], {})[0])(state.params)

    def of_one(p, x, y, key):
        return objective(p, {}, Batch(x[None], y[None]), key[None], {})[0]

    whole = gradient(torch.arange(32))
    parts = [gradient((batch.targets == c).nonzero().squeeze(1)) for c in range(10)]
    each = vmap(grad(of_one), in_dims=(None, 0, 0, 0))(state.params, *batch[:2], keys)
    chunked = vmap(grad(of_one), in_dims=(None, 0, 0, 0), chunk_size=5)(
        state.params, *batch[:2], keys
    )
    for name in whole:
        assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-4, atol=1e-5)
        assert_close(each[name].sum(0), whole[name], rtol=1e-4, atol=1e-5)
        assert_close(chunked[name], each[name], rtol=1e-4, atol=1e-5)


def test_it_is_one_graph_that_is_traced_once_and_gives_the_same(model, batch):
    torch.compiler.reset()
    # A bias before a BatchNorm has no gradient but rounding, which a small eps blows up to a step.
    optimizer = optim.adam(eps=1e-3)
    step = make_step(model, optimizer, schedule=optim.one_cycle(steps=10), clip_norm=1.0)
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    eager_state = state = init_state(model, optimizer)
    state, metrics = compiled(state, batch, HYPER)
    eager_state, eager_metrics = step(eager_state, batch, HYPER)
    close(state, eager_state)
    assert_close(metrics, eager_metrics)
    state, _ = compiled(state, batch, HYPER)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rate in (0.1, 0.2, 0.3):
            shared = state
            state, _ = compiled(shared, batch, {"learning_rate": torch.tensor(rate)})
            eager, _ = step(shared, batch, {"learning_rate": torch.tensor(rate)})
            close(state, eager)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["article-cnn", "fast-cnn", "mlp"])
def test_the_compiler_gives_the_same(name, batch):
    model, optimizer = MODELS[name].load()((1, 28, 28), 10), optim.adam(betas=(0.7, 0.9), eps=1e-3)
    step = make_step(model, optimizer)
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    state = init_state(model, optimizer)
    for i in range(4):
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            after, _ = compiled(state, batch, HYPER)
        close(after, step(state, batch, HYPER)[0], rtol=1e-4, atol=1e-5)
        state = after


def test_mapped_over_costs_and_learning_rates_is_a_loop(batch):
    model, optimizer = models.linear(), optim.adam()
    criterion = mean_of(class_weighted(losses.cross_entropy))
    step = make_step(model, optimizer, criterion)
    state = init_state(model, optimizer)
    weights = torch.ones(3, 10)
    weights[:, 9] = torch.tensor([1.0, 5.0, 25.0])
    hyper = {"learning_rate": torch.tensor([0.1, 0.01, 0.2]), "class_weights": weights}
    mapped, metrics = vmap(step, in_dims=(None, None, 0))(state, batch, hyper)
    for i in range(3):
        alone, single = step(state, batch, {name: value[i] for name, value in hyper.items()})
        assert_close(metrics["loss"][i], single["loss"])
        for name, p in alone.params.items():
            assert_close(mapped.params[name][i], p)


def test_the_step_can_be_differentiated_with_respect_to_a_cost(batch):
    model, optimizer = models.linear((1, 28, 28), 10), optim.sgd(momentum=0.9)
    step = make_step(model.double(), optimizer, mean_of(class_weighted(losses.cross_entropy)))
    state = init_state(model, optimizer)
    batch = batch._replace(inputs=batch.inputs.double())

    def after_two_steps(weight):
        weights = torch.cat([torch.ones(9, dtype=torch.float64), weight[None]])
        hyper = {"learning_rate": torch.tensor(0.01).double(), "class_weights": weights}
        now = state
        for _ in range(2):
            now, metrics = step(now, batch, hyper)
        return metrics["loss"]

    weight = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after_two_steps, weight)


def test_each_criterion_divides_by_what_its_name_says(batch):
    logits = torch.randn(32, 10)
    weights = torch.linspace(0, 3, 10)
    where = torch.arange(32) < 20
    masked = batch._replace(where=where)
    labels, kept = batch.targets, logits[where]
    hyper = {"learning_rate": torch.tensor(9.0), "class_weights": weights}
    summed = F.cross_entropy(kept, labels[where], weight=weights, reduction="sum")
    weighted = class_weighted(losses.cross_entropy)
    assert_close(mean_of(weighted)(logits, masked, hyper), summed / 20)
    assert_close(sum_of(weighted)(logits, masked, hyper), summed)
    torchs = F.cross_entropy(kept, labels[where], weight=weights)
    assert_close(weighted_mean_of(losses.cross_entropy)(logits, masked, hyper), torchs)


def test_the_mode_of_the_model_is_the_one_it_was_in(batch):
    model = models.article_cnn()
    state = init_state(model, optim.sgd())
    still = make_forward(model.eval())
    model.train()
    first, _ = still(state.params, state.buffers, batch.inputs)
    assert torch.equal(first, still(state.params, state.buffers, batch.inputs)[0])


def test_in_bfloat16_the_model_is_rounded_and_the_loss_is_not(batch):
    model = models.mlp()
    state = init_state(model, optim.sgd())
    keys = example_keys(state.key, state.step, 32)
    criterion = mean_of(losses.cross_entropy)
    whole, _ = supervised(model, criterion)(state.params, {}, batch, keys, HYPER)
    rounded, _ = supervised(model, criterion, bfloat16=True)(state.params, {}, batch, keys, HYPER)
    assert rounded.dtype == torch.float32
    assert 0 < abs(float(rounded - whole)) < 0.02
    grads = grad(
        lambda p: supervised(model, criterion, bfloat16=True)(p, {}, batch, keys, HYPER)[0]
    )
    assert all(g.dtype == torch.float32 for g in grads(state.params).values())


@pytest.mark.parametrize(
    ("hyper", "error", "message"),
    [
        ({}, KeyError, "hyper must hold learning_rate"),
        (
            {"learning_rate": 0.1},
            TypeError,
            "hyper\\['learning_rate'\\] must be a tensor, got a flo",
        ),
    ],
)
def test_hyper_is_checked(model, batch, hyper, error, message):
    state = init_state(model, optim.sgd())
    with pytest.raises(error, match=message):
        make_step(model, optim.sgd())(state, batch, hyper)


def test_a_negative_norm_to_clip_to_is_refused(model):
    with pytest.raises(ValueError, match="clip_norm must be at least 0, got -1"):
        make_step(model, optim.sgd(), clip_norm=-1.0)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        init_state(nn.Flatten(), optim.sgd())
