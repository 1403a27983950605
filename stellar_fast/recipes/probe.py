"""How well features tell classes apart: a linear probe, and nearest neighbours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
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
POOLED = ("sparse", "cls", "dense")  # what is told of an image by a mean over tokens
STEPS = 1000  # of the logistic regression, at most
NORMAL_95 = 1.959963984540054  # the 97.5th percentile of the normal distribution


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

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=STEPS))
    return model.fit(vectors, np.asarray(labels))


@dataclass(frozen=True)
class Probed:
    """What a linear probe got right of images that it was not trained on.

    Attributes:
        classes: sorted.
        confusion: (classes, classes), images of a class by the class that was predicted.
        trained: images.
        single: classes of one image, which are trained on and cannot be tested.
        usual: images that would be right if the class with most trained images were always said.
        converged: whether training came to its end.
    """

    classes: list[str]
    confusion: np.ndarray
    trained: int
    single: list[str]
    usual: int
    converged: bool

    @property
    def tested(self) -> int:
        return int(self.confusion.sum())

    @property
    def right(self) -> int:
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        return self.right / self.tested

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, at 95 %: by `wilson`."""
        return wilson(self.right, self.tested)


def probed(
    vectors: np.ndarray, labels: Sequence[str], *, held_out: float = 0.2, seed: int = 0
) -> Probed:
    """A linear probe, trained on a part of the rows and tested on the others.

    Args:
        vectors: (rows, D), by `pooled`.
        labels: one a row.
        held_out, seed: see `split`.

    Raises:
        ValueError: fewer than two classes, or no class of two images; as `split`.
        MissingExtraError: scikit-learn is not installed.
    """
    named = np.asarray(labels)
    classes, numbers, counts = np.unique(named, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a probe tells classes apart, and there are {len(classes)}")
    tested = split(numbers, held_out, seed)
    if not tested.any():
        raise ValueError("every class has one image, and none can be both trained on and tested")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")  # `converged` tells
        model = linear_probe(vectors[~tested], numbers[~tested])
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (numbers[tested], model.predict(vectors[tested])), 1)
    most = np.bincount(numbers[~tested]).argmax()
    return Probed(
        classes.tolist(),
        confusion,
        int((~tested).sum()),
        classes[counts == 1].tolist(),
        int((numbers[tested] == most).sum()),
        bool(model[-1].n_iter_.max() < STEPS),
    )


def split(labels: np.ndarray, held_out: float, seed: int) -> np.ndarray:
    """Which rows to test on: of every class that share, rounded, but one at least and not all; of a
    class of one, none.

    Args:
        labels: (rows,).
        held_out: between 0 and 1.
        seed: of the choice.

    Raises:
        ValueError: `held_out` is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"the share that is held out is between 0 and 1, got {held_out}")
    rng = np.random.default_rng(seed)
    tested = np.zeros(len(labels), bool)
    for one in np.unique(labels):
        rows = np.flatnonzero(labels == one)
        count = min(max(1, round(held_out * len(rows))), len(rows) - 1)
        tested[rng.permutation(rows)[:count]] = True
    return tested


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927): that of `right`
    in `total` independent trials; it stays within 0 and 1, also where all or none are right."""
    share, z2 = right / total, NORMAL_95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = math.sqrt(share * (1 - share) * z2 / total + (z2 / (2 * total)) ** 2)
    half = spread / (1 + z2 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


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
