"""The effect of a class's cost: by what factor its examples weigh, measured on gradients."""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from funcloss.laws.case import Batch, Broken, LossCase, NotApplicable

_PATTERNS = 8  # how many settings of the logits every class is seen in
_DRAWS = 64  # random batches
_MANY = 16  # classes; of more than these, few are measured, and in fewer batches
_FEW = 5
_DIVIDED = "the cost is divided out by the sum of the weights: alone it does nothing"
_CLOSE = 0.01  # relative: the draws of two classes share their batches, so little is noise


@dataclass(frozen=True, eq=False)
class CostEffect:
    """How much an example of each class weighs against one of the median class."""

    within: Tensor  # (classes,) side by side in one batch
    across: Tensor  # (classes,) on average over random batches
    alone: Tensor  # (classes,) at batch size one
    stated: Tensor | None  # (classes,) what they are said to weigh
    batch_size: int  # of the random batches
    named: tuple[int, ...] = ()  # the classes of which something was stated
    classes: tuple[int, ...] = ()  # that were measured: all, where they are few
    least: Tensor | None = None  # (classes,) within, at the predictions where it is least
    most: Tensor | None = None  # (classes,) within, at the predictions where it is most

    def judge(self) -> str:
        """Return what the classes weigh; raise ``Broken`` unless all agree, the stated too."""
        stated = self.within if self.stated is None else self.stated
        nothing = (self.within == 0) & ((stated > 0) | (self.stated is None))
        if nothing.any():
            raise Broken(
                f"{self._classes(nothing)} 0: nothing is learnt from such examples",
                "give every class a weight above 0, or say which weighs 0 (class-weight CLASS=0)",
            )
        columns = torch.stack([self.within, self.across, self.alone, stated])
        off = ((columns - stated).abs() > _CLOSE * stated.clamp(min=1.0)).any(0)
        varying = self._varying()
        if off.any() or (varying.any() and self.stated is not None):
            distance = (columns - stated).abs().amax(0) + varying.double() * (1 - off.double())
            off = off | varying
            named = [i for i, k in enumerate(self.classes) if k in self.named and off[i]]
            worst = named[0] if named else int(distance.argmax())  # what was asked about first
            cause = self.cause()
            if self.stated is None and cause != _DIVIDED:
                raise NotApplicable(f"{cause}: see map over examples")
            raise Broken(f"{self.of_class(self.classes[worst])}; {cause}")
        apart = (self.within - 1).abs() > _CLOSE
        if not apart.any():
            return "every class weighs 1.00"
        weights = ", ".join(
            f"{k}: {w:.2f}" for k, w, a in zip(self.classes, self.within, apart, strict=True) if a
        )
        line = f"at any batch size the classes weigh, against the median, {weights}"
        return line + (" (depending on the predictions)" if varying.any() else "")

    def cause(self) -> str:
        """Return what is wrong where the three, or what is stated, differ."""
        if self._varying().any():
            return "the factor is no constant: it depends on the prediction"
        if self._equal(self.within, self.across) and self._equal(self.within, self.alone):
            return "the cost does not do what it says"
        if self._equal(self.within, torch.ones_like(self.within)):
            return (
                "the cost scales whole batches, not the examples of its class, "
                "so it does not do what it says"
            )
        if self._equal(self.alone, torch.ones_like(self.alone)):
            return _DIVIDED
        return "what a class weighs depends on the rest of its batch"

    def _varying(self) -> Tensor:
        if self.least is None or self.most is None:
            return torch.zeros_like(self.within, dtype=torch.bool)
        return self.most - self.least > _CLOSE * self.most.clamp(min=1.0)

    def _classes(self, which: Tensor) -> str:
        found = [str(k) for k, w in zip(self.classes, which, strict=True) if w]
        many = len(found) > 1
        return f"class{'es' * many} {', '.join(found[:5])}{' ...' * (len(found) > 5)} weigh" + (
            "" if many else "s"
        )

    @staticmethod
    def _equal(one: Tensor, other: Tensor) -> bool:
        return bool(((one - other).abs() <= _CLOSE * other.clamp(min=1.0)).all())

    def of_class(self, index: int) -> str:
        """Return a line on one class."""
        i = self.classes.index(index)
        line = (
            f"class {index} weighs {self.within[i]:.2f} of the others within a batch, "
            f"{self.across[i]:.2f} across random batches of {self.batch_size}, "
            f"{self.alone[i]:.2f} alone"
        )
        if self.least is not None and self.most is not None and self._varying()[i]:
            line += f", from {self.least[i]:.2f} to {self.most[i]:.2f} by the prediction"
        if self.stated is not None:
            line += f"; its cost says {self.stated[i]:.2f}"
        return line


def cost_effect(case: LossCase) -> CostEffect:
    """Measure by what factor each class's examples weigh against the rest.

    Every class is put into the same situations: logits turned round so that its own column holds
    what the others' held. A loss without costs then gives every class a gradient of one norm, and
    what differs is the cost. Random batches draw their labels evenly; an example is put among them
    once as each class, so that the classes meet the same batches. Of more than sixteen
    classes five are measured, besides those of which a weight is stated.

    Args:
        case: A loss of logits and labels, or of one logit and two classes.

    Returns:
        The factors, relative to the (lower) median of the classes that weigh anything.

    Raises:
        NotApplicable: the targets are no classes, the predictions not one per class, or no
            example has a gradient that is finite and not 0.
    """
    make = _situations(case)
    c = 2 if make is _two_classes else case.classes
    given = case.options.get("class_weights")
    stated = given
    if case.stated:
        stated = torch.tensor([case.stated.get(i, 1.0) for i in range(c)])
    some = torch.linspace(0, c - 1, c if c <= _MANY else _FEW).long().tolist()
    classes = sorted({*some, *case.stated})
    norms = [measure(case, make, classes) for measure in (_within, _across, _alone)]
    if isinstance(given, Tensor):
        # Against the same loss under weights of one, which may tell its classes apart by itself.
        base = replace(case, options={**case.options, "class_weights": torch.ones_like(given)})
        plain = [measure(base, make, classes) for measure in (_within, _across, _alone)]
    else:
        plain = [torch.ones_like(x) for x in norms]
    within, across, alone = (
        _relative(x.sum(0) / y.sum(0)) for x, y in zip(norms, plain, strict=True)
    )
    factors = [
        _relative(x / y) for x, y in zip(norms[0], plain[0], strict=True) if x.any() and y.all()
    ]
    each = torch.stack(factors or [within])
    return CostEffect(
        within,
        across,
        alone,
        _relative(stated[classes].double()) if isinstance(stated, Tensor) else None,
        case.batch_size,
        tuple(case.stated),
        tuple(classes),
        each.amin(0),
        each.amax(0),
    )


def check_costs(case: LossCase) -> None:
    """Raise ``Broken`` where a cost matrix is read by columns, or a factor by the prediction."""
    for name in case.costs:
        matrix = case.options[name]
        if matrix.dim() == 2 and _reads_columns(case, name, matrix):
            raise Broken(
                f"{name} is read by its columns: raising the cost of deciding 1 for class 0 "
                "changes the value of class 1, and of class 0 not; its rows are the true classes",
                f"take the row of the label, {name}.index_select(0, labels.reshape(-1))",
            )
    if case.parameters[:1] != ("logits",) or _situations(case) is not _many_classes:
        return
    c = case.classes
    for label in range(min(c, 8) if c > 2 else 0):
        for first, second in (((label + 1) % c, (label + 2) % c), ((label + 2) % c, label - 1)):
            if first in (second, label) or second % c in (first, label):
                continue
            before, after = (_at_a_tie(case, label, first, second, by) for by in (-1e-4, 1e-4))
            if abs(after - before) > _CLOSE * max(abs(before), abs(after), 0.1):
                raise Broken(
                    "what an example weighs depends on the prediction, not on its label: for class "
                    f"{label} the value jumps from {before:.4g} to {after:.4g} as class {first} "
                    f"overtakes class {second % c}",
                    "look the weight up by the label, not by what is predicted: class_weighted",
                )


def _reads_columns(case: LossCase, name: str, matrix: Tensor) -> bool:
    """Return whether an entry acts on the class of its column and not on that of its row."""
    dearer = matrix.clone()
    dearer[0, 1] += 0.5
    predictions, labels = case.data(1, Generator().manual_seed(0))
    changes = []
    for label in (0, 1):
        example = predictions, torch.full_like(labels, label)
        changes.append(float((case(*example, **{name: dearer}) - case(*example)).abs().sum()))
    return changes[0] == 0.0 < changes[1]


def _at_a_tie(case: LossCase, label: int, first: int, second: int, by: float) -> float:
    """Return the value where two wrong classes are nearly even, above all others."""
    logits, labels = case.data(1, Generator().manual_seed(0))
    logits = logits.clone() / 4
    logits[:, second], logits[:, first] = 3.0, 3.0 + by
    return float(case(logits, torch.full_like(labels, label)).sum())


def _situations(case: LossCase):
    """Return how to make examples of given classes, from the look of the data."""
    data = case.data(16, Generator().manual_seed(0))
    if len(data) != 2 or case.predictions != 1:
        raise NotApplicable("its targets are no classes")
    predictions, targets = data
    if targets.is_floating_point():
        bits = predictions.dim() == 1 and set(targets.tolist()) <= {-1.0, 0.0, 1.0}
        if not bits or float(predictions.min()) > 0.0:
            raise NotApplicable("its targets are no classes")
        return _two_classes
    if predictions.dim() != 2 or predictions.shape[-1] != case.classes:
        raise NotApplicable("its predictions are not one per class")
    return _many_classes


def _many_classes(case: LossCase, classes: Tensor, patterns: Tensor) -> Batch:
    """Return examples whose logits are a pattern's, turned so that the class comes first in it."""
    logits, _ = case.data(_PATTERNS, Generator().manual_seed(1))
    c = logits.shape[-1]
    columns = (torch.arange(c) - classes[:, None]) % c
    return logits[patterns].gather(-1, columns), classes


def _two_classes(case: LossCase, classes: Tensor, patterns: Tensor) -> Batch:
    """Return examples whose logits are a pattern's for class 1, and its negative for class 0."""
    logits, _ = case.data(_PATTERNS, Generator().manual_seed(1))
    _, targets = case.data(16, Generator().manual_seed(0))
    low = float(targets.min())
    signs = (2 * classes - 1).to(logits.dtype)
    return logits[patterns] * signs, torch.where(classes == 1, 1.0, low).to(logits.dtype)


def _norms(case: LossCase, batch: Batch) -> Tensor:
    """Return the norm of the gradient with respect to each example's predictions, ``(n,)``."""
    predictions, targets = batch
    predictions = predictions.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(case(predictions, targets).sum(), predictions)
    return gradient.reshape(len(gradient), -1).norm(dim=-1).double()


def _within(case: LossCase, make, classes: list[int]) -> Tensor:
    """Return the norms by pattern and class, side by side in one batch."""
    rows = torch.tensor(classes)
    batches = (make(case, rows, torch.full_like(rows, p)) for p in range(_PATTERNS))
    return torch.stack([_norms(case, batch) for batch in batches])


def _across(case: LossCase, make, classes: list[int]) -> Tensor:
    """Return the norms by random batch and class."""
    generator = Generator().manual_seed(2)
    c = 2 if make is _two_classes else case.classes
    draws = _DRAWS if c <= _MANY else _FEW
    norms = torch.zeros(draws, len(classes), dtype=torch.float64)
    for draw in range(draws):
        labels = torch.randint(c, (case.batch_size,), generator=generator)
        patterns = torch.randint(_PATTERNS, (case.batch_size,), generator=generator)
        patterns[0] = draw % _PATTERNS
        for i, k in enumerate(classes):
            labels[0] = k
            norms[draw, i] = _norms(case, make(case, labels, patterns))[0]
    return norms


def _alone(case: LossCase, make, classes: list[int]) -> Tensor:
    """Return the norms by pattern and class, at batch size one."""
    norms = [
        [_norms(case, make(case, torch.tensor([k]), torch.tensor([p])))[0] for k in classes]
        for p in range(_PATTERNS)
    ]
    return torch.tensor(norms, dtype=torch.float64)


def _relative(norms: Tensor) -> Tensor:
    """Return weights against the (lower) median of the classes that weigh anything."""
    if not norms.isfinite().all():
        raise NotApplicable("the gradients of some classes are not finite: see extremes")
    some = norms > 0
    if not some.any():
        raise NotApplicable("no example of any class has a gradient: see has a gradient")
    return norms / norms[some].median()
