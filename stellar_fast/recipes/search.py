"""Search by image: a faiss index of the CLS tokens, by cosine similarity."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Image

from ..errors import MissingExtraError
from ..extract.features import Feature, Features

if TYPE_CHECKING:
    from ..engine.engine import Engine

# Vectors that an index with something to learn is trained on: faiss itself samples 256 for each of
# its centroids, and warns of fewer than 39.
TRAINED_ON = 262_144


@dataclass(frozen=True)
class Hit:
    """One image that was found.

    Attributes:
        score: cosine similarity to the query, from -1 to 1.
        row: of the features.
    """

    id: str
    score: float
    row: int


def build_index(features: Features, *, factory: str = "Flat", seed: int = 0) -> Any:
    """A faiss index of every row's CLS token, row r under number r.

    Args:
        factory: what kind, in the words of `faiss.index_factory`. "Flat" compares with every row
            and is exact: 4 D bytes a row. For many millions of rows, "IVF4096,PQ64" and the like
            are smaller, quicker and approximate; they learn from a sample of rows.
        seed: of that sample.

    Returns:
        A `faiss.Index`; `faiss.write_index` stores it.

    Raises:
        KeyError: the features were extracted without cls.
        MissingExtraError: faiss is not installed.
    """
    faiss = _faiss()
    cls = features["cls"]
    index = faiss.index_factory(cls.shape[-1], factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(unit(_sample(cls, TRAINED_ON, seed)))
    for block in cls.blocks():
        index.add(unit(block))
    return index


def search(
    index: Any, features: Features, engine: Engine, images: Sequence[Any], k: int = 10
) -> list[list[Hit]]:
    """The `k` nearest rows to each image, best first; fewer where there are not so many.

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
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_engine(features, engine)
    if index.ntotal != len(features):
        raise ValueError(f"the index has {index.ntotal} rows, the features {len(features)}")
    preset = features.configuration["preset"]
    queries = engine.encode(list(images), outputs=("cls",), preset=preset)["cls"]
    scores, rows = index.search(unit(queries.float().cpu().numpy()), k)
    found = []
    for line, numbers in zip(scores, rows, strict=True):
        there = numbers >= 0  # faiss fills up with -1
        ids = features.ids_of(numbers[there])
        found.append(
            [
                Hit(id, float(score), int(row))
                for id, score, row in zip(ids, line[there], numbers[there], strict=True)
            ]
        )
    return found


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


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("search by image", "recipes") from error
    return faiss
