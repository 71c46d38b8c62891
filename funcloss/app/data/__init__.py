"""What can be trained on: published data sets and your own, in memory or streamed."""

from funcloss.app.data.dataset import (
    Dataset,
    Examples,
    as_pixels,
    feed,
    moved,
    normalised,
    resized,
    subset,
    take,
)
from funcloss.app.data.images import read_image
from funcloss.app.data.own import Known, short_name
from funcloss.app.data.parts import class_counts, long_tailed, make_dataset, stratified_split
from funcloss.app.data.sources import data_folder, load_dataset
from funcloss.app.data.streaming import Stream
from funcloss.app.data.table import read_features, read_table

__all__ = [
    "Dataset",
    "Examples",
    "Known",
    "Stream",
    "as_pixels",
    "class_counts",
    "data_folder",
    "feed",
    "load_dataset",
    "long_tailed",
    "make_dataset",
    "moved",
    "normalised",
    "read_features",
    "read_image",
    "read_table",
    "resized",
    "short_name",
    "stratified_split",
    "subset",
    "take",
]
