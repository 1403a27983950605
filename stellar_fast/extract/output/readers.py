"""The files of partitions, opened when they are read and not all at once.

They may come from a stranger, and say how much memory to take: nothing is read before what a file
says of itself is what the plan and the manifest say, and its length is as that has it.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ...errors import StellarError
from ...files import is_machines, open_inside, told_of
from ..footer import PLAIN, RLE, SNAPPY, UNCOMPRESSED, read_footer
from .foreign import DTYPES, INDEX_COLUMNS, MOST_TEXT
from .layout import FEATURES_PARQUET, INDEX
from .text import plain
from .writers import features_schema

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

# Files of one `Opened` that are open at once: each holds a descriptor, of which a process has 1024
# by default.
OPEN = 64
# Of an index in the file. What snappy packs grows by a factor of 22 at most.
MOST_INDEX = MOST_TEXT  # bytes


class Opened:
    """The partitions that were read last, open. May be used from many threads."""

    def __init__(self, folders: list[Path], manifests: list[dict[str, Any]]) -> None:
        self._folders, self._manifests = folders, manifests
        self._kept: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._lock = threading.Lock()
        self.process = os.getpid()

    def rows(self, part: int, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a feature in a partition, a read-only view where there is one.

        Raises:
            StellarError: its file cannot be read, or is not what the manifest says.
        """
        return self._get(part, name)[start:stop]

    def take(self, part: int, name: str, rows: np.ndarray) -> np.ndarray:
        """The same of some rows, by number: a copy."""
        return self._get(part, name)[rows]

    def ids(self, part: int) -> pyarrow.ChunkedArray:
        """The ids of a partition's rows."""
        return self._get(part, "")

    def _get(self, part: int, name: str) -> Any:
        key = part, name
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._open(part, name)
                if len(self._kept) > OPEN:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _open(self, part: int, name: str) -> Any:
        folder, manifest = self._folders[part], self._manifests[part]
        if name:
            return open_rows(folder, manifest, name)
        table = read_index(folder, manifest)
        return table.filter(ok(table))["id"]


def open_rows(folder: Path, manifest: Mapping[str, Any], name: str) -> np.ndarray | ParquetRows:
    """One feature of a partition: (rows, ...), indexed by a slice or an array of row numbers.

    Args:
        manifest: of the partition in `folder`, by `layout.read_manifest`.

    Raises:
        StellarError: its file cannot be read, or is not what the manifest says.
    """
    if manifest["format"] == "parquet":
        return ParquetRows(folder, manifest, name)
    with _reading(folder, f"{name}.npy") as file:
        return _mapped(file, folder / f"{name}.npy", manifest["features"][name])


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


class ParquetRows:
    """One feature of a `features.parquet`, read by row group; the last group read is kept."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], name: str) -> None:
        """
        Raises:
            StellarError: the file cannot be read, or is not what the manifest says.
        """
        facts = manifest["features"][name]
        self.shape, self.dtype = tuple(facts["shape"]), np.dtype(facts["dtype"])
        self._path, self._name = folder / FEATURES_PARQUET, name
        with _reading(folder, FEATURES_PARQUET) as file:
            counts = self._groups(manifest["features"], file)
            self._file = _parquet(file)
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
        if sum(map(_width, features.values())) * self.shape[0] > length:
            raise ValueError(f"it has {length} bytes, fewer than its rows take")
        columns = [column for group in groups for column in group.columns]
        if any(code not in (PLAIN, RLE) for column in columns for code in column.encodings):
            raise ValueError("it repeats values by a dictionary, or in another way")
        return counts

    def _check_columns(self, features: Mapping[str, Any]) -> None:
        shapes = {name: tuple(facts["shape"][1:]) for name, facts in features.items()}
        expected = features_schema(shapes, self.dtype)
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
                with _told(self._path):
                    column = self._file.read_row_group(group, [self._name])[self._name]
                    count = int(self._starts[group + 1] - self._starts[group])
                    if len(column) != count:
                        raise ValueError(f"row group {group} has not the {count} rows that it says")
                    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
                    self._last = group, np.concatenate(chunks).reshape(count, *self.shape[1:])
            return self._last[1]


def read_index(folder: Path, manifest: Mapping[str, Any]) -> pyarrow.Table:
    """The index of a partition, one line an image.

    Raises:
        StellarError: it cannot be read, or is not what the manifest says.
    """
    with _reading(folder, INDEX) as file:
        if (length := os.fstat(file.fileno()).st_size) > MOST_INDEX:
            raise ValueError(f"it has {length} bytes, and {MOST_INDEX} are the most")
        groups = read_footer(file)
        # One group, as `write_index` makes of at most `MOST_IMAGES` lines.
        if [group.rows for group in groups] != [manifest["images"]]:
            lines = sum(group.rows for group in groups)
            raise ValueError(f"it has {lines} lines, and its manifest {manifest['images']}")
        if any(codec not in (UNCOMPRESSED, SNAPPY) for codec in groups[0].codecs):
            raise ValueError("it is packed otherwise than by snappy")
        types = {**INDEX_COLUMNS, **manifest["keep"]}
        text = [name for name, kind in types.items() if kind == "string"]
        table = _unpacked(_parquet(file, read_dictionary=text), types, text)
        _check_index(table, manifest)
        return table


def _unpacked(
    file: parquet.ParquetFile, types: Mapping[str, str], text: list[str]
) -> pyarrow.Table:
    """The table of an index whose text, however often it is repeated, is within `MOST_TEXT`."""
    packed = "dictionary<values=string, indices=int32, ordered=0>"
    found = {field.name: str(field.type) for field in file.schema_arrow}
    names = {"float64": "double"}  # as Arrow writes them
    expected = {name: names.get(kind, kind) for name, kind in types.items()}
    expected |= dict.fromkeys(text, packed)
    if found != expected or len(file.schema_arrow) != len(expected):
        raise ValueError("its columns are not those of an index")
    return plain(file.read(), text)


def _check_index(table: pyarrow.Table, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError where its lines are not those of the manifest's rows, in order."""
    import pyarrow
    import pyarrow.compute as compute

    good = compute.is_valid(table["row"])
    rows = table["row"].drop_null().to_numpy()
    if not np.array_equal(rows, np.arange(manifest["rows"])):
        raise ValueError(f"its rows are not 0 to {manifest['rows']} - 1 in order")
    status = compute.if_else(good, pyarrow.scalar("ok"), pyarrow.scalar("failed"))
    for what, holds in (
        ("an id", compute.is_valid(table["id"])),
        ("the status of its row", compute.fill_null(compute.equal(table["status"], status), False)),
        ("a reason where it failed, alone", compute.xor(good, compute.is_valid(table["reason"]))),
    ):
        if not compute.all(holds, min_count=0).as_py():
            raise ValueError(f"a line has not {what}")


def ok(table: pyarrow.Table) -> pyarrow.ChunkedArray:
    """Which lines of an index are images that have a row."""
    import pyarrow.compute as compute

    return compute.equal(table["status"], "ok")


def _parquet(file: IO[bytes], **options: Any) -> parquet.ParquetFile:
    """Reads a file in place: by its descriptor, as its name may lead elsewhere by now."""
    import pyarrow
    from pyarrow import parquet

    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return parquet.ParquetFile(pyarrow.BufferReader(pyarrow.py_buffer(mapped)), **options)


def _width(facts: Mapping[str, Any]) -> int:
    """Bytes of one row of a feature."""
    return math.prod(facts["shape"][1:]) * DTYPES[facts["dtype"]]


@contextmanager
def _reading(folder: Path, name: str) -> Iterator[IO[bytes]]:
    with (
        _told(folder / name),
        open_inside(folder.parent, folder.name, name) as file,
    ):
        yield file


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except StellarError:
        raise
    except Exception as error:  # OSError, NumPy's ValueError and SyntaxError, Arrow's own
        if is_machines(error):
            raise StellarError(f"{path}: cannot be read: {told_of(error)}") from error
        raise StellarError(f"{path}: cannot be read: {error}; remove {path.parent}") from error
