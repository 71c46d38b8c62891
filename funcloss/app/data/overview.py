"""What a data set holds, in the lines that are printed before a training."""

import torch
from torch import Tensor

from funcloss._names import listed
from funcloss.app.data.dataset import Dataset, Examples
from funcloss.app.data.splits import IN_WORDS, class_counts

_LISTED = 12  # classes with a line each
_WIDTH = 24  # characters of a class's name
_FEW = 10  # examples of a class, of which little can be learnt or said


def overview(dataset: Dataset) -> tuple[tuple[str, ...], tuple[str, ...]]:
    r"""Return lines on the classes of each split, and warnings of what may mislead.

    Args:
        dataset: Of any kind; only inputs that are held are compared between the splits.

    Returns:
        Lines, and warnings: a class that a split lacks or has few examples of, and inputs that
        occur in the training split and again in another one.

    Example:
        >>> from funcloss.app.data import RawSplit, make_dataset
        >>> split = RawSplit(torch.eye(20), torch.arange(20) % 2, ("a", "b"), unscaled=True)
        >>> lines, warnings = overview(make_dataset("even", {"train": split}))
        >>> print(*lines, sep="\n")
        class  training  validation  test
        a             8           1     1
        b             8           1     1
        answering a always: accuracy 50.0% on the test split
        >>> warnings[0]
        'fewer than 10 training examples of a (8), b (8)'
    """
    counts = {
        IN_WORDS[split]: class_counts(examples, len(dataset.classes)).tolist()
        for split, examples in dataset.splits.items()
        if len(examples.labels)
    }
    return (*_counted(dataset, counts), *_constant(dataset)), (
        *_absent(dataset, counts),
        *_rare(dataset, counts),
        *_repeated(dataset),
    )


def _counted(dataset: Dataset, counts: dict[str, list[int]]) -> list[str]:
    classes = dataset.classes
    if len(classes) > _LISTED:
        sizes = [f"{min(of):,} to {max(of):,} {split}" for split, of in counts.items()]
        return [f"{len(classes):,} classes with {', '.join(sizes)} examples each"]
    names = [c if len(c) <= _WIDTH else f"{c[: _WIDTH - 1]}…" for c in classes]
    wide = max(map(len, ("class", *names)))
    heads = {split: max(len(split), len(f"{max(of):,}")) for split, of in counts.items()}
    lines = ["  ".join(["class".ljust(wide), *(s.rjust(w) for s, w in heads.items())])]
    for i, name in enumerate(names):
        cells = [f"{counts[split][i]:,}".rjust(width) for split, width in heads.items()]
        lines.append("  ".join([name.ljust(wide), *cells]))
    return lines


def _constant(dataset: Dataset) -> list[str]:
    """Return what always answering the most frequent class is worth."""
    split = next((s for s in ("test", "validation") if len(dataset.splits[s].labels)), "train")
    answer = int(class_counts(dataset.train, len(dataset.classes)).argmax())
    accuracy = float((dataset.splits[split].labels == answer).float().mean())
    name = dataset.classes[answer]
    return [f"answering {name} always: accuracy {accuracy:.1%} on the {IN_WORDS[split]} split"]


def _absent(dataset: Dataset, counts: dict[str, list[int]]) -> list[str]:
    found = []
    for split, of in counts.items():
        absent = [name for name, n in zip(dataset.classes, of, strict=True) if not n]
        if absent:
            found.append(f"the {split} split has no example of {listed(absent, _LISTED)}")
    return found


def _rare(dataset: Dataset, counts: dict[str, list[int]]) -> list[str]:
    rare = [
        f"{name} ({n:,})"
        for name, n in zip(dataset.classes, counts["training"], strict=True)
        if 0 < n < _FEW
    ]
    return [f"fewer than {_FEW} training examples of {listed(rare, _LISTED)}"] if rare else []


def _repeated(dataset: Dataset) -> list[str]:
    rows = {split: _hashes(examples) for split, examples in dataset.splits.items()}
    trained = set(rows.pop("train"))
    found = []
    for split, hashes in rows.items():
        again = sum(row in trained for row in hashes)
        if again:
            found.append(
                f"{again:,} of {len(hashes):,} {IN_WORDS[split]} inputs occur in the training "
                "split too: scores on them say less of new data"
            )
    return found


def _hashes(examples: Examples) -> list[int]:
    inputs = examples.inputs
    if not isinstance(inputs, Tensor) or not inputs.numel():
        return []
    plain = inputs.detach().cpu().contiguous().flatten(1) if inputs.dim() > 1 else inputs[:, None]
    return [hash(row.tobytes()) for row in plain.view(torch.uint8).numpy()]
