"""The catalogue: every loss a pure function of tensors that gives one value an example."""

from funcloss.losses.classification import cross_entropy, nll
from funcloss.losses.regression import squared_error

__all__ = ["cross_entropy", "nll", "squared_error"]
