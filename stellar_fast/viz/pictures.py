"""Model input and output as pictures: of pixels, and of the spatial maps over a photograph."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import MissingExtraError
from ..files import replacing

KINDS = (".png", ".pdf", ".svg")
GAP, CAPTION, FONT = 8, 26, 13  # pixels between two pictures, under them, and of letters

if TYPE_CHECKING:
    import numpy as np

    from ..engine.engine import Engine
    from ..engine.fidelity import Fidelity


def has_viz() -> bool:
    """Whether the extra `viz` is installed; it is not imported."""
    return importlib.util.find_spec("matplotlib") is not None


def check_viz(what: str = "drawing spatial maps") -> None:
    """Raises MissingExtraError unless the extra `viz` is installed."""
    if not has_viz():
        raise MissingExtraError(what, "viz")


def to_picture(pixels: Tensor) -> Image.Image:
    """An RGB picture of (3, H, W) uint8, or floats that are clamped to [0, 1]."""
    if pixels.is_floating_point():
        pixels = pixels.float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def save_picture(path: Path, pixels: Tensor) -> None:
    """Writes (3, H, W) uint8, or floats in [0, 1], as a PNG.

    Raises:
        StellarError: the file cannot be written.
    """
    with replacing(path) as temporary:
        to_picture(pixels).save(temporary, "PNG")


def save_beside(path: Path, original: Tensor, pixels: Tensor, note: str) -> None:
    """Writes a PNG: what the model saw, enlarged to the size of what it made of it, and that.

    Args:
        original: (3, H, W) uint8, or floats in [0, 1].
        pixels: likewise, of its own size.
        note: what is said under the second one.

    Raises:
        StellarError: the file cannot be written.
    """
    made = to_picture(pixels)
    seen = to_picture(original).resize(made.size, Image.Resampling.BICUBIC)
    both = Image.new("RGB", (2 * made.width + GAP, made.height + CAPTION), "white")
    pen = ImageDraw.Draw(both)
    font = ImageFont.load_default(FONT)
    for left, picture, text in ((0, seen, "original"), (made.width + GAP, made, note)):
        both.paste(picture, (left, 0))
        middle = left + made.width / 2, made.height + CAPTION / 2
        pen.text(middle, text, "black", font, anchor="mm")
    with replacing(path) as temporary:
        both.save(temporary, "PNG")


def save_spatial(
    path: Path,
    engine: Engine,
    photograph: Image.Image,
    preset: str,
    title: str,
    top: int | None = None,
) -> None:
    """Encodes one photograph and writes its spatial maps, drawn over it, as a PNG, PDF or SVG by
    the suffix.

    Args:
        photograph: as `images.decode` gives it.
        preset: how the model sees it; the picture keeps the photograph's own proportions.
        top: so many maps at most, of the tokens with the largest shares; all, if left out.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StellarError: the file cannot be written.
    """
    from ..images.presets import apply_preset
    from ..images.seen import seen
    from .plots import save_maps

    pixels = apply_preset(photograph, preset)
    out = engine.encode(pixels[None], outputs=("spatial",))
    patch = engine.config.backbone.patch_size
    grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
    with replacing(path) as temporary:
        save_maps(temporary, seen(photograph, preset), out["spatial"][0], grid, title, top)


def save_fidelity(path: Path, fidelity: Fidelity, model: str) -> None:
    """Draws how far features are from float32, as a PNG, PDF or SVG by the suffix.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StellarError: the file cannot be written.
    """
    from .plots import draw_fidelity

    with replacing(path) as temporary:
        draw_fidelity(temporary, fidelity, model)


def save_confusion(path: Path, confusion: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Draws a confusion matrix, as a PNG, PDF or SVG by the suffix.

    Args:
        confusion: (classes, classes), images of a class by the class that was predicted.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StellarError: the file cannot be written.
    """
    from .confusion import draw_confusion

    with replacing(path) as temporary:
        draw_confusion(temporary, confusion, classes, title)


def check_picture(output: Path, kinds: Collection[str] = KINDS) -> None:
    """Raises ValueError where a picture cannot be written: before the model is loaded, which takes
    longer than to find out.

    Args:
        kinds: suffixes that it may have.
    """
    if output.suffix.lower() not in kinds:
        names = " or ".join(f"OUT{kind}" for kind in kinds)
        raise ValueError(f"{output}: the picture is written as {names}, by its name")
    if output.is_dir() or not output.parent.is_dir():
        found = "it is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise ValueError(f"{output}: cannot be written, {found}")
