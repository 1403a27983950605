"""An output folder that is there whole or not at all.

The work goes into a hidden folder beside the output, `.NAME.partial-*`, which takes the output's
name when everything in it is on disk. A process that dies on the way leaves only that hidden
folder, and the next run to the same output removes it: it is told from another run's, still at
work, by the lock that dies with its process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import StellarError
from ..files import folder_to_disk, writing

INDEX = "index.parquet"
RUN = "run.json"

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h


def check_output(output: Path, overwrite: bool) -> None:
    """Raises ValueError unless `output` may be written: it is not there, or it is an empty folder,
    or `overwrite` and it holds what an extraction left and nothing else."""
    if os.path.lexists(output) and not output.is_dir():
        raise ValueError(f"{output}: the output is a folder, but there is a file of this name")
    held = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    if held and not overwrite:
        raise ValueError(
            f"{output}: the output folder is not empty; choose another, or --overwrite"
        )
    foreign = [name for name in held if name not in (INDEX, RUN) and not name.endswith(".npy")]
    if foreign or (held and INDEX not in held):
        found = f"it holds {foreign[0]}" if foreign else f"it has no {INDEX}"
        raise ValueError(
            f"{output}: only the output of an earlier extraction is overwritten, but {found}; "
            "choose another folder, or remove this one yourself"
        )
    parent = next(folder for folder in output.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{output}: cannot be made, {parent} is not a folder that may be written")


@contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that becomes `output` when the block ends well, and is removed when it does not.

    With `overwrite`, an earlier output stays in its place until then.

    Raises:
        ValueError: as `check_output`, before and after the block.
        StellarError: another run is writing this output, or the folder cannot be written.
    """
    check_output(output, overwrite)
    with ExitStack() as stack:
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary = _make_temporary(output, stack)
        try:
            yield temporary
            check_output(output, overwrite)
            with writing(output):
                _publish(temporary, output)
        finally:
            # After an exchange this is the earlier output; after a plain rename it is gone.
            shutil.rmtree(temporary, ignore_errors=True)


def _make_temporary(output: Path, stack: ExitStack) -> Path:
    """A new folder beside `output`, locked until `stack` unwinds; those of dead runs are removed.

    It is made before the others are looked at: of two runs that start at once, one at least sees
    the other.
    """
    prefix = f".{output.name}.partial-"
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        descriptor = stack.enter_context(_opened(temporary))
        locked = _lock(descriptor)
        # Until it was locked, another run may have taken it for dead.
        if locked is not False and temporary.exists():
            break
    try:
        if locked:  # without locks, the dead cannot be told from the living
            for other in output.parent.glob(f"{glob.escape(prefix)}*"):
                if other != temporary:
                    _remove_dead(other, output)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would be the finished output's
    except BaseException:
        temporary.rmdir()
        raise
    return temporary


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_dead(folder: Path, output: Path) -> None:
    try:
        with _opened(folder) as descriptor:
            if _lock(descriptor) is False:
                raise StellarError(f"{output}: another run is writing this output, in {folder}")
            shutil.rmtree(folder)
    except FileNotFoundError:
        pass  # the other run was done, or removed it too


def _lock(descriptor: int) -> bool | None:
    """Locks a folder until it is closed; False if another run has it, None where the file system
    has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            return None
        raise
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _publish(temporary: Path, output: Path) -> None:
    folder_to_disk(temporary)
    if not output.exists() or not any(output.iterdir()):
        os.rename(temporary, output)  # replaces an empty folder
    elif not _exchange(temporary, output):
        # No exchange here: between these two renames, the output is absent rather than half done.
        earlier = temporary.with_name(f"{temporary.name}-earlier")
        os.rename(output, earlier)
        os.rename(temporary, output)
        shutil.rmtree(earlier)
    folder_to_disk(output.parent)


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
