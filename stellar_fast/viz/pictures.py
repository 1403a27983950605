"""Model input and output as pictures: PNG files, and the spatial maps over a photograph."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from ..errors import MissingExtraError
from ..files import replacing

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.fidelity import Fidelity


def has_viz() -> bool:
    """Whether the extra `viz` is installed; it is not imported."""
    return importlib.util.find_spec("matplotlib") is not None


def check_viz() -> None:
    """Raises MissingExtraError unless the extra `viz` is installed."""
    if not has_viz():
        raise MissingExtraError("drawing spatial maps", "viz")


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


def save_spatial(
    path: Path, engine: Engine, photograph: Image.Image, preset: str, title: str
) -> None:
    """Encodes one photograph and writes its K spatial maps, drawn over it, as a PNG.

    Args:
        photograph: as `images.decode` gives it.
        preset: how the model sees it; the picture keeps the photograph's own proportions.

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
        save_maps(temporary, seen(photograph, preset), out["spatial"][0], grid, title)


def save_fidelity(path: Path, fidelity: Fidelity, model: str) -> None:
    """Draws how far features are from float32, as a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StellarError: the file cannot be written.
    """
    from .plots import draw_fidelity

    with replacing(path) as temporary:
        draw_fidelity(temporary, fidelity, model)


def check_picture(output: Path) -> None:
    """Before the model is loaded, which takes longer than to find out."""
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output}: the picture is a PNG, name it OUT.png")
    if output.is_dir() or not output.parent.is_dir():
        found = "it is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise ValueError(f"{output}: cannot be written, {found}")
