"""What an audit says in plain words, never stronger than its uncertainty allows.

The rules, with the standard error ``sd / sqrt(batches)`` of a number from batch to batch:

- two numbers differ, and a class fights another, when they are two standard errors apart, more
  where few batches tell the error; else they "cannot be told apart";
- a class pays for another when the other's part of the step raises its loss *and* it fights it;
- without a spread (a single batch) only what was seen is said, "in this batch".
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from funcloss.audit.gram import Balance
from funcloss.audit.result import Audit, Check

# How many standard errors are certain, by the batches they were told from: Student's t at 95 %.
_STUDENT = {4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
_SAME = 0.01  # relative difference of two shares
_NAMED = 3  # classes named one by one in a sentence

Name = Callable[[str], str]


class _Said(NamedTuple):
    """What every sentence needs."""

    audit: Audit
    now: Balance
    name: Name


def sentences(
    audit: Audit,
    *,
    optimizer: str = "",
    scale_invariant: bool = False,
    name: Name = str,
    most: int = 4,
) -> tuple[str, ...]:
    """Return the first lines of the report: what the costs did, and who pays for it.

    Args:
        audit: The audit.
        optimizer: Name of the optimiser, to say how its step answers to scaled costs; empty: not
            known.
        scale_invariant: Whether its steps stay when all gradients are scaled, as
            :class:`funcloss.optim.Optimizer` states it.
        name: How a class's name is written.
        most: Classes to speak of, at most.

    Returns:
        One or two plain sentences each.
    """
    said = _Said(audit, audit.balance, name)
    lines = [_distrust(audit.checks)] if any(not passed(c) for c in audit.checks) else []
    if not said.now.share.isfinite().any():
        return (*lines, "The gradient is 0 or not finite on these examples: no class has a share.")
    if not audit.linear_in_weights:
        lines.append(
            "The cost acts inside the loss, which couples the examples: "
            "what another cost would do takes a fresh audit."
        )
    chosen = spoken_of(audit, most=most)
    if weighted(audit):
        for label in chosen:
            lines += _of_cost(said, label) + _of_class(said, label)
        if more := len(weighted(audit)) - len(chosen):
            has = "class has its cost" if more == 1 else "classes have their costs"
            lines.append(f"{more:,} more {has}: see the table.")
    else:
        lines.append("No class has a weight of its own.")
        for label, extreme in zip(chosen, ("most", "least"), strict=False):
            lines += [_of_count(said, label, extreme), *_of_class(said, label)]
    if audit.step is None:
        lines.append(
            "The step of the optimiser was not audited: what is said here is of the gradient."
        )
    elif audit.step.note:
        lines.append(f"Of the step: {audit.step.note}.".replace("..", "."))
    lines += _of_options(audit, name)
    if optimizer and audit.linear_in_weights:
        lines.append(_of_scale(audit, optimizer, scale_invariant))
    return tuple(lines)


def compare(audit: Audit, plain: Audit, *, name: Name = str, most: int = 24) -> tuple[str, ...]:
    """Return what the costs of a loss changed, against the same data under the plain loss.

    Args:
        audit: The audit of the loss with costs.
        plain: The audit of the same examples under the loss without them.
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
            f"The cost has no effect on {_classes(audit, same, name)}: its share of the gradient "
            f"is {percent(now.share[c])} with it and {percent(before.share[c])} without."
        )
    elif same:
        lines.append(
            f"The cost has no effect on {_classes(audit, same, name, most)}: "
            "their shares of the gradient are the same with and without it, to 1 %."
        )
    for c in changed[:most]:
        verb = "raises" if now.share[c] > before.share[c] else "lowers"
        lines.append(
            f"The cost {verb} the share of {_classes(audit, [c], name)} from "
            f"{percent(before.share[c])} to {percent(now.share[c])}."
        )
    if changed[most:]:
        lines.append(f"{len(changed[most:]):,} more changed by less than these.")
    times = float(now.gradient_norm / before.gradient_norm)
    if math.isfinite(times) and abs(times - 1.0) > _SAME:
        scaled = "" if changed else ": that acts as another learning rate would"
        lines.append(f"The gradient is {times:.3g} times as long as without the cost{scaled}.")
    return tuple(lines)


def spoken_of(audit: Audit, *, most: int = 4) -> list[int]:
    """Return the classes to speak of: those with a cost of their own, else the two extremes.

    Args:
        audit: The audit.
        most: How many at most, the most unusual costs first.

    Returns:
        Labels. Where all classes cost the same: the one with the largest share relative to its
        budget, then the one with the smallest.
    """
    own = weighted(audit)
    if own:
        usual = _usual(audit.class_weights.tolist())

        def unusual(label: int) -> float:
            weight = float(audit.class_weights[label])
            return abs(math.log(weight / usual)) if weight and usual else math.inf

        return sorted(own, key=lambda c: (-unusual(c), c))[:most]
    now = audit.balance
    ratio = (now.share / now.budget).tolist()
    ranked = sorted((c for c, r in enumerate(ratio) if math.isfinite(r)), key=lambda c: -ratio[c])
    return ([ranked[0], ranked[-1]] if len(ranked) > 1 else ranked)[:most]


def largest(audit: Audit, most: int = 24) -> list[int]:
    """Return the classes to show, in their order: all, or those with the largest shares.

    Args:
        audit: The audit.
        most: How many; those spoken of are among them.

    Returns:
        Labels, ascending.
    """
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


def passed(check: Check) -> bool:
    """Return whether an identity holds; one without a tolerance only informs."""
    return check.tolerance is None or check.error <= check.tolerance


def standard_error(audit: Audit, of: str, *at: int) -> float:
    """Return the standard error of a share or a conflict; NaN where it is not known."""
    if audit.spread is None or audit.spread.batches < 2:
        return math.nan
    return float(getattr(audit.spread, of)[at]) / math.sqrt(audit.spread.batches)


def fights(audit: Audit, conflict: Tensor, a: int, b: int) -> bool:
    """Return whether the cosine of two classes is below 0 by two standard errors."""
    cosine, error = float(conflict[a, b]), standard_error(audit, "conflict", a, b)
    return cosine < 0 and cosine <= -_certain(audit) * error  # False where the error is NaN


def percent(part: float | Tensor, error: float = math.nan) -> str:
    """Return a part of one as a percentage, with its standard error where there is one.

    Example:
        >>> percent(0.123456, 0.0123), percent(-0.0001)
        ('12.3 ± 1.2 %', '0.0 %')
    """
    text = f"{round(100 * float(part), 1) + 0.0:.1f}"  # + 0.0: no minus before a zero
    return f"{text} %" if math.isnan(error) else f"{text} ± {100 * error:.1f} %"


def _of_cost(said: _Said, label: int) -> list[str]:
    """Say whether the cost of a class did what it is for."""
    audit, now, name = said
    cost = f"{float(audit.class_weights[label]):.4g}"
    who = _classes(audit, [label], name)
    if not audit.count[label]:
        return [_sentence(f"{who} has no examples here: its cost of {cost} did nothing.")]
    share, error = float(now.share[label]), standard_error(audit, "share", label)
    here = _here(audit, error)
    if not audit.linear_in_weights:
        return [_sentence(f"{here} {who} makes up {percent(share, error)} of the gradient.")]
    equal = float(audit.reweighted(torch.ones_like(audit.class_weights)).share[label])
    usual = _usual(audit.class_weights.tolist())
    meant = 1.0 if float(audit.class_weights[label]) > usual else -1.0
    moved = meant * (share - equal)
    verb = "raises" if share > equal else "lowers" if share < equal else "does not change"
    numbers = (
        f"at cost {cost}, {who} makes up {percent(share, error)} of the gradient; "
        f"with every cost at 1 it would be {percent(equal)}."
    )
    if math.isnan(error):
        verdict = f"{here} the cost {verb} the share of {who}."
    elif not _apart(audit, share, equal, error):
        verdict = (
            f"The share of {who} cannot be told apart from what it would be at equal costs: "
            "no effect of the cost is seen."
        )
    elif moved > 0:
        verdict = f"The cost on {who} does what it is for: it {verb} the share of {who}."
    else:
        verdict = f"The cost on {who} does the opposite of what it is for: it {verb} its share."
    return [verdict, _sentence(numbers), _of_budget(said, label)]


def _of_budget(said: _Said, label: int) -> str:
    """Say how the share of a class compares with what its cost and count suggest."""
    audit, now, name = said
    who = _classes(audit, [label], name)
    share, budget = float(now.share[label]), float(now.budget[label])
    error = standard_error(audit, "share", label)
    stated = f"Cost and count of {who} suggest {percent(budget)}"
    more = "more" if share > budget else "less"
    if math.isnan(error):
        return f"{stated}; {_here(audit, error).lower()} it has {more}."
    if not _apart(audit, share, budget, error):
        return f"{stated}; its share cannot be told apart from that."
    return f"{stated}; it has {more}."


def _of_count(said: _Said, label: int, extreme: str) -> str:
    """Say how the share of a class compares with its count, where all cost the same."""
    audit, now, name = said
    share, budget = float(now.share[label]), float(now.budget[label])
    error = standard_error(audit, "share", label)
    line = (
        f"{_here(audit, error)} {_class(audit, label, name)} has the {extreme} of the gradient "
        f"for its count: {percent(share, error)} where the count suggests {percent(budget)}"
    )
    doubt = (
        ""
        if math.isnan(error) or _apart(audit, share, budget, error)
        else "; the two cannot be told apart"
    )
    return _sentence(f"{line}{doubt}.")


def _of_class(said: _Said, label: int) -> list[str]:
    """Say how much of the step a class owns, who pays for it, and who fights it."""
    if not said.audit.count[label]:
        return []
    return [*_of_step(said, label), *_of_payers(said, label), *_of_fight(said, label)]


def _of_step(said: _Said, label: int) -> list[str]:
    audit, _, name = said
    if audit.step is None:
        return []
    share = float(audit.step.share[label])
    who = _classes(audit, [label], name)
    if not math.isfinite(share):
        return ["The optimiser takes no step here."]
    if share < 0:
        return [_sentence(f"{who} pulls the step back: it owns {percent(share)} of it.")]
    line = f"Of a step on these examples, {who} owns {percent(share)}"
    past = dict(zip(audit.step.rows, audit.step.share.tolist(), strict=True)).get("history", 0.0)
    if abs(past) >= _SAME:
        line += f"; what it remembers of earlier steps owns {percent(past)}"
    return [line + "."]


def _of_payers(said: _Said, label: int) -> list[str]:
    """Say whose loss a class's part of the step raises."""
    audit, now, name = said
    if "train" not in audit.impact:
        return []
    rise = audit.impact["train"].matrix[:, label].tolist()
    raised = [k for k, r in enumerate(rise) if k != label and r > 0]  # a NaN is no rise
    raised.sort(key=lambda k: -rise[k])
    who = _classes(audit, [label], name)
    its = f"the part of the step that {who} owns"
    if not raised:
        where = _here(audit, math.nan)
        return [f"{where} {its} raises no other class's loss, to first order."]
    if _single(audit):
        listed = _classes(audit, raised, name, _NAMED)
        return [f"In this batch {its} raises the loss of {listed}, to first order."]
    certain = [k for k in raised if fights(audit, now.conflict, label, k)]
    if not certain:
        listed = _classes(audit, raised, name, _NAMED)
        return [
            f"Nobody can be said to pay for {who}: on these examples {its} raises the loss of "
            f"{listed}, which cannot be told apart from chance."
        ]
    payers = [f"{_class(audit, k, name)} ({rise[k]:+.2g})" for k in certain[:_NAMED]]
    more = len(certain) - _NAMED
    payers += [f"{more:,} more"] if more > 0 else []
    verb = "pays" if len(certain) == 1 else "pay"
    line = f"{_list(payers)} {verb} for {who}: {its} raises the mean loss, to first order."
    lines = [_sentence(line)]
    if "held_out" in audit.impact:
        elsewhere = audit.impact["held_out"].matrix[:, label]
        agree = [k for k in certain if elsewhere[k] > 0]
        if len(agree) == len(certain):
            lines.append("On held-out data the same losses rise.")
        elif agree:
            lines.append(
                f"On held-out data this holds for {_classes(audit, agree, name, _NAMED)} only."
            )
        else:
            lines.append("On held-out data none of these losses rises.")
    return lines


def _of_fight(said: _Said, label: int) -> list[str]:
    """Say which classes' gradients point against that of a class."""
    audit, now, name = said
    row = now.conflict[label].tolist()
    others = [k for k, c in enumerate(row) if k != label and math.isfinite(c)]
    if not others:
        return []
    others.sort(key=lambda k: row[k])
    lowest = others[0]
    who, other = _classes(audit, [label], name), _class(audit, lowest, name)
    error = standard_error(audit, "conflict", label, lowest)
    value = f"{row[lowest]:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
    if _single(audit) or math.isnan(error):
        sense = "point against each other" if row[lowest] < 0 else "do not point apart"
        where = _here(audit, error)
        return [f"{where} {who} and {other}, the furthest from it, {sense} (cosine {value})."]
    certain = [k for k in others if fights(audit, now.conflict, label, k)]
    if certain:
        named = [
            f"{_class(audit, k, name)} ({row[k]:.2f} ± "
            f"{standard_error(audit, 'conflict', label, k):.2f})"
            for k in certain[:_NAMED]
        ]
        more = len(certain) - _NAMED
        named += [f"{more:,} more"] if more > 0 else []
        verb = "fights" if len(certain) == 1 else "fight"
        return [
            _sentence(f"{_list(named)} {verb} {who}: cosine of the gradients, -1 straight against.")
        ]
    if row[lowest] < 0:
        return [
            f"No class is sure to point against {who}: the lowest cosine, with {other}, is "
            f"{value}, which cannot be told apart from 0."
        ]
    return [f"No class points against {who}: the lowest cosine, with {other}, is {value}."]


def _of_options(audit: Audit, name: Name) -> list[str]:
    """Say which entry of each option of the loss moves the gradient most."""
    lines = []
    for option, values in audit.elasticities.items():
        if option == "class_weights" or not values.isfinite().any():
            continue
        flat = values.double().flatten()
        most = int(flat.abs().nan_to_num(-1.0, -1.0).argmax())
        effect = float(flat[most])
        entry = _entry(audit, option, values, most, name)
        verb = "lengthens" if effect > 0 else "shortens"
        by = (
            f"{verb} the gradient by {abs(effect):.2g} %"
            if effect
            else "leaves the gradient's length"
        )
        lines.append(f"1 % more of {entry} {by}.")
    return lines


def _entry(audit: Audit, option: str, values: Tensor, at: int, name: Name) -> str:
    """Return the words for one entry of an option of the loss."""
    classes = len(audit.classes)
    if values.dim() == 0:
        return option
    if values.shape == (classes, classes):
        true, decided = (name(audit.classes[k]) for k in divmod(at, classes))
        return f"{option} at true class {true}, decided class {decided} (most of all its entries)"
    entry = name(audit.classes[at]) if values.shape == (classes,) else f"entry {at}"
    return f"{option} at {entry} (most of all its entries)"


def _of_scale(audit: Audit, optimizer: str, scale_invariant: bool) -> str:
    """Say what multiplying all costs by one number does to the step."""
    if audit.reduction == "weighted_mean":
        return "Multiplying all costs by one number changes nothing: the loss divides by their sum."
    if scale_invariant:
        return (
            f"A step of {optimizer} hardly changes when all costs are multiplied by one number: "
            "only their ratios count."
        )
    clipped = audit.step is not None and audit.step.clip < 1
    limit = ", up to the clipping, which cut this one" if clipped else ""
    return (
        f"A step of {optimizer} grows with the costs: multiplying all of them by one number "
        f"multiplies it as a larger learning rate would{limit}."
    )


def _distrust(checks: Iterable[Check]) -> str:
    names = _list([check.name for check in checks if not passed(check)])
    return f"The self-check failed ({names}): do not trust these numbers before you know why."


def _single(audit: Audit) -> bool:
    return audit.spread is None or audit.spread.batches < 2


def _certain(audit: Audit) -> float:
    return 2.0 if audit.spread is None else _STUDENT.get(audit.spread.left_out, 2.0)


def _apart(audit: Audit, a: float, b: float, error: float) -> bool:
    """Return whether two parts differ by two standard errors, and by more than rounding."""
    return abs(a - b) >= max(_certain(audit) * error, 1e-9)


def _here(audit: Audit, error: float) -> str:
    """Return where a number without a standard error holds."""
    return "In this batch" if _single(audit) else "On these examples" if math.isnan(error) else ""


def _usual(weights: list[float]) -> float:
    """Return the most common weight; of equally common ones, the one nearest to 1."""
    seen = Counter(weights)
    return max(seen, key=lambda w: (seen[w], -abs(math.log(w)) if w > 0 else -math.inf, -w))


def _class(audit: Audit, label: int, name: Name) -> str:
    return f"class {name(audit.classes[label])}"


def _classes(audit: Audit, labels: list[int], name: Name, most: int = 24) -> str:
    """Return classes by name, the first ``most`` of them."""
    names = [name(audit.classes[label]) for label in labels[:most]]
    more = len(labels) - most
    names += [f"{more:,} more"] if more > 0 else []
    return f"{'class' if len(labels) == 1 else 'classes'} {_list(names)}"


def _sentence(text: str) -> str:
    text = text.lstrip()
    return text[0].upper() + text[1:]


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
