"""What is refused before any pixel is decoded: see rule 2 of `reader`."""

from __future__ import annotations

import re
from typing import IO

from PIL import Image, ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ..errors import ImageError
from .jpeg import count_scans
from .jpeg2000 import check as check_jpeg2000

MAX_PIXELS = 50_000_000  # 0.2 GiB as RGB in Pillow; decoders take up to 9 times that
MAX_SIDE = 1 << 20  # resizing takes 32 bytes for each pixel of a side
MAX_SCANS = 100  # libtiff's limit for JPEG; encoders make about 10

# A comment's end, or the file's, must be among the bytes that it is applied to.
_PNM_HEADER = re.compile(rb"P[456](?:(?:\s|#[^\r\n]*[\r\n])++\d++){2}\s")
_PNM_HEADER_BYTES = 1 << 16
_TIFF_TILE = (322, 323)  # tags: width and height of a tile


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises ImageError for no pixels or too many, and for a side that is too long."""
    if width < 1 or height < 1:
        raise ImageError("", f"has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError("", f"{width}x{height} is more than the limit of {max_pixels} pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageError("", f"{width}x{height} has a side of more than {MAX_SIDE} pixels")


def check_costs(image: Image.Image, max_pixels: int) -> None:
    """Raises ImageError for what would cost more than its pixels do, if it is still to be decoded.

    Nothing is refused that a camera or an encoder in use makes.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None or not image.tile:
        return
    if isinstance(image, JpegImageFile):
        scans = count_scans(image.fp, image.tile[0].offset, image.layers, MAX_SCANS)
        if scans > MAX_SCANS:
            raise ImageError("", f"JPEG of more than {MAX_SCANS} scans")
    elif isinstance(image, TiffImageFile):
        sides = [image.tag_v2.get(tag, 1) for tag in _TIFF_TILE]
        if sides[0] * sides[1] > max_pixels:
            tile = "x".join(map(str, sides))
            raise ImageError("", f"TIFF whose tiles of {tile} are more than {max_pixels} pixels")
    elif isinstance(image, Jpeg2KImageFile):
        check_jpeg2000(image.fp)


def _check_webp(file: IO[bytes], max_pixels: int) -> None:
    """The canvas, which Pillow's opener allocates twice."""
    head = file.read(30)
    if head[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    if len(head) == 30:  # or it is damaged, which the opener tells
        check_size(width, height, max_pixels)


def _check_pnm(file: IO[bytes], max_pixels: int) -> None:
    """Pillow takes comments byte by byte, and in a text all that follow for each."""
    if _PNM_HEADER.match(file.read(_PNM_HEADER_BYTES)) is None:
        raise ImageError("", "of PNM only P4, P5 and P6 are read, with a header of at most 64 KiB")


# By format, what is held against the first bytes of a file.
BEFORE_OPENING = {"WEBP": _check_webp, "PPM": _check_pnm}
