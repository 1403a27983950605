"""A photograph cut into regions by its spatial map: at each pixel, the token that it belongs to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, from_numpy
from torch.nn.functional import interpolate

from ..files import replacing
from ..images.presets import SIZE
from ..images.reader import decode
from ..images.seen import seen
from ..viz.pictures import check_picture
from ..viz.plots import draw_regions, token_colours

SHOWN = 0.55  # share of a region's colour; the rest is the photograph
BORDER = 0.35  # brightness of the lines between regions


def grid_of(configuration: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches, of a plan's or features' `configuration`."""
    side = SIZE // configuration["model"]["backbone"]["patch_size"]
    return side, side


def segments(
    spatial: Tensor | np.ndarray, grid: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """The strongest token at every pixel: int64 (height, width), from 0 to K - 1.

    Maps are enlarged before the strongest is taken, so that borders run through patches.

    Args:
        spatial: (P, K), one row of the feature `spatial`, or as `encode` gives it for one image.
        grid: rows and columns of patches, P in all.
        size: width and height in pixels.

    Raises:
        ValueError: `spatial` is not (P, K), or P is not rows times columns.
    """
    if not isinstance(spatial, Tensor):
        spatial = from_numpy(np.array(spatial))
    rows, columns = grid
    if spatial.dim() != 2 or len(spatial) != rows * columns:
        raise ValueError(f"spatial must be ({rows} x {columns}, K), got {tuple(spatial.shape)}")
    maps = spatial.detach().float().cpu().T.reshape(1, -1, rows, columns)
    width, height = size
    enlarged = interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    return enlarged[0].argmax(dim=0).numpy()


def save_segments(
    path: str | os.PathLike[str],
    image: Image.Image | str | os.PathLike[str],
    spatial: Tensor | np.ndarray,
    grid: tuple[int, int],
    preset: str = "card",
    title: str | None = None,
) -> np.ndarray:
    """Writes the photograph as the model saw it, its regions coloured and outlined.

    A token has the same colour in every picture.

    Args:
        image: the photograph, as a path or an image that `images.decode` takes.
        spatial, grid: as for `segments`.
        preset: that the features were made with, which decides what part the model saw.
        title: with one, even an empty one, a legend of the tokens and their shares is beside it,
            and `path` may be a PNG, a PDF or an SVG (extra viz); without, `path` is a PNG of the
            photograph's size.

    Returns:
        The regions, by `segments`, of the picture that was written.

    Raises:
        ImageError: the photograph cannot be read.
        ValueError: unknown preset, another suffix, or as `segments`.
        MissingExtraError: matplotlib is needed for a legend, and is not installed.
        StellarError: the picture cannot be written.
    """
    path = Path(path)
    if title is not None:
        check_picture(path)
    photograph = seen(decode(image), preset)
    regions = segments(spatial, grid, photograph.size)
    colours = token_colours(spatial.shape[1])[regions]
    picture = (1 - SHOWN) * np.asarray(photograph) / 255 + SHOWN * colours
    edge = np.zeros(regions.shape, bool)
    edge[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    edge[1:] |= regions[1:] != regions[:-1]
    picture[edge] *= BORDER
    pixels = (picture * 255).round().astype(np.uint8)
    with replacing(path) as temporary:
        if title is None:
            Image.fromarray(pixels).save(temporary, "PNG")
        else:
            draw_regions(temporary, pixels, regions, spatial.shape[1], title)
    return regions
