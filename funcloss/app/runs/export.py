"""A run's model as one graph, from inputs as the data set has them to decisions, in a file."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funcloss import __version__
from funcloss._files import replacing
from funcloss.app.data import normalised
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.network import try_model
from funcloss.app.runs.rules import check_rule, rule_caveat, usual_rule
from funcloss.app.runs.use import load
from funcloss.errors import ConfigError, FunclossError, RunError

DTYPES = ("uint8", "float32", "float64", "int64")
OUTPUTS = ("logits", "probabilities", "expected_costs", "decision")
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGEST = 2**31 - 2**20  # bytes of tensors in a protobuf message, with room for the graph
_BATCHES = (1, 7)  # sizes that are tried
_TOLERANCE = 1e-5  # of the largest value of an output
_TIE = 1e-9  # of the largest expected cost: either decision is right

Answer = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class ExportReport:
    """The files that a run was exported to, and how they are used."""

    files: dict[Path, float]  # largest difference from the run, relative to the output's size
    dtype: str  # of the inputs
    shape: tuple[int, ...]  # of one input
    rule: str  # of funcloss.decisions.RULES
    note: str  # what to doubt about its decisions; empty: nothing


class DecidingModel(nn.Module):
    """A run's model between the normalisation of its inputs and the rule of its decisions.

    Args:
        run: On the CPU.
        rule: ``min-cost`` or ``argmax``.
    """

    input_mean: Tensor  # of no name that torch 2.6 gives a node, as "mean" is
    input_std: Tensor

    def __init__(self, run: TrainedModel, rule: str) -> None:
        """Take the parts of a run."""
        super().__init__()
        self.model = run.model
        self.rule, self.by = run.rule, rule
        self.register_buffer("input_mean", run.mean)
        self.register_buffer("input_std", run.std)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return logits, probabilities, expected costs and decisions, by name."""
        logits = self.model(normalised(inputs, self.input_mean, self.input_std))
        found = self.rule.decisions(logits, by=self.by)
        outputs = (logits, found.probabilities, found.expected_costs, found.index)
        return dict(zip(OUTPUTS, outputs, strict=True))


def export_run(
    run_dir: str | Path,
    *,
    onnx: str | Path | None = None,
    torch: str | Path | None = None,
    rule: str = "",
    dtype: str = "",
    allow_import: bool = False,
) -> ExportReport:
    """Write a run's model with its normalisation, calibration and decisions as one graph.

    The graph takes ``inputs`` as the data set has them, any number of examples: images ``(batch,
    height, width, channels)``, features ``(batch, features)``, else what the model takes. It gives
    ``logits (batch, classes)``, ``probabilities (batch, classes)``, ``expected_costs (batch,
    decisions)`` and ``decision (batch)``, the index among the run's decisions, as
    :meth:`TrainedModel.decide` does. Names of classes and decisions, the rule, the costs and the
    temperature are in the metadata of the file.

    A file is kept only if it gives what the run gives on random inputs: the logits to 1e-5 of the
    largest, and of its own logits the probabilities and expected costs to 1e-5 and the decisions.

    Args:
        run_dir: A run folder.
        onnx: The ONNX file to make or replace; needs the extra ``export``.
        torch: The ``torch.export`` program, ``.pt2``, to make or replace.
        rule: ``min-cost`` or ``argmax``; empty: the first if the run was given costs.
        dtype: Of the inputs, ``uint8``, ``float32``, ``float64`` or ``int64``; empty: that of the
            training inputs. Pixels that are uint8 stand for 0..1 in steps of 1/255.
        allow_import: Whether code that the run names (a model of yours) may be imported.

    Returns:
        What was written.

    Raises:
        ConfigError: no file is named, a name or the rule does not fit, a package is missing, or the
            model does not take such inputs or is too large for an ONNX file.
        RunError: the run cannot be read, the model has no graph, the file cannot be written or
            gives other numbers; what was there is as it was.
    """
    _check_request(onnx, torch, dtype)
    check_rule(rule)
    run = load(run_dir, allow_import=allow_import)
    if run.costs.amounts:
        names = ", ".join(dict.fromkeys(name for *_, name in run.costs.amounts))
        raise ConfigError(
            f"{run_dir} decides by the {names} of each example, and a graph takes inputs alone: "
            "use funcloss predict, or decide of funcloss.load"
        )
    dtype = dtype or run.dtype or ("uint8" if run.images else "float32")
    by = rule or usual_rule(run.config)
    model = DecidingModel(run, by).eval()
    examples = [_random_inputs(run, dtype, n) for n in (3, *_BATCHES)]
    given = normalised(examples[0], run.mean, run.std)
    try_model(run.model, run.config.model, given, len(run.classes))
    facts = _metadata(run, by)
    if onnx is not None:
        _check_size(model)
    program = _graph_of(model, examples[0])
    files = {}
    for path, write in ((onnx, _write_onnx), (torch, _write_torch)):
        if path is None:
            continue
        path = Path(path).expanduser()
        with replacing(path) as beside:
            beside.touch()  # what cannot be written is known before the long part
            answer = write(beside, program, facts)
            files[path] = max(_difference(path, model, answer, x) for x in examples[1:])
    return ExportReport(
        files=files,
        dtype=dtype,
        shape=tuple(examples[0].shape[1:]),
        rule=by,
        note=rule_caveat(run.config) if by == "min-cost" else "",
    )


def _check_request(onnx: str | Path | None, torch: str | Path | None, dtype: str) -> None:
    if onnx is None and torch is None:
        raise ConfigError("export: name a file to write, onnx FILE.onnx or torch FILE.pt2")
    for name, path, suffix in (("onnx", onnx, ".onnx"), ("torch", torch, ".pt2")):
        if path is not None and Path(path).suffix != suffix:
            raise ConfigError(f"{name} must be a file that ends in {suffix}, got {str(path)!r}")
    if dtype not in ("", *DTYPES):
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if onnx is not None and missing:
        raise ConfigError(
            f"onnx: {', '.join(missing)} not installed: pip install 'funcloss[export]'"
        )


def _check_size(model: nn.Module) -> None:
    """Raise ``ConfigError`` if the tensors of a model do not fit into one ONNX file."""
    tensors = (*model.parameters(), *model.buffers())
    size = sum(t.numel() * t.element_size() for t in tensors)
    if size > _LARGEST:
        raise ConfigError(
            f"onnx: the model has {size / 2**30:.1f} GiB of tensors, and an ONNX file holds at "
            "most 2 GiB: export it with torch FILE.pt2"
        )


def _graph_of(model: nn.Module, inputs: Tensor) -> torch.export.ExportedProgram:
    """Return the graph of a model for any number of such inputs."""
    with _quietly("torch.export"), torch.no_grad():
        dynamic = ({0: torch.export.Dim("batch")},)
        return torch.export.export(model, (inputs,), dynamic_shapes=dynamic, strict=False)


def _random_inputs(run: TrainedModel, dtype: str, n: int) -> Tensor:
    """Return random inputs as the data set has them, the same for each number of them."""
    shape, random = run.input_shape, torch.Generator().manual_seed(n)
    shape = (n, *shape[1:], shape[0]) if run.images else (n, *shape)
    if dtype == "uint8":
        return torch.randint(256, shape, generator=random, dtype=torch.uint8)
    if dtype == "int64":  # an index that the smallest table of embeddings has
        return torch.randint(2, shape, generator=random)
    noise = torch.randn(shape, generator=random, dtype=getattr(torch, dtype))
    return run.mean + run.std * noise if len(run.mean) else noise


def _metadata(run: TrainedModel, by: str) -> dict[str, str]:
    """Return what a user of a file must know, lists as JSON."""
    facts: dict[str, Any] = {
        "funcloss": __version__,
        "model": run.config.model,
        "columns": [dataclasses.asdict(column) for column in run.columns],
        "features": [name for column in run.columns for name in column.features],
        "classes": run.classes,
        "decisions": run.costs.decisions,
        "cost_matrix": run.costs.matrix.tolist(),
        "rule": by,
        "temperature": run.rule.temperature,
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


def _write_onnx(path: Path, program: torch.export.ExportedProgram, facts: dict[str, str]) -> Answer:
    """Write an ONNX file, and return how onnxruntime answers from it."""
    with _quietly("torch.onnx.export"):
        # Torch 2.6 converts neither addcmul on a batch of any size nor nodes of several outputs.
        addcmul = torch.ops.aten.addcmul.default
        plain: dict[Any, Any] = {
            addcmul: torch.export.default_decompositions()[addcmul],
            torch.ops.aten._native_batch_norm_legit_no_training.default: _batch_norm,
        }
        made = torch.onnx.export(
            program.run_decompositions(plain),
            dynamo=True,
            output_names=OUTPUTS,
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
        assert made is not None
        made.model.metadata_props.update(facts)
        made.save(path, external_data=False)
    with _quietly("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def answer(inputs: Tensor) -> dict[str, Tensor]:
        with _quietly("onnxruntime"):
            found = session.run(OUTPUTS, {"inputs": inputs.numpy()})
        return {k: torch.as_tensor(v) for k, v in zip(OUTPUTS, found, strict=True)}

    return answer


def _batch_norm(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return batch normalisation in evaluation, scale and shift, and two empty statistics."""
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (inputs.dim() - 2))
    found = inputs * scale.reshape(shape) + shift.reshape(shape)
    return found, inputs.new_empty(0), inputs.new_empty(0)


def _write_torch(
    path: Path, program: torch.export.ExportedProgram, facts: dict[str, str]
) -> Answer:
    """Write a torch.export program, and return how it answers once it is loaded."""
    with _quietly("torch.export"):
        buffer = io.BytesIO()  # to a path, the archive would keep its name
        torch.export.save(program, buffer, extra_files=dict(facts))
        path.write_bytes(buffer.getbuffer())
        module = torch.export.load(path).module()

    def answer(inputs: Tensor) -> dict[str, Tensor]:
        with _quietly("torch.export"), torch.no_grad():
            return module(inputs)

    return answer


def _difference(path: Path, model: DecidingModel, answer: Answer, inputs: Tensor) -> float:
    """Return the largest difference of a file's answer, relative to the size of the output.

    Raises:
        RunError: it is too large, or a decision is another.
    """
    with torch.no_grad():
        logits = model(inputs)["logits"]
    got = answer(inputs)
    # By its own logits: a low temperature makes more of their rounding.
    expected = model.rule.decisions(got["logits"], by=model.by)
    values = -got["logits"] if model.by == "argmax" else expected.expected_costs
    decided = [values.gather(1, index[:, None]) for index in (expected.index, got["decision"])]
    compared = {
        "logits": (logits, got["logits"], _TOLERANCE),
        "probabilities": (expected.probabilities, got["probabilities"], _TOLERANCE),
        "expected_costs": (expected.expected_costs, got["expected_costs"], _TOLERANCE),
        "decision": (*decided, _TIE),
    }
    largest = 0.0
    for name, (ours, theirs, tolerance) in compared.items():
        size = values if name == "decision" else ours
        apart = float((ours - theirs).abs().max() / size.abs().max().clamp(min=1e-30))
        if not apart <= tolerance:
            raise RunError(
                f"{path} is not written: its {name} on {len(inputs)} random examples is off by "
                f"{apart:.1e} of the largest value, more than {tolerance:.0e}"
            )
        largest = max(largest, apart)
    return largest


@contextlib.contextmanager
def _quietly(tool: str) -> Iterator[None]:
    """Keep what a tool prints and warns of its own code to itself; its failure is one line."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (FunclossError, OSError):
        raise
    except Exception as error:
        line = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
        raise RunError(f"{tool} fails on the model: {type(error).__name__}: {line}") from error
