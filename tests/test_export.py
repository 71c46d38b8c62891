"""A run as one graph in a file: what it answers is what the run decides."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import help_without
from test_decide import write_rows
from torch.testing import assert_close

import funcloss
from funcloss.app import runs
from funcloss.app.config import make_config
from funcloss.app.runs import export
from funcloss.app.train import train
from funcloss.decisions import DecisionRule, make_costs
from funcloss.errors import ConfigError, RunError

# torch 2.6's own, of what it reads back
pytestmark = pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")

CLASSES = ("malignant", "benign")
COSTS = {
    "malignant": {"malignant": 0.0, "benign": 20.0, "ask": 0.4},
    "benign": {"malignant": 1.0, "benign": 0.0, "ask": 0.4},
}
QUICK = {"epochs": 1, "audit_every": 0, "compile": "off", "seed": 1, "check": False}
OWN = """
from torch import nn

def net(shape, classes):
    return nn.Sequential(nn.Linear(*shape, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))

class Branching(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.fc = nn.Linear(*shape, classes)

    def forward(self, x):
        return self.fc(x) if x.sum() > 1e9 else self.fc(2 * x)
"""


@pytest.fixture(scope="module", autouse=True)
def _no_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("funcloss.app.report.run_figures.save_figure", lambda figure, path: None)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    write_rows(place / "rows.csv", range(200), CLASSES)
    (place / "own_export.py").write_text(OWN)
    return place


def trained(place, name, **options):
    """Train on the rows, but for other options."""
    given = {"dataset": str(place / "rows.csv"), "target": "diagnosis", **QUICK, **options}
    train(make_config(given), place / name)
    return place / name


@pytest.fixture(scope="module")
def run(place):
    """An mlp with costs, a decision that is no class, class weights and a prior."""
    options = {"cost_matrix": COSTS, "class_weight": {"malignant": 3.0}, "batch_size": 16}
    return trained(place, "run", **options, prior={"malignant": 0.1}, epochs=5)


def answers_of(path, inputs):
    """What a file answers, by name, and its metadata."""
    if path.suffix == ".pt2":
        facts = dict.fromkeys(("classes", "decisions", "cost_matrix", "rule", "temperature"), "")
        with torch.no_grad():
            found = torch.export.load(path, extra_files=facts).module()(inputs)
        return found, facts
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    names = [output.name for output in session.get_outputs()]
    named = {name: torch.from_numpy(v) for name, v in zip(names, found, strict=True)}
    return named, session.get_modelmeta().custom_metadata_map


def assert_decides_as(model, path, inputs, *, by=""):
    answers, facts = answers_of(path, inputs)
    decided = model.decide(inputs, by=by)
    assert list(answers) == ["logits", "probabilities", "expected_costs", "decision"]
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert_close(answers["probabilities"], decided.probabilities, **close)
    scale = float(model.costs.matrix.max())
    assert_close(answers["expected_costs"] / scale, decided.expected_costs / scale, **close)
    assert answers["decision"].tolist() == decided.index.tolist()
    assert answers["decision"].dtype == torch.int64
    assert json.loads(facts["classes"]) == list(model.classes)
    assert json.loads(facts["decisions"]) == list(decided.costs.decisions)
    assert json.loads(facts["cost_matrix"]) == decided.costs.matrix.tolist()
    assert float(facts["temperature"]) == model.rule.temperature
    assert facts["rule"] == decided.rule
    return decided


def test_both_files_decide_as_the_run_does(place, run, run_cli):
    onnx, program = place / "run.onnx", place / "run.pt2"
    code, out, err = run_cli("export", run, "--onnx", onnx, "--torch", program)
    assert (code, err) == (0, "")
    assert out.startswith("inputs: float64 (batch, 30); decisions by min-cost\n")
    assert [line.partition(":")[0] for line in out.splitlines()[1:]] == [str(onnx), str(program)]
    model = funcloss.load(run)
    inputs, _ = runs.use.read_features(place / "rows.csv", model.columns)
    for path in (onnx, program):
        decided = assert_decides_as(model, path, inputs)
        assert set(decided.names) == {"malignant", "benign", "ask"}
        assert_decides_as(model, path, inputs[:1])
    assert not list(place.glob(".run-*"))


@pytest.mark.slow
def test_images_go_in_as_bytes_and_the_rule_can_be_asked_for(place, sample):
    run = trained(place, "digits", dataset="mnist-sample", target="", model="linear")
    made = runs.export_run(run, torch=place / "digits.pt2")
    assert (made.dtype, made.shape, made.rule) == ("uint8", (28, 28, 1), "argmax")
    assert 0 <= made.files[place / "digits.pt2"] < 1e-5
    model = funcloss.load(run)
    assert_decides_as(model, place / "digits.pt2", sample.test.inputs)
    costly = runs.export_run(run, torch=place / "costly.pt2", rule="min-cost", dtype="float32")
    answers, facts = answers_of(place / "costly.pt2", sample.test.inputs / 255)
    assert costly.rule == facts["rule"] == "min-cost"
    decided = model.decide(sample.test.inputs, by="min-cost")
    assert answers["decision"].tolist() == decided.index.tolist()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "mnist-sample", "target": "", "model": "fast-cnn"},
        {"dataset": "mnist-sample", "target": "", "model": "torchvision:resnet18",
         "image_size": 32, "class_cost": {"9": 5.0}},
        {"loss": "logit_adjusted"},
        {"dataset": "mnist-sample", "target": "", "model": "lenet5"},
    ],
    ids=["fast-cnn", "resnet18", "a correction of the logits", "lenet5"],
)  # fmt: skip
def test_other_networks_and_losses(place, options, tmp_path):
    run = trained(place, tmp_path.name, **options)
    model = funcloss.load(run)
    made = runs.export_run(run, onnx=tmp_path / "x.onnx", torch=tmp_path / "x.pt2")
    inputs = export._random_inputs(model, made.dtype, 50)
    for path in made.files:
        assert_decides_as(model, path, inputs)


@pytest.mark.slow
def test_a_model_of_your_own_with_batch_norm_needs_your_word(place, run_cli, tmp_path):
    run = trained(place, "own", model=f"{place}/own_export.py:net", batch_size=20)
    code, _, err = run_cli("export", run, "--torch", tmp_path / "own.pt2")
    assert code == 2
    assert "allow" in err
    files = ("--onnx", tmp_path / "own.onnx", "--torch", tmp_path / "own.pt2")
    assert run_cli("export", run, *files, "--allow-import")[0] == 0
    model = funcloss.load(run, allow_import=True)
    inputs, _ = runs.use.read_features(place / "rows.csv", model.columns)
    for path in files[1::2]:
        assert_decides_as(model, path, inputs)


def test_a_model_without_a_graph_leaves_no_file(place, tmp_path):
    run = trained(place, "branching", model=f"{place}/own_export.py:Branching", batch_size=20)
    with pytest.raises(RunError, match=r"torch.export fails on the model: \w+: \w+"):
        runs.export_run(run, torch=tmp_path / "x.pt2", allow_import=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "name a file to write"),
        ({"onnx": "x.pt2"}, "onnx must be a file that ends in .onnx, got 'x.pt2'"),
        ({"torch": "x"}, "torch must be a file that ends in .pt2, got 'x'"),
        ({"torch": "x.pt2", "rule": "cheapest"}, "rule must be one of argmax, min-cost, got"),
        (
            {"torch": "x.pt2", "dtype": "float16"},
            "dtype must be one of uint8, float32, float64",
        ),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_first(asked, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        runs.export_run(tmp_path / "no run", **asked)


def test_onnx_names_the_extra_that_it_needs(run, tmp_path, monkeypatch):
    find = export.importlib.util.find_spec
    absent = {"onnxscript", "onnxruntime"}
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    with pytest.raises(ConfigError, match=r"onnxscript, onnxruntime.*pip install 'funcloss\[exp"):
        runs.export_run(run, onnx=tmp_path / "x.onnx")
    monkeypatch.undo()
    monkeypatch.setattr(export, "_LARGEST", 1000)
    with pytest.raises(ConfigError, match="an ONNX file holds at most 2 GiB"):
        runs.export_run(run, onnx=tmp_path / "x.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("output", "said"), [("logits", "logits"), ("decision", "decision")])
def test_a_file_that_answers_otherwise_is_not_kept(run, tmp_path, monkeypatch, output, said):
    write, path = export._write_torch, tmp_path / "x.pt2"
    path.write_text("as it was")

    def wrong(*args):
        answer = write(*args)

        def other(inputs):
            found = answer(inputs)
            return found | {output: 1 - found[output].clamp(max=1)}

        return other

    monkeypatch.setattr(export, "_write_torch", wrong)
    with pytest.raises(RunError, match=rf"x.pt2 is not written: its {said} on 1 random examples"):
        runs.export_run(run, torch=path)
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(RunError, match=r"cannot write .*no/x.pt2: No such file"):
        runs.export_run(run, torch=tmp_path / "no" / "x.pt2")


@pytest.mark.parametrize("by", ["argmax", "min-cost"])
def test_every_output_is_compared(run, by):
    model = export.DecidingModel(funcloss.load(run), by).eval()
    inputs = export._random_inputs(funcloss.load(run), "float32", 7)

    def answer(inputs, **changed):
        with torch.no_grad():
            found = model(inputs)
        return found | {name: change(found[name]) for name, change in changed.items()}

    assert export._difference("x", model, answer, inputs) == 0
    tiny = {"logits": lambda v: v * (1 + 1e-6)}
    assert 0 < export._difference("x", model, lambda x: answer(x, **tiny), inputs) < 1e-5
    wrong = {
        "logits": lambda v: v + 1e-3 * v.abs().max(),
        "probabilities": lambda v: v + 1e-4,
        "expected_costs": lambda v: v.index_fill(1, torch.tensor([1]), float("nan")),
        "decision": lambda v: (v + 1) % 2,
    }
    for name, change in wrong.items():
        with pytest.raises(RunError, match=f"its {name} on 7 random examples is off by"):
            export._difference("x", model, lambda x, n=name, c=change: answer(x, **{n: c}), inputs)


def test_either_of_two_equal_decisions_is_right():
    rule = DecisionRule(make_costs(("a", "b")))
    even = SimpleNamespace(model=lambda x: x, rule=rule, by="min-cost")
    even.input_mean = even.input_std = torch.zeros(0)

    def model(inputs):
        return export.DecidingModel.forward(even, inputs)

    def other(inputs):
        found = model(inputs)
        return found | {"decision": 1 - found["decision"]}

    model.rule, model.by = rule, "min-cost"
    inputs = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    assert export._difference("x", model, other, inputs) == 0
    with pytest.raises(RunError, match="its decision"):
        export._difference("x", model, other, torch.tensor([[0.0, 1e-6]]))


def test_help_loads_no_torch():
    shown = help_without("export", "torch", "onnx")
    assert all(f"--{name}" in shown for name in ("onnx", "torch", "rule", "allow-import"))
