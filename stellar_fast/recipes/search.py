"""Search by image, or by a part of one: a faiss index of tokens, by cosine similarity."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Image

from ..errors import MissingExtraError
from ..extract.features import Features
from ..extract.rows import Feature

if TYPE_CHECKING:
    from ..engine.engine import Engine

# Vectors that an index with something to learn is trained on: faiss itself samples 256 for each of
# its centroids, and warns of fewer than 39.
TRAINED_ON = 262_144
BLOCK = 1024  # rows that are added at once
# What an index may hold, and the feature that it is of.
BY = {"cls": "cls", "sparse": "sparse", "token": "sparse"}


@dataclass(frozen=True)
class Hit:
    """One image that was found.

    Attributes:
        score: cosine similarity to the query, from -1 to 1.
        row: of the features.
        token: the one of its sparse tokens that is nearest, where tokens were searched.
    """

    id: str
    score: float
    row: int
    token: int | None = None


def build_index(
    features: Features, *, by: str = "cls", factory: str = "Flat", seed: int = 0
) -> Any:
    """A faiss index of every row.

    Args:
        by: of what: "cls", the CLS token, row r under number r; "sparse", the mean of the sparse
            tokens, likewise; "token", every sparse token, token t of row r under number r K + t.
        factory: what kind, in the words of `faiss.index_factory`. "Flat" compares with every
            vector and is exact: 4 D bytes a vector. For many millions, "IVF4096,PQ64" and the like
            are smaller, quicker and approximate; they learn from a sample of rows.
        seed: of that sample.

    Returns:
        A `faiss.Index`; `faiss.write_index` stores it, and `kept.open_index` finds it again.

    Raises:
        KeyError: the features were extracted without cls, or sparse.
        ValueError: unknown `by`, or a `factory` that faiss does not know or that needs more rows.
        MissingExtraError: faiss is not installed.
    """
    faiss = import_faiss()
    feature = features[_feature_of(by)]
    try:
        index = faiss.index_factory(feature.shape[-1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            a_row = vectors_a_row(features, by)
            index.train(vectors(_sample(feature, max(1, TRAINED_ON // a_row), seed), by))
    except RuntimeError as error:  # an unknown kind, or too few vectors to learn from
        raise ValueError(f"faiss makes no index {factory!r} of these vectors: {error}") from None
    for block in feature.blocks(BLOCK):
        index.add(vectors(block, by))
    return index


def search(
    index: Any, features: Features, engine: Engine, images: Sequence[Any], k: int = 10
) -> list[list[Hit]]:
    """The `k` nearest rows to each image by its CLS token, best first; fewer where there are not so
    many.

    Args:
        index: by `build_index`, of these `features`.
        engine: of the same model and weights as made the features.
        images: paths or PIL images.

    Raises:
        TypeError: `images` is one image and no list.
        ValueError: the engine is of another model or other weights, or the index of other features;
            `k` is less than 1.
        ImageError: an image cannot be read.
    """
    if isinstance(images, str | bytes | os.PathLike | Image):
        raise TypeError(f"images are a list, got one {type(images).__name__}; put it into one")
    check_count(k)
    check_engine(features, engine)
    preset = features.configuration["preset"]
    queries = engine.encode(list(images), outputs=("cls",), preset=preset)["cls"]
    return nearest(index, features, vectors(queries.float().cpu().numpy(), "cls"), k)


def nearest(
    index: Any,
    features: Features,
    queries: np.ndarray,
    k: int = 10,
    *,
    by: str = "cls",
    without: Sequence[int | None] | None = None,
) -> list[list[Hit]]:
    """The `k` nearest rows to each vector, best first; each once, by the best of its tokens.

    Args:
        index: by `build_index`, of these `features` and `by`.
        queries: (queries, D) of length 1, by `vectors`.
        without: a row for each query that is not to be found, such as its own; or None.

    Raises:
        ValueError: the index is of other features; `k` is less than 1.
    """
    check_count(k)
    a_row = vectors_a_row(features, by)
    if index.ntotal != len(features) * a_row:
        raise ValueError(
            f"the index has {index.ntotal} vectors, the features {len(features) * a_row}"
        )
    if not index.ntotal:
        return [[] for _ in queries]
    left_out = [None] * len(queries) if without is None else without
    # So many vectors are of k + 1 rows at least.
    scores, numbers = index.search(queries, min((k + 1) * a_row, index.ntotal))
    return [
        _rows(features, line, found, k, a_row if by == "token" else None, out)
        for line, found, out in zip(scores, numbers, left_out, strict=True)
    ]


def check_count(k: int) -> None:
    """Raises ValueError for a number of hits that there cannot be."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _rows(
    features: Features,
    scores: np.ndarray,
    numbers: np.ndarray,
    k: int,
    tokens: int | None,
    left_out: int | None,
) -> list[Hit]:
    """What faiss found for one query, by row.

    Args:
        tokens: of a row, where the vectors are tokens.
    """
    best: dict[int, tuple[float, int | None]] = {}
    for score, number in zip(scores.tolist(), numbers.tolist(), strict=True):
        if number < 0:  # faiss fills up with -1
            continue
        row, token = (number, None) if tokens is None else divmod(number, tokens)
        if row != left_out and row not in best:
            best[row] = score, token
    rows = list(best)[:k]
    return [
        Hit(id, score, row, token)
        for id, row, (score, token) in zip(
            features.ids_of(rows), rows, (best[row] for row in rows), strict=True
        )
    ]


def vectors(block: np.ndarray, by: str) -> np.ndarray:
    """What an index holds of some rows of its feature (rows, tokens, D): float32 of length 1,
    (rows, D), or (rows x tokens, D) by "token"."""
    if by == "token":
        return unit(block.reshape(-1, block.shape[-1]))
    return unit(block.mean(axis=1, dtype=np.float32))


def vectors_a_row(features: Features, by: str) -> int:
    """How many vectors of a row an index holds.

    Raises:
        KeyError, ValueError: as `build_index`.
    """
    shape = features[_feature_of(by)].shape
    return shape[1] if by == "token" else 1


def check_by(features: Features, by: str, token: int | None = None) -> None:
    """Raises ValueError where `by` is unknown, the feature that it takes was not extracted, or
    there is no such token."""
    name = _feature_of(by)
    if name not in features:
        raise ValueError(
            f"{features.folder}: was extracted without {name}; it has {', '.join(features)}, and "
            f"another one has it by extract --features {name}"
        )
    if token is None:
        return
    if by != "token":
        raise ValueError(f"token {token} is looked for by token, not by {by}")
    if not 0 <= token < (count := vectors_a_row(features, by)):
        raise ValueError(f"token {token}: there are {count}, counted from 0")


def _feature_of(by: str) -> str:
    if by not in BY:
        raise ValueError(f"unknown kind of vectors {by!r}; known: {', '.join(BY)}")
    return BY[by]


def unit(vectors: np.ndarray) -> np.ndarray:
    """(rows, ..., D) as float32 (rows, D) of length 1, so that inner products are cosines; a zero
    vector stays zero."""
    flat = vectors.reshape(len(vectors), vectors.shape[-1]).astype(np.float32)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, length, out=flat, where=length > 0)


def check_engine(features: Features, engine: Engine) -> None:
    """Raises ValueError where an engine's features are not comparable with stored ones. Another
    precision is: it differs by rounding."""
    from ..extract.job import identify
    from ..extract.output.layout import difference

    changed = difference(features.configuration, identify(engine), ("model", "weights"))
    if changed:
        raise ValueError(f"the features were made with another engine: {', '.join(changed)}")


def _sample(feature: Feature, most: int, seed: int) -> np.ndarray:
    if len(feature) <= most:
        return feature.to_numpy()
    rows = np.random.default_rng(seed).choice(len(feature), most, replace=False)
    return feature[np.sort(rows)]


def import_faiss() -> Any:
    """faiss, or MissingExtraError."""
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("search by image", "recipes") from error
    return faiss
