"""What can be trained on: whole data sets as one tensor of images and one of labels."""

from funcloss.data.dataset import (
    Dataset,
    Examples,
    class_counts,
    long_tailed,
    make_dataset,
    moved,
    normalised,
    resized,
    stratified_split,
    take,
)
from funcloss.data.sources import data_folder, load_dataset

__all__ = [
    "Dataset",
    "Examples",
    "class_counts",
    "data_folder",
    "load_dataset",
    "long_tailed",
    "make_dataset",
    "moved",
    "normalised",
    "resized",
    "stratified_split",
    "take",
]
