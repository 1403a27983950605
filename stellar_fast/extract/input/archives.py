"""What is in a tar or a zip that is open already, whatever its headers claim."""

from __future__ import annotations

import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from ...printable import printable

BLOCK = tarfile.BLOCKSIZE
# Of the headers that hold a long name or PAX records: honest ones have some kilobytes.
MAX_HEADER = 1 << 20
MAX_MEMBERS = 10_000_000
# Of a zip's directory, which is held in memory at ten times its size: half a million members.
MAX_DIRECTORY = 64 << 20
# Behind the end; `tar` fills up to some kilobytes, a tape to some more.
MAX_ZEROS = 64 << 20
# Links that are followed for one, as Linux has it, and characters of a path with links in it.
MAX_HOPS, MAX_FOLLOWED = 40, 1024
_ZIP_MEMBER = b"PK\x03\x04"
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar.

    Attributes:
        offset, size: its bytes in the tar.
        regular: it is a file, and no folder, link or device.
        holes: it is stored without its runs of zeros.
        folder: it is a folder.
        link: what a link leads to: of a hard link the name of a member, of a symbolic one a path
            from the link's own folder.
        hard: it is a hard link.
    """

    name: str
    offset: int
    size: int
    regular: bool
    holes: bool
    folder: bool = False
    link: str | None = None
    hard: bool = False


def members(file: IO[bytes], place: str) -> Iterator[Member]:
    """The members of a tar in their order, by its headers.

    Not by tarfile, which reads headers of any size into memory, follows sizes backwards, and takes
    a damaged header for the end.

    Args:
        place: what messages call the tar.

    Raises:
        ValueError: it is damaged, cut off, or no tar.
    """
    length = file.seek(0, 2)
    at = count = 0
    shared: dict[str, str] = {}  # PAX records for all that follows
    own: dict[str, str] = {}  # for the next member
    while True:
        block = _read(file, at, BLOCK)
        if block == bytes(BLOCK) and not own:
            at = _behind_end(file, at, length, place)
            if at == length:
                return
            shared = {}  # another tar follows
            continue
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            if at == 0:
                raise ValueError(
                    f"{place}: cannot be read as a tar: {error}; compressed ones are not read, "
                    "as their members cannot be found alone"
                ) from None
            raise ValueError(
                f"{place}: is cut off or damaged at byte {at}, where a member or the end of the "
                "tar was expected"
            ) from None
        data = at + BLOCK
        if info.type in _PAX or info.type in _LONG:
            if not 0 <= info.size <= MAX_HEADER:
                raise ValueError(
                    f"{place}: cannot be read as a tar: the header at byte {at} has {info.size} "
                    f"bytes, more than the limit of {MAX_HEADER}"
                )
            content = _read(file, data, info.size)
            at = _after(data, info.size)
            if info.type == tarfile.XGLTYPE:
                shared |= _records(content, place, at)
            else:
                found = _records(content, place, at) if info.type in _PAX else {}
                if info.type in _LONG:
                    key = "path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
                    found = {key: _text(content.partition(b"\0")[0])}
                # As tarfile has it: of two headers for one member, the first.
                own = found | own
                own.setdefault("", "")  # a member must follow
            continue

        records = shared | own
        name = records.get("GNU.sparse.name") or records.get("path") or info.name
        size = _size(records["size"], place, at) if "size" in records else info.size
        holes = info.type == tarfile.GNUTYPE_SPARSE or any(
            key.startswith("GNU.sparse.") for key in records
        )
        more = info.type == tarfile.GNUTYPE_SPARSE and block[482]
        while more:
            more = _read(file, data, BLOCK)[504:505] not in (b"", b"\0")
            data = _after(data, BLOCK)
        stored = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        if size < 0:
            raise ValueError(
                f"{place}: cannot be read as a tar: {printable(name)} has {size} bytes"
            )
        at = _after(data, size if stored else 0)
        if data + size > length and stored:
            raise ValueError(
                f"{place}: cannot be read as a tar: {printable(name)} has {size} bytes from byte "
                f"{data} on, and the tar only {length} in all"
            )
        count += 1
        if count > MAX_MEMBERS:
            raise ValueError(f"{place}: has more than the limit of {MAX_MEMBERS} members")
        link = records.get("linkpath") or info.linkname if info.issym() or info.islnk() else None
        yield Member(
            name.rstrip("/"), data, size, info.isreg(), holes, info.isdir(), link, info.islnk()
        )
        own = {}


def _behind_end(file: IO[bytes], at: int, length: int, place: str) -> int:
    """Where the next header begins behind the zeros at byte `at`, which end a tar: some follow each
    other in one file. The file's length if none does.

    Raises:
        ValueError: there are more zeros than any program appends.
    """
    start = at
    while at < length:
        if at - start > MAX_ZEROS:
            raise ValueError(
                f"{place}: has more than {MAX_ZEROS} bytes of zeros from byte {start} on"
            )
        zeros = _read(file, at, 1 << 20)
        if not zeros:
            break
        content = zeros.lstrip(b"\0")
        if content:
            return at + (len(zeros) - len(content)) // BLOCK * BLOCK
        at += len(zeros)
    return length


def files(file: IO[bytes], place: str) -> Iterator[tuple[str, Member | str]]:
    """What a tar has by its names: files; then links as the files that they lead to, if those are
    in the tar; and of what else there is, but for folders, why it is none.

    Raises:
        ValueError: as `members`.
    """
    links: dict[str, Member] = {}
    for member in members(file, place):
        if member.link is not None:
            links[_normal(member.name)] = member
        elif member.regular:
            yield member.name, member
        elif not member.folder:
            yield member.name, "members that are no files"
    if not links:
        return
    ends = {name: _end(name, links) for name in links}
    wanted = set(ends.values()) - {None}
    # Read again: what links lead to is known now, and all else need not be in memory.
    found = {
        name: member
        for member in members(file, place)
        if member.regular and (name := _normal(member.name)) in wanted
    }
    for name, end in ends.items():
        none = "links that lead to no file of the tar"
        yield links[name].name, found.get(end, none) if end is not None else none


def _end(name: str, links: Mapping[str, Member]) -> str | None:
    """Where links lead from one of them; None from those that lead in a circle, or too far."""
    for _ in range(MAX_HOPS):
        if len(name) > MAX_FOLLOWED:
            return None
        following = _followed(name, links)
        if following is None:
            return name
        name = following
    return None


def _followed(name: str, links: Mapping[str, Member]) -> str | None:
    """The path that is meant by one whose first link, of a folder or of its own, is followed."""
    parts = name.split("/")
    for count in range(1, len(parts) + 1):
        link = links.get("/".join(parts[:count]))
        if link is None:
            continue
        assert link.link is not None
        before = [] if link.hard or link.link.startswith("/") else parts[: count - 1]
        return _normal("/".join([*before, link.link, *parts[count:]]))
    return None


def _normal(path: str) -> str:
    """A path in a tar, as `tar` unpacks it: from the folder that it is unpacked to."""
    return posixpath.normpath(f"/{path}").lstrip("/")


def _read(file: IO[bytes], at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _after(start: int, size: int) -> int:
    """Where the block after some bytes begins."""
    return start + -(-size // BLOCK) * BLOCK


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _records(content: bytes, place: str, end: int) -> dict[str, str]:
    """PAX records, each `LENGTH KEY=VALUE` and a newline."""
    records = {}
    at = 0
    while at < len(content) and content[at]:
        digits, space, _ = content[at : at + 20].partition(b" ")
        size = int(digits) if space and digits.isdigit() else 0
        record = content[at + len(digits) + 1 : at + size]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not (equals and record.endswith(b"\n") and at + size <= len(content)):
            raise ValueError(
                f"{place}: cannot be read as a tar: the records of the header before byte {end} "
                "are damaged"
            )
        records[_text(key)] = _text(value)
        at += size
    return records


def _size(text: str, place: str, at: int) -> int:
    if text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    raise ValueError(
        f"{place}: cannot be read as a tar: the size of the member at byte {at} is "
        f"{printable(text[:40])!r}"
    )


class Tar:
    """The members of a tar by name."""

    def __init__(self, file: IO[bytes], place: str) -> None:
        """
        Raises:
            ValueError: it cannot be read as a tar.
        """
        self._file = file
        self._members: dict[str, Member] = {}
        for name, member in files(file, place):
            if name in self._members:
                raise ValueError(f"{place}: has {printable(name)} twice")
            if isinstance(member, Member):
                self._members[name] = member

    def names(self) -> list[tuple[str, str]]:
        """The files, and by which name each is read."""
        return [(name, name) for name in self._members]

    def read(self, name: str, limit: int) -> bytes:
        """
        Raises:
            FileNotFoundError: no such member.
            OSError: it has more than `limit` bytes, or cannot be read.
        """
        member = self._members.get(name)
        if member is None:
            raise FileNotFoundError("no such file")
        if member.holes:
            raise OSError("is stored with holes")
        if member.size > limit:
            raise OSError(f"{member.size} bytes are more than the limit of {limit}")
        return _read(self._file, member.offset, member.size)


class Zip:
    """The members of a zip by name."""

    def __init__(self, file: IO[bytes], place: str) -> None:
        """
        Raises:
            ValueError: it cannot be read as a zip.
        """
        try:
            self._zip = zipfile.ZipFile(_Sparing(file))
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{place}: cannot be read as a zip: {printable(str(error))}"
            ) from error
        first = min((info.header_offset for info in self._zip.infolist()), default=0)
        file.seek(0)
        # Its directory is at the end of the file, and tells nothing of what another one has.
        if first and file.read(4) == _ZIP_MEMBER:
            raise ValueError(f"{place}: has another zip before the one that is read; unpack it")

    def names(self) -> list[tuple[str, str]]:
        """The files, and by which name each is read: of a link, by what it leads to, if that is in
        the zip."""
        files = {info.filename: info for info in self._zip.infolist() if not info.is_dir()}
        links = {}
        for name, info in files.items():
            if stat.S_ISLNK(info.external_attr >> 16) and info.file_size <= MAX_FOLLOWED:
                target = _text(self.read(name, MAX_FOLLOWED))
                links[_normal(name)] = Member(name, 0, 0, False, False, link=target)
        own = {_normal(name): name for name in files}
        ends = {link.name: own.get(_end(name, links) or name) for name, link in links.items()}
        return [(name, ends.get(name) or name) for name in files]

    def read(self, name: str, limit: int) -> bytes:
        """
        Raises:
            FileNotFoundError: no such member.
            OSError: it has more than `limit` bytes, or cannot be read.
        """
        try:
            info = self._zip.getinfo(name)
        except KeyError:
            raise FileNotFoundError("no such file") from None
        if info.file_size > limit:
            raise OSError(f"{info.file_size} bytes are more than the limit of {limit}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise OSError(
                f"is packed by method {info.compress_type} of zip; stored and deflated are read"
            )
        if info.flag_bits & 1:
            raise OSError("is encrypted")
        parts = []
        left = info.file_size + 1
        try:
            with self._zip.open(info) as member:
                while left and (part := member.read(min(left, 1 << 20))):
                    parts.append(part)
                    left -= len(part)
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise OSError(f"is damaged in the zip: {printable(str(error))}") from error
        if left != 1:
            raise OSError(f"has other than the {info.file_size} bytes that the zip says")
        return b"".join(parts)


class _Sparing:
    """A file of which no more is read at once than a zip's directory may have."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.seekable, self.close = file.seekable, file.close

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            at = self.tell()
            size = self.seek(0, 2) - at
            self.seek(at)
        if size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory has more than {MAX_DIRECTORY} bytes")
        return self._file.read(size)
