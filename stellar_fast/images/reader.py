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

No global state of Pillow is changed for others. Everything here may be called from many threads.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Callable
from functools import cache, partial
from io import BytesIO, UnsupportedOperation
from typing import IO, Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ..errors import ImageError
from . import metadata
from .jpeg import count_scans
from .jpeg2000 import check as check_jpeg2000
from .jpeg2000 import with_another_bit
from .settings import without_settings

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "MPO")
MAX_PIXELS = 50_000_000  # 0.2 GiB as RGB in Pillow; decoders take up to 9 times that
MAX_SIDE = 1 << 20  # resizing takes 32 bytes for each pixel of a side
MAX_SCANS = 100  # libtiff's limit for JPEG; encoders make about 10
BACKGROUND = (255, 255, 255, 255)
STRIP = 1 << 20  # pixels that are composited at once
REASON_LENGTH = 300

# A comment's end, or the file's, must be among the bytes that it is applied to.
_PNM_HEADER = re.compile(rb"P[456](?:(?:\s|#[^\r\n]*[\r\n])++\d++){2}\s")
_PNM_HEADER_BYTES = 1 << 16
_TIFF_TILE = (322, 323)  # tags: width and height of a tile
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PALETTE = 258, 262, 320
_TIFF_EXTRA_SAMPLES, _TIFF_SAMPLE_FORMAT = 338, 339
_RGB16 = "RGB;16B"
_UNKNOWN_PIXELS = "unknown pixel mode"  # Pillow's words

# Held where this module changes the process's warning filters, so that its threads restore them in
# turn.
_WITHOUT_WARNINGS = threading.Lock()

_TRANSPOSE = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One picture as a loaded 8-bit RGB PIL image, by the rules of this module.

    Args:
        source: a path, the bytes of a file, a binary file object, or a PIL image (not changed).
        max_pixels: the largest width times height.

    Raises:
        ImageError: anything wrong with the file or its content.
        TypeError: `source` is none of these.
        ValueError: `max_pixels` is not positive.
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be positive, got {max_pixels}")
    name = describe(source)
    try:
        with without_settings(max_pixels):
            try:
                return _decode_any(source, max_pixels)
            except Warning:  # rule 9
                with _WITHOUT_WARNINGS, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return _decode_any(source, max_pixels)
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


def _decode_any(source: Source, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return _to_rgb(source, max_pixels)
    if isinstance(source, str | os.PathLike):
        return _decode_path(source, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        source = BytesIO(source)
    return _decode_file(source, max_pixels)


def _decode_path(path: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    with open_regular(path) as file:
        return _decode_file(file, max_pixels)


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


def _decode_file(file: IO[bytes], max_pixels: int) -> Image.Image:
    try:
        file.seek(0)
    except (AttributeError, UnsupportedOperation):
        file = BytesIO(file.read())
    name = _format_of(file, max_pixels)
    try:
        return _decode_format(name, file, max_pixels)
    except Exception as error:
        if _is_final(error):
            raise
        other = None
        if not isinstance(error, _Unknown):
            other = _decode_repaired(name, file, max_pixels)
        elif (negative := metadata.as_black_is_zero(file)) is not None:
            other = ImageOps.invert(_decode_format(name, negative, max_pixels))
        if other is None:
            raise
        return other


def _is_final(error: Exception) -> bool:
    """Whether no other reading of the file could go better."""
    refused = isinstance(error, ImageError) and not isinstance(error, _Damaged)
    return refused or isinstance(error, MemoryError | Warning)


def _decode_repaired(name: str, file: IO[bytes], max_pixels: int) -> Image.Image | None:
    """A picture that could not be read as it is (rule 10); None if it cannot at all."""
    if name in ("JPEG", "MPO"):
        completed = metadata.complete_jpeg(file)
    else:
        content = metadata.repaired(name, file)
        completed = None if content is None else (BytesIO(content),)
    if completed is None:
        return None
    found = []
    for one in completed:
        try:
            found.append(_decode_format(name, one, max_pixels))
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
            if name in _BEFORE_OPENING:
                file.seek(0)
                _BEFORE_OPENING[name](file, max_pixels)
            return name
    raise ImageError("", reason)


def _decode_format(name: str, file: IO[bytes], max_pixels: int) -> Image.Image:
    bare = metadata.bare(name, file)
    with _opened(name, bare.file) as image:
        check_size(*image.size, max_pixels)
        for key, value in (("exif", bare.exif), ("xmp", bare.xmp)):
            if value is not None:
                image.info[key] = value
        mend = None
        if _raw_mode(image) == _RGB16 and "transparency" in image.info:
            with _opened(name, bare.file) as low:
                check_costs(low, max_pixels)
                # Of 16 bits, this gives the low byte where the other one gives the high one.
                low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
                low.load()
            mend = partial(_without_colour, low=low, key=image.info["transparency"])
        elif name == "JPEG2000" and image.mode in ("LA", "RGB", "RGBA"):
            coarse = with_another_bit(file)
            if coarse is not None:
                check_costs(image, max_pixels)
                with _opened(name, coarse) as other:
                    other.load()
                mend = partial(_unwrapped, coarse=other)
        return _to_rgb(image, max_pixels, mend)


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


_BEFORE_OPENING = {"WEBP": _check_webp, "PPM": _check_pnm}


def _to_rgb(
    image: Image.Image,
    max_pixels: int,
    mend: Callable[[Image.Image], Image.Image] | None = None,
) -> Image.Image:
    """
    Args:
        mend: gives the pixels that are meant for those that Pillow loaded.
    """
    check_size(*image.size, max_pixels)
    check_costs(image, max_pixels)
    key = _key_of(image)
    if isinstance(image, TiffImageFile):
        _name_samples(image)
    image.load()
    check_size(*image.size, max_pixels)  # some formats learn their size while decoding
    # After loading: TIFF orients itself there, and drops the tag.
    transpose = _TRANSPOSE.get(orientation_of(image))
    rgb = _convert(image if mend is None else mend(image), key)
    if transpose is not None:
        rgb = rgb.transpose(transpose)
    elif rgb is image:
        rgb = rgb.copy()
    rgb.info = {}  # or the orientation would be applied again to what is upright now
    return rgb


def _name_samples(image: TiffImageFile) -> None:
    """Of planes of 16 bits that are not packed, Pillow takes each for one of 8."""
    bits = image.tag_v2.get(_TIFF_BITS, (1,))[0]
    order = "L" if image.tag_v2.prefix == b"II" else "B"
    for at, tile in enumerate(image.tile):
        if bits == 16 and tile.codec_name == "raw" and isinstance(tile.args, tuple):
            plane, *others = tile.args
            if plane in ("R", "G", "B", "A"):
                image.tile[at] = tile._replace(args=(f"{plane};16{order}", *others))


def _raw_mode(image: Image.Image) -> Any:
    """How a PNG's pixels are in the file, in Pillow's words, while they are not loaded."""
    tiles = image.tile if isinstance(image, PngImageFile) else []
    return tiles[0].args if tiles else None


def _key_of(image: Image.Image) -> Any:
    """The transparent colour, or what palettes have in its place, in the units of the pixels.

    In a PNG it is in those of the file, of which only the low bits count (ISO/IEC 15948, 11.3.2.1).
    """
    key = image.info.get("transparency")
    if not isinstance(image, PngImageFile):
        return key
    raw_mode = _raw_mode(image)
    if isinstance(key, int) and image.mode == "L":
        bits = _grey_bits(image, key) if raw_mode is None else {"L;2": 2, "L;4": 4}.get(raw_mode, 8)
        return (key & ((1 << bits) - 1)) * (255 // ((1 << bits) - 1))
    if isinstance(key, tuple):
        # Of 16 bits there are but the high bytes; loaded, such a key alone tells that there were.
        wide = raw_mode == _RGB16 or (raw_mode is None and max(key) > 255)
        return tuple(value >> 8 if wide else value & 255 for value in key)
    return key


def _grey_bits(image: Image.Image, key: int) -> int:
    """The depth of a loaded grey PNG in the file, which Pillow does not keep: one by which the
    transparent value is among the pixels, or else 8."""
    counts = image.histogram()
    if key < 256 and counts[key]:
        return 8
    for bits in (2, 4):
        step = 255 // ((1 << bits) - 1)
        spread = all(value % step == 0 for value, count in enumerate(counts) if count)
        if spread and key < 1 << bits:
            return bits
    return 8


def _without_colour(image: Image.Image, low: Image.Image, key: tuple[int, ...]) -> Image.Image:
    """A picture in white where it has a colour of 16 bits a channel.

    Args:
        image, low: of the high and of the low bytes.
    """
    pixels, others = np.array(image), np.asarray(low)
    hidden = np.ones(pixels.shape[:2], bool)
    for channel, value in enumerate(key):
        hidden &= pixels[..., channel] == value >> 8
        hidden &= others[..., channel] == value & 255
    pixels[hidden] = BACKGROUND[:3]
    return Image.fromarray(pixels)


def _unwrapped(image: Image.Image, coarse: Image.Image) -> Image.Image:
    """A picture of more than 8 bits whose brightest values Pillow rounds up to 256, and so to 0.

    Args:
        coarse: the same with values above 128 for those of the brighter half.
    """
    pixels = np.array(image)
    pixels[(pixels == 0) & (np.asarray(coarse) > 128)] = 255
    return Image.fromarray(pixels, image.mode)


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


def orientation_of(image: Image.Image) -> Any:
    """What EXIF or XMP say, 1 to 8 if they are right; None where they say nothing."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Warning:  # rule 9
        raise
    except Exception:  # rule 4: the pixels are whole, only the metadata are not
        return None


def _convert(image: Image.Image, key: Any) -> Image.Image:
    """Any mode to RGB; the image itself if it is that already."""
    if image.mode == "F":
        raise ImageError("", "float pixels have no agreed range; convert it to 8 or 16 bits")
    if isinstance(image, TiffImageFile):
        image = _as_tags_say(image)
    if image.mode.startswith("I"):
        image = _high_byte(image, 16, key)
    if _has_unused_alpha(image):
        return image.convert("RGB")
    if image.has_transparency_data:
        result = Image.new("RGB", image.size)
        rows = max(1, STRIP // image.width)
        for top in range(0, image.height, rows):  # or a large picture is in memory four times more
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            if "transparency" in strip.info:
                strip.info["transparency"] = key
            result.paste(_over_background(strip), (0, top))
        return result
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_unused_alpha(image: Image.Image) -> bool:
    """Of a BMP, whose fourth channel many programs leave at 0, and of a TIFF that does not say what
    the fourth one is."""
    unsaid = isinstance(image, BmpImageFile) or (
        isinstance(image, TiffImageFile) and _TIFF_EXTRA_SAMPLES not in image.tag_v2
    )
    return unsaid and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _over_background(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow converts it to nothing but LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(background, image).convert("RGB")


def _as_tags_say(image: TiffImageFile) -> Image.Image:
    """A TIFF's pixels, where Pillow leaves a part of how they are meant to its user."""
    bits = image.tag_v2.get(_TIFF_BITS, (1,))[0]
    if image.mode.startswith("I;16"):
        white = image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0  # is 0
        return _high_byte(image, bits, None, white_is_zero=white)
    signed = image.mode == "L" and 2 in image.tag_v2.get(_TIFF_SAMPLE_FORMAT, ())
    if signed and np.asarray(image).max() > 127:
        raise ImageError("", "signed 8-bit pixels, some of which are negative")
    if image.mode in ("P", "PA"):
        colours = image.tag_v2.get(_TIFF_PALETTE, ())
        if colours and max(colours) < 256:  # 8 bits, where there should be 16
            copy = image.copy()
            copy.putpalette(bytes(np.reshape(colours, (3, -1)).T.ravel().tolist()))
            return copy
    return image


def _high_byte(
    image: Image.Image, bits: int, key: Any, *, white_is_zero: bool = False
) -> Image.Image:
    """Greyscale of `bits` to 8 bits, as LA where one grey value means transparent."""
    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ImageError("", f"32-bit pixels from {low} to {high} are outside 0..65535")
    grey = (pixels >> (bits - 8)).astype(np.uint8)
    shown = Image.fromarray(255 - grey if white_is_zero else grey)
    if not isinstance(key, int):
        return shown
    alpha = np.where(pixels == key, 0, 255).astype(np.uint8)
    return Image.merge("LA", (shown, Image.fromarray(alpha)))


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
