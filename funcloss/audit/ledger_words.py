"""The ledger of a training in plain sentences, never stronger than its errors allow.

The rules:

- an entry is spoken of when it surely differs from 0: in an exact ledger, when it is larger than
  what is missing from the sum of its row; in a sampled one, two standard errors from 0, which takes
  16 steps or more;
- what was raised and lowered on the way is told of an exact ledger only;
- where the parts of an exact ledger miss the measured changes by more than 5 %, no class is named.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from funcloss.audit.ledger import Ledger
from funcloss.audit.words import Name, _list, _sentence, unusual

_CLOSES = 0.05  # of the changes of the losses: how much the parts may miss them by
_ROUNDING = 1e-9  # of what was raised and lowered in a row
_SMALL = 0.01  # of an entry: what it was moved by against its sign, not worth a word
_FEW = 16  # measured steps, below which two standard errors are not the usual 95 %
_NAMED = 3  # classes named one by one in a sentence


def ledger_sentences(
    classes: Sequence[str],
    parts: Sequence[str],
    ledger: Ledger,
    class_weights: Float[Tensor, " classes"],
    *,
    exact: bool,
    judged: str = "held-out",
    name: Name = str,
    most: int = 4,
) -> tuple[str, ...]:
    """Return what the examples of each weighted class did to the losses, and what that is worth.

    Where all classes weigh the same: the two whose examples did most to other classes' losses.

    Args:
        classes: Names of the classes, the rows of the ledger.
        parts: Names of its columns, the classes first.
        ledger: The sums over a training.
        class_weights: Of the training, shape ``(classes)``.
        exact: Whether each step was measured, not a sample of them.
        judged: Which examples the losses are of, ``held-out`` or ``training``.
        name: How a class's name is written.
        most: Weighted classes to speak of, at most.

    Returns:
        Plain sentences, the answer first and how far to trust it last.

    Raises:
        ValueError: the ledger does not have a row for each class and a column for each part.

    Example:
        >>> entries = torch.tensor([[-3.0, 2.0], [0.5, -4.0]], dtype=torch.float64)
        >>> begin, change = torch.ones(2).double(), entries.sum(1)
        >>> ledger = Ledger(
        ...     raised=entries.clamp(min=0), lowered=entries.clamp(max=0),
        ...     variance=0 * entries, variance_of_sum=0 * begin, begin=begin + 3,
        ...     now=begin + 3 + change, memory={}, steps=torch.tensor(10))
        >>> first, *_ = ledger_sentences("ab", "ab", ledger, torch.tensor([1.0, 4.0]), exact=True)
        >>> print(*first.split(": "), sep=chr(10))
        Class b (weight 4)
        its examples lowered class b's own loss by 4.0 and raised that of class a (by 2.0).
    """
    if ledger.net.shape != (len(classes), len(parts)):
        raise ValueError(
            f"ledger_sentences: the ledger must have {len(classes)} rows and {len(parts)} columns, "
            f"a row per class and a column per part, got {tuple(ledger.net.shape)}"
        )
    if not int(ledger.steps):
        return ("No step was measured: the ledger is empty.",)
    if not _changes(ledger).isfinite().any():
        return ("No class has a finite loss: the ledger cannot tell.",)
    if exact and not closes(ledger):
        return (
            "The parts do not add up to the measured changes of the losses: they miss them by "
            f"{_percent(ledger.residual)}. The ledger does not tell who moved whose loss.",
        )
    if few(ledger):
        return (
            f"{_measured(ledger)}, too few to tell who moved whose loss. For all steps: "
            "--ledger exact.",
        )
    writer = _Writer(
        [f"class {name(text)}" for text in classes],
        ledger,
        ledger.net,
        certain(ledger, exact=exact),
        class_weights.tolist(),
        ledger.due_to(class_weights),
        exact,
        judged,
    )
    weighted = unusual(class_weights.tolist())
    spoken = spoken_columns(ledger, class_weights, exact=exact, most=most)
    lines = []
    if weighted:
        for c in spoken:
            lines += writer.weighted(c)
        if more := len(weighted) - len(spoken):
            has = "class has its weight" if more == 1 else "classes have their weights"
            lines.append(f"{more:,} more {has}: see the table.")
    else:
        lines += writer.unweighted(spoken)
    return (*lines, *writer.limits(bool(weighted)))


def certain(ledger: Ledger, *, exact: bool) -> Bool[Tensor, "classes parts"]:
    """Return which entries surely differ from 0.

    Of an exact ledger, those larger than what is missing from the sum of their row; of a sampled
    one, those two standard errors from 0, where 16 steps or more were drawn. None is that is not
    finite.
    """
    net = ledger.net
    if exact:
        missing = (net.sum(1) - _changes(ledger)).abs()
        rounding = _ROUNDING * (ledger.raised - ledger.lowered).sum(1)
        return net.isfinite() & (net.abs() > torch.maximum(missing, rounding)[:, None])
    error = ledger.standard_error
    if few(ledger):
        return torch.zeros_like(net, dtype=torch.bool)
    return net.isfinite() & (error > 0) & (net.abs() > 2.0 * error)


def few(ledger: Ledger) -> bool:
    """Return whether too few steps were drawn for two standard errors to mean the usual 95 %."""
    return ledger.sampling is not None and int(ledger.sampling.samples) < _FEW


def closes(ledger: Ledger) -> bool:
    """Return whether the parts of an exact ledger add up to the changes of the losses, to 5 %."""
    return ledger.residual <= _CLOSES


def spoken_columns(
    ledger: Ledger,
    class_weights: Float[Tensor, " classes"],
    *,
    exact: bool,
    most: int = 4,
) -> list[int]:
    """Return the classes to speak of: those weighted, else two that did most to others' losses."""
    if weighted := unusual(class_weights.tolist()):
        return weighted[:most]
    classes = len(class_weights)
    surely = ledger.net.where(certain(ledger, exact=exact), 0.0)
    size = surely[:, :classes].abs().fill_diagonal_(0.0).sum(0)
    return [c for c in size.argsort(descending=True, stable=True).tolist() if size[c] > 0][:2]


def largest_rows(ledger: Ledger, first: Sequence[int], most: int) -> list[int]:
    """Return the classes to show, ascending: these first, then those with the largest entries."""
    size = ledger.net.abs().nan_to_num(-1.0).max(1).values
    order = [*first, *size.argsort(descending=True, stable=True).tolist()]
    return sorted(list(dict.fromkeys(order))[:most])


def amount(value: float) -> str:
    """Return the size of an entry for a sentence, without its sign.

    Example:
        >>> amount(-1034.56), amount(2.58), amount(0.0123)
        ('1,034.6', '2.6', '0.012')
    """
    size = abs(value)
    return f"{size:,.1f}" if 0.995 <= size < 1e6 else f"{size:.2g}"


def signed(value: float, *, largest: float = 0.0) -> str:
    """Return an entry for a table, with its sign and about three digits.

    Args:
        value: The entry.
        largest: Of the table: where it is 10 or more, no entry has more than one decimal.

    Example:
        >>> signed(103.94), signed(-48.54), signed(0.0123), signed(0.0123, largest=103.94)
        ('+104', '-48.5', '+0.012', '+0.0')
    """
    size = abs(value)
    if not size:
        return "0"
    if 99.95 <= size < 1e6:
        return f"{value:+,.0f}"
    if 0.995 <= size < 99.95 or size < largest and largest >= 10:
        return f"{round(value, 1) + 0.0:+.1f}"
    return f"{value:+.2g}"


@dataclass(frozen=True, eq=False)
class _Writer:
    """Writes the sentences about one ledger."""

    names: Sequence[str]  # "class 9"
    ledger: Ledger
    net: Float[Tensor, "classes parts"]
    sure: Bool[Tensor, "classes parts"]
    weights: Sequence[float]
    due: Float[Tensor, "classes classes"]
    exact: bool
    judged: str

    def weighted(self, c: int) -> list[str]:
        """Say what the examples of a weighted class did, who paid, and what the weight added."""
        who = f"{_sentence(self.names[c])} (weight {self.weights[c]:.4g})"
        if not self.net[:, c].nan_to_num(0.0).any():
            when = "" if self.exact else " in the steps that were measured"
            return [f"{who}: its examples moved no loss{when}."]
        losers = self.moved_by(c, up=True)
        deeds = []
        if self.sure[c, c]:
            verb = "lowered" if self.net[c, c] < 0 else "raised"
            deeds.append(f"{verb} {self.names[c]}'s own loss by {self.entry(c, c)}")
        if losers:
            what = "that" if deeds else "the loss"
            deeds.append(f"raised {what} of {self.listed(losers, c)}")
        if not deeds:
            return [f"{who}: {self.unknown()} what its examples did to any class's loss."]
        lines = [f"{who}: its examples {' and '.join(deeds)}."]
        if not self.sure[c, c] and self.net[c, c].isfinite():
            own = f"what they did to {self.names[c]}'s own loss"
            lines[0] = f"{lines[0][:-1]}; {self.unknown()} {own}."
        lines += self.won_back(losers[0], c) if losers else self.no_losers(c)
        return lines + self.due_part(c, losers[0] if losers else c)

    def won_back(self, k: int, c: int) -> list[str]:
        """Say what made up for what class ``c`` raised a loss by, and how far it moved in all."""
        name, own = self.names[k], float(self.net[k, k])
        if self.sure[k, k]:
            again = "lowered it again" if own < 0 else "raised it too,"
            begin = f"{_sentence(name)}'s own examples {again} by {self.entry(k, k)}"
        else:
            begin = f"{_sentence(self.unknown())} what {name}'s own examples did to it"
        rest = float(self.net[k].sum()) - own - float(self.net[k, c])
        if self.exact and self.sure[k, k] and abs(rest) > self.missing(k):
            verb = "lowered" if rest < 0 else "raised"
            begin += f", all other parts {verb} it by {amount(rest)}"
        return [f"{begin}; in all it {self.in_all(k)}."]

    def missing(self, k: int) -> float:
        """Return how much the parts of an exact ledger miss the change of a class's loss by."""
        return abs(float(self.net[k].sum() - self.ledger.now[k] + self.ledger.begin[k]))

    def in_all(self, k: int) -> str:
        """Return by how much the loss of a class changed, as it was measured."""
        begin, now = float(self.ledger.begin[k]), float(self.ledger.now[k])
        if not math.isfinite(now - begin):
            return "is not finite at the end"
        if now == begin:
            return f"stayed at {amount(now)}"
        verb = "rose" if now > begin else "fell"
        return f"{verb} by {amount(now - begin)}, from {_level(begin)} to {_level(now)}"

    def no_losers(self, c: int) -> list[str]:
        """Say that no other class's loss was surely raised, as far as the ledger can tell."""
        others = self.net[:, c].clone()
        others[c] = math.nan
        if not others.isfinite().any():
            return ["No other class has a finite loss."]
        if not self.exact:
            return ["The samples show no other class's loss raised by them."]
        by_more = " by more than the parts miss the changes by" if (others > 0).any() else ""
        return [f"They raised no other class's loss{by_more}."]

    def due_part(self, c: int, k: int) -> list[str]:
        """Say how much of what a class did is due to its weight, with one class's loss for all."""
        weight = self.weights[c]
        if not (self.sure[k, c] and 0.0 < weight < math.inf) or weight == 1:
            return []
        whose = f"{self.names[k]}'s {'own ' * (k == c)}loss"
        due, entry = amount(float(self.due[k, c])), self.entry(k, c)
        if weight > 1:
            return [
                f"Along this path {_percent(1 - 1 / weight)} of these, (w - 1) / w, are due to the "
                f"weight beyond 1: {due} of the {entry} on {whose}."
            ]
        held = "a fall" if self.net[k, c] < 0 else "a rise"
        return [
            f"Along this path these would be {1 / weight:.3g} times as large at weight 1: the "
            f"lower weight held back {held} of {whose} by {due}."
        ]

    def unweighted(self, spoken: list[int]) -> list[str]:
        """Say whose examples did most to the losses of other classes."""
        lines = ["All classes have the same weight."]
        for rank, c in enumerate(spoken):
            deeds = [
                f"{verb} the loss of {self.listed(moved, c)}"
                for verb, up in (("raised", True), ("lowered", False))
                if (moved := self.moved_by(c, up=up))
            ]
            most = "other classes' losses most" if rank == 0 else "them most after these"
            lines.append(
                f"{_sentence(self.names[c])}'s examples moved {most}: they {', and '.join(deeds)}."
            )
        if not spoken and len(self.names) > 1:
            lines.append(f"{_sentence(self.unknown())} whose examples moved other classes' losses.")
        return lines

    def limits(self, weighted: bool) -> list[str]:
        """Say what the numbers are, what they do not tell, and how nearly they add up."""
        unknown = [n for n, loss in zip(self.names, self.ledger.begin, strict=True) if loss.isnan()]
        lost = [
            n
            for n, loss, now in zip(self.names, self.ledger.begin, self.ledger.now, strict=True)
            if loss.isfinite() and not now.isfinite()
        ]
        lines = []
        if unknown:
            have = "has" if len(unknown) == 1 else "have"
            lines.append(f"{_sentence(_list(unknown, _NAMED))} {have} no {self.judged} examples.")
        if lost:
            lines.append(f"No finite loss at the end: {_list(lost, _NAMED)}.")
        lines.append(
            f"A loss here is the mean over a class's {self.judged} examples, each at weight 1 (in "
            "nats where it is a cross-entropy); an entry adds up what all steps changed it by."
        )
        changed = _changes(self.ledger)
        changed = changed[changed.isfinite()].abs().max()
        large = self.net[self.sure].abs()
        than = ""
        if len(large) and large.max() > 2 * changed:
            than = "Entries are larger than the changes in all, since classes undo each other. "
        other = "one at weight 1" if weighted else "another"
        ask = ": a baseline tells that" if weighted else ""
        lines.append(
            f"{than}The ledger tells how this training went, not how {other} would have gone{ask}."
        )
        if self.exact:
            within = _percent(self.ledger.residual)
            lines.append(f"The parts add up to the measured changes within {within}.")
        else:
            lines.append(self.sampling())
        return lines

    def sampling(self) -> str:
        """Say how a sampled ledger came about, and how nearly its rows add up."""
        apart = (self.net.sum(1) - _changes(self.ledger)).abs()
        error = self.ledger.variance_of_sum.sqrt()
        known = apart.isfinite() & error.isfinite()
        near, classes = int((apart <= 2.0 * error)[known].sum()), int(known.sum())
        return (
            f"{_measured(self.ledger)}: ± is one standard error, and an entry within two of 0 is "
            "not named (for all steps: --ledger exact). "
            f"The parts add up to the measured change within two standard errors for {near:,} of "
            f"{classes:,} classes."
        )

    def moved_by(self, c: int, *, up: bool) -> list[int]:
        """Return the other classes whose loss a class's examples surely moved, most first."""
        column = self.net[:, c] if up else -self.net[:, c]
        sure = self.sure[:, c] & (column > 0)
        sure[c] = False
        return sorted(sure.nonzero().flatten().tolist(), key=lambda k: -float(column[k]))

    def listed(self, labels: list[int], c: int) -> str:
        """Return classes with what class ``c`` did to them, the first few by name."""
        named = [
            f"{self.names[k]} (by {self.entry(k, c)}{self.gross(k, c) if k == labels[0] else ''})"
            for k in labels[:_NAMED]
        ]
        more = len(labels) - len(named)
        return _list([*named, *[f"{more:,} more"] * (more > 0)])

    def gross(self, k: int, c: int) -> str:
        """Return what an entry was raised and lowered by, where it is known and both count."""
        up, down = float(self.ledger.raised[k, c]), -float(self.ledger.lowered[k, c])
        if not self.exact or min(up, down) < _SMALL * abs(up - down):
            return ""
        return f": up {amount(up)} in some steps, down {amount(down)} in others"

    def entry(self, k: int, c: int) -> str:
        """Return the size of an entry, with its standard error where it has one."""
        net = float(self.net[k, c])
        if not self.exact:
            return f"{amount(net)} ± {amount(float(self.ledger.standard_error[k, c]))}"
        return amount(net)

    def unknown(self) -> str:
        """Return that the ledger cannot tell, as the beginning of a clause."""
        return "the ledger is too inexact to tell" if self.exact else "the samples do not tell"


def _changes(ledger: Ledger) -> Float[Tensor, " classes"]:
    return ledger.now - ledger.begin


def _measured(ledger: Ledger) -> str:
    steps = int(ledger.steps)
    if ledger.sampling is None:
        return f"Some of {steps:,} steps were measured"
    first, drawn = int(ledger.sampling.since), int(ledger.sampling.samples)
    if not first:
        return f"{drawn:,} of {steps:,} steps were measured, drawn at random"
    return (
        f"{first + drawn:,} of {steps:,} steps were measured, the first {first:,} and {drawn:,} "
        "drawn at random"
    )


def _level(loss: float) -> str:
    return f"{loss:.3g}"


def _percent(part: float) -> str:
    """Return a part of one for a sentence, in percent, with two digits."""
    if not math.isfinite(part):
        return "more than a number can hold"
    percent = 100.0 * part
    if 0 < percent < 0.01:
        return "0.01 %"
    return f"{percent:,.0f} %" if percent >= 10 else f"{percent:.2g} %"
