import pytest
import torch
from torch.testing import assert_close

from funcloss import losses, models, optim
from funcloss._trees import flatten
from funcloss.app.data import get_batch
from funcloss.keys import make_key
from funcloss.objectives import make_forward, mean_of, supervised
from funcloss.training import (
    epoch_order,
    evaluate,
    fit,
    init_state,
    make_train_step,
    oversampled_counts,
    oversampled_order,
)

HYPER = {"learning_rate": torch.tensor(0.05)}


@pytest.fixture(scope="module")
def training(sample):
    torch.manual_seed(0)
    model, optimizer = models.article_cnn(), optim.sgd(momentum=0.5)
    step = make_train_step(supervised(model, mean_of(losses.cross_entropy)), optimizer)

    def step_on(state, index):
        return step(state, get_batch(sample, sample.train, index), HYPER)

    return init_state(model, optimizer), step_on


def run(training, epochs=2, n=500, state=None, **options):
    first, step_on = training
    options = {"batch_size": 64, "log_every": 3} | options
    return list(fit(state or first, step_on, n, epochs=epochs, **options))


def same(a, b):
    a, b = flatten(a), flatten(b)
    return all(torch.equal(a[path], b[path]) for path in a)


def test_epochs_come_one_by_one_with_the_state_after_them(training):
    epochs = run(training)
    assert [e.number for e in epochs] == [1, 2]
    assert [e.step for e in epochs] == [7, 14]  # 500 // 64: the last partial batch is left out
    assert [e.examples for e in epochs] == [448, 896]
    assert all(e.finished for e in epochs)
    assert epochs[-1].state.step == 14
    assert epochs[1].loss < epochs[0].loss


def test_stopped_anywhere_it_goes_on_as_if_it_had_not(training):
    whole = run(training)[-1].state
    for stop_at in (1, 6, 7, 8, 13):
        seen = iter(range(1, 100))
        part = run(training, should_stop=lambda s=seen, at=stop_at: next(s) >= at)
        assert part[-1].step == stop_at
        assert part[-1].finished == (stop_at == 7)
        assert same(run(training, state=part[-1].state)[-1].state, whole)


def test_reports_come_every_few_steps_and_average_them(training):
    reports = []
    epochs = run(training, on_progress=reports.append)
    assert [r.step for r in reports] == [3, 6, 7, 9, 12, 14]
    assert [r.steps for r in reports] == [3, 3, 1, 2, 3, 2]
    means = [r.loss for r in reports[:3]]
    assert_close(epochs[0].loss, (3 * means[0] + 3 * means[1] + means[2]) / 7)


def test_a_finished_training_has_no_more_epochs(training):
    done = run(training)[-1].state
    assert run(training, state=done) == []


def test_too_few_examples_are_refused(training):
    with pytest.raises(ValueError, match="a batch of 64 needs as many examples, got 63"):
        run(training, n=63)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"log_every": 0}])
def test_numbers_that_are_not_positive_are_refused(training, options):
    with pytest.raises(ValueError, match="batch_size and log_every must be at least 1"):
        run(training, **options)


def test_the_order_hangs_on_key_and_epoch_alone():
    key, before = make_key(0), torch.get_rng_state()
    orders = [epoch_order(key, epoch, 100) for epoch in range(3)]
    assert torch.equal(orders[1], epoch_order(key, 1, 100))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], epoch_order(make_key(1), 0, 100))
    assert all(torch.equal(o.sort().values, torch.arange(100)) for o in orders)
    assert torch.equal(torch.get_rng_state(), before)


OVERSAMPLED = [
    ([90, 30, 7], 0.0, [90, 30, 7]),
    ([90, 30, 7], 1.0, [90, 90, 90]),
    ([90, 0, 40, 10], 0.5, [90, 0, 60, 30]),
    ([5, 5], 1.0, [5, 5]),
    ([64, 1], 1 / 3, [64, 4]),
]


@pytest.mark.parametrize(("counts", "power", "draws"), OVERSAMPLED)
def test_an_oversampled_epoch_repeats_the_examples_of_rarer_classes(counts, power, draws):
    counts, key, before = torch.tensor(counts), make_key(3), torch.get_rng_state()
    assert oversampled_counts(counts, power).tolist() == draws
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    orders = [oversampled_order(key, epoch, labels, power) for epoch in range(30)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(orders[7], oversampled_order(key, 7, labels, power))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], oversampled_order(make_key(4), 0, labels, power))
    often = torch.stack([order.bincount(minlength=len(labels)) for order in orders])
    for c, n in enumerate(counts.tolist()):
        own = often[:, labels == c]
        assert (own.sum(1) == draws[c]).all()
        if n:
            assert own.min() >= draws[c] // n
            assert own.max() <= -(-draws[c] // n)
            if draws[c] % n:  # which come once more is another choice in each epoch
                assert (own.double().mean(0) - draws[c] / n).abs().max() < 0.4
                assert len(own.unique(dim=0)) > 4
    mixed = labels[orders[0]][: len(orders[0]) // 2].bincount(minlength=len(counts))
    assert (mixed - torch.tensor(draws) / 2).abs().max() < 20  # shuffled


def test_a_loop_goes_through_the_order_that_it_is_given(training):
    labels = torch.tensor([0] * 100 + [1] * 10)
    seen = []

    def note(index):
        seen.append(index)
        return index

    def epochs(state=None, **options):
        return run(training, n=200, batch_size=20, state=state,
                   order=lambda key, epoch: oversampled_order(key, epoch, labels, 1.0),
                   iter_batches=lambda indices: map(note, indices), **options)  # fmt: skip

    whole = epochs()[-1].state
    key = whole.key
    expected = torch.cat([oversampled_order(key, epoch, labels, 1.0) for epoch in (0, 1)])
    assert torch.equal(torch.cat(seen), expected)
    steps = iter(range(1, 100))
    part = epochs(should_stop=lambda: next(steps) >= 13)[-1]
    assert not part.finished
    assert same(epochs(state=part.state)[-1].state, whole)


@pytest.mark.parametrize("batch_size", [1, 7, 500, 9999])
def test_an_evaluation_does_not_depend_on_the_size_of_its_batches(training, sample, batch_size):
    state, _ = training
    model = models.article_cnn().eval()
    n = 13 if batch_size == 1 else 500
    batches = (get_batch(sample, sample.train, i) for i in torch.arange(n).split(batch_size))
    made = evaluate(make_forward(model), state, batches, mean_of(losses.cross_entropy), HYPER)
    batch = get_batch(sample, sample.train, torch.arange(n))
    logits, _ = make_forward(model)(state.params, state.buffers, batch.inputs)
    guesses = logits.argmax(-1)
    assert_close(made.logits, logits)
    assert_close(made.loss, losses.cross_entropy(logits, batch.targets).mean().item())
    scores = made.argmax
    right = (guesses == batch.targets).double().mean().item()
    assert scores.accuracy.value == pytest.approx(right)
    for c in range(10):
        true, said = batch.targets == c, guesses == c
        hits = (true & said).sum().double()
        assert_close(scores.recall.value[c], hits / true.sum(), equal_nan=True)
        assert_close(scores.precision.value[c], hits / said.sum(), equal_nan=True)
        assert scores.confusion[c].tolist() == guesses[true].bincount(minlength=10).tolist()


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="there are no examples"):
        evaluate(None, None, [], None, {})
