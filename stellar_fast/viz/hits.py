"""What a page or a sheet of hits shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Opacity of a map over a photograph: of black where the token is not, and where it is strongest of
# a colour, which shows on dark photographs too.
DARK, GLOW = 0.72, 0.38
GLOW_COLOUR = (255, 150, 30)


@dataclass(frozen=True)
class Tile:
    """One image.

    Attributes:
        id: as it is; whoever shows it makes it harmless.
        jpeg: its picture; None if it cannot be had.
        size: width and height of the picture in pixels.
        reason: why there is no picture.
        score: cosine similarity; None for a query.
        row: of the features; None for an image from elsewhere.
        token: whose map is shown.
        weights: (rows, columns), how much each patch belongs to the token; None without a map.
        near: id, row and score of the nearest others.
    """

    id: str
    jpeg: bytes | None = None
    size: tuple[int, int] = (4, 3)
    reason: str = ""
    score: float | None = None
    row: int | None = None
    token: int | None = None
    weights: np.ndarray | None = None
    near: Sequence[tuple[str, int, float]] = field(default=())


@dataclass(frozen=True)
class Section:
    """A query and its hits, best first."""

    query: Tile
    hits: Sequence[Tile]


def veil(weights: np.ndarray) -> np.ndarray:
    """RGBA, uint8 (rows, columns, 4), to lay over a photograph: its token's part glows, the rest is
    dark."""
    light = (weights.astype(np.float64) / max(float(weights.max()), 1e-12)).clip(0, 1)
    opacity = DARK * (1 - light) + GLOW * light
    colour = (GLOW * light / opacity)[..., None] * GLOW_COLOUR
    return np.dstack([colour, 255 * opacity]).round().astype(np.uint8)
