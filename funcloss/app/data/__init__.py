"""What can be trained on: published data sets and your own, in memory or streamed.

Names load when they are first asked for: the table of names alone loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from funcloss.app.data.dataset import (
        Dataset,
        Examples,
        as_pixels,
        get_batch,
        iter_batches,
        joined,
        moved,
        normalised,
        resized,
        subset,
        with_classes,
    )
    from funcloss.app.data.images import read_images
    from funcloss.app.data.loading import load_dataset, short_name
    from funcloss.app.data.published import data_folder
    from funcloss.app.data.records import Column, InputSchema, LoadOptions, RawSplit, enough_memory
    from funcloss.app.data.splits import class_counts, long_tailed, make_dataset, stratified_split
    from funcloss.app.data.streaming import Stream
    from funcloss.app.data.table import features_of, read_features, read_table

_HOMES = {
    "dataset": (
        "Dataset Examples as_pixels get_batch iter_batches joined moved normalised resized subset "
        "with_classes"
    ),
    "images": "read_images",
    "loading": "load_dataset short_name",
    "published": "data_folder",
    "records": "Column InputSchema LoadOptions RawSplit enough_memory",
    "splits": "class_counts long_tailed make_dataset stratified_split",
    "streaming": "Stream",
    "table": "features_of read_features read_table",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Column",
    "Dataset",
    "Examples",
    "InputSchema",
    "LoadOptions",
    "RawSplit",
    "Stream",
    "as_pixels",
    "class_counts",
    "data_folder",
    "enough_memory",
    "features_of",
    "get_batch",
    "iter_batches",
    "joined",
    "load_dataset",
    "long_tailed",
    "make_dataset",
    "moved",
    "normalised",
    "read_features",
    "read_images",
    "read_table",
    "resized",
    "short_name",
    "stratified_split",
    "subset",
    "with_classes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'funcloss.app.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"funcloss.app.data.{_HOME_OF[name]}"), name)
