"""An output folder: who may write into it, and partitions that appear whole.

A partition is made in a hidden folder, `.part-00000.partial-*`, which takes the partition's name
when everything in it is on disk. A process that dies leaves that hidden folder, and the next one
that makes the partition removes it.

Two processes never make one partition at the same time: each holds a lock on the partition's byte
of `.lock`, which dies with the process, works between the machines of a network file system, and
needs no clean-up.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import StellarError
from ...files import folder_to_disk, open_own, remove, writing
from .layout import INPUTS, PLAN, Partition

LOCK = ".lock"
ENGINE = "engine"  # a folder: the packed weights of an extraction that has scales of its own
# The byte that is locked while a plan is made, beyond those of any partition.
_PLAN_BYTE = 1 << 40
OURS = re.compile(
    rf"{re.escape(PLAN)}|{re.escape(INPUTS)}|stats(-\d+-of-\d+)?\.json|part-\d{{5,}}|"
    rf"{re.escape(LOCK)}|{ENGINE}|\.part-\d{{5,}}\.partial-.*|\.(plan|inputs|stats|search-).*|"
    r"search-[a-z]+\.faiss"  # of `recipes.kept`
)
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h
# What this process has locked, as (device, inode, partition): its own locks do not stop it.
_TAKEN: set[tuple[int, int, int]] = set()
_PLANNING = threading.Lock()
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)


def check_output(output: Path, overwrite: bool) -> bool:
    """Whether `output` holds an extraction that may be gone on with.

    Raises:
        ValueError: it can be neither that nor a new output: a file, a folder of something else, a
            folder that may not be written; with `overwrite` also one that holds more than an
            extraction left.
    """
    if os.path.lexists(output) and not output.is_dir():
        raise ValueError(f"{output}: the output is a folder, but there is a file of this name")
    held = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    foreign = [name for name in held if not OURS.fullmatch(name)]
    planned = PLAN in held
    if foreign and (overwrite or not planned):
        raise ValueError(
            f"{output}: the output folder is not empty, and it holds {foreign[0]}, which is no "
            "part of an extraction; choose another folder, or remove that yourself"
        )
    place = output if output.is_dir() else next(f for f in output.parents if f.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{output}: cannot be made, {place} is not a folder that may be written")
    return planned and not overwrite


def clear(output: Path) -> None:
    """Removes what an extraction left; its plan last, so that until then it can be gone on with.

    Raises:
        StellarError: something cannot be removed.

    Links are removed, and never what they lead to.
    """
    with writing(output):
        names = [entry.name for entry in output.iterdir() if OURS.fullmatch(entry.name)]
        for name in sorted(names, key=lambda name: (name == PLAN, name)):
            path = output / name
            if name in (LOCK, ENGINE):
                continue  # others may be waiting for it; this run has just made it
            remove(path)


class BusyError(StellarError):
    """Another process makes a partition at this moment."""


def has_locks(output: Path) -> bool:
    """Whether this folder's file system keeps processes from what another one has locked."""
    with open_own(output / LOCK) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _PLAN_BYTE)
        except OSError as error:
            return error.errno not in _NO_LOCKS
    return True


class Locks:
    """Locks on the partitions of one output, held until they are released or the process dies.

    Where the file system has no locks, they are granted without asking.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            self._file = open_own(output / LOCK)
        status = os.fstat(self._file.fileno())
        self._identity = status.st_dev, status.st_ino

    def __enter__(self) -> Locks:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def take(self, partition: Partition) -> None:
        """Raises BusyError if another process has it."""
        taken = (*self._identity, partition.index)
        busy = taken in _TAKEN
        if not busy:
            try:
                with _without_locks():
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, partition.index)
            except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as POSIX has it
                busy = True
        if busy:
            raise BusyError(
                f"{self._output}: another run is writing {partition.name} at this moment"
            )
        _TAKEN.add(taken)

    def release(self, partition: Partition) -> None:
        _TAKEN.discard((*self._identity, partition.index))
        with _without_locks():
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, partition.index)

    def check_free(self) -> None:
        """Raises StellarError if another run has any partition."""
        busy = any(taken[:2] == self._identity for taken in _TAKEN)
        try:
            with _without_locks():
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, _PLAN_BYTE, 0)
                fcntl.lockf(self._file, fcntl.LOCK_UN, _PLAN_BYTE, 0)
        except (BlockingIOError, PermissionError):
            busy = True
        if busy:
            raise StellarError(f"{self._output}: another run is writing it at this moment")

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Waits until no other process, or thread, writes a file that is not a partition's."""
        with _PLANNING:
            with _without_locks():
                fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _PLAN_BYTE)
            try:
                yield
            finally:
                with _without_locks():
                    fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _PLAN_BYTE)


@contextmanager
def _without_locks() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


class Staged:
    """A new folder that becomes a partition, or is removed."""

    def __init__(self, output: Path, partition: Partition, locks: Locks) -> None:
        """
        Raises:
            BusyError: another process is making this partition.
            StellarError: the folder cannot be made.
        """
        self.output, self.partition = output, partition
        self._locks = locks
        locks.take(partition)
        prefix = f".{partition.name}.partial-"
        try:
            with writing(output / partition.name):
                for other in output.glob(f"{prefix}*"):  # of a run that died
                    remove(other)
                self.folder = output / f"{prefix}{secrets.token_hex(8)}"
                self.folder.mkdir()  # fails where anything is, a link too
        except BaseException:
            locks.release(partition)
            raise

    def publish(self) -> None:
        """Gives the folder its name, in place of an earlier one, when it is on disk.

        Raises:
            StellarError: that cannot be done; the folder is still there to be dropped.
        """
        target = self.output / self.partition.name
        with writing(target):
            folder_to_disk(self.folder)
            if not os.path.lexists(target):
                os.rename(self.folder, target)
            elif not _exchange(self.folder, target):
                # No exchange here: between these two renames the partition is absent, not half.
                earlier = self.folder.with_name(f"{self.folder.name}-earlier")
                os.rename(target, earlier)
                os.rename(self.folder, target)
                remove(earlier)
            folder_to_disk(self.output)
        self.drop()

    def drop(self) -> None:
        """Removes what is left of the folder, and lets others make the partition."""
        with suppress(OSError):
            remove(self.folder)
        self._locks.release(self.partition)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
