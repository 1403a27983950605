"""The labels of features: of a column that was extracted with them, or of a table of one's own."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import listing
from ..extract.features import Features
from ..extract.input.addresses import shown
from ..extract.input.door import NOTHING_MORE, open_file
from ..extract.input.kept import FOLDER
from ..extract.records import PathLike
from .probe import folder_labels

ID = "id"  # the column of a table with the images' ids


@dataclass(frozen=True)
class Labels:
    """A label for each row.

    Attributes:
        values: None for a row without one.
        failed: ids that have a label and could not be extracted.
        unknown: ids that have a label and are of no image.
    """

    values: list[str | None]
    failed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        missing = self.values.count(None)
        told = [f"{len(self.values)} images, {len(self.values) - missing} with a label"]
        if self.failed:
            told.append(f"{len(self.failed)} labels of images that failed: {listing(self.failed)}")
        if self.unknown:
            told.append(f"{len(self.unknown)} labels of no image: {listing(self.unknown)}")
        return "; ".join(told)


def labels_of(features: Features, label: str, table: PathLike | None = None) -> Labels:
    """The labels of all rows.

    Args:
        label: the column that has them; or "folder", which needs no column.
        table: a .csv file in UTF-8, commas between its columns and names in its first line, one of
            them `id`; the features' own columns, if left out. An empty field is no label.

    Raises:
        ValueError: no such column, or the table cannot be read, or names an id twice.
        OSError: the table cannot be opened.
    """
    if table is None:
        columns = features.columns
        if label == FOLDER and label not in columns:
            return Labels([*folder_labels(features)])
        if label not in columns:
            raise ValueError(
                f"{features.folder}: no column {label!r}, their columns are "
                f"{listing(list(columns))}; extract with --keep {label}, or give --labels FILE.csv "
                f"with the columns {ID} and {label}"
            )
        return Labels([_text(value) for value in columns[label]])
    given = _read(table, label)
    values = [given.pop(id, None) for id in features.ids]
    failed = {failed.id for failed in features.failed}
    return Labels(
        values,
        [id for id, value in given.items() if value is not None and id in failed],
        [id for id, value in given.items() if value is not None and id not in failed],
    )


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


def _text(value: Any) -> str | None:
    """A label as text; nothing, an empty text and no number (NaN) are none."""
    return None if value is None or value == "" or value != value else str(value)


def _read(table: PathLike, label: str) -> dict[str, str | None]:
    """The label of every id in a table."""
    name = shown(os.fspath(table))
    found: dict[str, str | None] = {}
    with open_file(os.path.expanduser(os.fspath(table)), NOTHING_MORE, whole=True) as file:
        rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
        try:
            for line, id, value in _fields(rows, label):
                if id in found:
                    raise ValueError(f"line {line} names {shown(id)} again; an id has one label")
                found[id] = _text(value)
        except (csv.Error, ValueError) as error:
            told = "is no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise ValueError(f"{name}: {told}") from None
    return found


def _fields(rows: Any, label: str) -> Iterator[tuple[int, str, str]]:
    """Line, id and label of every row of a table but empty lines."""
    names: list[str] = next(rows, [])
    for wanted in (ID, label):
        if names.count(wanted) != 1:
            count = names.count(wanted) or "no"
            raise ValueError(f"has {count} column {wanted!r}; its columns are {listing(names)}")
    for row in rows:
        if not row:
            continue
        if len(row) != len(names):
            raise ValueError(
                f"line {rows.line_num} has {len(row)} columns, and the first line {len(names)}"
            )
        yield rows.line_num, row[names.index(ID)], row[names.index(label)]
