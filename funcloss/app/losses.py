"""The losses that ``--loss`` names and that are made of others, as losses of logits and labels."""

from funcloss import losses
from funcloss.combinators import from_logits, one_hot_targets, summed

nll = from_logits(losses.nll)
squared_error = one_hot_targets(losses.squared_error)
cross_entropy_with_cost = summed(
    {"fit": (1.0, losses.cross_entropy), "cost": ("price", losses.expected_cost)}
)
