"""What a JPEG file's markers tell before its pixels are decoded.

Markers and segments as in ITU-T T.81, annex B: 0xFF and a code; in the coded pixels 0xFF is always
followed by 0 or by a restart marker.
"""

from __future__ import annotations

import re
from typing import IO

START_OF_SCAN = 0xDA
END_OF_IMAGE = 0xD9
# Not 0 (a byte of pixels), 0xFF (padding), nor the markers without a length: TEM, RST0 to RST7.
_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])", re.DOTALL)
_FIRST_BLOCK = 64  # bytes: segments follow each other, only pixels are long
_BLOCK = 1 << 16
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))


def count_scans(file: IO[bytes], start: int, components: int, limit: int) -> int:
    """Scans that a decoder makes of the picture that begins at byte `start`, up to `limit` + 1.

    Only markers are looked at: a thumbnail in the metadata, or a film behind the picture, as
    telephones append it, has scans of its own that are not counted. Where the frame is not
    progressive and all its `components` are in the first scan, that is the only one: the rest of
    the file is not looked at. The file's position is changed.
    """
    scans, at = 0, start + 2  # behind the start-of-image marker
    progressive = False
    size = _FIRST_BLOCK
    while scans <= limit:
        file.seek(at)
        block = file.read(size)
        if len(block) < 2:
            break
        found = _MARKER.search(block)
        if found is None:
            at += len(block) - 1  # its last byte may be half of a marker
            size = _BLOCK
            continue
        size = _FIRST_BLOCK
        code = found[1][0]
        if code == END_OF_IMAGE:
            break
        at += found.end()
        file.seek(at)
        head = file.read(3)  # the segment's length, and of a scan the number of its components
        if code in _PROGRESSIVE:
            progressive = True
        elif code == START_OF_SCAN:
            scans += 1
            if scans == 1 and not progressive and head[2:] == bytes((components,)):
                break
        at += max(2, int.from_bytes(head[:2], "big"))
    return scans
