"""JPEG files decoded on a GPU, by the rules of `images.py`; needs the extra `gpu-decode`.

torchcodec hands JPEG data to nvJPEG on CUDA devices, and to libjpeg-turbo on CPUs. It gets the
coded pixels alone: what `images.py` decides of a file (its size, its scans, its orientation,
whether it is whole) is decided here by the same functions. Every file that is not a plain grey or
YCbCr JPEG is decoded by Pillow, and so is one that torchcodec refuses, for Pillow to say why.

On a CPU the pixels are Pillow's to the bit, under test. nvJPEG rounds otherwise and enlarges halved
colours otherwise, so features of the two are not to be mixed in one set; and what of damaged pixels
it notices is its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from .errors import ImageError, MissingExtraError, StellarError
from .images import (
    EVAL_MAX_PIXELS,
    MAX_PIXELS,
    SIZE,
    check_costs,
    check_preset,
    decode,
    describe_error,
    eval_size,
    open_image,
    open_regular,
    orientation_of,
)
from .jpeg import bare

Source = str | os.PathLike[str] | bytes


def decode_batch(
    sources: Sequence[Source], device: str | torch.device, *, max_pixels: int = MAX_PIXELS
) -> list[Tensor | ImageError]:
    """Every picture as uint8 RGB (3, H, W) on `device`, upright, or why there is none.

    Args:
        sources: paths, or the bytes of files.
        device: a CUDA device; on a CPU libjpeg-turbo decodes, as it does in Pillow.
        max_pixels: the largest width times height.

    Raises:
        MissingExtraError: torchcodec is not installed.
        StellarError: it is, but cannot be loaded; it is built for one version of torch and CUDA.
    """
    decode_jpeg = _torchcodec()
    device = torch.device(device)
    results: list[Tensor | ImageError | None] = [None] * len(sources)
    plain: list[tuple[int, bytes, Any]] = []
    for place, source in enumerate(sources):
        try:
            found = _plain_jpeg(_bytes(source), max_pixels)
        except ImageError as error:
            results[place] = ImageError(_name(source), error.reason)
            continue
        except Exception as error:  # the file system, or a header that Pillow trips over
            results[place] = ImageError(_name(source), describe_error(error))
            continue
        if found is not None:
            plain.append((place, *found))
    decoded = _decode_jpegs(decode_jpeg, [data for _, data, _ in plain], device)
    for (place, _, orientation), pixels in zip(plain, decoded, strict=True):
        if pixels is not None:
            results[place] = upright(pixels, orientation)
    for place, source in enumerate(sources):
        if results[place] is None:
            results[place] = _by_pillow(source, max_pixels, device)
    return [result for result in results if result is not None]


def apply_preset(image: Tensor, preset: str) -> Tensor:
    """`images.apply_preset` of a tensor (3, H, W), uint8, on its device.

    "card" differs from Pillow's by its rounding between the two directions, at most 1 or so of 255;
    "eval" is computed alike.

    Raises:
        ValueError: unknown preset.
        ImageError: the picture is too long and narrow for "eval".
    """
    check_preset(preset)
    pixels = image[None].float()
    if preset == "card":
        resized = interpolate(
            pixels, size=(SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False
        )
        return resized[0].round_().clamp_(0, 255).to(torch.uint8)
    height, width = image.shape[1:]
    rows, columns = eval_size(height, width)
    if rows * columns > EVAL_MAX_PIXELS:
        raise ImageError("<tensor>", f"{width}x{height} is too long and narrow for 'eval'")
    resized = interpolate(
        pixels.div_(255), size=(rows, columns), mode="bicubic", align_corners=True
    )
    top, left = (rows - SIZE) // 2, (columns - SIZE) // 2
    return resized[0, :, top : top + SIZE, left : left + SIZE].contiguous()


def upright(pixels: Tensor, orientation: Any) -> Tensor:
    """(3, H, W) turned by an EXIF orientation; anything but 2 to 8 is upright already."""
    match orientation:
        case 2:
            return pixels.flip(2)
        case 3:
            return pixels.rot90(2, (1, 2))
        case 4:
            return pixels.flip(1)
        case 5:
            return pixels.transpose(1, 2).contiguous()
        case 6:
            return pixels.rot90(-1, (1, 2))
        case 7:
            return pixels.rot90(2, (1, 2)).transpose(1, 2).contiguous()
        case 8:
            return pixels.rot90(1, (1, 2))
    return pixels


def _plain_jpeg(data: bytes, max_pixels: int) -> tuple[bytes, Any] | None:
    """The coded pixels and the orientation of a JPEG that every decoder reads alike, else None."""
    with open_image(BytesIO(data), max_pixels) as image:
        check_costs(image, max_pixels)
        if not isinstance(image, JpegImageFile) or image.mode not in ("RGB", "L"):
            return None
        # Without Adobe's or JFIF's word, components named R, G and B are no YCbCr.
        if image.info.get("adobe_transform") == 0 or [c[0] for c in image.layer] == [82, 71, 66]:
            return None
        coded = bare(data)
        return None if coded is None else (coded, orientation_of(image))


def _decode_jpegs(decode_jpeg: Any, files: list[bytes], device: torch.device) -> list[Any]:
    """(3, H, W) of each; None where torchcodec refuses the file. All at once is quickest on a GPU,
    but one bad file fails them all."""
    if not files:
        return []
    try:
        return list(decode_jpeg(files, mode="RGB", device=device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if len(files) == 1:
            return [None]
    middle = len(files) // 2
    return [
        *_decode_jpegs(decode_jpeg, files[:middle], device),
        *_decode_jpegs(decode_jpeg, files[middle:], device),
    ]


def _by_pillow(source: Source, max_pixels: int, device: torch.device) -> Tensor | ImageError:
    import numpy as np

    try:
        pixels = np.array(decode(source, max_pixels=max_pixels))
    except ImageError as error:
        return error
    return torch.from_numpy(pixels).to(device).permute(2, 0, 1).contiguous()


def _bytes(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    with open_regular(source) as file:
        return file.read()


def _name(source: Source) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


def _torchcodec() -> Any:
    try:
        from torchcodec.decoders import decode_jpeg
    except ImportError as error:
        raise MissingExtraError("decoding on a GPU", "gpu-decode") from error
    except (OSError, RuntimeError) as error:
        raise StellarError(
            f"torchcodec is installed but cannot be loaded: {' '.join(str(error).split())[:200]}; "
            f"it must be built for torch {torch.__version__} and its CUDA"
        ) from error
    return decode_jpeg
