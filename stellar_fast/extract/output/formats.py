"""The formats of a partition's features: a class each, in `FORMATS`, which names its files, writes
them and reads them again. A new format is a class here.

They may come from a stranger, and say how much memory to take: nothing is read before what a file
says of itself is what the manifest says, and its length is as that has it.
"""

from __future__ import annotations

import io
import json
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from ...errors import StellarError
from ...files import reading, to_disk, told_reading, writing
from ..footer import PLAIN, RLE, UNCOMPRESSED, in_place, read_footer

if TYPE_CHECKING:
    import pyarrow

Shapes = Mapping[str, tuple[int, ...]]
METADATA = b"stellar_fast"  # the key of shapes and dtypes in a Parquet schema


class Rows(Protocol):
    """One feature of a partition, (rows, ...)."""

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """Rows by a slice or by an array of their numbers; of a slice, a view where there is one.

        Raises:
            StellarError: the file cannot be read, or is not what the manifest says.
        """


class Format(ABC):
    """A class is a format; an object of it is one partition's new files, appended batch by batch.

    Args:
        folder: of the partition.
        shapes: of one row of each feature.
        dtype: of the files, "float32" or "float16".
    """

    def __init__(self, folder: Path, shapes: Shapes, dtype: str) -> None:
        self.rows = 0
        self._shapes, self._dtype = shapes, np.dtype(dtype)

    @staticmethod
    @abstractmethod
    def names(features: Sequence[str]) -> list[str]:
        """The names of a partition's files of these features."""

    @staticmethod
    @abstractmethod
    def open(folder: Path, manifest: Mapping[str, Any], name: str) -> Rows:
        """One feature of the partition in `folder`.

        Args:
            manifest: its own, by `layout.read_manifest`.

        Raises:
            StellarError: its file cannot be read, or is not what the manifest says.
        """

    @abstractmethod
    def append(self, ids: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
        """Appends `rows` (B, *shape) of each feature, cast to the files' dtype.

        Raises:
            StellarError: a value is not finite, or no longer is in the files' dtype; or the files
                cannot be written.
        """

    @abstractmethod
    def finish(self) -> list[Path]:
        """Puts the files on disk: their paths."""

    @abstractmethod
    def close(self) -> None:
        """Closes the files, whole or not."""

    def _stored(self, name: str, rows: np.ndarray) -> np.ndarray:
        """`rows` (B, *shape) in the files' dtype, C-contiguous."""
        shape, dtype = self._shapes[name], self._dtype
        if rows.shape[1:] != shape:
            raise ValueError(f"{name} takes rows {shape}, got {rows.shape}")
        with np.errstate(over="ignore"):  # looked for below
            stored = np.ascontiguousarray(rows, dtype=dtype)
        if not np.isfinite(stored).all():
            if np.isfinite(rows).all():
                raise StellarError(
                    f"{name} reaches {np.abs(rows).max():.4g}, beyond the largest {dtype}, "
                    f"{np.finfo(dtype).max:.4g}; use --dtype float32"
                )
            raise StellarError(f"the model gave NaN or infinity in {name}; try --precision fp32")
        return stored


class Npy(Format):
    """One `.npy` file a feature, whose length is written at the end."""

    def __init__(self, folder: Path, shapes: Shapes, dtype: str) -> None:
        super().__init__(folder, shapes, dtype)
        self._files: dict[str, tuple[Path, IO[bytes]]] = {}
        for name, shape in shapes.items():
            path = folder / f"{name}.npy"
            with writing(path):
                file = path.open("wb")
                self._files[name] = path, file
                file.write(self._header(shape))

    @staticmethod
    def names(features: Sequence[str]) -> list[str]:
        return [f"{name}.npy" for name in features]

    @staticmethod
    def open(folder: Path, manifest: Mapping[str, Any], name: str) -> Rows:
        with reading(folder, f"{name}.npy") as file:
            return _mapped(file, folder / f"{name}.npy", manifest["features"][name])

    def append(self, ids: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
        for name, (path, file) in self._files.items():
            stored = self._stored(name, rows[name])
            with writing(path):
                file.write(stored.data)
        self.rows += len(ids)

    def finish(self) -> list[Path]:
        for name, (path, file) in self._files.items():
            with writing(path):
                # NumPy pads the header for a first axis of any length, so it can be rewritten.
                file.seek(0)
                file.write(self._header(self._shapes[name]))
                to_disk(file)
                file.close()
        return [path for path, _ in self._files.values()]

    def close(self) -> None:
        for _, file in self._files.values():
            # Closing flushes, which fails again on a full disk and would hide the first error.
            with suppress(OSError):
                file.close()

    def _header(self, shape: tuple[int, ...]) -> bytes:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self.rows, *shape),
            },
        )
        return header.getvalue()


def _mapped(file: IO[bytes], path: Path, facts: Mapping[str, Any]) -> np.ndarray:
    shape, dtype = tuple(facts["shape"]), np.dtype(facts["dtype"])
    # Only the header that extraction writes: the later ones may say to be 4 GB long.
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"its header is of version {version}, not (1, 0)")
    found = np.lib.format.read_array_header_1_0(file)
    if found != (shape, False, dtype):
        order = " in Fortran order" if found[1] else ""
        raise StellarError(
            f"{path} holds {found[2].name} {list(found[0])}{order}, but its manifest says "
            f"{dtype.name} {list(shape)}; remove {path.parent} and extract again"
        )
    start = file.tell()
    expected = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if (length := os.fstat(file.fileno()).st_size) != expected:
        raise ValueError(f"it has {length} bytes, and its rows take {expected}")
    # A plain view: memmap's own indexing is slow.
    return np.memmap(file, dtype, "r", start, shape).view(np.ndarray)


class Parquet(Format):
    """`features.parquet`, a row group a batch."""

    FILE = "features.parquet"

    def __init__(self, folder: Path, shapes: Shapes, dtype: str) -> None:
        from pyarrow import parquet

        super().__init__(folder, shapes, dtype)
        self._path = folder / self.FILE
        self._schema = _schema(shapes, self._dtype)
        with writing(self._path):
            self._file = self._path.open("wb")
            # Plain and not packed: what a reader takes is then bounded by the file's length.
            self._writer = parquet.ParquetWriter(
                self._file,
                self._schema,
                compression="none",
                use_dictionary=False,
                write_statistics=["id"],
            )

    @staticmethod
    def names(features: Sequence[str]) -> list[str]:
        return [Parquet.FILE]

    @staticmethod
    def open(folder: Path, manifest: Mapping[str, Any], name: str) -> Rows:
        return _ParquetRows(folder, manifest, name)

    def append(self, ids: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
        import pyarrow

        columns = [pyarrow.array(ids, pyarrow.string())]
        for name in self._shapes:
            stored = self._stored(name, rows[name]).reshape(-1)
            kind = self._schema.field(name).type
            numbers = pyarrow.array(stored, kind.value_type)
            columns.append(pyarrow.FixedSizeListArray.from_arrays(numbers, type=kind))
        with writing(self._path):
            self._writer.write_table(pyarrow.table(columns, schema=self._schema))
        self.rows += len(ids)

    def finish(self) -> list[Path]:
        with writing(self._path):
            self._writer.close()
            to_disk(self._file)
            self._file.close()
        return [self._path]

    def close(self) -> None:
        with suppress(OSError):
            self._writer.close()
        with suppress(OSError):
            self._file.close()


def _schema(shapes: Shapes, dtype: np.dtype[Any]) -> pyarrow.Schema:
    """Of `features.parquet`: an id, and each feature as a fixed-size list of floats, flattened row
    by row. The metadata has the shape and dtype of a row, as JSON under `METADATA`."""
    import pyarrow

    number = pyarrow.field("element", pyarrow.from_numpy_dtype(dtype), nullable=False)
    fields = [pyarrow.field("id", pyarrow.string(), nullable=False)] + [
        pyarrow.field(name, pyarrow.list_(number, int(np.prod(shape))), nullable=False)
        for name, shape in shapes.items()
    ]
    facts = {name: {"shape": list(shape), "dtype": dtype.name} for name, shape in shapes.items()}
    return pyarrow.schema(fields, metadata={METADATA: json.dumps(facts).encode()})


class _ParquetRows:
    """One feature of a `features.parquet`, read by row group; the last group read is kept."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], name: str) -> None:
        facts = manifest["features"][name]
        self.shape, self.dtype = tuple(facts["shape"]), np.dtype(facts["dtype"])
        self._path, self._name = folder / Parquet.FILE, name
        with reading(folder, Parquet.FILE) as file:
            counts = self._groups(manifest["features"], file)
            self._file = in_place(file)
            self._check_columns(manifest["features"])
        self._starts = np.array([0, *accumulate(counts)])
        self._lock = threading.Lock()
        self._last: tuple[int, np.ndarray] | None = None

    def _groups(self, features: Mapping[str, Any], file: IO[bytes]) -> list[int]:
        """The rows of every group, of a file that cannot unpack to more than its length."""
        groups = read_footer(file)
        counts = [group.rows for group in groups]
        if sum(counts) != self.shape[0]:
            raise ValueError(f"it has {sum(counts)} rows, and its manifest {self.shape[0]}")
        # Groups without rows would cost memory for nothing.
        if len(groups) > max(1, self.shape[0]):
            raise ValueError(f"it has {len(groups)} row groups for {self.shape[0]} rows")
        if any(codec != UNCOMPRESSED for group in groups for codec in group.codecs):
            raise ValueError("it is compressed")
        length = os.fstat(file.fileno()).st_size
        numbers = sum(math.prod(facts["shape"][1:]) for facts in features.values())
        if numbers * self.dtype.itemsize * self.shape[0] > length:
            raise ValueError(f"it has {length} bytes, fewer than its rows take")
        columns = [column for group in groups for column in group.columns]
        if any(code not in (PLAIN, RLE) for column in columns for code in column.encodings):
            raise ValueError("it repeats values by a dictionary, or in another way")
        return counts

    def _check_columns(self, features: Mapping[str, Any]) -> None:
        shapes = {name: tuple(facts["shape"][1:]) for name, facts in features.items()}
        expected = _schema(shapes, self.dtype)
        found = self._file.schema_arrow
        # Of one order, too.
        if not found.equals(expected, check_metadata=True):
            raise ValueError("its columns are not those of its manifest")

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(rows.start, rows.stop)
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for group in np.unique(groups):
            at = np.flatnonzero(groups == group)
            result[at] = self._group(int(group))[rows[at] - self._starts[group]]
        return result

    def _group(self, group: int) -> np.ndarray:
        with self._lock:
            if self._last is None or self._last[0] != group:
                with told_reading(self._path):
                    column = self._file.read_row_group(group, [self._name])[self._name]
                    count = int(self._starts[group + 1] - self._starts[group])
                    if len(column) != count:
                        raise ValueError(f"row group {group} has not the {count} rows that it says")
                    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
                    self._last = group, np.concatenate(chunks).reshape(count, *self.shape[1:])
            return self._last[1]


FORMATS: Mapping[str, type[Format]] = {"npy": Npy, "parquet": Parquet}
