"""One partition while it is made: its images, what became of them, and its files."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import StellarError
from ...files import to_disk, writing
from ...printable import printable
from ..records import Item
from ..work.decoding import Outcome
from .folder import Locks, Staged
from .formats import FORMATS, Format, Npy, Shapes
from .index import read_index, write_index
from .layout import MANIFEST, SCHEMA, Plan, read_manifest, sha256_of
from .store import Store

PACKAGES = ("stellar-fast", "torch", "numpy", "pillow", "pyarrow")
# Rows that are copied at once where a partition's earlier rows and new ones are put together.
BLOCK = 512

Size = tuple[int | None, int | None]


class Work:
    """One partition while it is made.

    `add` is called for every image of `items` in their order, `append` for the features of those
    that did not fail, and at last `finish` or `drop`.

    Attributes:
        items: the images to read: all of the partition, or where it is complete already, those
            that failed.
        earlier: its manifest, where it is complete already.
    """

    def __init__(
        self,
        output: Path,
        plan: Plan,
        index: int,
        items: list[Item],
        shapes: Shapes,
        locks: Locks,
        store: Store | None = None,
    ) -> None:
        """
        Args:
            store: where the partition is put when it is whole, if `output` but stands for it.

        Raises:
            BusyError: another process is making this partition.
            StellarError: it cannot be written.
        """
        self.partition = plan.partitions[index]
        self.items = items
        self.reasons: list[str | None] = []
        self.sizes: list[Size] = []
        self._output, self._plan, self._shapes = output, plan, shapes
        self._staged = Staged(output, self.partition, locks)
        self._files: Format | None = None
        self._store = store
        self._format = FORMATS[plan.configuration["format"]]
        try:
            self.earlier = read_manifest(output, plan, index, held=store is None)
            self._all = [item.id for item in items]
            self._kept = [item.kept for item in items]
            if self.earlier is not None:
                self._index = self._read_earlier(self.earlier)
                failed = {
                    id
                    for id, row in zip(self._index["id"], self._index["row"], strict=True)
                    if row is None
                }
                self.items = [item for item in items if item.id in failed]
            self._files = self._new_files(again=self.earlier is not None)
        except BaseException:
            self.drop()
            raise

    def _read_earlier(self, manifest: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The index of the partition as it is, of these images and features of these shapes."""
        folder = self._output / self.partition.name
        index = read_index(folder, manifest).to_pydict()
        shapes = {name: tuple(facts["shape"][1:]) for name, facts in manifest["features"].items()}
        if index["id"] != self._all or shapes != dict(self._shapes):
            raise StellarError(
                f"{folder} holds other images, or features of other shapes, than this run makes; "
                f"remove {folder} and run again"
            )
        return index

    def _new_files(self, again: bool = False) -> Format:
        """
        Args:
            again: whether these are to be put together with the rows of an earlier partition.
        """
        kind, folder = self._format, self._staged.folder
        if again:
            kind, folder = Npy, folder / "new"
            with writing(folder):
                folder.mkdir()
        return kind(folder, self._shapes, self._plan.configuration["dtype"])

    def add(self, outcome: Outcome) -> None:
        # Decoders and stores say anything, and the index is UTF-8.
        self.reasons.append(None if outcome.reason is None else printable(outcome.reason))
        self.sizes.append((outcome.width, outcome.height))

    def append(self, ids: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
        assert self._files is not None
        self._files.append(ids, rows)

    def finish(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """Completes the partition: its manifest.

        Args:
            made: how it was made, for the manifest.

        Raises:
            StellarError: it cannot be written; it is dropped.
        """
        try:
            return self._finish(made)
        finally:
            self.drop()

    def _finish(self, made: Mapping[str, Any]) -> dict[str, Any]:
        assert self._files is not None and len(self.reasons) == len(self.items)
        assert self._files.rows == self.reasons.count(None)
        if self.earlier is not None and not self._files.rows:
            return self.earlier  # every image failed again
        folder = self._staged.folder
        paths = self._files.finish()
        if self.earlier is not None:
            if self._store is not None:
                self._store.bring(self.partition.name, self.earlier)
            paths = self._merge(self.earlier)
        rows = self.reasons.count(None)
        keep = self._plan.configuration["keep"]
        paths.append(write_index(folder, self._all, self.reasons, self.sizes, keep, self._kept))
        manifest = {
            "schema": SCHEMA,
            "partition": self.partition.index,
            "configuration": self._plan.digest,
            "digest": self.partition.digest,
            "images": len(self._all),
            "rows": rows,
            "failed": len(self._all) - rows,
            "format": self._plan.configuration["format"],
            "keep": keep,
            "features": {
                name: {"shape": [rows, *shape], "dtype": self._plan.configuration["dtype"]}
                for name, shape in self._shapes.items()
            },
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                for path in paths
            },
            "made": {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "host": platform.node(),
                **made,
                "versions": {"python": platform.python_version()}
                | {name: version(name) for name in PACKAGES},
            },
        }
        path = folder / MANIFEST
        with writing(path), path.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.write("\n")
            to_disk(file)
        if self._store is not None:
            self._store.put(self.partition.name, folder)
        self._staged.publish()
        return manifest

    def _merge(self, earlier: Mapping[str, Any]) -> list[Path]:
        """Puts the earlier rows and the new ones together, in the order of the images."""
        assert self._files is not None
        folder = self._output / self.partition.name
        new = self._staged.folder / "new"
        rows = {
            name: (
                self._format.open(folder, earlier, name),
                np.load(new / f"{name}.npy", mmap_mode="r"),
            )
            for name in self._shapes
        }
        outcomes = {
            item.id: (reason, size)
            for item, reason, size in zip(self.items, self.reasons, self.sizes, strict=True)
        }
        self.reasons, self.sizes = [], []
        sources: list[tuple[bool, int]] = []  # of each row: whether it is new, and where it is
        taken = 0
        for id, row, width, height in zip(
            *(self._index[name] for name in ("id", "row", "width", "height")), strict=True
        ):
            reason, size = (None, (width, height)) if row is not None else outcomes[id]
            self.reasons.append(reason)
            self.sizes.append(size)
            if row is not None:
                sources.append((False, row))
            elif reason is None:
                sources.append((True, taken))
                taken += 1
        ids = [id for id, reason in zip(self._all, self.reasons, strict=True) if reason is None]
        self._files = self._new_files()
        for start in range(0, len(ids), BLOCK):
            fresh, at = np.array(sources[start : start + BLOCK]).T
            chosen = fresh.astype(bool)
            self._files.append(
                ids[start : start + BLOCK],
                {name: _woven(*pair, chosen, at) for name, pair in rows.items()},
            )
        paths = self._files.finish()
        for path in new.iterdir():
            path.unlink()
        new.rmdir()
        return paths

    def drop(self) -> None:
        """Removes what was made, unless it is complete."""
        if self._files is not None:
            self._files.close()
        self._staged.drop()


def _woven(old: Any, new: np.ndarray, fresh: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows `at` of `new` where `fresh`, of `old` elsewhere."""
    result = np.empty((len(at), *new.shape[1:]), new.dtype)
    result[fresh] = new[at[fresh]]
    result[~fresh] = old[at[~fresh]]
    return result


class Unwritten:
    """A partition of which nothing is written, to measure everything else."""

    def __init__(self, plan: Plan, index: int, items: list[Item]) -> None:
        self.partition = plan.partitions[index]
        self.items = items
        self.reasons: list[str | None] = []

    def add(self, outcome: Outcome) -> None:
        self.reasons.append(outcome.reason)

    def append(self, ids: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
        pass

    def finish(self, made: Mapping[str, Any]) -> dict[str, Any]:
        rows = self.reasons.count(None)
        images = len(self.reasons)
        return {
            "partition": self.partition.index,
            "images": images,
            "rows": rows,
            "failed": images - rows,
        }

    def drop(self) -> None:
        pass
