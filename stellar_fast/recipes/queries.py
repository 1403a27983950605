"""What is looked for: an image, by its id, its row or its file, or one of its sparse tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import ImageError
from ..extract.features import Failed, Features
from ..extract.input.addresses import Allowed, is_address, localized, shown
from ..extract.input.door import read_item
from ..extract.originals import Original
from ..extract.records import Item
from ..extract.rows import Feature
from ..images.reader import decode
from .search import BY, Hit, check_by, check_engine, nearest, vectors
from .segment import grid_of

if TYPE_CHECKING:
    from ..engine.engine import Engine


@dataclass(frozen=True)
class Query:
    """One image to find others like.

    Attributes:
        name: its id.
        row: of the features; None for an image from elsewhere.
        vectors: (1, D), or (K, D) of its tokens, of length 1.
        spatial: (P, K), the maps of its tokens; None if they were not extracted.
        image: where its pixels are; None for one of the features, whose plan tells.
    """

    name: str
    row: int | None
    vectors: np.ndarray
    spatial: np.ndarray | None = None
    image: Original | None = None

    def __str__(self) -> str:
        return self.name if self.row is None else f"{self.name} (row {self.row})"


@dataclass(frozen=True)
class Found:
    """What is nearest to a query, or to one token of it, best first.

    Attributes:
        near: for each hit, what is nearest to it.
    """

    query: Query
    token: int | None
    hits: list[Hit]
    near: list[list[Hit]]


def maps_of(features: Features) -> Feature | None:
    """The maps of the sparse tokens; None if they were not extracted.

    Raises:
        ValueError: they are not of the tokens, or of the model's patches.
    """
    if "spatial" not in features:
        return None
    rows, columns = grid_of(features.configuration)
    expected = (rows * columns, features["sparse"].shape[1])
    if (found := features["spatial"].shape[1:]) != expected:
        raise ValueError(f"{features.folder}: spatial is {found} a row, not {expected}")
    return features["spatial"]


def read_queries(
    features: Features,
    texts: Sequence[str],
    by: str,
    load: Callable[[], Engine],
    allowed: Allowed,
) -> list[Query]:
    """The images that `texts` name: by an id of `features`, else by a row of them, else by a file.

    Args:
        load: the engine, asked for once and only for a file: one of the model and weights that made
            the features.
        allowed: what may be read beyond the defaults.

    Raises:
        ValueError: a text is none of these, or an image that failed; the engine is of another model
            or other weights.
        ImageError: a file cannot be read as an image.
    """
    engine: Engine | None = None
    found = []
    for text in texts:
        row = features.find(text)
        if isinstance(row, Failed):
            raise ValueError(f"{text}: has no features: {row.reason}")
        if row is None and re.fullmatch("[0-9]{1,18}", text):
            row = int(text)
            if row >= len(features):
                raise ValueError(
                    f"{text}: there are {len(features)} rows, counted from 0; a file of this name "
                    f"is ./{text}"
                )
        if row is not None:
            found.append(_of_row(features, row, by))
            continue
        path = text if is_address(text) else os.path.expanduser(text)
        if not is_address(text) and not os.path.exists(path):
            raise ValueError(
                f"{shown(text)}: is neither an id of {features.folder}, nor one of its "
                f"{len(features)} rows, nor a file"
            )
        item = Item(shown(text), localized(path))
        image = _read(item, allowed)
        if engine is None:
            engine = load()
            check_engine(features, engine)
        found.append(_of_image(features, engine, image, item, by))
    return found


def _read(item: Item, allowed: Allowed) -> Image.Image:
    try:
        return decode(read_item(item, allowed))
    except ImageError as error:
        raise ImageError(item.id, error.reason) from None
    except OSError as error:
        raise ImageError(item.id, error.strerror or str(error)) from None


def _of_row(features: Features, row: int, by: str) -> Query:
    (id,) = features.ids_of([row])
    maps = maps_of(features) if by == "token" else None
    spatial = None if maps is None else maps[row]
    return Query(id, row, vectors(features[BY[by]][row : row + 1], by), spatial)


def _of_image(features: Features, engine: Engine, image: Image.Image, item: Item, by: str) -> Query:
    outputs = (BY[by], "spatial") if by == "token" else (BY[by],)
    out = engine.encode([image], outputs=outputs, preset=features.configuration["preset"])
    arrays = {name: value.float().cpu().numpy() for name, value in out.items()}
    spatial = arrays["spatial"][0] if by == "token" else None
    return Query(item.id, None, vectors(arrays[BY[by]], by), spatial, Original(item))


def ask(
    index: Any,
    features: Features,
    query: Query,
    k: int,
    *,
    by: str,
    token: int | None = None,
    near: int = 0,
) -> list[Found]:
    """What is nearest to a query, itself left out; for tokens, to each of them, the one with the
    largest share of the image first.

    Args:
        token: of the query, to look for this one alone.
        near: what is nearest to every hit is looked for too, so many; 0 is not.

    Raises:
        ValueError: as `search.check_by` and `search.nearest`.
    """
    check_by(features, by, token)
    tokens: list[int] | list[None] = [None]
    chosen = query.vectors
    if by == "token":
        count = len(query.vectors)
        share = np.zeros(count) if query.spatial is None else query.spatial.mean(axis=0)
        order = np.argsort(-share, kind="stable")
        order = order if token is None else np.array([token])
        tokens, chosen = order.tolist(), query.vectors[order]
    found = nearest(index, features, chosen, k, by=by, without=[query.row] * len(tokens))
    return [
        Found(query, one, hits, _near(index, features, hits, near, by) if near else [])
        for one, hits in zip(tokens, found, strict=True)
    ]


def _near(index: Any, features: Features, hits: list[Hit], k: int, by: str) -> list[list[Hit]]:
    if not hits:
        return []
    rows = [hit.row for hit in hits]
    block = features[BY[by]][rows]
    if by == "token":
        block = block[np.arange(len(hits)), np.array([hit.token for hit in hits])][:, None]
    return nearest(index, features, vectors(block, by), k, by=by, without=rows)
