"""Files that are whole or not there, and files that a stranger may have written."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NoReturn

from .errors import StellarError

_UNFOLLOWED = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MACHINES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ESTALE)
# Bytes of a config.json or of a safetensors header; the published ones have some 1,000 and 100,000.
MAX_JSON = 10_000_000


def parse_json(text: str | bytes) -> Any:
    """JSON by its standard: no NaN, no infinity, no key twice in one object.

    Raises:
        ValueError, RecursionError: it is something else, or nested too deeply.
    """
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_key_twice)


def _no_constant(token: str) -> NoReturn:
    raise ValueError(f"{token} is no JSON number")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice in one object")
    return found


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into one StellarError that says what could not be written and why."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; make room, then run again" if full else ""
        raise StellarError(
            f"{path}: cannot be written: {error.strerror or error}{remedy}"
        ) from error


def is_machines(error: BaseException) -> bool:
    """Whether an error is of this machine or this process, and tells nothing of the file."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _MACHINES
    )


def told_of(error: BaseException) -> str:
    """What such an error says, and what to do."""
    text = str(getattr(error, "strerror", None) or error or "out of memory")
    full = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
    return f"{text}; close some, or raise `ulimit -n`" if full else text


def to_disk(file: IO[Any]) -> None:
    """Returns when what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def folder_to_disk(folder: Path) -> None:
    """Returns when the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, with its suffix, that takes its place when the block ends
    well and is removed when it does not. A link at `path` is replaced, not followed.

    Raises:
        StellarError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    try:
        with writing(path):
            temporary.touch(exist_ok=False)  # O_EXCL: what was put there before is not written to
            yield temporary
            with temporary.open("rb+") as file:
                to_disk(file)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_inside(folder: Path, *names: str) -> BufferedReader:
    """Opens for reading the regular file that is `names`, one below the other, in `folder`.

    Links are followed on the way to `folder`, whose place the caller chose, and nowhere below it:
    what lies there may come from a stranger, and leads nowhere else. Nor does this wait for what is
    no file, such as a FIFO.

    Raises:
        FileNotFoundError: there is no such file.
        StellarError: it is a link, is reached through one, or is no regular file.
        OSError: it cannot be opened.
    """
    path = folder.joinpath(*names)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            try:
                inner = os.open(name, os.O_RDONLY | _UNFOLLOWED, dir_fd=descriptor)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.EMLINK):  # EMLINK on BSD
                    raise _refused(path, "is a link, or is reached through one") from error
                raise
            os.close(descriptor)
            descriptor = inner
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _refused(path, "is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise


@contextmanager
def reading(folder: Path, name: str) -> Iterator[BufferedReader]:
    """A file of an inner folder of an output, opened by `open_inside`, within `told_reading`."""
    with told_reading(folder / name), open_inside(folder.parent, folder.name, name) as file:
        yield file


@contextmanager
def told_reading(path: Path) -> Iterator[None]:
    """Turns any error into one StellarError that says what could not be read, why, and what to
    do."""
    try:
        yield
    except StellarError:
        raise
    except Exception as error:  # OSError, NumPy's ValueError and SyntaxError, Arrow's own
        if is_machines(error):
            raise StellarError(f"{path}: cannot be read: {told_of(error)}") from error
        raise StellarError(f"{path}: cannot be read: {error}; remove {path.parent}") from error


def open_own(path: Path) -> IO[bytes]:
    """Opens `path` to append to, made if it is not there.

    Raises:
        StellarError: it is a link or no regular file, and is not touched.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _UNFOLLOWED, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR):
            raise _refused(path, "is a link or a folder") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refused(path, "is no regular file")
    return os.fdopen(descriptor, "ab")


def _refused(path: Path, what: str) -> StellarError:
    return StellarError(
        f"{path}: {what}: an output folder has files of its own only; if it is yours, copy it with "
        "its links resolved (cp -rL), else remove this"
    )


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
