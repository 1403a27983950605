"""Figures of matplotlib: made without pyplot, whose state is the user's, and written by suffix."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = {".png": 110, ".pdf": 300, ".svg": 300}  # of what is no line or letter
# Fonts as outlines that every printer has, and nothing of the time of drawing.
SETTINGS = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "stellar-fast"}
UNDATED = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


def new_figure(width: float, height: float, what: str) -> Figure:
    """An empty figure, in inches.

    Args:
        what: is drawn, for the error.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(what, "viz") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG, a PDF or an SVG, by the suffix; the same figure to the same bytes."""
    import matplotlib

    suffix = Path(path).suffix.lower()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(path, format=suffix[1:], dpi=DOTS_PER_INCH[suffix], metadata=UNDATED[suffix])
