"""An audit in plain sentences, never stronger than its standard errors allow.

The rules:

- two numbers differ, and two classes conflict, when they are two standard errors apart, more where
  few batches give the error; else the difference "is not significant";
- a class loses from another when the other's part of the step raises its loss *and* their
  gradients conflict significantly;
- without standard errors (a single batch) only what was seen is said, "in this batch".
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from funcloss.audit.gram import Balance
from funcloss.audit.result import Audit

# How many standard errors are significant, by the batches that gave them: Student's t at 95 %.
_STUDENT = {4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
_SAME = 0.01  # relative difference of two shares
_NAMED = 3  # classes named one by one in a sentence
_MOST = 24  # classes named in a list

Name = Callable[[str], str]


def sentences(
    audit: Audit,
    *,
    optimizer: str = "",
    scale_invariant: bool = False,
    name: Name = str,
    most: int = 4,
) -> tuple[str, ...]:
    """Return the first lines of the report: the effect of the class weights, and on which classes.

    Args:
        audit: The audit.
        optimizer: Name of the optimiser, to say how its step answers to scaled weights; empty: not
            known.
        scale_invariant: Whether its steps stay when all gradients are scaled, as
            :class:`funcloss.optim.Optimizer` states it.
        name: How a class's name is written.
        most: Classes to speak of, at most.

    Returns:
        One or two plain sentences each.
    """
    writer = _Writer(audit, audit.balance, name)
    lines = []
    if failed := [check.name for check in audit.checks if not check.holds]:
        lines.append(
            f"Self-check failed ({_list(failed)}): do not trust these numbers before you know why."
        )
    if not writer.now.share.isfinite().any():
        return (*lines, "The gradient is 0 or not finite on these examples: no class has a share.")
    if not audit.linear_in_weights:
        lines.append(
            "The weights act inside the loss, which couples the examples: the effect of other "
            "weights takes a new audit."
        )
    chosen = spoken_of(audit, most=most)
    if weighted(audit):
        for label in chosen:
            lines += writer.weight(label) + writer.conflicts(label)
        if more := len(weighted(audit)) - len(chosen):
            have = "class has its weight" if more == 1 else "classes have their weights"
            lines.append(f"{more:,} more {have}: see the table.")
    else:
        lines.append("All classes have the same weight.")
        for label, extreme in zip(chosen, ("largest", "smallest"), strict=False):
            lines += [writer.extreme(label, extreme), *writer.conflicts(label)]
    if audit.step is None:
        lines.append("The optimizer step was not audited: these lines are about the gradient.")
    elif audit.step.note:
        lines.append(f"Optimizer step: {audit.step.note}.".replace("..", "."))
    lines += writer.options()
    if optimizer and audit.linear_in_weights:
        lines.append(writer.scale(optimizer, scale_invariant))
    return tuple(lines)


def compare(audit: Audit, plain: Audit, *, name: Name = str, most: int = _MOST) -> tuple[str, ...]:
    """Return what the weights of a loss changed, against the same data under the plain loss.

    Args:
        audit: The audit of the weighted loss.
        plain: The audit of the same examples under the plain loss.
        name: How a class's name is written.
        most: Classes to speak of one by one, at most.

    Returns:
        Which classes' shares are the same to 1 %, what happened to the others, and to the length
        of the gradient.

    Raises:
        ValueError: the two audits are not of the same classes and counts.
    """
    if audit.classes != plain.classes or not torch.equal(audit.count, plain.count):
        raise ValueError("compare: the two audits must be of the same classes and examples")
    now, before = audit.balance, plain.balance
    writer = _Writer(audit, now, name)
    known = (now.share.isfinite() & before.share.isfinite() & (audit.count > 0)).tolist()
    labels = [c for c, here in enumerate(known) if here]
    if not labels:
        return ("One of the gradients is 0 or not finite: nothing to compare.",)
    moved = (now.share - before.share).abs()
    same = [c for c in labels if float(moved[c]) <= _SAME * float(before.share[c].abs())]
    changed = sorted(set(labels) - set(same), key=lambda c: -float(moved[c]))
    lines = []
    if len(same) == 1:
        c = same[0]
        lines.append(
            f"The weighting has no effect on {writer.classes(same)}: its share of the gradient "
            f"is {percent(now.share[c])} with it and {percent(before.share[c])} without."
        )
    elif same:
        lines.append(
            f"The weighting has no effect on {writer.classes(same, most)}: "
            "their shares of the gradient are the same with and without it, to 1 %."
        )
    for c in changed[:most]:
        verb = "raises" if now.share[c] > before.share[c] else "lowers"
        lines.append(
            f"The weighting {verb} the share of {writer.classes([c])} from "
            f"{percent(before.share[c])} to {percent(now.share[c])}."
        )
    if changed[most:]:
        lines.append(f"{len(changed[most:]):,} more changed by less than these.")
    times = float(now.gradient_norm / before.gradient_norm)
    if math.isfinite(times) and abs(times - 1.0) > _SAME:
        scaled = "" if changed else ": that acts as another learning rate would"
        lines.append(f"The gradient is {times:.3g} times as long as without the weighting{scaled}.")
    return tuple(lines)


def spoken_of(audit: Audit, *, most: int = 4) -> list[int]:
    """Return the labels to speak of: those with a weight of their own, the most unusual first.

    Where all classes weigh the same: the one with the largest share relative to the expected one,
    then the one with the smallest.
    """
    own = weighted(audit)
    if own:
        usual = _usual(audit.class_weights.tolist())

        def unusual(label: int) -> float:
            weight = float(audit.class_weights[label])
            return abs(math.log(weight / usual)) if weight and usual else math.inf

        return sorted(own, key=lambda c: (-unusual(c), c))[:most]
    now = audit.balance
    ratio = (now.share / now.expected_share).tolist()
    ranked = sorted((c for c, r in enumerate(ratio) if math.isfinite(r)), key=lambda c: -ratio[c])
    return ([ranked[0], ranked[-1]] if len(ranked) > 1 else ranked)[:most]


def largest(audit: Audit, most: int = _MOST) -> list[int]:
    """Return the labels to show, ascending: all, or those spoken of and with the largest shares."""
    if len(audit.classes) <= most:
        return list(range(len(audit.classes)))
    size = audit.balance.share.abs().nan_to_num(-1.0)
    first = [*spoken_of(audit, most=min(4, most)), *size.argsort(descending=True).tolist()]
    return sorted(list(dict.fromkeys(first))[:most])


def weighted(audit: Audit) -> list[int]:
    """Return the classes whose weight is not the most common one."""
    weights = audit.class_weights.tolist()
    usual = _usual(weights)
    return [c for c, weight in enumerate(weights) if weight != usual]


def conflicting(audit: Audit, conflict: Tensor, a: int, b: int) -> bool:
    """Return whether the cosine of two classes is significantly below 0."""
    if audit.standard_errors is None:
        return False
    error = float(audit.standard_errors.conflict[a, b])
    return float(conflict[a, b]) < 0 and float(conflict[a, b]) <= -_certain(audit) * error


def percent(part: float | Tensor, error: float = math.nan) -> str:
    """Return a part of one as a percentage, with its standard error where there is one.

    Example:
        >>> percent(0.123456, 0.0123), percent(-0.0001)
        ('12.3 ± 1.2 %', '0.0 %')
    """
    text = f"{round(100 * float(part), 1) + 0.0:.1f}"  # + 0.0: no minus before a zero
    return f"{text} %" if math.isnan(error) else f"{text} ± {100 * error:.1f} %"


@dataclass(frozen=True, eq=False)
class _Writer:
    """Writes the sentences about one audit."""

    audit: Audit
    now: Balance
    name: Name

    def classes(self, labels: list[int], most: int = _MOST) -> str:
        """Return classes by name, the first ``most`` of them."""
        names = [self.name(self.audit.classes[label]) for label in labels]
        return f"{'class' if len(labels) == 1 else 'classes'} {_list(names, most)}"

    def where(self, error: float = math.nan) -> str:
        """Return where a number without a standard error holds, as the beginning of a sentence."""
        if not math.isnan(error):
            return ""
        return "In this batch " if self.audit.standard_errors is None else "On these examples "

    def error_of_share(self, label: int) -> float:
        errors = self.audit.standard_errors
        return math.nan if errors is None else float(errors.share[label])

    def differ(self, a: float, b: float, error: float) -> bool:
        """Return whether two parts differ significantly, and by more than rounding."""
        return abs(a - b) >= max(_certain(self.audit) * error, 1e-9)

    def weight(self, label: int) -> list[str]:
        """Say whether the weight of a class has the effect that it is for."""
        audit, who = self.audit, self.classes([label])
        weight = float(audit.class_weights[label])
        if not audit.count[label]:
            no_effect = f"{who} has no examples here: its weight of {weight:.4g} has no effect."
            return [_sentence(no_effect)]
        share, error = float(self.now.share[label]), self.error_of_share(label)
        numbers = f"{who} contributes {percent(share, error)} of the gradient"
        if not audit.linear_in_weights:
            return [_sentence(f"{self.where(error)}{numbers}.")]
        equal = float(audit.reweighted(torch.ones_like(audit.class_weights)).share[label])
        verb = "increases" if share > equal else "decreases"
        effect = f"the class weight {verb} {who}'s contribution to the"
        meant = (weight > _usual(audit.class_weights.tolist())) == (share > equal)
        if share == equal:
            verdict = f"{self.where(error)}the class weight does not change {who}'s contribution."
        elif math.isnan(error):
            verdict = f"{self.where(error)}{effect} gradient."
        elif not self.differ(share, equal, error):
            verdict = (
                f"{who}'s share does not differ significantly from unweighted. "
                "This does not say whether recall changed: see evaluate."
            )
        elif meant:
            verdict = f"{effect} current gradient, as intended."
        else:
            verdict = f"{effect} current gradient, the opposite of what is intended."
        same = f"for the same model with all weights 1, {percent(equal)}."
        return [
            _sentence(verdict),
            f"With weight {weight:.4g}, {numbers}; {same}",
            self.expected(label),
        ]

    def expected(self, label: int) -> str:
        """Say how the share of a class compares with what its weight and count suggest."""
        share, expected = float(self.now.share[label]), float(self.now.expected_share[label])
        error = self.error_of_share(label)
        told = f"Expected from weight x count: {percent(expected)}"
        if not math.isnan(error) and not self.differ(share, expected, error):
            return f"{told}; the difference is not significant."
        more = "higher" if share > expected else "lower"
        return f"{told}; {self.where(error).lower()}the actual share is {more}."

    def extreme(self, label: int, extreme: str) -> str:
        """Say how the share of a class compares with its frequency, where all weigh the same."""
        share, expected = float(self.now.share[label]), float(self.now.expected_share[label])
        error = self.error_of_share(label)
        line = (
            f"{self.where(error)}{self.classes([label])} has the {extreme} gradient share relative "
            f"to its frequency: {percent(share, error)}, expected {percent(expected)}"
        )
        doubtful = not math.isnan(error) and not self.differ(share, expected, error)
        return _sentence(f"{line}{'; the difference is not significant' if doubtful else ''}.")

    def conflicts(self, label: int) -> list[str]:
        """Say how much of the step comes from a class, who loses from it, and who conflicts."""
        if not self.audit.count[label]:
            return []
        return [*self.step(label), *self.losers(label), *self.lowest_cosines(label)]

    def step(self, label: int) -> list[str]:
        step, who = self.audit.step, self.classes([label])
        if step is None:
            return []
        share = float(step.share[label])
        if not math.isfinite(share):
            return ["The optimizer takes no step here."]
        if share < 0:
            return [
                _sentence(f"{who}'s gradient points against the optimizer step ({percent(share)}).")
            ]
        line = f"Of the next step, {percent(share)} comes from {who}'s current gradient"
        past = dict(zip(step.rows, step.share.tolist(), strict=True)).get("history", 0.0)
        return [f"{line} and {percent(past)} from momentum." if abs(past) >= _SAME else f"{line}."]

    def losers(self, label: int) -> list[str]:
        """Say whose loss a class's part of the step raises."""
        audit = self.audit
        if "train" not in audit.impact:
            return []
        rise = audit.impact["train"].matrix[:, label].tolist()
        raised = [k for k, r in enumerate(rise) if k != label and r > 0]  # a NaN is no rise
        raised.sort(key=lambda k: -rise[k])
        its, where = f"{self.classes([label])}'s part of the step", self.where()
        if not raised:
            return [f"{where}{its} raises no other class's loss."]
        listed = self.classes(raised, _NAMED)
        if audit.standard_errors is None:
            return [f"{where}{its} raises the loss of {listed}."]
        certain = [k for k in raised if conflicting(audit, self.now.conflict, label, k)]
        if not certain:
            return [
                f"No class loses significantly from {its}: on these examples it raises the loss "
                f"of {listed}."
            ]
        losers = _list([f"{self.classes([k])} ({rise[k]:+.2g})" for k in certain], _NAMED)
        lines = [_sentence(f"{its} raises the loss of {losers}.")]
        if "held_out" in audit.impact:
            elsewhere = audit.impact["held_out"].matrix[:, label]
            agree = [k for k in certain if elsewhere[k] > 0]
            only = "" if not agree else f"this holds for {self.classes(agree, _NAMED)} only"
            says = "the same losses rise" if len(agree) == len(certain) else only
            lines.append(f"On held-out data {says or 'none of these losses rises'}.")
        return lines

    def lowest_cosines(self, label: int) -> list[str]:
        """Say which classes' gradients conflict with that of a class."""
        row = self.now.conflict[label].tolist()
        others = [k for k, c in enumerate(row) if k != label and math.isfinite(c)]
        if not others:
            return []
        others.sort(key=lambda k: row[k])
        errors, who = self.audit.standard_errors, self.classes([label])

        def cosine(k: int) -> str:
            error = math.nan if errors is None else float(errors.conflict[label, k])
            return f"{row[k]:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")

        lowest = f"with {self.classes(others[:1])}, is {cosine(others[0])}"
        if "±" not in lowest:
            return [f"{self.where()}the lowest cosine similarity of {who}, {lowest}."]
        certain = [k for k in others if conflicting(self.audit, self.now.conflict, label, k)]
        if certain:
            named = _list([f"{self.classes([k])} ({cosine(k)})" for k in certain], _NAMED)
            return [f"Conflicting gradients (cosine similarity with {who}): {named}."]
        significant = "significant " if row[others[0]] < 0 else ""
        return [
            f"No {significant}gradient conflict: the lowest cosine similarity of {who}, {lowest}."
        ]

    def options(self) -> list[str]:
        """Say which entry of each option of the loss moves the gradient most."""
        lines = []
        for option, values in self.audit.elasticities.items():
            if option == "class_weights" or not values.isfinite().any():
                continue
            flat = values.double().flatten()
            most = int(flat.abs().nan_to_num(-1.0, -1.0).argmax())
            effect = float(flat[most])
            verb = "lengthens" if effect > 0 else "shortens"
            by = f"{verb} the gradient by {abs(effect):.2g} %"
            by = by if effect else "leaves the gradient's length"
            lines.append(f"1 % more of {self.entry(option, values, most)} {by}.")
        return lines

    def entry(self, option: str, values: Tensor, at: int) -> str:
        """Return the words for one entry of an option of the loss."""
        names = [self.name(text) for text in self.audit.classes]
        if values.dim() == 0:
            return option
        if values.shape == (len(names), len(names)):
            true, decided = divmod(at, len(names))
            where = f"true class {names[true]}, decided class {names[decided]}"
        else:
            where = names[at] if values.shape == (len(names),) else f"entry {at}"
        return f"{option} at {where} (most of all its entries)"

    def scale(self, optimizer: str, scale_invariant: bool) -> str:
        """Say what multiplying all weights by one number does to the step."""
        if self.audit.reduction == "weighted_mean":
            return (
                "Multiplying all class weights by one number changes nothing: the loss divides by "
                "their sum."
            )
        if scale_invariant:
            return (
                f"A step of {optimizer} hardly changes when all class weights are multiplied by "
                "one number: only their ratios count."
            )
        clipped = self.audit.step is not None and self.audit.step.clip < 1
        limit = ", up to the clipping, which cut this one" if clipped else ""
        return (
            f"A step of {optimizer} grows with the class weights: multiplying all of them by one "
            f"number multiplies it as a larger learning rate would{limit}."
        )


def _certain(audit: Audit) -> float:
    """Return how many standard errors are significant."""
    errors = audit.standard_errors
    return 2.0 if errors is None else _STUDENT.get(errors.left_out, 2.0)


def _usual(weights: list[float]) -> float:
    """Return the most common weight; of equally common ones, the one nearest to 1."""
    seen = Counter(weights)
    return max(seen, key=lambda w: (seen[w], -abs(math.log(w)) if w > 0 else -math.inf, -w))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _list(parts: list[str], most: int = _MOST) -> str:
    """Return parts in a row, the first ``most`` of them."""
    more = len(parts) - most
    parts = [*parts[:most], f"{more:,} more"] if more > 0 else parts
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
