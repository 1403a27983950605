"""A contact sheet of hits: one picture, drawn by Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..printable import printable
from .hits import Section, Tile, veil

SIDE = 200  # pixels that a picture has in either direction
GAP = 14
LINES = 40  # pixels of text under a picture
HEAD = 56
COLUMNS = 6  # of hits, beside the query
PAPER, INK, FAINT, LINE, GONE = "#fafaf8", "#1c1c1a", "#6b6b66", "#deded8", "#e6e6e0"


def sheet(title: str, facts: str, sections: Sequence[Section]) -> Image.Image:
    """RGB: a query at the left of each band, its hits beside it, score and name under each."""
    bands = [max(1, -(-len(one.hits) // COLUMNS)) for one in sections]
    cell = SIDE + LINES + GAP
    width = (COLUMNS + 1) * (SIDE + GAP) + 3 * GAP
    picture = Image.new("RGB", (width, HEAD + sum(bands) * cell + len(bands) * GAP + GAP), PAPER)
    pen = ImageDraw.Draw(picture)
    _line(pen, (GAP, 10), title, 18, INK, width - 2 * GAP)
    _line(pen, (GAP, 34), facts, 13, FAINT, width - 2 * GAP)
    top = HEAD
    for section, rows in zip(sections, bands, strict=True):
        pen.line([(GAP, top), (width - GAP, top)], LINE)
        top += GAP
        _tile(picture, pen, (GAP, top), section.query, "query")
        for place, hit in enumerate(section.hits):
            left = 3 * GAP + (1 + place % COLUMNS) * (SIDE + GAP)
            _tile(picture, pen, (left, top + place // COLUMNS * cell), hit, f"{hit.score:.3f}")
        top += rows * cell
    return picture


def _tile(
    picture: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], tile: Tile, text: str
) -> None:
    left, top = at
    if tile.jpeg is None:
        pen.rectangle([left, top, left + SIDE - 1, top + SIDE - 1], GONE)
        for number, line in enumerate(_wrapped(f"no picture: {printable(tile.reason)}")):
            _line(pen, (left + 10, top + 10 + 16 * number), line, 12, FAINT, SIDE - 20)
    else:
        small = _lit(tile)
        picture.paste(small, (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))
    if tile.token is not None:
        text += f"  token {tile.token}"
    _line(pen, (left, top + SIDE + 4), text, 14, INK, SIDE)
    _line(pen, (left, top + SIDE + 22), tile.id, 12, FAINT, SIDE)


def _lit(tile: Tile) -> Image.Image:
    """A picture no larger than its place, its map laid over it."""
    assert tile.jpeg is not None
    image = ImageOps.contain(Image.open(BytesIO(tile.jpeg)).convert("RGB"), (SIDE, SIDE))
    if tile.weights is None:
        return image
    over = Image.fromarray(veil(tile.weights)).resize(image.size, Image.Resampling.BILINEAR)
    image.paste(over.convert("RGB"), mask=over.getchannel("A"))
    return image


def _line(
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    colour: str,
    room: int,
) -> None:
    """One line of text, its middle left out where it is too long."""
    font = ImageFont.load_default(size)
    text = printable(text)
    kept = len(text)
    shown = text
    while pen.textlength(shown, font) > room and kept > 2:
        kept -= 1
        half = kept // 2
        shown = f"{text[: kept - half]}…{text[-half:]}"
    pen.text(at, shown, colour, font)


def _wrapped(text: str, columns: int = 28, lines: int = 10) -> list[str]:
    return [text[start : start + columns] for start in range(0, len(text), columns)][:lines]
