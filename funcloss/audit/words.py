"""An audit in plain sentences, never stronger than its standard errors allow.

The rules:

- two numbers differ, and two classes conflict, when they are two standard errors apart, more where
  few batches give the error; else the difference "is not significant";
- a class loses from another when the other's part of the step raises its loss *and* their
  gradients conflict significantly;
- where the shares mean nothing, or nobody can tell, there is no verdict: :func:`doubts`.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
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
    log_loss: bool = False,
    name: Name = str,
    most: int = 4,
) -> tuple[str, ...]:
    """Return a gradient and a step in sentences: the classes' shares, and who loses by whom.

    Args:
        audit: The audit.
        optimizer: Name of the optimiser, to say how its step answers to scaled weights; empty: not
            known.
        scale_invariant: Whether its steps stay when all gradients are scaled, as
            :class:`funcloss.optim.Optimizer` states it.
        log_loss: Whether the loss is the cross-entropy, see :func:`doubts`.
        name: How a class's name is written.
        most: Classes to speak of, at most.

    Returns:
        One or two plain sentences each. Where no verdict is possible they say why, and leave the
        numbers to the table.
    """
    writer = _Writer(audit, audit.balance, name)
    lines = []
    if failed := [check.name for check in audit.checks if not check.holds]:
        lines.append(
            f"Self-check failed ({_list(failed)}): do not trust these numbers before you know why."
        )
    if not writer.now.share.isfinite().any():
        return (*lines, "The gradient is 0 or not finite on these examples: no class has a share.")
    no_verdict = doubts(audit, log_loss=log_loss, name=name)
    if no_verdict:
        lines += [f"No verdict on the shares: {reason}." for reason in no_verdict]
        lines.append("The table has the numbers.")
    else:
        lines += writer.verdicts(most)
    if audit.step is None:
        lines.append("The optimizer step was not audited: these lines are about the gradient.")
    elif audit.step.note:
        lines.append(f"Optimizer step: {audit.step.note}.".replace("..", "."))
    if not no_verdict:
        lines += writer.options()
    if optimizer and audit.linear_in_weights:
        lines.append(writer.scale(optimizer, scale_invariant))
    return tuple(lines)


def doubts(audit: Audit, *, log_loss: bool = False, name: Name = str) -> list[str]:
    """Return why nothing can be concluded from the shares of an audit; empty where it can.

    Args:
        audit: The audit.
        log_loss: Whether the loss is the cross-entropy: then a model is at chance when its weighted
            loss is not below the entropy of weight x count; else when its mean recall is not above
            1 / classes.
        name: How a class's name is written.

    Returns:
        Reasons, as the second half of a sentence.
    """
    now, errors = audit.balance, audit.standard_errors
    reasons = []
    if errors is None:
        reasons.append("too few batches for standard errors")
    if chance := _at_chance(audit, log_loss=log_loss):
        reasons.append(chance)
    present = [c for c, n in enumerate(audit.count.tolist()) if n]
    outside = [name(audit.classes[c]) for c in present if not -1 <= float(now.share[c]) <= 2]
    if outside:
        one = len(outside) == 1
        which = f"{'that of class' if one else 'those of classes'} {_list(outside, _NAMED)}"
        reasons.append(f"{which} {'lies' if one else 'lie'} outside -100 to 200 %")
    error, norm = _gradient_error(audit), float(now.gradient_norm)
    # Within two of its standard errors the gradient is not significantly different from 0. The
    # square of the error is then a quarter of |g|^2 or more, and as much of every share may be
    # sampling alone, which the jackknife does not show. Few parts that cancel need many examples.
    if 4 * error**2 > norm**2:
        left = norm / float(now.norm.sum())
        reasons.append(
            f"the class gradients nearly cancel (the norm of their sum is {percent(left)} of their "
            f"norms together, its standard error {100 * error / norm:.0f} % of it)"
        )
    return reasons


def _gradient_error(audit: Audit) -> float:
    """Return ``sqrt(E |g - E g|^2)`` of a mean over examples; 0 where their norms are not known."""
    examples = audit.examples
    if examples is None or not examples.norm.isfinite().all():
        return 0.0
    now, n = audit.balance, len(examples.norm)
    # The factor of ``sum_c w_c G_c`` that the reduction leaves.
    along = float((audit.class_weights @ audit.gram.to(audit.class_weights)) @ audit.class_weights)
    scale = float(now.gradient_norm) / math.sqrt(along) if along > 0 else 0.0
    weighted = scale * audit.class_weights[examples.label] * examples.norm
    mean_square = float(weighted.square().mean())
    return math.sqrt(max(mean_square - float(now.gradient_norm) ** 2, 0.0) / n)


def _at_chance(audit: Audit, *, log_loss: bool) -> str:
    """Return that a model is not better than the class frequencies, if that is so."""
    present = audit.count > 0
    if int(present.sum()) < 2:
        return ""
    if log_loss:
        part = audit.balance.expected_share[present]
        loss = float(part @ audit.loss[present])
        entropy = float(-torch.special.xlogy(part, part).sum())
        if loss < entropy:
            return ""
        return f"the model is at chance (weighted loss {loss:.3g}, that of the prior {entropy:.3g})"
    examples = audit.examples
    if examples is None or examples.margin.isnan().any():
        return ""
    right = torch.zeros(len(audit.count), dtype=torch.float64)
    right = right.index_add(0, examples.label, (examples.margin > 0).double())[present]
    count = audit.count[present].double()
    recall, classes = right / count, len(count)
    mean = float(recall.mean())
    error = float((recall * (1 - recall) / count).sum().sqrt()) / classes
    if mean - 1 / classes > 2 * error:
        return ""
    return f"the model is at chance (mean recall {mean:.1%} of {classes} classes)"


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
    if own := unusual(audit.class_weights.tolist()):
        return own[:most]
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
    return sorted(unusual(audit.class_weights.tolist()))


def unusual(weights: Sequence[float]) -> list[int]:
    """Return the positions of weights that are not the most common one, the most unusual first.

    Example:
        >>> unusual([1.0, 1.0, 0.5, 5.0])
        [3, 2]
    """
    usual = _usual(weights)

    def distance(label: int) -> float:
        weight = weights[label]
        return abs(math.log(weight / usual)) if weight and usual else math.inf

    own = [c for c, weight in enumerate(weights) if weight != usual]
    return sorted(own, key=lambda c: (-distance(c), c))


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

    def error_of_share(self, label: int) -> float:
        errors = self.audit.standard_errors
        return math.nan if errors is None else float(errors.share[label])

    def differ(self, a: float, b: float, error: float) -> bool:
        """Return whether two parts differ significantly, and by more than rounding."""
        return abs(a - b) >= max(_certain(self.audit) * error, 1e-9)

    def verdicts(self, most: int) -> list[str]:
        """Say what the shares and the step show of the classes to speak of."""
        audit, lines = self.audit, []
        if not audit.linear_in_weights:
            lines.append(
                "The weights act inside the loss, which couples the examples: the effect of other "
                "weights takes a new audit."
            )
        chosen = spoken_of(audit, most=most)
        if not weighted(audit):
            lines.append("All classes have the same weight.")
            for label, extreme in zip(chosen, ("largest", "smallest"), strict=False):
                lines += self.doubt(label) or [
                    self.extreme(label, extreme),
                    *self.conflicts(label),
                ]
            return lines
        for label in chosen:
            lines += self.doubt(label) or [*self.weight(label), *self.conflicts(label)]
        if more := len(weighted(audit)) - len(chosen):
            have = "class has its weight" if more == 1 else "classes have their weights"
            lines.append(f"{more:,} more {have}: see the table.")
        return lines

    def doubt(self, label: int) -> list[str]:
        """Say that nothing can be concluded from the share of a class, if that is so."""
        share, error = float(self.now.share[label]), self.error_of_share(label)
        if not self.audit.count[label] or error <= abs(share):
            return []
        why = "its standard error is not known" if math.isnan(error) else "its error exceeds it"
        return [f"No verdict on the share of {self.classes([label])}: {why}; see the table."]

    def weight(self, label: int) -> list[str]:
        """Say how the weight of a class changes its share."""
        audit, who = self.audit, self.classes([label])
        weight = float(audit.class_weights[label])
        if not audit.count[label]:
            no_effect = f"{who} has no examples here: its weight of {weight:.4g} has no effect."
            return [_sentence(no_effect)]
        share, error = float(self.now.share[label]), self.error_of_share(label)
        numbers = f"{who} contributes {percent(share, error)} of the gradient"
        if not audit.linear_in_weights:
            return [_sentence(f"{numbers}.")]
        equal = float(audit.reweighted(torch.ones_like(audit.class_weights)).share[label])
        if self.differ(share, equal, error):
            verb = "increases" if share > equal else "decreases"
            verdict = f"the class weight {verb} {who}'s contribution to the current gradient."
        else:
            verdict = f"{who}'s share does not differ significantly from unweighted."
        same = f"for the same model with all weights 1, {percent(equal)}."
        return [
            _sentence(verdict),
            f"With weight {weight:.4g}, {numbers}; {same}",
            self.expected(label),
        ]

    def expected(self, label: int) -> str:
        """Say how the share of a class compares with what its weight and count suggest."""
        share, expected = float(self.now.share[label]), float(self.now.expected_share[label])
        told = f"Expected from weight x count: {percent(expected)}"
        if not self.differ(share, expected, self.error_of_share(label)):
            return f"{told}; the difference is not significant."
        return f"{told}; the actual share is {'higher' if share > expected else 'lower'}."

    def extreme(self, label: int, extreme: str) -> str:
        """Say how the share of a class compares with its frequency, where all weigh the same."""
        share, expected = float(self.now.share[label]), float(self.now.expected_share[label])
        error = self.error_of_share(label)
        line = (
            f"{self.classes([label])} has the {extreme} gradient share relative "
            f"to its frequency: {percent(share, error)}, expected {percent(expected)}"
        )
        doubtful = not self.differ(share, expected, error)
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
        line = f"Of the step, {percent(share)} comes from {who}'s current gradient"
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
        its = f"{self.classes([label])}'s part of the step"
        if not raised:
            return [f"On these examples {its} raises no other class's loss."]
        listed = self.classes(raised, _NAMED)
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
        assert errors is not None  # else there is no verdict

        def cosine(k: int) -> str:
            error = float(errors.conflict[label, k])
            return f"{row[k]:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")

        lowest = f"with {self.classes(others[:1])}, is {cosine(others[0])}"
        if "±" not in lowest:
            return [f"On these examples the lowest cosine similarity of {who}, {lowest}."]
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


def _usual(weights: Sequence[float]) -> float:
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
