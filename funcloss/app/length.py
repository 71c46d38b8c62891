"""How long a training run is: its defaults by the number of examples, and when it stops early.

Nothing here loads torch: the help of the options says the same numbers.
"""

import math

EPOCHS, BATCH_SIZE = 3, 128  # of many examples, and of the published data sets
LEARNING_RATE, CONSTANT_RATE = 0.01, 0.003  # at the peak of a schedule; of a constant one
FEW = 20_000  # training examples; of fewer, EPOCHS make less than 500 steps
STEPS = 1_000  # of few examples, where a run cannot stop early
MOST_EPOCHS, MOST_STEPS = 1_000, 20_000  # of a run that stops early: whichever comes first
LEAST = 1e-4  # that the validation loss must fall by to have fallen; else it may fall for ever
PATIENCE = "10 epochs, 200 steps and a fifth of the epochs done, whichever is most"


def batch_size_for(n: int) -> int:
    """Return the batch size for few training examples: the power of two nearest to ``n / 16``.

    It is at least 8, or ``n`` if that is less, and at most 128.

    Example:
        >>> [batch_size_for(n) for n in (5, 100, 400, 1500, 10_000)]
        [5, 8, 32, 128, 128]
    """
    nearest = 2 ** round(math.log2(max(n, 1) / 16))
    return min(max(nearest, 8), BATCH_SIZE, max(n, 1))


def epochs_for(per_epoch: int) -> int:
    """Return the epochs for few training examples where a run cannot stop early: 1,000 steps.

    Example:
        >>> epochs_for(25), epochs_for(999)
        (40, 2)
    """
    return math.ceil(STEPS / per_epoch)


def last_epoch(epochs: int | str, per_epoch: int) -> int:
    """Return the number of the last epoch, of a run that may stop early: the last possible one.

    Args:
        epochs: How many epochs, or ``auto``.
        per_epoch: Steps of an epoch.

    Example:
        >>> last_epoch(3, 25), last_epoch("auto", 5), last_epoch("auto", 300)
        (3, 1000, 66)
    """
    if isinstance(epochs, int):
        return epochs
    return max(1, min(MOST_EPOCHS, MOST_STEPS // per_epoch))


def patience(epoch: int, per_epoch: int) -> int:
    """Return how many epochs without a lower validation loss end a run after epoch ``epoch``.

    ``max(10, ceil(200 / per_epoch), ceil(epoch / 5))``.

    Args:
        epoch: Epochs done.
        per_epoch: Steps of an epoch.

    Example:
        >>> patience(12, 100), patience(12, 4), patience(200, 100)
        (10, 50, 40)
    """
    return max(10, math.ceil(200 / per_epoch), math.ceil(epoch / 5))


def is_over(epoch: int, best: int, per_epoch: int) -> bool:
    """Return whether a run that stops early is over after an epoch.

    Args:
        epoch: Epochs done.
        best: Number of the one with the lowest validation loss.
        per_epoch: Steps of an epoch.

    Example:
        >>> is_over(15, 5, 100), is_over(15, 6, 100)
        (True, False)
    """
    waited = epoch - best >= patience(epoch, per_epoch)
    return waited or epoch >= last_epoch("auto", per_epoch)
