"""Reading what was extracted: the rows of all partitions as one array a feature, without loading.

A partition is a memory-mapped `.npy` file a feature, or a Parquet file of which the row groups that
are asked for are read. Rows are the images that did not fail, in the order of the input.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtraError, StellarError, listing
from ..files import is_machines, told_of
from .output.index import ok, read_index
from .output.layout import Partition, PathLike, Plan, check_sums, complete, read_plan
from .rows import Feature, Rows, checked

if TYPE_CHECKING:
    import pyarrow

    from .dataset import FeatureDataset


def open_features(folder: PathLike, *, allow_incomplete: bool = False) -> Features:
    """The features in an output folder of `stellar-fast extract`.

    Args:
        allow_incomplete: whether partitions may be missing, as while the extraction runs; the rows
            are then those of the partitions that are there.

    Raises:
        StellarError: `folder` is no such output, partitions are missing, or a file of one is.
    """
    # Absolute: the process may go elsewhere, and a pickle to another one.
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    if not folder.is_dir():
        raise StellarError(f"{folder}: no such folder")
    plan = read_plan(folder)
    manifests = complete(folder, plan)
    _check_shapes(folder, manifests)
    features = Features(folder, plan, manifests)
    if features.missing and not allow_incomplete:
        raise StellarError(
            f"{folder}: {len(features.missing)} of {len(plan.partitions)} partitions are missing: "
            f"{listing(features.missing)}; extract again into the same folder to complete it, or "
            "open what is there with allow_incomplete=True"
        )
    return features


@dataclass(frozen=True)
class Failed:
    """An image that has no row, and why."""

    id: str
    reason: str


class Features:
    """The features of an output folder; made by `open_features`.

    `features["sparse"]` is one feature, `len(features)` its number of rows. May be pickled, and
    used from many threads and in forked or spawned processes: files are opened where they are read.

    Attributes:
        folder: the output folder.
        configuration: what decided the features: model, weights, precision, preset, dtype and so on
            (`plan.json` has the same).
        names: the features there are.
        missing: names of partitions that are not complete; empty unless that was allowed.
    """

    def __init__(self, folder: Path, plan: Plan, manifests: dict[int, dict[str, Any]]) -> None:
        self.folder = folder
        self.configuration = dict(plan.configuration)
        self.names: tuple[str, ...] = tuple(plan.configuration["features"])
        self.missing = [part.name for part in plan.partitions if part.index not in manifests]
        self._plan = plan
        folders = [folder / plan.partitions[index].name for index in sorted(manifests)]
        self._manifests = [manifests[index] for index in sorted(manifests)]
        self._rows = Rows(folder, folders, self._manifests)
        dtype = self.configuration["dtype"]
        self._views = {name: Feature(self._rows, name, dtype) for name in self.names}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, name: str) -> Feature:
        try:
            return self._views[name]
        except KeyError:
            raise KeyError(f"no feature {name!r}; here are: {', '.join(self.names)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        missing = f", {len(self.missing)} partitions missing" if self.missing else ""
        features = ", ".join(
            f"{name} {self[name].dtype} {list(self[name].shape[1:])}" if len(self) else name
            for name in self.names
        )
        return f"<Features {self.folder}: {len(self)} rows of {features}{missing}>"

    @property
    def images(self) -> int:
        """Images in the partitions that are there, those that failed included."""
        return sum(manifest["images"] for manifest in self._manifests)

    @cached_property
    def ids(self) -> list[str]:
        """The id of every row."""
        table = self.index
        return table.filter(ok(table))["id"].to_pylist()

    @cached_property
    def failed(self) -> list[Failed]:
        """The images that have no row, in the order of the input."""
        import pyarrow.compute as compute

        table = self.index
        table = table.filter(compute.invert(ok(table)))
        return [Failed(line["id"], line["reason"]) for line in table.to_pylist()]

    @property
    def index(self) -> pyarrow.Table:
        """One line an image, in the order of the input: id, row (here, null if it failed), status,
        reason, width, height, and what was kept. Reads the index of every partition.

        Raises:
            StellarError: an index cannot be read.
        """
        import pyarrow
        import pyarrow.compute as compute

        tables = []
        for folder, manifest, start in zip(
            self._rows.folders, self._manifests, self._rows.starts, strict=False
        ):
            table = read_index(folder, manifest)
            place = table.schema.get_field_index("row")
            row = compute.add(table["row"], pyarrow.scalar(start, pyarrow.int64()))
            tables.append(table.set_column(place, "row", row))
        if not tables:
            raise StellarError(f"{self.folder}: no partition is complete yet")
        return pyarrow.concat_tables(tables)

    def ids_of(self, rows: Collection[int] | np.ndarray) -> list[str]:
        """The ids of some rows; unlike `ids`, reads only the partitions that they are in.

        Raises:
            IndexError: there is no such row.
        """
        found = [""] * len(rows)
        for part, at, inside in self._rows.split(checked(np.asarray(rows), len(self))):
            ids = self._rows.opened.ids(part)
            for place, row in zip(at, inside, strict=True):
                found[place] = ids[row].as_py()
        return found

    @cached_property
    def columns(self) -> Mapping[str, np.ndarray]:
        """What the index has of every row: id, width, height, and what was kept (`--keep`).

        Integers, floats and booleans are arrays of them; text, and any column with missing values,
        is an array of objects, where None stands for what is missing.

        Raises:
            StellarError: an index cannot be read.
        """
        table = self._table
        found = {name: table[name] for name in table.column_names}
        return {
            name: column.to_numpy()
            if column.null_count == 0 and str(column.type) != "string"
            else np.array(column.to_pylist(), object)
            for name, column in found.items()
        }

    def row(self, id: str) -> int:
        """The row of an image.

        Raises:
            KeyError: there is no such image, or it failed, and why.
        """
        found = self.find(id)
        if isinstance(found, int):
            return found
        why = f"no image {id!r}" if found is None else f"{id!r} has no row: {found.reason}"
        raise KeyError(why)

    def find(self, id: str) -> int | Failed | None:
        """The row of an image; why it has none; or None, where there is no such image."""
        row = self._places.get(id)
        return next((one for one in self.failed if one.id == id), None) if row is None else row

    @cached_property
    def _places(self) -> dict[str, int]:
        return {id: row for row, id in enumerate(self.ids)}

    @property
    def _table(self) -> pyarrow.Table:
        """The index of the images that have a row, without what is the same of all."""
        table = self.index
        return table.filter(ok(table)).drop_columns(["row", "status", "reason"])

    def to_pandas(self, names: Collection[str] = ()) -> Any:
        """A DataFrame with a line for each row: id, width, height, and what was kept.

        Args:
            names: features that become columns too; each of their cells is an array of the row.

        Raises:
            KeyError: no such feature.
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("a DataFrame", "recipes") from error
        import pyarrow

        table = self._table
        # Integers with missing ones among them stay integers.
        missing = any(one.null_count and one.type == pyarrow.int64() for one in table.columns)
        frame = table.to_pandas(
            types_mapper={pyarrow.int64(): pandas.Int64Dtype()}.get if missing else None
        )
        for name in names:
            frame[name] = list(self[name].to_numpy())
        return frame

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decided the features and of what their files hold, by the manifests: that
        of other rows, or of other features of the same images, is another."""
        files = [
            {name: facts["sha256"] for name, facts in manifest["files"].items()}
            for manifest in self._manifests
        ]
        text = json.dumps([self._plan.digest, files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def parts_of(
        self, rows: Collection[int] | np.ndarray
    ) -> Iterator[tuple[Partition, dict[str, Any], np.ndarray, np.ndarray]]:
        """The partitions that some rows are in: each with its manifest, the places of its rows in
        `rows`, and their numbers there.

        Raises:
            IndexError: there is no such row.
        """
        for part, at, inside in self._rows.split(checked(np.asarray(rows), len(self))):
            manifest = self._manifests[part]
            yield self._plan.partitions[manifest["partition"]], manifest, at, inside

    def verify(self) -> None:
        """Reads every file and compares it with its checksum.

        Raises:
            StellarError: files differ; all their partitions are named.
        """
        damaged = []
        for manifest in self._manifests:
            try:
                check_sums(self.folder, self._plan, manifest["partition"])
            except (StellarError, OSError) as error:
                if is_machines(error) or is_machines(error.__cause__ or error):
                    raise StellarError(
                        f"{self.folder}: cannot be read: {told_of(error)}"
                    ) from error
                damaged.append((self._plan.partitions[manifest["partition"]].name, str(error)))
        if damaged:
            names = listing([name for name, _ in damaged])
            raise StellarError(
                f"{self.folder}: {len(damaged)} of {len(self._manifests)} partitions are damaged: "
                f"{names}; the first: {damaged[0][1]}"
            )

    def dataset(
        self, names: Collection[str] | None = None, *, with_ids: bool = False
    ) -> FeatureDataset:
        """A map-style torch Dataset; works with any number of DataLoader workers.

        Args:
            names: the features of an item; all of them if left out.
            with_ids: whether an item has its "id", too.

        Raises:
            KeyError: no such feature.
        """
        from .dataset import FeatureDataset

        return FeatureDataset(self, self.names if names is None else names, with_ids)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("ids", "failed", "columns", "_places")
        return {name: value for name, value in vars(self).items() if name not in left_out}


def _check_shapes(folder: Path, manifests: Mapping[int, dict[str, Any]]) -> None:
    """Raises StellarError where partitions have rows of different shapes."""
    first: dict[str, Any] = {}
    for index, manifest in manifests.items():
        shapes = {name: facts["shape"][1:] for name, facts in manifest["features"].items()}
        first = first or shapes
        if shapes != first:
            raise StellarError(
                f"{folder}: the rows of partition {index} are {shapes}, those of the first "
                f"{first}; one model makes rows of one shape"
            )
