"""How well features tell classes apart: a linear probe, and nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import MissingExtraError
from ..extract.features import Features
from ..extract.input.kept import folder_of
from .search import unit

# Of the usual nearest-neighbour evaluation of self-supervised features: the number of neighbours
# and the temperature of their votes (DINO, arXiv 2104.14294, after arXiv 1805.01978).
NEIGHBOURS = 20
TEMPERATURE = 0.07


def pooled(features: Features, name: str = "sparse") -> np.ndarray:
    """One vector for each row: the mean over its tokens, float32 (rows, D).

    Reads block by block; what is returned is K times smaller than the feature.

    Raises:
        KeyError: the features were extracted without `name`.
    """
    feature = features[name]
    result = np.empty((len(feature), feature.shape[-1]), np.float32)
    at = 0
    for block in feature.blocks():
        result[at : at + len(block)] = block.mean(axis=1, dtype=np.float32)
        at += len(block)
    return result


def folder_labels(features: Features) -> list[str]:
    """The label of every row, where each class has a folder of its own: the one its file is in, in
    its tar or zip if it is in one; and the tar's own folder where the tar has no folders.

    Raises:
        ValueError: a file is in no folder.
    """
    return [_label(id) for id in features.ids]


def _label(id: str) -> str:
    label = folder_of(id)
    if label is None:
        raise ValueError(f"{id}: is in no folder that could be its class")
    return label


def linear_probe(vectors: np.ndarray, labels: Sequence[Any], *, c: float = 1.0) -> Any:
    """A logistic regression on frozen features, each dimension scaled to unit variance.

    Args:
        vectors: (rows, D), by `pooled`.
        labels: one a row.
        c: inverse strength of the L2 penalty; choose it on held-out rows, for example with
            scikit-learn's `GridSearchCV` over `logisticregression__C`.

    Returns:
        A fitted scikit-learn pipeline, with `predict`, `predict_proba` and `score`.

    Raises:
        ValueError: fewer than two classes, or as many labels as rows are not there.
        MissingExtraError: scikit-learn is not installed.
    """
    _check_sklearn()
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    return model.fit(vectors, np.asarray(labels))


def nearest_neighbours(
    vectors: np.ndarray, labels: Sequence[Any], *, k: int = NEIGHBOURS
) -> Nearest:
    """The vote of the `k` nearest rows by cosine similarity s, each with weight exp(s / 0.07).

    Args:
        vectors: (rows, D), by `pooled`.
        labels: one a row.
        k: no more than there are rows are asked.

    Raises:
        ValueError: there are no rows, or not as many labels.
        MissingExtraError: scikit-learn is not installed.
    """
    return Nearest(vectors, labels, k)


class Nearest:
    """A fitted classifier of `nearest_neighbours`, with `predict` and `score` as scikit-learn's."""

    def __init__(self, vectors: np.ndarray, labels: Sequence[Any], k: int) -> None:
        _check_sklearn()
        from sklearn.neighbors import KNeighborsClassifier

        if not 0 < len(vectors) == len(labels):
            raise ValueError(f"{len(vectors)} rows and {len(labels)} labels")
        self._model = KNeighborsClassifier(
            min(k, len(vectors)), weights=_weights, metric="cosine", algorithm="brute"
        )
        self._model.fit(unit(vectors), np.asarray(labels))

    def predict(self, vectors: np.ndarray) -> np.ndarray:
        """The label of each of `vectors` (rows, D)."""
        return self._model.predict(unit(vectors))

    def score(self, vectors: np.ndarray, labels: Sequence[Any]) -> float:
        """The share of `vectors` whose label is predicted."""
        return float(np.mean(self.predict(vectors) == np.asarray(labels)))


def _weights(distances: np.ndarray) -> np.ndarray:
    """Of cosine distances 1 - s (queries, k), but for a factor that each query has of its own."""
    return np.exp((distances.min(axis=1, keepdims=True) - distances) / TEMPERATURE)


def _check_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("probing features", "recipes") from error
