"""Search indexes on the disk: reused only for the very features that they were built of.

    OUTPUT/search-cls.faiss     what `faiss.write_index` writes, then one line of JSON that says of
                                which features it is, a code over both, and a mark

faiss trusts what an index file says of its own sizes: reading one that a stranger wrote can overrun
memory (https://github.com/facebookresearch/faiss/issues/5400), and output folders are handed on.
So a file has a code, HMAC-SHA-256 (RFC 2104) by a key that only this user has, and one whose code
is another's is not opened but built anew.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import StellarError
from ..extract.features import Features
from ..extract.records import PathLike
from ..files import open_inside, parse_json, replacing, writing
from .search import build_index, check_by, import_faiss

MARK = b"stellar-fast index 1\n"
KEY_BYTES = 32
CODE_BYTES = hashlib.sha256().digest_size
MAX_HEADER = 4096  # bytes of the line of JSON
BLOCK = 1 << 20
# Of an inverted file's cells, the part that a query looks into: faiss itself looks into one cell.
PROBED = 16
_NO_INDEX = "which is no search index"
_OTHER = {"features": "other features", "by": "other vectors", "factory": "another kind"}


def open_index(
    features: Features,
    by: str = "cls",
    *,
    path: PathLike | None = None,
    factory: str = "Flat",
    say: Callable[[str], None] = lambda line: None,
) -> Any:
    """The index of `features` that is kept on the disk; built and kept, if there is none of them.

    One of other features, of another kind, or that this user did not build, is replaced. Kinds with
    cells (IVF) are set to look into a sixteenth of them.

    Args:
        by, factory: as `build_index` takes them.
        path: where it is kept; in the features' folder, if left out, and where that may not be
            written it is not kept.
        say: takes one line: whether it was there, or why it was built.

    Raises:
        ValueError: unknown `by`, or its feature was not extracted; `path` is a file of another
            kind.
        StellarError: `path` cannot be written.
        MissingExtraError: faiss is not installed.
    """
    faiss = import_faiss()
    check_by(features, by)
    place = features.folder / f"search-{by}.faiss" if path is None else Path(os.path.abspath(path))
    wanted = {"features": features.digest, "by": by, "factory": factory}
    index, why = _read(place, wanted)
    if index is None:
        if path is not None and why == _NO_INDEX:
            raise ValueError(f"{place}: is there, {why}; keep the index under another name")
        index = build_index(features, by=by, factory=factory)
        told = f"index: built, since {why}"
        try:
            _write(place, index, wanted)
            say(f"{told}; kept in {place}")
        except StellarError as error:
            if path is not None:
                raise
            say(f"{told}; not kept: {error}")
    else:
        say(f"index: {place}")
    with suppress(RuntimeError):  # of a kind that has no cells
        cells = faiss.extract_index_ivf(index)
        cells.nprobe = max(1, cells.nlist // PROBED)
    return index


def _read(path: Path, wanted: Mapping[str, Any]) -> tuple[Any, str]:
    """The index at `path`, if it is the wanted one; else None and what there is instead."""
    try:
        file = open_inside(path.parent, path.name)
    except FileNotFoundError:
        return None, "there was none"
    except StellarError:  # a link, or no regular file
        return None, _NO_INDEX
    with file:
        try:
            return _checked(file, wanted)
        except StellarError as error:  # no key
            return None, str(error)


def _checked(file: BinaryIO, wanted: Mapping[str, Any]) -> tuple[Any, str]:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(MARK) - CODE_BYTES))
    code, mark = file.read(CODE_BYTES), file.read()
    if mark != MARK:
        return None, _NO_INDEX
    signed = size - len(MARK) - CODE_BYTES
    if not hmac.compare_digest(code, _code(file, signed)):
        return None, "the one there was not built by this user, or is damaged"
    file.seek(max(0, signed - MAX_HEADER))
    header = parse_json(file.read(min(signed, MAX_HEADER)).rpartition(b"\n")[2])
    for name, other in _OTHER.items():
        if header[name] != wanted[name]:
            return None, f"the one there is of {other}"
    file.seek(0)
    return import_faiss().read_index(import_faiss().PyCallbackIOReader(file.read)), ""


def _write(path: Path, index: Any, header: Mapping[str, Any]) -> None:
    """
    Raises:
        StellarError: it cannot be written.
    """
    with replacing(path) as temporary:
        try:
            import_faiss().write_index(index, os.fspath(temporary))
        except RuntimeError as error:  # what faiss makes of an error of the system
            raise StellarError(f"{path}: cannot be written: {error}") from None
        with temporary.open("rb+") as file:
            file.seek(0, os.SEEK_END)
            file.write(b"\n" + json.dumps(header).encode())
            code = _code(file, file.tell())
            file.write(code + MARK)


def _code(file: BinaryIO, size: int) -> bytes:
    """Over the first `size` bytes of a file, which is left behind them."""
    code = hmac.new(_key(), digestmod="sha256")
    file.seek(0)
    while size and (block := file.read(min(size, BLOCK))):
        code.update(block)
        size -= len(block)
    return code.digest()


def _key() -> bytes:
    """This user's key, made when it is first needed.

    Raises:
        StellarError: it cannot be had.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache) / "stellar-fast" / "index.key"
    with writing(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _make_key(path)
        status, key = path.stat(), path.read_bytes()
    if len(key) != KEY_BYTES or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise StellarError(f"{path}: is no key of this user's alone; remove it")
    return key


def _make_key(path: Path) -> None:
    temporary = path.with_name(f".{secrets.token_hex(8)}.key")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        with suppress(FileExistsError):  # another process was first, whose key it is then
            os.link(temporary, path)
    finally:
        temporary.unlink()
