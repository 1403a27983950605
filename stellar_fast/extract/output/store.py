"""An output in a store, such as `s3://bucket/features`: made here, part by part, and put there.

A folder of this machine stands for it: there are the plan, the locks and the partition at hand, and
of every partition that is in the store its manifest and its index. Each file is put whole, and a
partition's manifest last: one that has none in the store, or a file of another size, is not there.
What is in the store decides: `Store.fetch` makes the local folder agree with it.

A store has no locks. Processes of one machine share the local folder and its locks; of several
machines, each makes a share of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import StellarError
from ...files import folder_to_disk, parse_json, remove, replacing, writing
from ..input.addresses import STORES, Allowed, is_address, localized, parse, shown
from ..input.door import folder_in_store, told_without_credentials
from .folder import ENGINE, OURS, BusyError, Locks, Staged, check_output, clear
from .foreign import INDEX, MOST_JSON, check_manifest
from .layout import INPUTS, MANIFEST, PLAN, SCHEMA, Partition, Plan, read_plan, sha256_of

KEPT_HERE = (MANIFEST, INDEX)
# Files of the plan; nobody's name in a store leads out of the folder here.
_FETCHED = re.compile(rf"{re.escape(INPUTS)}|{ENGINE}(/[\w\-][\w.\-]*)+")
AT_ONCE = 64  # manifests that are asked for together


def store_of(output: str, allowed: Allowed) -> Store | None:
    """The store that an output is in; None for a folder of this machine.

    Raises:
        ValueError: an address that nothing can be put at, or that may not be opened.
    """
    if not is_address(localized(output) if is_address(output) else output):
        return None
    address = parse(output)
    if address.inner is not None or address.protocol not in STORES | allowed.protocols:
        raise ValueError(
            f"{shown(output)}: an output is a folder of this machine, or one in a store: s3://, "
            "gs://, az:// or hf://, or what --allow-protocol names"
        )
    if re.search(r"[*?\[\]]", address.path):
        raise ValueError(f"{shown(output)}: an output's address has none of * ? [ ]")
    return Store(output.rstrip("/"), allowed)


@dataclass(frozen=True)
class Store:
    """The folder at an address, as an output. May be pickled: the store is opened where it is used.

    Attributes:
        address: without a slash at its end.
    """

    address: str
    allowed: Allowed

    @property
    def here(self) -> Path:
        """The folder of this machine that stands for it, in the user's cache."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(os.fsencode(self.address)).hexdigest()[:32]
        return (cache / "stellar-fast" / "outputs" / name).resolve()

    def fetch(self, overwrite: bool) -> None:
        """Makes the local folder agree with the store.

        Args:
            overwrite: what is there is to be removed, so that none of it is read.

        Raises:
            ValueError: the store's folder holds something else.
            StellarError: the store cannot be read; or another run on this machine is at work on
                what the store no longer has.
        """
        with self._opened() as (fs, root):
            with writing(self.here):
                self.here.mkdir(mode=0o700, parents=True, exist_ok=True)
            with Locks(self.here) as locks:
                with locks.planning():
                    there = self._listed(fs, root)
                    self._check_ours(there, overwrite)
                    planned = PLAN in there and not overwrite
                    text = self._read(fs, root, PLAN, there[PLAN]) if planned else None
                    known = check_output(self.here, overwrite=False)
                    if known and (self.here / PLAN).read_bytes() != text:
                        locks.check_free()
                        clear(self.here)
                        if (self.here / ENGINE).exists():
                            remove(self.here / ENGINE)
                    if text is None:
                        return
                    self._fetch_plan(fs, root, there, text)
                plan = read_plan(self.here)
                for partition in self._changed(fs, root, there, plan):
                    with suppress(BusyError):  # or the process that makes it puts it
                        self._fetch_partition(fs, root, plan, partition, locks)

    def _fetch_plan(self, fs: Any, root: str, there: Mapping[str, int], text: bytes) -> None:
        for name, size in sorted(there.items()):
            path = self.here / name
            known = path.is_file() and path.stat().st_size == size
            if _FETCHED.fullmatch(name) and not known:
                self._bring(fs, root, name, size)
        with replacing(self.here / PLAN) as temporary:
            temporary.write_bytes(text)
        folder_to_disk(self.here)

    def _changed(
        self, fs: Any, root: str, there: Mapping[str, int], plan: Plan
    ) -> Iterator[Partition]:
        """The partitions that are not there as they are here: by the manifest, or in a size."""
        for first in range(0, len(plan.partitions), AT_ONCE):
            parts = plan.partitions[first : first + AT_ONCE]
            names = {part.index: f"{part.name}/{MANIFEST}" for part in parts}
            asked = {index: name for index, name in names.items() if name in there}
            for name in asked.values():
                self._check_size(name, there[name], MOST_JSON)
            found = fs.cat([f"{root}/{name}" for name in asked.values()]) if asked else {}
            for part in parts:
                path = self.here / names[part.index]
                here = path.read_bytes() if path.is_file() else None
                text = found.get(f"{root}/{names[part.index]}")
                files = parse_json(here)["files"] if here is not None and here == text else {}
                if here != text or any(
                    there.get(f"{part.name}/{name}") != facts["bytes"]
                    for name, facts in files.items()
                ):
                    yield part

    def _fetch_partition(
        self, fs: Any, root: str, plan: Plan, partition: Partition, locks: Locks
    ) -> None:
        """Makes one partition here what it is there now, while no process makes it."""
        folder, place = self.here / partition.name, f"{root}/{partition.name}"
        staged = Staged(self.here, partition, locks)
        try:
            there = self._listed(fs, place)
            manifest = None
            if MANIFEST in there:
                text = self._read(fs, place, MANIFEST, there[MANIFEST])
                manifest = self._checked(text, plan, partition)
                files = manifest["files"]
                if any(there.get(name) != facts["bytes"] for name, facts in files.items()):
                    manifest = None  # it is made again
            if manifest is None:
                if folder.exists():
                    remove(folder)
                return
            self._bring(fs, place, INDEX, files[INDEX]["bytes"], staged.folder)
            self._check_sum(staged.folder, partition.name, INDEX, files[INDEX]["sha256"])
            (staged.folder / MANIFEST).write_bytes(text)
            staged.publish()
        finally:
            staged.drop()

    def _checked(self, text: bytes, plan: Plan, partition: Partition) -> dict[str, Any]:
        where = Path(f"{self.shown}/{partition.name}/{MANIFEST}")
        try:
            manifest = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise StellarError(f"{where}: cannot be read: {error}") from None
        if not isinstance(manifest, dict):
            raise StellarError(f"{where}: holds no JSON object")
        expected = (SCHEMA, plan.digest, partition.digest)
        if tuple(manifest.get(key) for key in ("schema", "configuration", "digest")) != expected:
            raise StellarError(
                f"{where}: is of another plan; remove {self.shown}/{partition.name} and run again"
            )
        check_manifest(where, manifest, plan.configuration, partition.images, partition.index)
        return manifest

    def put_plan(self) -> None:
        """Puts the plan, behind all that belongs to it.

        Raises:
            StellarError: that cannot be done; or another machine has put one meanwhile.
        """
        with self._opened() as (fs, root):
            there = self._listed(fs, root)
            if PLAN in there:
                if self._read(fs, root, PLAN, there[PLAN]) == (self.here / PLAN).read_bytes():
                    return
                raise StellarError(
                    f"{self.shown}: another machine has begun an extraction there meanwhile; give "
                    "the same command again, with --partitions K/N of its own for each machine"
                )
            engine = self.here / ENGINE
            for path in sorted(engine.rglob("*")) if engine.is_dir() else ():
                if path.is_file():
                    self._put(fs, root, path.relative_to(self.here).as_posix(), path)
            for name in (INPUTS, PLAN):
                self._put(fs, root, name, self.here / name)

    def put(self, partition: str, folder: Path) -> None:
        """Puts a partition that is whole in `folder`, and leaves `KEPT_HERE` of it there.

        While it replaces an earlier one, the partition is absent, not half.

        Raises:
            StellarError: that cannot be done.
        """
        with self._opened() as (fs, root):
            manifest = f"{root}/{partition}/{MANIFEST}"
            fs.invalidate_cache()
            if fs.exists(manifest):
                fs.rm_file(manifest)
            names = sorted(path.name for path in folder.iterdir() if path.is_file())
            for name in sorted(names, key=lambda name: (name == MANIFEST, name)):
                self._put(fs, root, f"{partition}/{name}", folder / name)
        for name in names:
            if name not in KEPT_HERE:
                (folder / name).unlink()

    def put_file(self, name: str) -> None:
        """Puts a file of the local folder, such as the statistics of a run.

        Raises:
            StellarError: that cannot be done.
        """
        with self._opened() as (fs, root):
            self._put(fs, root, name, self.here / name)

    def bring(self, partition: str, manifest: Mapping[str, Any]) -> None:
        """Brings the files of a partition back, to be made again from.

        Raises:
            StellarError: that cannot be done, or one is not what the manifest says.
        """
        with self._opened() as (fs, root):
            for name, facts in manifest["files"].items():
                if name not in KEPT_HERE:
                    place, folder = f"{root}/{partition}", self.here / partition
                    self._bring(fs, place, name, facts["bytes"], folder)
                    self._check_sum(folder, partition, name, facts["sha256"])

    def clear(self) -> None:
        """Removes an extraction from the store; its plan last.

        Raises:
            StellarError: that cannot be done.
        """
        with self._opened() as (fs, root):
            for name in sorted(self._listed(fs, root), key=lambda name: (name == PLAN, name)):
                fs.rm_file(f"{root}/{name}")

    @property
    def shown(self) -> str:
        return shown(self.address)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        try:
            with told_without_credentials(self.address):
                yield folder_in_store(self.address, self.allowed)
        except OSError as error:
            if isinstance(error, StellarError):
                raise
            raise StellarError(f"{error}; the same command goes on from there") from None

    def _listed(self, fs: Any, root: str) -> dict[str, int]:
        """Bytes of every file, by its path in the folder; nothing that is kept from before."""
        fs.invalidate_cache()
        try:
            found = fs.find(root, detail=True)
        except FileNotFoundError:
            return {}
        start = f"{root}/"
        return {
            path.removeprefix(start): facts["size"]
            for path, facts in found.items()
            if path.startswith(start)
        }

    def _check_ours(self, there: Mapping[str, int], overwrite: bool) -> None:
        foreign = sorted(name for name in there if not OURS.fullmatch(name.partition("/")[0]))
        if foreign and (overwrite or PLAN not in there):
            raise ValueError(
                f"{self.shown}: the output folder is not empty, and it holds {shown(foreign[0])}, "
                "which is no part of an extraction; choose another folder, or remove that yourself"
            )

    def _check_size(self, name: str, size: int, most: int) -> None:
        if size > most:
            raise StellarError(f"{self.shown}/{name}: has {size} bytes, and {most} are the most")

    def _check_sum(self, folder: Path, partition: str, name: str, expected: str) -> None:
        if sha256_of(folder / name) != expected:
            raise StellarError(
                f"{self.shown}/{partition}/{name} is not what its manifest says; remove "
                f"{self.shown}/{partition} and run again"
            )

    def _read(self, fs: Any, place: str, name: str, size: int) -> bytes:
        """A small file, of as many bytes as were listed."""
        self._check_size(name, size, MOST_JSON)
        content = fs.cat_file(f"{place}/{name}")
        if len(content) != size:
            raise StellarError(
                f"{shown(place)}/{name}: has {len(content)} bytes, and {size} were listed; another "
                "machine may be writing it: run again"
            )
        return content

    def _bring(self, fs: Any, place: str, name: str, size: int, folder: Path | None = None) -> None:
        """A file of a place there into a folder here, the local one if left out."""
        path = (folder or self.here) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.chmod(0o600)
            fs.get_file(f"{place}/{name}", str(temporary))
            found = temporary.stat().st_size
            if found != size:
                raise StellarError(f"{self.shown}/{name}: {found} of its {size} bytes came")

    def _put(self, fs: Any, root: str, name: str, path: Path) -> None:
        """Puts one file, and looks whether all of it is there."""
        target = f"{root}/{name}"
        if parse(self.address).protocol not in STORES:  # where folders are more than names
            fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(path), target)
        fs.invalidate_cache()
        size, found = path.stat().st_size, fs.info(target)["size"]
        if found != size:
            raise StellarError(f"{self.shown}/{name}: {found} of its {size} bytes are there")
