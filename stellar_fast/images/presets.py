"""From upright RGB pictures to model input: named presets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import ImageError
from .reader import Source, decode, describe, describe_error
from .refusals import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

PRESETS = ("card", "eval")
SIZE = 224  # the models' side, in pixels
EVAL_SIDE = 256
# Longest strip that "eval" resizes to, 256 times its width: more is a bomb of another kind.
EVAL_MAX_PIXELS = EVAL_SIDE * EVAL_SIDE * 256


def apply_preset(image: Image.Image, preset: str) -> Tensor:
    """An RGB image, as `decode` gives it, as model input.

    "card": the whole picture squeezed to 224x224 by Pillow's antialiased bicubic, uint8
    (3, 224, 224). "eval": the published evaluation transform: pixels / 255, shorter side to 256 by
    bicubic without antialiasing and with aligned corners, the longer side cut to a whole number;
    centre crop of 224, a plain slice as in kornia's CenterCrop(224), whose default is not to warp;
    the overshoot of the bicubic clamped to [0, 1], last of all; float32 (3, 224, 224).

    Raises:
        ValueError: unknown preset, or an image of another mode.
        ImageError: the picture is too long and narrow for "eval".
    """
    from torch import from_numpy

    return from_numpy(preset_pixels(image, preset))


def preset_pixels(image: Image.Image, preset: str) -> np.ndarray:
    """`apply_preset` as an array; "card" does without torch, which takes seconds to import."""
    check_preset(preset)
    if image.mode != "RGB":
        raise ValueError(f"apply_preset takes RGB images, as decode gives them; got {image.mode}")
    if preset == "card":
        return _channels_first(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    from torch import empty, from_numpy
    from torch.nn.functional import interpolate

    width, height = image.size
    rows, columns = eval_size(height, width)
    if rows * columns > EVAL_MAX_PIXELS:
        raise ImageError(
            "<PIL image>", f"{width}x{height} is too long and narrow for the preset 'eval'"
        )
    top, left = (rows - SIZE) // 2, (columns - SIZE) // 2
    result = empty(3, SIZE, SIZE, device="cpu")
    for channel, cropped in enumerate(result):
        # One at a time: in float32, a picture of many pixels is gigabytes.
        pixels = from_numpy(np.array(image.getchannel(channel)))[None, None].float().div_(255)
        resized = interpolate(pixels, size=(rows, columns), mode="bicubic", align_corners=True)
        cropped.copy_(resized[0, 0, top : top + SIZE, left : left + SIZE])
    return result.clamp_(0, 1).numpy()


def least_side(preset: str, scaled_decode: bool) -> int | None:
    """What `decode` is told of a picture that is for `preset`: None is to decode it in full, and
    otherwise twice what it is resized to, so that a JPEG still has more than the model sees.

    Raises:
        ValueError: unknown preset, or "eval" and scaled: it reads single pixels of a picture
            without smoothing, and of a smaller one it would be another transform.
    """
    check_preset(preset)
    if not scaled_decode:
        return None
    if preset == "eval":
        raise ValueError(
            "the preset 'eval' reads single pixels of a picture in full: scaled decoding goes with "
            "the preset 'card' alone"
        )
    return 2 * SIZE


def load_image(
    source: Source, preset: str, *, max_pixels: int = MAX_PIXELS, scaled_decode: bool = False
) -> Tensor:
    """`decode`, then `apply_preset`: (3, 224, 224), uint8 for "card", float32 for "eval".

    Args:
        scaled_decode: read JPEGs at the smallest scale that is at least twice what they are resized
            to ("card" alone): several times as fast for photographs of many megapixels, and not
            quite the same pixels.

    Raises:
        ImageError: the picture cannot be decoded or resized.
        ValueError: unknown preset, or `scaled_decode` with "eval".
    """
    least = least_side(preset, scaled_decode)
    image = decode(source, max_pixels=max_pixels, least_side=least)
    try:
        return apply_preset(image, preset)
    except ImageError as error:
        raise ImageError(describe(source), error.reason) from None
    except Exception as error:  # memory
        raise ImageError(describe(source), describe_error(error)) from error


def load_batch(
    sources: Sequence[Source],
    preset: str,
    *,
    max_pixels: int = MAX_PIXELS,
    scaled_decode: bool = False,
) -> Tensor:
    """(B, 3, 224, 224) of at least one picture, each by `load_image`.

    Raises:
        ImageError: of the first picture that fails.
        ValueError: as `load_image`, or no picture.
    """
    import torch

    if not sources:
        raise ValueError("load_batch needs at least one picture")
    told: dict[str, Any] = {"max_pixels": max_pixels, "scaled_decode": scaled_decode}
    return torch.stack([load_image(source, preset, **told) for source in sources])


def check_preset(preset: str) -> None:
    """Raises ValueError for a name that is not in `PRESETS`."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")


def eval_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns after the shorter side became 256; the longer is truncated, as kornia's
    Resize does it: from the ratio width / height in floating point."""
    ratio = width / height
    if ratio >= 1:
        return EVAL_SIDE, int(EVAL_SIDE * ratio)
    return int(EVAL_SIDE / ratio), EVAL_SIDE


def _channels_first(image: Image.Image) -> np.ndarray:
    """RGB image (W, H) -> uint8 (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1).copy()
