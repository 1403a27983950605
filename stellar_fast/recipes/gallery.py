"""What a search found, to be looked at: a page, or a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..extract.features import Features
from ..extract.input.addresses import Allowed
from ..extract.input.door import NOTHING_MORE
from ..extract.originals import Picture, originals_of, pictures_of
from ..files import replacing
from ..viz.hits import Section, Tile
from ..viz.page import page
from ..viz.sheet import sheet
from .queries import Found, maps_of
from .search import Hit
from .segment import grid_of

SYNTHETIC = "Synthetic weights: random numbers, nothing was learned. The scores mean nothing."
WHAT = {"cls": "CLS token", "sparse": "mean of the sparse tokens", "token": "single sparse tokens"}


def check_out(path: Path) -> None:
    """Raises ValueError where `save` cannot write `path`: before what takes longer."""
    if path.suffix.lower() not in (".html", ".png"):
        raise ValueError(f"{path}: hits are shown as OUT.html or OUT.png")
    if path.is_dir() or not path.parent.is_dir():
        found = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"{path}: cannot be written, {found}")


def sections_of(
    features: Features, found: Sequence[Found], allowed: Allowed = NOTHING_MORE
) -> list[Section]:
    """Queries and hits with their pictures, read again, and for tokens with their maps, where
    `spatial` was extracted.

    Args:
        allowed: what may be read beyond the defaults.
    """
    own = {one.query.row for one in found} | {hit.row for one in found for hit in one.hits}
    rows = sorted(row for row in own if row is not None)
    files = {id(one.query): one.query for one in found if one.query.row is None}
    pictures = pictures_of(
        [*originals_of(features, rows), *(query.image or "" for query in files.values())],
        features.configuration["preset"],
        allowed=allowed,
    )
    of_row: dict[int | None, Picture | str] = dict(zip(rows, pictures, strict=False))
    of_file = dict(zip(files, pictures[len(rows) :], strict=True))
    grid = grid_of(features.configuration)
    by_token = any(one.token is not None for one in found)
    maps = maps_of(features) if by_token else None

    def tile(
        name: str,
        picture: Picture | str,
        row: int | None,
        token: int | None,
        spatial: np.ndarray | None,
        hit: Hit | None = None,
        near: Sequence[Hit] = (),
    ) -> Tile:
        known = picture if isinstance(picture, Picture) else None
        return Tile(
            name,
            None if known is None else known.jpeg,
            (4, 3) if known is None else (known.width, known.height),
            reason=picture if isinstance(picture, str) else "",
            score=None if hit is None else hit.score,
            row=row,
            token=token,
            weights=None if spatial is None else spatial[:, token].reshape(grid),
            near=[(other.id, other.row, other.score) for other in near],
        )

    def spatial_of(hit: Hit) -> np.ndarray | None:
        return None if maps is None else maps[hit.row]

    sections = []
    for one in found:
        query = one.query
        picture = of_file[id(query)] if query.row is None else of_row[query.row]
        sections.append(
            Section(
                tile(query.name, picture, query.row, one.token, query.spatial),
                [
                    tile(hit.id, of_row[hit.row], hit.row, hit.token, spatial_of(hit), hit, near)
                    for hit, near in zip(one.hits, one.near, strict=True)
                ],
            )
        )
    return sections


def save(path: Path, features: Features, by: str, sections: Sequence[Section]) -> None:
    """Writes hits as a page or a sheet, by the suffix.

    Raises:
        ValueError: another suffix.
        StellarError: the file cannot be written.
    """
    check_out(path)
    model = str(features.configuration["model"].get("name"))
    synthetic = features.configuration["weights"] == "synthetic"
    facts = f"{model}{' (synthetic weights)' if synthetic else ''} · {len(features):,} images of "
    facts += f"{features.folder.name} · by cosine similarity of {WHAT[by]}"
    title = "Images with this part" if by == "token" else "Nearest images"
    with replacing(path) as temporary:
        if path.suffix.lower() == ".png":
            sheet(title, facts, sections).save(temporary, "PNG")
        else:
            text = page(title, facts, sections, SYNTHETIC if synthetic else "")
            temporary.write_text(text, encoding="utf-8")
