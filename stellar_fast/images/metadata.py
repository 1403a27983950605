"""Pictures without their metadata, since only what makes the pixels decides whether they are read.

Of what a file holds beside its pixels, Pillow reads almost everything, and gives up the picture
where a comment, a profile or a resolution is damaged or large; in PNG, a text of the name
"interlace" even changes the pixels. Here all of it is left out but Exif and XMP, whose orientation
is applied if it can be read.

Formats: PNG (ISO/IEC 15948), JPEG (ITU-T T.81, annex B), RIFF of WebP (RFC 9649), TIFF 6.0, boxes
of JPEG 2000 (ITU-T T.800, annex I) and AVIF (ISO/IEC 14496-12).
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, Any, cast

# Runs of bytes that are left in; behind so many, all is.
MAX_PIECES = 1 << 16
MAX_NOTE, MAX_NOTES = 1 << 20, 16  # bytes of Exif or XMP, and chunks that may hold some
_XMP_OF_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_OF_PNG = b"XML:com.adobe.xmp"
_EXIF_OF_TEXT = b"Raw profile type exif"
_NOTES = {  # chunks of a PNG, and what those begin with that may hold an orientation
    b"eXIf": b"",
    b"tEXt": _EXIF_OF_TEXT,
    b"zTXt": _EXIF_OF_TEXT,
    b"iTXt": _XMP_OF_PNG,
}
# Segments that are looked at: all with a length that may be before the first scan.
_START_OF_SCAN, _APP0, _APP1, _APP14, _APP15, _COMMENT = 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE


# Of another file, the first byte and the length; or what is there instead.
Piece = tuple[int, int] | bytes


class Spliced(io.RawIOBase):
    """A file that is made of pieces of another one."""

    def __init__(self, file: IO[bytes], pieces: list[Piece]) -> None:
        self._file, self._pieces = file, pieces
        lengths = (len(one) if isinstance(one, bytes) else one[1] for one in pieces)
        self._starts = list(accumulate(lengths, initial=0))
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._starts[-1])[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        number = bisect_right(self._starts, self._at) - 1
        if number >= len(self._pieces):
            return 0
        piece, inside = self._pieces[number], self._at - self._starts[number]
        if isinstance(piece, bytes):
            content = piece[inside : inside + len(buffer)]
        else:
            self._file.seek(piece[0] + inside)
            content = self._file.read(min(len(buffer), piece[1] - inside))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


@dataclass
class Bare:
    """A picture's file without its metadata, and what of these may hold the orientation."""

    file: IO[bytes]
    exif: bytes | None = None
    xmp: bytes | None = None


class _Pieces:
    def __init__(self) -> None:
        self.found: list[Piece] = []

    def add(self, start: int, length: int) -> None:
        last = self.found[-1] if self.found else b""
        if not isinstance(last, bytes) and sum(last) == start:
            self.found.pop()
            start, length = last[0], last[1] + length
        self.found.append((start, length))

    def spliced(self, file: IO[bytes]) -> IO[bytes]:
        return cast("IO[bytes]", io.BufferedReader(Spliced(file, self.found)))


def bare(name: str, file: IO[bytes]) -> Bare:
    """A picture in the format `name`, whose metadata are left out where that can be done by the
    way. The file's position is changed, and reading the result changes it again."""
    if name == "PNG":
        return _bare_png(file)
    if name in ("JPEG", "MPO"):
        return _bare_jpeg(file)
    if name == "TIFF":
        return _bare_tiff(file)
    return Bare(file)


def _length(file: IO[bytes]) -> int:
    return file.seek(0, io.SEEK_END)


# PNG: ancillary chunks are told by their first letter; tRNS is of the pixels.


def _bare_png(file: IO[bytes]) -> Bare:
    length, at, pieces = _length(file), 8, _Pieces()
    result = Bare(file)
    pieces.add(0, 8)
    kind, notes = b"", 0
    while at + 8 <= length and kind != b"IEND" and len(pieces.found) < MAX_PIECES:
        file.seek(at)
        size, kind = struct.unpack(">I4s", file.read(8))
        if not kind.isalpha():
            break  # no chunk begins here: the decoder tells of it
        end = min(at + 12 + size, length)
        if kind[:1].isupper() or kind == b"tRNS":
            pieces.add(at, end - at)
        elif kind in _NOTES and size <= MAX_NOTE and notes < MAX_NOTES:
            body, check = file.read(size), file.read(4)
            if body.startswith(_NOTES[kind]) and check == zlib.crc32(kind + body).to_bytes(
                4, "big"
            ):
                notes += 1
                _note_png(result, kind, body)
        at = end
    if kind != b"IEND" and at < length:
        pieces.add(at, length - at)
    result.file = pieces.spliced(file)
    return result


def _note_png(result: Bare, kind: bytes, body: bytes) -> None:
    if kind == b"eXIf":
        result.exif = body
        return
    keyword, _, text = body.partition(b"\0")
    if kind == b"iTXt" and keyword == _XMP_OF_PNG:
        packed, rest = text[:1] == b"\1", text[2:]
        text = rest.partition(b"\0")[2].partition(b"\0")[2]
        result.xmp = _unpacked(text) if packed else text
    elif kind != b"iTXt" and keyword == _EXIF_OF_TEXT and result.exif is None:
        text = _unpacked(text[1:]) if kind == b"zTXt" else text
        digits = b"".join(b"".join(text.split(b"\n")[3:]).split())  # below a name and a length
        if re.fullmatch(rb"(?:[0-9A-Fa-f]{2})+", digits):
            result.exif = bytes.fromhex(digits.decode("ascii"))


def _unpacked(content: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(content, MAX_NOTE)
    except zlib.error:
        return b""


# JPEG: JFIF and Adobe's segment say what the colours are.


def _bare_jpeg(file: IO[bytes]) -> Bare:
    length, at, pieces = _length(file), 2, _Pieces()
    result = Bare(file)
    pieces.add(0, 2)
    while at + 4 <= length and len(pieces.found) < MAX_PIECES:
        file.seek(at)
        head, size = struct.unpack(">HH", file.read(4))
        code = head & 0xFF
        if head == 0xFFFF:  # padding
            at += 1
            continue
        if head >> 8 != 0xFF or not 0xC0 <= code <= 0xFE or code == _START_OF_SCAN or size < 2:
            break
        if _APP0 <= code <= _APP15 or code == _COMMENT:
            body = file.read(size - 2)
            # As libjpeg has it, shorter ones say nothing.
            if (code == _APP0 and body.startswith(b"JFIF\0") and len(body) >= 14) or (
                code == _APP14 and body.startswith(b"Adobe") and len(body) >= 12
            ):
                pieces.add(at, 2 + size)
            elif code == _APP1 and body.startswith(b"Exif\0\0"):
                before = result.exif or b""
                result.exif = (
                    before + body[6 * bool(before) :] if len(before) < MAX_NOTE else before
                )
            elif code == _APP1 and body.startswith(_XMP_OF_JPEG):
                result.xmp = body.removeprefix(_XMP_OF_JPEG)
        else:
            pieces.add(at, 2 + size)
        at += 2 + size
    if at < length:
        pieces.add(at, length - at)
    result.file = pieces.spliced(file)
    return result


# TIFF: the first page, with the tags of its pixels, and of how they are to be understood (TIFF 6.0;
# 317 and 339 of its part 2; 32995 to 32998 of SGI, 50674 of LERC). Pillow reads no tag behind one
# that it cannot read.

_TIFF_TAGS = frozenset(
    (
        *(254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317),
        *(320, 322, 323, 324, 325, 338, 339, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530),
        *(531, 532, 32995, 32996, 32997, 32998, 50674),
    )
)
_TIFF_PHOTOMETRIC, _TIFF_EXTRA_SAMPLES, _TIFF_XMP = 262, 338, 700
MAX_TAGS = 1 << 12


@dataclass
class _Directory:
    """The first directory of a TIFF.

    Attributes:
        order: of bytes, as `struct` has it.
        big: it is a BigTIFF.
        start, size: in the file.
        entries: tag by tag, in their order.
    """

    order: str
    big: bool
    start: int
    size: int
    entries: list[tuple[int, bytes]]

    def field(self, entry: bytes) -> tuple[int, int]:
        """How many values a tag has, and its value or the place where they are."""
        return struct.unpack_from(self.order + ("QQ" if self.big else "II"), entry, 4)

    def __bytes__(self) -> bytes:
        count = struct.pack(self.order + ("Q" if self.big else "H"), len(self.entries))
        last = bytes(8 if self.big else 4)  # no other page
        return count + b"".join(entry for _, entry in self.entries) + last


def _directory(file: IO[bytes]) -> _Directory | None:
    """None of a file that is damaged, which the decoder tells of."""
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2], "<")
    try:
        big = struct.unpack_from(f"{order}H", head, 2)[0] == 43
        kind, size = ("Q", 20) if big else ("H", 12)
        (start,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", head, 8 if big else 4)
        file.seek(start)
        (count,) = struct.unpack(order + kind, file.read(struct.calcsize(order + kind)))
        if count > MAX_TAGS:
            return None
        entries = []
        for _ in range(count):
            entry = file.read(size)
            if len(entry) < size:
                return None
            entries.append((struct.unpack_from(f"{order}H", entry)[0], entry))
    except (struct.error, OverflowError, OSError):
        return None
    length = struct.calcsize(order + kind) + count * size + (8 if big else 4)
    return _Directory(order, big, start, length, entries)


def _bare_tiff(file: IO[bytes]) -> Bare:
    directory = _directory(file)
    if directory is None:
        return Bare(file)
    xmp = None
    for tag, entry in directory.entries:
        if tag == _TIFF_XMP:
            count, place = directory.field(entry)
            if count <= MAX_NOTE:
                file.seek(min(place, _length(file)))
                xmp = file.read(count)
    directory.entries = [one for one in directory.entries if one[0] in _TIFF_TAGS]
    return Bare(_with_directory(file, directory), xmp=xmp)


def _with_directory(file: IO[bytes], directory: _Directory) -> IO[bytes]:
    """The file with another, not longer directory in the place of the first."""
    new = bytes(directory).ljust(directory.size, b"\0")
    start, end = directory.start, directory.start + directory.size
    pieces: list[Piece] = [(0, start), new, (end, max(0, _length(file) - end))]
    return cast("IO[bytes]", io.BufferedReader(Spliced(file, pieces)))


def as_black_is_zero(file: IO[bytes]) -> IO[bytes] | None:
    """A greyscale TIFF whose 0 is white as one whose 0 is black, its negative; None of others. The
    file's position is changed."""
    directory = _directory(file)
    tags = dict(directory.entries) if directory is not None else {}
    if directory is None or _TIFF_PHOTOMETRIC not in tags or _TIFF_EXTRA_SAMPLES in tags:
        return None
    at = 12 if directory.big else 8  # where an entry has its value
    if struct.unpack_from(f"{directory.order}H", tags[_TIFF_PHOTOMETRIC], at) != (0,):
        return None
    entry = bytearray(tags[_TIFF_PHOTOMETRIC])
    struct.pack_into(f"{directory.order}H", entry, at, 1)
    tags[_TIFF_PHOTOMETRIC] = bytes(entry)
    directory.entries = list(tags.items())
    return _with_directory(file, directory)


# Formats whose metadata seldom stop Pillow: they are left out when it was stopped.


def repaired(name: str, file: IO[bytes]) -> bytes | None:
    """A file with metadata that were left out or made unknown, for one that could not be read; None
    where nothing can be done. The file's position is changed."""
    repair = _REPAIRS.get(name)
    if repair is None:
        return None
    file.seek(0)
    try:
        return repair(file.read())
    except (struct.error, IndexError):
        return None


def _repaired_webp(content: bytes) -> bytes | None:
    """Without profiles, Exif and XMP, which are behind the pixels and may be cut off."""
    kept, at, extended = [], 12, False
    while at + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, at)
        chunk = content[at : at + 8 + size + (size & 1)]
        at += 8 + size + (size & 1)
        if kind == b"VP8X":
            extended = True
            chunk = chunk[:8] + bytes([chunk[8] & ~0x2C]) + chunk[9:]  # flags of the three
        if kind in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(chunk)
    body = b"WEBP" + b"".join(kept)
    whole = b"RIFF" + struct.pack("<I", len(body)) + body
    return whole if extended else None


def _repaired_jp2(content: bytes) -> bytes | None:
    """With the resolution as a box of no meaning."""
    head, mark, rest = content.partition(b"jp2c")
    return head.replace(b"res ", b"free") + mark + rest if b"res " in head else None


def _repaired_avif(content: bytes) -> bytes | None:
    """With Exif and XMP as items of no meaning; rotations are of the picture's own."""
    pattern = re.compile(rb"(infe\x02\x00\x00[\x00\x01].{4})(?:Exif|mime)", re.DOTALL)
    found, count = pattern.subn(rb"\1none", content[: 1 << 20])
    return found + content[1 << 20 :] if count else None


_REPAIRS: dict[str, Callable[[bytes], bytes | None]] = {
    "WEBP": _repaired_webp,
    "JPEG2000": _repaired_jp2,
    "AVIF": _repaired_avif,
}


# JPEG without its end


def complete_jpeg(file: IO[bytes]) -> tuple[IO[bytes], ...] | None:
    """A JPEG that lacks its end marker, with it, and with other bytes before it.

    Both decode to the same pixels if none depends on bytes that are not there. None where that
    tells nothing: of a picture in several scans, or one of whose restart intervals some are absent.
    The file's position is changed.
    """
    file.seek(0)
    content = file.read()
    facts = _frame_of(content)
    if facts is None:
        return None
    units, interval, scan = facts
    expected = -(-units // interval) - 1 if interval else 0
    if sum(1 for _ in re.finditer(rb"\xff[\xd0-\xd7]", content[scan:])) != expected:
        return None
    if re.search(rb"\xff[^\x00\xd0-\xd7\xff]", content[scan:], re.DOTALL):
        return None  # more than pixels follows
    content = content.removesuffix(b"\xff")
    filler = bytes((at * 73 + 41) % 251 for at in range(4096))  # no 0xFF in it
    return io.BytesIO(content + b"\xff\xd9"), io.BytesIO(content + filler + b"\xff\xd9")


def _frame_of(content: bytes) -> tuple[int, int, int] | None:
    """Of a sequential JPEG in one scan: its units (MCU), those between restart markers or 0, and
    where the scan's bytes begin."""
    at, units, interval, components = 2, 0, 0, 0
    while at + 4 <= len(content):
        head, size = struct.unpack_from(">HH", content, at)
        body = content[at + 4 : at + 2 + size]
        if head in (0xFFC0, 0xFFC1) and len(body) >= 9:
            height, width, components = struct.unpack_from(">HHB", body, 1)
            factors = [
                body[7 + 3 * index] for index in range(components) if len(body) > 7 + 3 * index
            ]
            across = 8 * max(factor >> 4 for factor in factors) if components > 1 else 8
            down = 8 * max(factor & 15 for factor in factors) if components > 1 else 8
            if not across or not down:
                return None
            units = -(-width // across) * -(-height // down)
        elif head == 0xFFDD and len(body) >= 2:
            (interval,) = struct.unpack_from(">H", body)
        elif head == 0xFFDA:
            whole = units and body[:1] == bytes((components,))
            return (units, interval, at + 2 + size) if whole else None
        elif head >> 8 != 0xFF or (
            0xC2 <= head & 0xFF <= 0xCF and head not in (0xFFC4, 0xFFC8, 0xFFCC)
        ):
            return None
        at += 2 + size
    return None
