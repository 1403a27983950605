"""The files of a partition: features as `.npy` or Parquet, the index, and last the manifest."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from ...errors import StellarError
from ...files import to_disk, writing
from ..records import Value
from .foreign import INDEX_COLUMNS, MOST_TEXT
from .layout import FEATURES_PARQUET, INDEX

if TYPE_CHECKING:
    import pyarrow

Shapes = Mapping[str, tuple[int, ...]]
METADATA = b"stellar_fast"  # the key of shapes and dtypes in a Parquet schema


class FeatureFiles(Protocol):
    """Rows of all features of a partition, appended batch by batch."""

    rows: int

    def append(self, ids: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
        """Appends `rows` (B, *shape) of each feature, cast to the files' dtype.

        Raises:
            StellarError: a value is not finite, or no longer is in the files' dtype; or the files
                cannot be written.
        """

    def finish(self) -> list[Path]:
        """Puts the files on disk: their paths."""

    def close(self) -> None:
        """Closes the files, whole or not."""


def feature_files(kind: str, folder: Path, shapes: Shapes, dtype: str) -> FeatureFiles:
    """New files of features in `folder`.

    Args:
        kind: of `foreign.FORMATS`.
        shapes: of one row of each feature.
    """
    if kind == "npy":
        return NpyFiles(folder, shapes, np.dtype(dtype))
    return ParquetFile(folder / FEATURES_PARQUET, shapes, np.dtype(dtype))


def _stored(name: str, rows: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`rows` (B, *shape) in the files' dtype, C-contiguous."""
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


class NpyFiles:
    """One `.npy` file a feature, whose length is written at the end."""

    def __init__(self, folder: Path, shapes: Shapes, dtype: np.dtype[Any]) -> None:
        self.rows = 0
        self._shapes, self._dtype = shapes, dtype
        self._files: dict[str, tuple[Path, IO[bytes]]] = {}
        for name, shape in shapes.items():
            path = folder / f"{name}.npy"
            with writing(path):
                file = path.open("wb")
                self._files[name] = path, file
                file.write(self._header(shape))

    def append(self, ids: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
        for name, (path, file) in self._files.items():
            stored = _stored(name, rows[name], self._shapes[name], self._dtype)
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


def features_schema(shapes: Shapes, dtype: np.dtype[Any]) -> pyarrow.Schema:
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


class ParquetFile:
    """`features.parquet`, a row group a batch."""

    def __init__(self, path: Path, shapes: Shapes, dtype: np.dtype[Any]) -> None:
        from pyarrow import parquet

        self.rows = 0
        self._path, self._shapes, self._dtype = path, shapes, dtype
        self._schema = features_schema(shapes, dtype)
        with writing(path):
            self._file = path.open("wb")
            # Plain and not packed: what a reader takes is then bounded by the file's length.
            self._writer = parquet.ParquetWriter(
                self._file,
                self._schema,
                compression="none",
                use_dictionary=False,
                write_statistics=["id"],
            )

    def append(self, ids: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
        import pyarrow

        columns = [pyarrow.array(ids, pyarrow.string())]
        for name, shape in self._shapes.items():
            stored = _stored(name, rows[name], shape, self._dtype).reshape(-1)
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


def write_index(
    folder: Path,
    ids: Sequence[str],
    reasons: Sequence[str | None],
    sizes: Sequence[tuple[int | None, int | None]],
    keep: Mapping[str, str],
    kept: Sequence[tuple[Value, ...]],
) -> Path:
    """Writes `index.parquet`, one line an image in the order of the input.

    Columns: id (string); row (int64), its row in the features, null if the image failed; status
    (string), "ok" or "failed"; reason (string), null if ok; width and height (int32) of the upright
    picture in pixels, null if it failed; then what is kept.

    Args:
        reasons: why each image failed, None where it did not.
        keep: the columns that are kept, and their types.
        kept: their values, of each image.

    Raises:
        StellarError: it cannot be written, or its text is longer than `opened.read_index` takes.
    """
    import pyarrow
    from pyarrow import parquet

    rows: list[int | None] = []
    good = 0
    for reason in reasons:
        rows.append(good if reason is None else None)
        good += reason is None
    states = ["ok" if reason is None else "failed" for reason in reasons]
    columns: dict[str, Sequence[Any]] = {
        "id": ids,
        "row": rows,
        "status": states,
        "reason": reasons,
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        **dict(zip(keep, zip(*kept, strict=True), strict=True)),
    }
    types = {**INDEX_COLUMNS, **keep}
    table = pyarrow.table(
        columns,
        pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in types.items()]),
    )
    path = folder / INDEX
    text = sum(table[name].nbytes for name, kind in types.items() if kind == "string")
    if text > MOST_TEXT:
        raise StellarError(
            f"{path}: {text} bytes of ids, reasons and kept text, and {MOST_TEXT} are the most; "
            "give a smaller --partition-size"
        )
    with writing(path), path.open("wb") as file:
        parquet.write_table(table, file, compression="snappy")  # what `opened` reads
        to_disk(file)
    return path
