"""What can be trained on: whole data sets as one tensor of images and one of labels."""

from funcloss.data.dataset import (
    Dataset,
    Examples,
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
    "data_folder",
    "load_dataset",
    "make_dataset",
    "moved",
    "normalised",
    "resized",
    "stratified_split",
    "take",
]
