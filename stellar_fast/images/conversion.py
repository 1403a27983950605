"""From what Pillow opened to upright 8-bit RGB: see rules 4 to 8 of `reader`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ..errors import ImageError
from .refusals import check_costs, check_size

BACKGROUND = (255, 255, 255, 255)
STRIP = 1 << 20  # pixels that are composited at once
RGB16 = "RGB;16B"

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PALETTE = 258, 262, 320
_TIFF_EXTRA_SAMPLES, _TIFF_SAMPLE_FORMAT = 338, 339
_TRANSPOSE = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that change width for height


def to_rgb(
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


def raw_mode(image: Image.Image) -> Any:
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
    packed = raw_mode(image)
    if isinstance(key, int) and image.mode == "L":
        bits = _grey_bits(image, key) if packed is None else {"L;2": 2, "L;4": 4}.get(packed, 8)
        return (key & ((1 << bits) - 1)) * (255 // ((1 << bits) - 1))
    if isinstance(key, tuple):
        # Of 16 bits there are but the high bytes; loaded, such a key alone tells that there were.
        wide = packed == RGB16 or (packed is None and max(key) > 255)
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


def without_colour(image: Image.Image, low: Image.Image, key: tuple[int, ...]) -> Image.Image:
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


def unwrapped(image: Image.Image, coarse: Image.Image) -> Image.Image:
    """A picture of more than 8 bits whose brightest values Pillow rounds up to 256, and so to 0.

    Args:
        coarse: the same with values above 128 for those of the brighter half.
    """
    pixels = np.array(image)
    pixels[(pixels == 0) & (np.asarray(coarse) > 128)] = 255
    return Image.fromarray(pixels, image.mode)


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
