"""A confusion matrix as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ..printable import printable
from .figures import new_figure, write_figure

NAMED = 60  # classes, whose names would be too small to read if there were more
COUNTED = 20  # classes, likewise their numbers of images
LONGEST = 28  # characters of a name


def draw_confusion(
    path: str | os.PathLike[str], confusion: np.ndarray, classes: Sequence[str], title: str
) -> None:
    """Writes a PNG, a PDF or an SVG: each row a class, each column what was predicted of it, dark
    by its share of the row.

    Args:
        confusion: (classes, classes), numbers of images.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    count = len(classes)
    side = min(14.0, 2.5 + 0.42 * count)
    figure = new_figure(side + 1.2, side + 0.5, "drawing a confusion matrix")
    axis = figure.subplots()
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shade = axis.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    # Names are anybody's: a dollar begins no formula.
    axis.set_title(printable(title, keep="\n"), fontsize=11, parse_math=False)
    axis.set(xlabel="predicted", ylabel="true")
    if count <= NAMED:
        names = [_short(printable(name)) for name in classes]
        places = np.arange(count)
        axis.set_xticks(places, names, rotation=90, fontsize=8, parse_math=False)
        axis.set_yticks(places, names, fontsize=8, parse_math=False)
    else:
        axis.set_xticks([])
        axis.set_yticks([])
    if count <= COUNTED:
        for row, column in np.argwhere(confusion):
            colour = "white" if share[row, column] > 0.5 else "black"
            text = str(confusion[row, column])
            axis.text(column, row, text, color=colour, fontsize=8, ha="center", va="center")
    bar = figure.colorbar(shade, ax=axis, shrink=0.8)
    bar.set_label("share of the class's images", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    write_figure(figure, path)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
