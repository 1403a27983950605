"""Spatial maps as a picture: where in a photograph each sparse token looks."""

from __future__ import annotations

import colorsys
import math
import os
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..engine.fidelity import Fidelity

COLUMNS = 6
PANEL_INCHES = 1.9
DOTS_PER_INCH = 110
GREY = 0.7  # brightness of the photograph under a map


def save_maps(
    path: str | os.PathLike[str],
    image: Image.Image,
    spatial: Tensor | np.ndarray,
    grid: tuple[int, int],
    title: str,
) -> None:
    """Writes a PNG: the photograph, the strongest token of every patch, and every token's map.

    Args:
        image: what the model saw, RGB, in any proportions: the maps are stretched over it.
        spatial: (P, K), as `encode` gives it for one image, rows that sum to 1.
        grid: rows and columns of patches, P in all.

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
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("drawing spatial maps", "viz") from error
    _draw(image, maps, title).savefig(path, format="png", dpi=DOTS_PER_INCH)


def token_colours(count: int) -> np.ndarray:
    """A colour for each of `count` tokens: RGB in [0, 1], (count, 3).

    Neighbouring numbers get hues far apart: steps of the golden ratio around the colour circle.
    """
    hues = (np.arange(count) * 0.618034) % 1
    return np.array([colorsys.hsv_to_rgb(hue, 1, 1) for hue in hues]).reshape(count, 3)


def _draw(image: Image.Image, maps: np.ndarray, title: str) -> Figure:
    """A matplotlib Figure of `maps` (rows, columns, K); never pyplot, whose state is the user's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = maps.shape[2]
    lines = math.ceil((count + 2) / COLUMNS)
    tall = min(2.0, max(0.5, image.height / image.width)) * PANEL_INCHES + 0.25
    figure = Figure(
        figsize=(COLUMNS * PANEL_INCHES + 0.9, lines * tall + 0.6), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
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
    for token, axis in enumerate(axes[2 : count + 2]):
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
        axis.set_title(f"■ token {token}: {weight.mean():.0%}", fontsize=9, color=hues[token] * 0.8)
    if shade is not None:
        bar = figure.colorbar(shade, ax=list(axes), fraction=0.012, pad=0.01)
        bar.set_label("share of the patch", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    return figure


def draw_fidelity(path: str | os.PathLike[str], fidelity: Fidelity, model: str) -> None:
    """Writes a PNG: the relative error of each output, and the shares of choices that are the same.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing fidelity", "viz") from error

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"{model}: {fidelity.precision} on {fidelity.backend} against fp32, "
        f"{fidelity.images} images"
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
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
