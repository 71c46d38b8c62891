"""What the cost of a class does: by what factor its examples weigh, measured on gradients."""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from funcloss.laws.case import Batch, Broken, LossCase, NotApplicable

_PATTERNS = 8  # how many settings of the logits every class is seen in
_DRAWS = 64  # random batches
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

    def judge(self) -> str:
        """Return what the classes weigh; raise ``Broken`` unless all agree, the stated too."""
        stated = self.within if self.stated is None else self.stated
        columns = torch.stack([self.within, self.across, self.alone, stated])
        off = ((columns - stated).abs() > _CLOSE * stated.clamp(min=1.0)).any(0)
        if off.any():
            distance = (columns - stated).abs().amax(0)
            named = [i for i in self.named if off[i]]  # what was stated is what was asked about
            worst = named[0] if named else int(distance.argmax())
            raise Broken(f"{self.of_class(worst)}; {self.cause()}")
        apart = (self.within - 1).abs() > _CLOSE
        if not apart.any():
            return "every class weighs 1.00"
        weights = ", ".join(f"{i}: {w:.2f}" for i, w in enumerate(self.within) if apart[i])
        return f"at any batch size the classes weigh, against the median, {weights}"

    def cause(self) -> str:
        """Return what is wrong where the three, or what is stated, differ."""
        if self._equal(self.within, self.across) and self._equal(self.within, self.alone):
            return "the cost does not do what it says"
        if self._equal(self.within, torch.ones_like(self.within)):
            return (
                "the cost scales whole batches, not the examples of its class, "
                "so it does not do what it says"
            )
        if self._equal(self.alone, torch.ones_like(self.alone)):
            return "the cost is divided out by the sum of the weights: alone it does nothing"
        return "what a class weighs depends on the rest of its batch"

    @staticmethod
    def _equal(one: Tensor, other: Tensor) -> bool:
        return bool(((one - other).abs() <= _CLOSE * other.clamp(min=1.0)).all())

    def of_class(self, index: int) -> str:
        """Return a line on one class."""
        line = (
            f"class {index} weighs {self.within[index]:.2f} of the others within a batch, "
            f"{self.across[index]:.2f} across random batches of {self.batch_size}, "
            f"{self.alone[index]:.2f} alone"
        )
        if self.stated is not None:
            line += f"; its cost says {self.stated[index]:.2f}"
        return line


def cost_effect(case: LossCase) -> CostEffect:
    """Measure by what factor each class's examples weigh against the rest.

    Every class is put into the same situations: logits turned round so that its own column holds
    what the others' held. A loss without costs then gives every class a gradient of one norm, and
    what differs is the cost. Random batches draw their labels evenly; an example is put among them
    once as each class, so that the classes meet the same batches.

    Args:
        case: A loss of logits and labels, or of one logit and two classes.

    Returns:
        The factors, relative to the (lower) median of the classes that weigh anything.

    Raises:
        NotApplicable: the targets are no classes, or the predictions not one a class.
    """
    make = _situations(case)
    c = 2 if make is _two_classes else case.classes
    given = case.options.get("class_weights")
    stated = given
    if case.stated:
        stated = torch.tensor([case.stated.get(i, 1.0) for i in range(c)])
    measured = [measure(case, make, c) for measure in (_within, _across, _alone)]
    if isinstance(given, Tensor):
        # Against the same loss under weights of one, which may tell its classes apart by itself.
        plain = {**case.options, "class_weights": torch.ones_like(given)}
        base = replace(case, options=plain)
        measured = [
            m / measure(base, make, c)
            for m, measure in zip(measured, (_within, _across, _alone), strict=True)
        ]
    within, across, alone = map(_relative, measured)
    return CostEffect(
        within,
        across,
        alone,
        _relative(stated.double()) if isinstance(stated, Tensor) else None,
        case.batch_size,
        tuple(case.stated),
    )


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
        raise NotApplicable("its predictions are not one a class")
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


def _within(case: LossCase, make, c: int) -> Tensor:
    total = torch.zeros(c, dtype=torch.float64)
    for pattern in range(_PATTERNS):
        batch = make(case, torch.arange(c), torch.full((c,), pattern))
        total += _norms(case, batch)
    return total


def _across(case: LossCase, make, c: int) -> Tensor:
    generator = Generator().manual_seed(2)
    total = torch.zeros(c, dtype=torch.float64)
    for draw in range(_DRAWS):
        classes = torch.randint(c, (case.batch_size,), generator=generator)
        patterns = torch.randint(_PATTERNS, (case.batch_size,), generator=generator)
        patterns[0] = draw % _PATTERNS
        for k in range(c):
            classes[0] = k
            total[k] += _norms(case, make(case, classes, patterns))[0]
    return total


def _alone(case: LossCase, make, c: int) -> Tensor:
    total = torch.zeros(c, dtype=torch.float64)
    for pattern in range(_PATTERNS):
        for k in range(c):
            batch = make(case, torch.tensor([k]), torch.tensor([pattern]))
            total[k] += _norms(case, batch)[0]
    return total


def _relative(norms: Tensor) -> Tensor:
    """Return weights against the (lower) median of the classes that weigh anything."""
    if not norms.isfinite().all():
        raise Broken("the gradients of some classes are not finite")
    some = norms > 0
    if not some.any():
        raise Broken("no example of any class has a gradient: there is nothing to learn from")
    return norms / norms[some].median()
