"""Files that are whole or not there, and JSON that others wrote."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from .errors import StellarError

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
    """A temporary path beside `path`, with its suffix, that takes its place when the block ends
    well and is removed when it does not.

    Raises:
        StellarError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb+") as file:
                to_disk(file)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
