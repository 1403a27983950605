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
_BLOCK = 1 << 16


def count_scans(file: IO[bytes], start: int, limit: int) -> int:
    """Scans of the picture that begins at byte `start`, counted up to `limit` + 1.

    Only markers are looked at: a thumbnail in the metadata, or a film behind the picture, as
    telephones append it, has scans of its own that are not counted. The file's position is changed.
    """
    scans, at = 0, start + 2  # behind the start-of-image marker
    while scans <= limit:
        file.seek(at)
        block = file.read(_BLOCK)
        if len(block) < 2:
            break
        found = _MARKER.search(block)
        if found is None:
            at += len(block) - 1  # its last byte may be half of a marker
            continue
        code = found[1][0]
        if code == END_OF_IMAGE:
            break
        scans += code == START_OF_SCAN
        at += found.end()
        file.seek(at)
        at += max(2, int.from_bytes(file.read(2), "big"))
    return scans
