"""What a JPEG 2000 file's markers tell of the cost of decoding it.

A picture is cut into tiles, those into components and resolutions, and those into precincts and
code blocks (ITU-T T.800, annexes A and B). OpenJPEG allocates some 100 to 1,000 bytes for each of
these pieces before it reads any: cut into single pixels, a file of 100 bytes takes gigabytes.
Encoders cut code blocks of 32 or 64 pixels a side, in tiles of some hundreds.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from io import BytesIO
from typing import IO

from ..errors import ImageError

MAX_COMPONENTS = 4  # of Pillow's modes
# So many tiles are free, and so many pixels pay for one more.
FREE_TILES, PIXELS_A_TILE = 1 << 10, 64 * 64
# The same for precincts and code blocks of one component.
FREE_PIECES, PIXELS_A_PIECE = 1 << 14, 128
MAX_TILE_PARTS = 1 << 16
# Markers with their segments, and boxes before the codestream, that are looked at: some millions of
# empty ones fit into a file.
MAX_SEGMENTS, MAX_BOXES = 1 << 18, 1 << 12
_START = b"\xff\x4f\xff\x51"  # of a codestream, with the marker that must follow
_SIZE, _STYLE, _COMPONENT_STYLE = 0xFF51, 0xFF52, 0xFF53
_START_OF_TILE, _START_OF_DATA = 0xFF90, 0xFF93


def check(file: IO[bytes]) -> None:
    """Raises ImageError for a picture that is cut into too many pieces.

    What is damaged passes: the decoder tells of it. The file's position is changed.
    """
    try:
        for marker, body in _segments(file, _codestream(file)):
            if marker == _SIZE:
                width, height, tile_width, tile_height, tiles = _size(body)
            elif marker == _STYLE:
                style = body[5:], bool(body[0] & 1)
            elif marker == _COMPONENT_STYLE:  # its first byte says of which
                style = body[2:], bool(body[1] & 1)
            if marker in (_STYLE, _COMPONENT_STYLE):
                pieces = tiles * _pieces(tile_width, tile_height, *style)
                if pieces > FREE_PIECES + width * height // PIXELS_A_PIECE:
                    raise ImageError(
                        "", f"JPEG 2000 of {width}x{height} cut into {pieces} code blocks"
                    )
    except (struct.error, IndexError, UnboundLocalError, ZeroDivisionError):
        return


def with_another_bit(file: IO[bytes]) -> IO[bytes] | None:
    """A picture of more than 8 bits a channel as if each had one more; None of 8 bits or fewer.

    The values then begin at a half of what they were, or are twice as far from the middle: the
    brighter half stays the brighter one. The file's position is changed.

    Raises:
        ImageError: its channels are luminance and colour differences, which Pillow rounds wrongly
            before it converts them.
    """
    try:
        start = _codestream(file) + 4  # behind two markers
        file.seek(0)
        content = bytearray(file.read())
        (components,) = struct.unpack_from(">H", content, start + 36)
        depths = range(start + 38, start + 38 + 3 * components, 3)
        if all(content[at] & 0x7F < 8 for at in depths):
            return None
    except (struct.error, IndexError):
        return None
    if b"colr\x01\x00\x00" + (18).to_bytes(4, "big") in content[:start]:
        raise ImageError("", "JPEG 2000 of more than 8 bits in YCC; 8 bits are read")
    for at in depths:
        content[at] = min(content[at] + 1, 0x25)  # 38 bits are the most
    return BytesIO(bytes(content))


def _codestream(file: IO[bytes]) -> int:
    """Where the first one begins: at once, or in a box of its own.

    Raises:
        struct.error: there is none.
        ImageError: more than `MAX_BOXES` before it.
    """
    at = 0
    for _ in range(MAX_BOXES):
        file.seek(at)
        head = file.read(16)
        if head[:4] == _START:
            return at
        length, kind = struct.unpack_from(">I4s", head)
        if kind == b"jp2c":
            return at + (16 if length == 1 else 8)
        if length == 1:
            (length,) = struct.unpack_from(">Q", head, 8)
        at += max(8, length)
    raise ImageError("", f"JPEG 2000 with more than {MAX_BOXES} boxes before its pixels")


def _segments(file: IO[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    """Marker and body of each segment of the main header and of the tile-parts' headers.

    Raises:
        struct.error: the file ends.
        ImageError: more than `MAX_SEGMENTS`, or than `MAX_TILE_PARTS`.
    """
    at, parts, following = start + 2, 0, 0
    for _ in range(MAX_SEGMENTS):
        file.seek(at)
        marker, length = struct.unpack(">HH", file.read(4))
        if marker == _START_OF_DATA:
            if following <= at:  # damaged: this would go back, and round for ever
                return
            at = following
            continue
        body = file.read(max(0, length - 2))
        if marker == _START_OF_TILE:
            parts += 1
            if parts > MAX_TILE_PARTS:
                raise ImageError("", f"JPEG 2000 of more than {MAX_TILE_PARTS} tile-parts")
            (length_of_part,) = struct.unpack_from(">I", body, 2)
            following = at + max(length_of_part, 12)  # or it is the last: 0
            if length_of_part == 0:
                file.seek(0, 2)
                following = file.tell()
        yield marker, body
        at += 2 + max(2, length)
    raise ImageError("", f"JPEG 2000 with more than {MAX_SEGMENTS} segments of markers")


def _size(body: bytes) -> tuple[int, int, int, int, int]:
    """Width and height of the picture and of its tiles, and how many of these there are.

    Raises:
        ImageError: more components than Pillow reads, or too many tiles.
    """
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, components = (
        struct.unpack_from(">8IH", body, 2)
    )
    if components > MAX_COMPONENTS:
        raise ImageError("", f"JPEG 2000 of {components} components; {MAX_COMPONENTS} are read")
    width, height = right - left, bottom - top
    tiles = _ceil(right - tile_left, tile_width) * _ceil(bottom - tile_top, tile_height)
    if tiles > FREE_TILES + width * height // PIXELS_A_TILE:
        raise ImageError("", f"JPEG 2000 of {width}x{height} cut into {tiles} tiles")
    return width, height, min(width, tile_width), min(height, tile_height), tiles


def _pieces(width: int, height: int, style: bytes, has_precincts: bool) -> int:
    """Precincts and code blocks of one component of a tile."""
    levels = min(style[0], 32)  # more are not allowed
    pieces = 0
    for level in range(levels + 1):
        sides = [_ceil(side, 1 << (levels - level)) for side in (width, height)]
        powers = style[5 + level] if has_precincts else 0xFF
        precinct = [1 << (powers & 15), 1 << (powers >> 4)]
        pieces += math.prod(map(_ceil, sides, precinct))
        if level:  # of its three bands, each has half of the columns and rows
            sides = [_ceil(side, 2) for side in sides]
            precinct = [max(1, side // 2) for side in precinct]
        # A code block lies in one precinct.
        blocks = [
            min(4 << (power & 15), most) for power, most in zip(style[1:3], precinct, strict=True)
        ]
        pieces += (3 if level else 1) * math.prod(map(_ceil, sides, blocks))
    return pieces


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
