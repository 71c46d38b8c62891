"""The verdict on a loss, in three degrees, and its root cause."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from funcloss.laws.laws import LAWS, LOOKUP, Finding

WORKS = "works everywhere"
BATCHES = "works on batches"
WRONG = "wrong"

_GRADIENTS = (
    "gradcheck", "extremes", "saturation", "masked = dropped", "weights", "cost effect",
    "vmap", "per-sample gradients", "gradgradcheck", "jacrev = jacfwd", "hessian", "compile",
)  # fmt: skip
# What may only follow where a law is broken, the likeliest root first.
_FOLLOWS: dict[str, tuple[str, ...]] = {
    "runs": tuple(LAWS),
    "pure": tuple(LAWS),
    "has a gradient": (*_GRADIENTS, "map over examples", "direction", "not flat", "pickles"),
    "cost effect": (
        "map over examples", "weights", "class permutation", "direction", "cost order",
        "per-sample gradients", "not flat",
    ),
    "map over examples": (
        *_GRADIENTS, "direction", "not flat", "class permutation", "cost order", "dtype",
    ),
    "direction": ("cost order", "class permutation", "not flat"),
    "not flat": ("extremes", "saturation"),
    "gradcheck": ("vmap", "per-sample gradients", "gradgradcheck", "jacrev = jacfwd", "hessian",
                  "compile", "weights"),
    "saturation": (),
    "extremes": ("saturation", "dtype"),
    "weights": ("cost order",),
    "per-sample gradients": ("compile", "hessian", "jacrev = jacfwd", "gradgradcheck"),
    "vmap": ("per-sample gradients", "compile", "hessian", "jacrev = jacfwd", "gradgradcheck"),
    "gradgradcheck": ("hessian", "jacrev = jacfwd", "compile"),
    "jacrev = jacfwd": ("hessian", "compile"),
    "hessian": ("compile",),
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """How far a loss works, and why no further."""

    degree: str  # "works everywhere", "works on batches" or "wrong"
    causes: tuple[Finding, ...] = ()  # the root first; what only follows from another is left out

    @property
    def sentence(self) -> str:
        """The verdict in words, with its root cause."""
        if self.degree == WORKS:
            return f"{WORKS}: on batches and single examples, mapped, differentiated and compiled"
        cause = f"{self.causes[0].law}: {self.causes[0].detail}"
        if self.degree == WRONG:
            return f"{WRONG}: {cause}"
        lost = ", ".join(dict.fromkeys(_WITHOUT.get(f.law, f.law) for f in self.causes))
        return f"{BATCHES}: it trains and can be audited; not {lost} ({cause})"


_WITHOUT = {
    "vmap": "under vmap with single examples",
    "per-sample gradients": "under vmap with single examples",
    "gradgradcheck": "with second derivatives",
    "jacrev = jacfwd": "in forward mode",
    "hessian": "with second derivatives",
    "compile": "compiled to one graph",
    "inductor": "with the default compiler",
    "dtype": "in every dtype",
}


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """Return the verdict that findings come to.

    Args:
        findings: What :func:`check` gives.

    Returns:
        ``works everywhere`` where no law is broken; ``works on batches`` where all that are broken
        are laws of single examples, transforms, compilers and dtypes; else ``wrong``.

    Example:
        >>> verdict_of([Finding("runs", "pass"), Finding("dtype", "fail", "float32 out")]).degree
        'works on batches'
    """
    broken = {f.law: f for f in findings if f.verdict == "fail"}
    order = [*_FOLLOWS, *LAWS]
    for law in order:
        if law in broken:
            follows = _follows(law, broken)
            broken = {n: f for n, f in broken.items() if n not in follows or n == law}
    causes = sorted(broken.values(), key=lambda f: (LAWS[f.law].everywhere, order.index(f.law)))
    if not causes:
        return Verdict(WORKS)
    return Verdict(BATCHES if LAWS[causes[0].law].everywhere else WRONG, tuple(causes))


def _follows(law: str, broken: Mapping[str, Finding]) -> tuple[str, ...]:
    """Return the laws that may be broken only because one is."""
    detail = broken[law].detail
    if law == "saturation" and "its gradient is" in detail and "another" not in detail:
        return ("extremes",)  # a root or a power, met far out too; not an overflow
    if law == "per-sample gradients" and "vmap" in broken and LOOKUP in broken["vmap"].detail:
        return (*_FOLLOWS[law], "vmap")  # torch 2.6 maps no lookup, newer ones all but its gradient
    return _FOLLOWS.get(law, ())
