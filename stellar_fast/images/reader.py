"""From files and PIL images to RGB: decoding by written rules.

`decode` gives 8-bit RGB, whatever the file holds:

1. Formats: `FORMATS`, told by content and not by suffix. Nothing that starts another program (EPS);
   of PNM the binary kinds, P4 to P6.
2. Size: width times height of the header is checked against `max_pixels` before any pixel is
   decoded, and again after; a side is at most `MAX_SIDE`, as resizing takes memory for each of its
   pixels. Pillow's own limit plays no part, nor does its warning: what its decoders check by that
   (WebP, frames of GIF, tiles of TIFF), they check by `max_pixels`. Small files that cost more
   than their pixels are refused: a JPEG of several scans that has more than `MAX_SCANS`, each a few
   bytes and a pass over all pixels; a TIFF whose tiles are larger than `max_pixels`; a JPEG 2000
   cut into more pieces than `jpeg2000.check` allows; a PNM header of more than 64 KiB.
3. Truncated or damaged pixels: an error. A half-decoded photograph is never returned.
4. Orientation: the EXIF (or XMP) orientation is applied, for PIL images as well as for files, so
   that a photograph looks as a viewer shows it. Unreadable metadata count as "upright".
5. Several frames or pages: the first; a PIL image gives the frame it stands at.
6. Transparency (an alpha channel, a transparent palette entry, a transparent colour) is composited
   over white, which pages show behind such pictures; dropping the channel would show whatever
   colour the transparent pixels happen to hold. A BMP whose alpha is 0 everywhere has none, nor
   has a TIFF that does not say that its fourth channel is alpha.
7. Greyscale and 1-bit: three equal channels. CMYK and YCCK: Adobe's inverted convention in JPEG,
   then the plain conversion. YCbCr, HSV and LAB: Pillow's conversion. ICC profiles are not applied.
8. More than 8 bits a channel: the 8 high ones of as many as the file says (Pillow's own conversion
   of greyscale clips to white; colours of JPEG 2000 and PNM are rounded instead), and white is
   where the file says that it is. 32-bit integers are
   taken as 16-bit values and refused outside 0..65535, as are negative 8-bit ones; floats are
   refused, as they have no agreed range.
9. Pillow's warnings (damaged metadata) never decide. They reach Python's `warnings` as they are,
   which shows each of them once: the filters belong to the whole process, and other threads may be
   decoding. Only where a filter turns one into an error is the picture decoded again without them.

10. Metadata never decide, however damaged or large (`metadata`): profiles, comments, resolutions.
    A JPEG that lacks its end marker is read if all its pixels are there.
11. Nor do Pillow's module-wide settings, such as `LOAD_TRUNCATED_IMAGES` (`settings`).
12. Only if asked: a JPEG is decoded at a half, a quarter or an eighth, by fewer terms of its cosine
    transform, the smallest of these at which both sides are as long as was asked for. Everything
    that is refused is refused by its size in full.

No global state of Pillow is changed for others. Everything here may be called from many threads.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import warnings
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO, UnsupportedOperation
from typing import IO, cast

from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from ..errors import ImageError
from . import metadata
from .conversion import RGB16, SIDEWAYS, orientation_of, raw_mode, to_rgb, unwrapped, without_colour
from .jpeg2000 import with_another_bit
from .refusals import BEFORE_OPENING, MAX_PIXELS, check_costs, check_size
from .settings import without_settings

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "MPO")
REASON_LENGTH = 300
SIZE_IN_FILE = "size_in_file"  # key of a picture's `info`, see `decode`

_UNKNOWN_PIXELS = "unknown pixel mode"  # Pillow's words

# Held where this module changes the process's warning filters, so that its threads restore them in
# turn.
_WITHOUT_WARNINGS = threading.Lock()


@dataclass(frozen=True)
class _Wanted:
    """What `decode` was asked for."""

    max_pixels: int
    least_side: int | None


def decode(
    source: Source, *, max_pixels: int = MAX_PIXELS, least_side: int | None = None
) -> Image.Image:
    """One picture as a loaded 8-bit RGB PIL image, by the rules of this module.

    Args:
        source: a path, the bytes of a file, a binary file object, or a PIL image (not changed).
        max_pixels: the largest width times height.
        least_side: pixels that both sides shall have at least, if they have them in the file: a
            JPEG may then be decoded smaller, by rule 12. None is in full.

    Returns:
        The picture; of one that was decoded smaller, `info["size_in_file"]` is the (width, height)
        of the upright picture in full.

    Raises:
        ImageError: anything wrong with the file or its content.
        TypeError: `source` is none of these.
        ValueError: `max_pixels` or `least_side` is not positive.
    """
    for name, value in (("max_pixels", max_pixels), ("least_side", least_side)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    wanted = _Wanted(max_pixels, least_side)
    name = describe(source)
    try:
        with without_settings(max_pixels):
            try:
                return _decode_any(source, wanted)
            except Warning:  # rule 9
                with _WITHOUT_WARNINGS, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return _decode_any(source, wanted)
    except ImageError as error:
        raise ImageError(name, error.reason) from None
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, RuntimeError
        raise ImageError(name, describe_error(error)) from error


def describe(source: Source) -> str:
    """What to call `source` in an error: its path if it has one.

    Raises:
        TypeError: no kind of source.
    """
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "<PIL image>")
    if hasattr(source, "read"):
        return str(getattr(source, "name", "<file>"))
    raise TypeError(
        f"an image is a path, bytes, a binary file or a PIL image, got {type(source).__name__}"
    )


def _decode_any(source: Source, wanted: _Wanted) -> Image.Image:
    if isinstance(source, Image.Image):
        return to_rgb(source, wanted.max_pixels)
    if isinstance(source, str | os.PathLike):
        return _decode_path(source, wanted)
    if isinstance(source, bytes | bytearray | memoryview):
        source = BytesIO(source)
    return _decode_file(source, wanted)


def _decode_path(path: str | os.PathLike[str], wanted: _Wanted) -> Image.Image:
    with open_regular(path) as file:
        return _decode_file(file, wanted)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file that may hold a picture, open.

    Raises:
        ImageError: it is a folder, a pipe or the like, or empty.
        OSError: it cannot be opened.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(path, "is a folder")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ImageError(path, "is not a regular file")
    if status.st_size == 0:
        raise ImageError(path, "empty file")
    # Opened here: given a path, Pillow would map the file, and a file that shrinks is then SIGBUS.
    return open(path, "rb")


class _Damaged(ImageError):
    """A file that cannot be opened as what it begins like."""


class _Unknown(_Damaged):
    """Pixels of a kind that Pillow does not know."""


def _decode_file(file: IO[bytes], wanted: _Wanted) -> Image.Image:
    try:
        file.seek(0)
    except (AttributeError, UnsupportedOperation):
        file = BytesIO(file.read())
    name = _format_of(file, wanted.max_pixels)
    try:
        return _decode_format(name, file, wanted)
    except Exception as error:
        if _is_final(error):
            raise
        other = None
        if not isinstance(error, _Unknown):
            other = _decode_repaired(name, file, wanted)
        elif (negative := metadata.as_black_is_zero(file)) is not None:
            other = ImageOps.invert(_decode_format(name, negative, wanted))
        if other is None:
            raise
        return other


def _is_final(error: Exception) -> bool:
    """Whether no other reading of the file could go better."""
    refused = isinstance(error, ImageError) and not isinstance(error, _Damaged)
    return refused or isinstance(error, MemoryError | Warning)


def _decode_repaired(name: str, file: IO[bytes], wanted: _Wanted) -> Image.Image | None:
    """A picture that could not be read as it is (rule 10); None if it cannot at all."""
    if name in ("JPEG", "MPO"):
        completed = metadata.complete_jpeg(file)
    else:
        content = metadata.repaired(name, file)
        completed = None if content is None else (BytesIO(content),)
    if completed is None:
        return None
    found = []
    in_full = _Wanted(wanted.max_pixels, None)  # or what is missing might not be seen
    for one in completed:
        try:
            found.append(_decode_format(name, one, in_full))
        except Exception as error:
            if _is_final(error):
                raise
            return None
    if any(image.tobytes() != found[0].tobytes() for image in found[1:]):
        return None
    return found[0]


def _format_of(file: IO[bytes], max_pixels: int) -> str:
    """The one of `FORMATS` that a file begins like.

    Raises:
        ImageError: in no format that is read, or its header is refused.
    """
    start = file.read(16)
    if not start:
        raise ImageError("", "empty file")
    reason = f"not an image in a format that is read ({', '.join(_formats())})"
    for name in _formats():
        _, accepts = Image.OPEN[name]
        accepted = accepts(start) if accepts is not None else True
        if isinstance(accepted, str):  # the format is known, but this Pillow was built without it
            reason = accepted
        elif accepted:
            if name in BEFORE_OPENING:
                file.seek(0)
                BEFORE_OPENING[name](file, max_pixels)
            return name
    raise ImageError("", reason)


def _decode_format(name: str, file: IO[bytes], wanted: _Wanted) -> Image.Image:
    bare = metadata.bare(name, file)
    with _opened(name, bare.file) as image:
        check_size(*image.size, wanted.max_pixels)
        for key, value in (("exif", bare.exif), ("xmp", bare.xmp)):
            if value is not None:
                image.info[key] = value
        mend = None
        if raw_mode(image) == RGB16 and "transparency" in image.info:
            with _opened(name, bare.file) as low:
                check_costs(low, wanted.max_pixels)
                # Of 16 bits, this gives the low byte where the other one gives the high one.
                low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
                low.load()
            mend = partial(without_colour, low=low, key=image.info["transparency"])
        elif name == "JPEG2000" and image.mode in ("LA", "RGB", "RGBA"):
            coarse = with_another_bit(file)
            if coarse is not None:
                check_costs(image, wanted.max_pixels)
                with _opened(name, coarse) as other:
                    other.load()
                mend = partial(unwrapped, coarse=other)
        in_full = image.size
        if wanted.least_side is not None and isinstance(image, JpegImageFile):
            image.draft(None, (wanted.least_side, wanted.least_side))
        rgb = to_rgb(image, wanted.max_pixels, mend)
        if image.size != in_full:
            turned = orientation_of(image) in SIDEWAYS
            rgb.info[SIZE_IN_FILE] = in_full[::-1] if turned else in_full
        return rgb


def _opened(name: str, file: IO[bytes]) -> ImageFile.ImageFile:
    """`PIL.Image.open` for one format, without its limit of pixels."""
    file.seek(0)
    opener, _ = Image.OPEN[name]
    try:
        return cast("ImageFile.ImageFile", opener(file, ""))
    except (SyntaxError, IndexError, TypeError, struct.error) as error:
        reason = _one_line(error) or type(error).__name__
        if reason == _UNKNOWN_PIXELS:
            reason = f"{name} with samples of a kind, depth or order that is not read"
            raise _Unknown("", reason) from error
        raise _Damaged("", f"damaged {name} file: {reason}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow knows; it fails on names it does not."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def describe_error(error: Exception, done: str = "decoded") -> str:
    """One line for what Pillow, the file system or the memory raised."""
    if isinstance(error, FileNotFoundError):
        # Stores say so of all that they cannot reach; why is another error's.
        cause = error.__cause__ if error.errno is None else None
        return "no such file" if cause is None else f"no such file: {_one_line(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    text = _one_line(error)
    if isinstance(error, MemoryError):
        return f"out of memory{': ' if text else ''}{text}"
    if text and isinstance(error, OSError | SyntaxError | Image.DecompressionBombError):
        return text  # Pillow's own words for a reader: "image file is truncated"
    return f"cannot be {done} ({type(error).__name__}{': ' if text else ''}{text})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:REASON_LENGTH]
