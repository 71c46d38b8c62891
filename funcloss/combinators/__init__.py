"""Losses in, a loss out: each result is as pure as what it was made of."""

from funcloss.combinators._combined import (
    Combined,
    Factor,
    correction_of,
    couples_examples,
    factor_names,
    masking,
    name_of,
    options_of,
    probabilities_of,
    taken,
)
from funcloss.combinators.targets import (
    from_logits,
    mixup,
    one_hot_targets,
    smoothed,
    soft,
    temperature,
    where,
)
from funcloss.combinators.weighting import (
    ClassWeighted,
    class_weighted,
    class_weights_of,
    parts,
    sample_weighted,
    scaled,
    summed,
)

__all__ = [
    "ClassWeighted",
    "Combined",
    "Factor",
    "class_weighted",
    "class_weights_of",
    "correction_of",
    "couples_examples",
    "factor_names",
    "from_logits",
    "masking",
    "mixup",
    "name_of",
    "one_hot_targets",
    "options_of",
    "parts",
    "probabilities_of",
    "sample_weighted",
    "scaled",
    "smoothed",
    "soft",
    "summed",
    "taken",
    "temperature",
    "where",
]
