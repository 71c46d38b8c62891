"""What is read back of ``summary.json``, which holds more."""

from typing import NotRequired, TypedDict

from funcloss.app.decoding import Count, Number

Interval = tuple[Number, Number, Number]  # value, low, high
Sure = tuple[float, Number, Number]


class RuleScores(TypedDict):
    """What is read of the scores by a rule."""

    accuracy: Sure
    expected_cost: Interval
    normalised_cost: Number
    recall: dict[str, Interval]


class FoldScores(TypedDict):
    """The scores by a rule over the folds."""

    accuracy: Sure
    expected_cost: Interval


class SplitSummary(TypedDict):
    """What is read of the scores on a split."""

    n: Count
    rules: dict[str, RuleScores]  # argmax among them


Summary = TypedDict(
    "Summary",
    {
        "dataset": str,
        "class_weight": dict[str, float],
        "epochs": Count,
        "costs": list[str],
        "decisions": list[str],
        "calibrated": str,
        "caveat": str,
        "warnings": NotRequired[list[str]],  # none in a run from before there were any
        "test": NotRequired[SplitSummary],
        "out-of-fold": NotRequired[SplitSummary],
        "over_folds": NotRequired[dict[str, FoldScores]],
        "best_epoch": NotRequired[Count],
    },
)


class ConstraintSummary(TypedDict):
    """What a constraint came to."""

    reached: Number


class ConstrainedSummary(TypedDict):
    """What the summary of a run under constraints has beside."""

    best_step: Count
    constraints: list[ConstraintSummary]
    weights_found: dict[str, float]
