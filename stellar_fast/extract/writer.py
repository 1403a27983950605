"""What an output folder holds: a `.npy` for each feature, `run.json`, and last `index.parquet`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from ..errors import StellarError
from ..files import to_disk, writing
from .folder import INDEX, RUN


class FeatureFile:
    """Rows of one feature, appended to a `.npy` file whose length is written at the end."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """
        Args:
            shape: of one row.
        """
        self.path, self.shape, self.dtype = path, shape, dtype
        self.rows = 0
        header = self._header()
        self._header_bytes = len(header)
        with writing(path):
            self._file: IO[bytes] = path.open("wb")
            self._file.write(header)

    def append(self, rows: np.ndarray) -> None:
        """Appends `rows` (B, *shape), cast to the file's dtype.

        Raises:
            StellarError: a value is not finite, or no longer is in the file's dtype; or the file
                cannot be written.
        """
        if rows.shape[1:] != self.shape:
            raise ValueError(f"{self.path.name} takes rows {self.shape}, got {rows.shape}")
        with np.errstate(over="ignore"):  # looked for below
            stored = np.ascontiguousarray(rows, dtype=self.dtype)
        if not np.isfinite(stored).all():
            if np.isfinite(rows).all():
                raise StellarError(
                    f"{self.path.stem} reaches {np.abs(rows).max():.4g}, beyond the largest "
                    f"{self.dtype}, {np.finfo(self.dtype).max:.4g}; use --dtype float32"
                )
            raise StellarError(
                f"the model gave NaN or infinity in {self.path.stem}; try --precision fp32"
            )
        with writing(self.path):
            self._file.write(stored.data)
        self.rows += len(stored)

    def finish(self) -> None:
        """Writes the length and puts the file on disk."""
        header = self._header()
        # NumPy pads the header for a first axis of any length, so that it can be rewritten.
        assert len(header) == self._header_bytes
        with writing(self.path):
            self._file.seek(0)
            self._file.write(header)
            to_disk(self._file)
            self._file.close()

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            # Closing flushes, which fails again on a full disk and would hide the first error.
            with suppress(OSError):
                self._file.close()

    def _header(self) -> bytes:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.rows, *self.shape),
            },
        )
        return header.getvalue()


def write_run(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes `run.json`: how the features were made."""
    with writing(folder / RUN), (folder / RUN).open("w", encoding="utf-8") as file:
        json.dump(facts, file, indent=1)
        file.write("\n")
        to_disk(file)


def write_index(folder: Path, paths: Sequence[str], reasons: Sequence[str | None]) -> None:
    """Writes `index.parquet`, one line an image in the order of the input.

    Columns: path (string); row (int64), its row in every `.npy`, null if the image failed; status
    (string), "ok" or "failed"; reason (string), null if ok.

    Args:
        reasons: why each image failed, None where it did not.
    """
    import pyarrow
    from pyarrow import parquet

    rows: list[int | None] = []
    good = 0
    for reason in reasons:
        rows.append(good if reason is None else None)
        good += reason is None
    table = pyarrow.table(
        {
            "path": pyarrow.array(paths, pyarrow.string()),
            "row": pyarrow.array(rows, pyarrow.int64()),
            "status": pyarrow.array(
                ["ok" if reason is None else "failed" for reason in reasons], pyarrow.string()
            ),
            "reason": pyarrow.array(reasons, pyarrow.string()),
        }
    )
    with writing(folder / INDEX), (folder / INDEX).open("wb") as file:
        parquet.write_table(table, file)
        to_disk(file)
