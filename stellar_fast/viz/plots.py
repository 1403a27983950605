"""Spatial maps and regions as pictures: where in a photograph each sparse token looks."""

from __future__ import annotations

import colorsys
import math
import os
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from ..printable import printable
from .figures import new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..engine.fidelity import Fidelity

COLUMNS = 6
PANEL_INCHES = 1.9
REGIONS_INCHES = 4.5  # width of a photograph with its regions
GREY = 0.7  # brightness of the photograph under a map


def save_maps(
    path: str | os.PathLike[str],
    image: Image.Image,
    spatial: Tensor | np.ndarray,
    grid: tuple[int, int],
    title: str,
    top: int | None = None,
) -> None:
    """Writes a PNG, a PDF or an SVG, by the suffix: the photograph, the strongest token of every
    patch, and every token's map.

    Args:
        image: what the model saw, RGB, in any proportions: the maps are stretched over it.
        spatial: (P, K), as `encode` gives it for one image, rows that sum to 1.
        grid: rows and columns of patches, P in all.
        top: so many maps at most, of the tokens with the largest shares, largest first; all in
            their order, if left out.

    Raises:
        ValueError: `spatial` is not (P, K), or P is not rows times columns.
        MissingExtraError: matplotlib is not installed.
    """
    if isinstance(spatial, Tensor):
        spatial = spatial.detach().float().cpu().numpy()
    rows, columns = grid
    if spatial.ndim != 2 or len(spatial) != rows * columns:
        raise ValueError(f"spatial must be ({rows} x {columns}, K), got {spatial.shape}")
    maps = spatial.reshape(rows, columns, -1)
    write_figure(_draw(image, maps, title, top), path)


def token_colours(count: int) -> np.ndarray:
    """A colour for each of `count` tokens: RGB in [0, 1], (count, 3).

    Neighbouring numbers get hues far apart: steps of the golden ratio around the colour circle.
    """
    hues = (np.arange(count) * 0.618034) % 1
    return np.array([colorsys.hsv_to_rgb(hue, 1, 1) for hue in hues]).reshape(count, 3)


def _draw(image: Image.Image, maps: np.ndarray, title: str, top: int | None = None) -> Figure:
    """A matplotlib Figure of `maps` (rows, columns, K)."""
    share = maps.mean(axis=(0, 1), dtype=np.float64)
    count = len(share)
    tokens = range(count) if top is None else np.argsort(-share, kind="stable")[:top].tolist()
    across = min(COLUMNS, len(tokens) + 2)
    lines = math.ceil((len(tokens) + 2) / across)
    tall = min(2.0, max(0.5, image.height / image.width)) * PANEL_INCHES + 0.25
    figure = new_figure(
        max(4.0, across * PANEL_INCHES) + 0.9, lines * tall + 0.6, "drawing spatial maps"
    )
    # A title has names of files: a dollar begins no formula.
    figure.suptitle(printable(title), fontsize=12, parse_math=False)
    axes = figure.subplots(lines, across, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()

    photograph = np.asarray(image.convert("RGB"))
    extent = (0, image.width, image.height, 0)
    axes[0].imshow(photograph, extent=extent)
    axes[0].set_title("photograph", fontsize=9)

    hues = token_colours(count)
    strongest = maps.argmax(axis=2)
    axes[1].imshow(photograph, extent=extent)
    axes[1].imshow(hues[strongest], extent=extent, alpha=0.55, interpolation="nearest")
    axes[1].set_title("strongest token", fontsize=9)

    # One scale for all maps, of what is there: a flat map must not look like a peaked one.
    low, high = float(maps.min()), float(maps.max())
    grey = np.asarray(image.convert("L")).astype(float) / 255 * GREY
    shade = None
    for token, axis in zip(tokens, axes[2:], strict=False):
        weight = maps[:, :, token]
        axis.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=1)
        shade = axis.imshow(
            weight,
            extent=extent,
            cmap="inferno",
            vmin=low,
            vmax=high,
            alpha=0.25 + 0.65 * (weight - low) / max(high - low, 1e-12),
            interpolation="nearest",
        )
        axis.set_title(f"■ token {token}: {share[token]:.0%}", fontsize=9, color=hues[token] * 0.8)
    if shade is not None:
        bar = figure.colorbar(shade, ax=list(axes), fraction=0.012, pad=0.01)
        bar.set_label("share of the patch", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    return figure


def draw_regions(
    path: str | os.PathLike[str], picture: np.ndarray, regions: np.ndarray, count: int, title: str
) -> None:
    """Writes a PNG, a PDF or an SVG, by the suffix: regions with a legend of their tokens.

    Args:
        picture: uint8 (height, width, 3), the photograph with its regions.
        regions: (height, width), the token of every pixel.
        count: of all tokens, which decides their colours.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    height, width = regions.shape
    tall = min(8.0, max(2.0, REGIONS_INCHES * height / width))
    figure = new_figure(REGIONS_INCHES + 1.6, tall + 0.5, "drawing regions")
    axis = figure.subplots()
    axis.set_axis_off()
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(printable(title), fontsize=11, parse_math=False)
    colours = token_colours(count)
    share = np.bincount(regions.ravel(), minlength=count) / regions.size
    for token in np.argsort(-share, kind="stable"):
        if share[token] > 0:
            label = f"{token}: {share[token]:.1%}"
            axis.scatter([], [], s=70, marker="s", color=colours[token], label=label)
    figure.legend(
        title="token: share", loc="outside right center", fontsize=8, title_fontsize=9,
        frameon=False,
    )  # fmt: skip
    write_figure(figure, path)


def draw_fidelity(path: str | os.PathLike[str], fidelity: Fidelity, model: str) -> None:
    """Writes a PNG, a PDF or an SVG, by the suffix: the relative error of each output, and the
    shares of choices that are the same.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(9, 3.2, "drawing fidelity")
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"{model}: {fidelity.precision} on {fidelity.backend} against fp32, "
        f"{fidelity.images} images",
        parse_math=False,
    )
    names = list(fidelity.outputs)
    left.barh(names, [fidelity.outputs[name].error for name in names], color="#c1272d")
    left.set(xscale="log", xlabel="relative error")
    shares = {"strongest token": fidelity.strongest}
    shares |= {f"nearest by {name}": share for name, share in fidelity.neighbours.items()}
    right.barh(list(shares), list(shares.values()), color="#8c959f")
    right.set(xlim=(0, 1), xlabel="share that is the same")
    for axis in (left, right):
        axis.invert_yaxis()
    write_figure(figure, path)
