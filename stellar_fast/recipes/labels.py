"""Labels of features by name: a column that was kept, or the folders of the images."""

from __future__ import annotations

import numpy as np

from ..extract.features import Features
from ..extract.input.kept import FOLDER
from .probe import folder_labels


def named_labels(features: Features, name: str) -> np.ndarray:
    """The label of every row.

    Args:
        name: a column that `--keep` carried along; or "folder", which needs no column.

    Raises:
        KeyError: no such column.
        ValueError: an image has no label.
    """
    if name == FOLDER and name not in features.columns:
        return np.array(folder_labels(features), object)
    if name not in features.columns:
        known = ", ".join(features.columns)
        raise KeyError(f"no column {name!r}; here are {known}; extract with --keep {name}")
    labels = features.columns[name]
    missing = [row for row, label in enumerate(labels) if label is None or label != label]
    if missing:
        id = features.columns["id"][missing[0]]
        raise ValueError(
            f"{len(missing)} of {len(labels)} rows have no {name!r}, the first is {id}; leave them "
            f"out: features.columns[{name!r}] has None there"
        )
    return labels
