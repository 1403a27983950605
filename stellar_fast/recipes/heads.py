"""The published probes, on extracted features: a trained head on what the frozen model gives.

Classification: the mean over tokens, LayerNorm, a linear layer. Segmentation: BatchNorm and a 1x1
convolution over the grid of patches. State-dict names are the published ones. Labels are drawn on
the patches' grid, as published: masks are cut down to it by nearest neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = 255  # the label of pixels that count for nothing
SMOOTH = 1.0  # added to both sides of the Dice ratio

Head = TypeVar("Head", bound=nn.Module)
Rows = Callable[[np.ndarray], np.ndarray]  # sorted row numbers -> those rows


class ClassificationHead(nn.Module):
    """LayerNorm of the mean over tokens, and a linear layer.

    Args:
        width: D.
        num_classes: C.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.normalize = nn.LayerNorm(width)
        self.classification_head = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, D), or their mean (B, D) -> logits (B, C)."""
        mean = tokens.mean(dim=1) if tokens.ndim == 3 else tokens
        return self.classification_head(self.normalize(mean))


class SegmentationHead(nn.Module):
    """BatchNorm and a 1x1 convolution of the patches.

    Args:
        width: D.
        num_classes: C.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.decoder_head = nn.Sequential(
            nn.BatchNorm2d(width), nn.Conv2d(width, num_classes, kernel_size=1)
        )

    def forward(self, patches: Tensor) -> Tensor:
        """(B, P, D) of a square grid -> logits (B, C, rows, columns).

        Raises:
            ValueError: P is no square number.
        """
        side = math.isqrt(patches.shape[1])
        if side * side != patches.shape[1]:
            raise ValueError(f"{patches.shape[1]} patches are no square grid")
        return self.decoder_head(patches.transpose(1, 2).unflatten(2, (side, side)))


class Trained(Generic[Head]):
    """A trained head.

    Attributes:
        head: in evaluation mode.
        losses: the mean of every epoch.
    """

    def __init__(self, head: Head, losses: list[float]) -> None:
        self.head, self.losses = head, losses

    @torch.no_grad()
    def logits(self, features: np.ndarray | Tensor, batch_size: int = 1024) -> Tensor:
        """What the head gives for features as it was trained on, on the CPU."""
        device = next(self.head.parameters()).device
        parts = [
            self.head(_tensor(features[start : start + batch_size]).to(device)).cpu()
            for start in range(0, len(features), batch_size)
        ]
        return torch.cat(parts)


class Classifier(Trained[ClassificationHead]):
    """A trained classification probe, with `predict` and `score` as scikit-learn's.

    Attributes:
        classes: the labels, sorted; class i is the i-th.
    """

    def __init__(self, head: ClassificationHead, losses: list[float], classes: np.ndarray) -> None:
        super().__init__(head, losses)
        self.classes = classes

    def predict(self, vectors: np.ndarray) -> np.ndarray:
        """The label of each of `vectors` (rows, D)."""
        return self.classes[self.logits(vectors).argmax(dim=1).numpy()]

    def score(self, vectors: np.ndarray, labels: Sequence[Any]) -> float:
        """The share of `vectors` whose label is predicted."""
        return float(np.mean(self.predict(vectors) == np.asarray(labels)))


class Segmenter(Trained[SegmentationHead]):
    """A trained segmentation probe."""

    def predict(self, dense: np.ndarray) -> np.ndarray:
        """The class of every patch of (rows, P, D): int64 (rows, rows of patches, columns)."""
        return self.logits(dense).argmax(dim=1).numpy()

    def score(self, dense: np.ndarray, masks: np.ndarray) -> float:
        """The mean IoU over classes, of patches against masks (rows, H, W) cut down to them."""
        found = self.predict(dense)
        return mean_iou(found, _cut_down(torch.as_tensor(masks), found.shape[1:]).numpy())


def classification_probe(
    vectors: np.ndarray,
    labels: Sequence[Any],
    *,
    epochs: int = 30,
    batch_size: int = 2048,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Classifier:
    """The published classification probe: AdamW, weight decay 1e-4, gradients clipped at 5.

    Args:
        vectors: (rows, D), the mean over `sparse` (`probe.pooled`).
        labels: one a row.

    Raises:
        ValueError: not one label a row, or no rows.
    """
    classes, targets = np.unique(np.asarray(labels), return_inverse=True)
    if not 0 < len(vectors) == len(targets):
        raise ValueError(f"{len(vectors)} rows and {len(targets)} labels")
    torch.manual_seed(seed)
    head = ClassificationHead(vectors.shape[1], len(classes)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), learning_rate, weight_decay=1e-4)
    losses = _train(
        head,
        optimizer,
        lambda logits, rows: F.cross_entropy(logits, torch.as_tensor(targets[rows]).to(device)),
        lambda rows: vectors[rows],
        len(vectors),
        epochs,
        batch_size,
        clip=5.0,
    )
    return Classifier(head.eval(), losses, classes)


def segmentation_probe(
    dense: Any,
    masks: np.ndarray,
    num_classes: int,
    *,
    epochs: int = 80,
    batch_size: int = 2048,
    learning_rate: float = 1e-4,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Segmenter:
    """The published segmentation probe: AdamW, cross-entropy and Dice loss together.

    Args:
        dense: (rows, P, D): an array, or the feature `dense` of `open_features`, of which a batch
            is read at a time.
        masks: (rows, H, W) integers, the class of every pixel that the model saw; 255 counts for
            nothing.
        num_classes: C.

    Raises:
        ValueError: not one mask a row, no rows, or a class beyond `num_classes`.
    """
    if not 0 < len(dense) == len(masks):
        raise ValueError(f"{len(dense)} rows and {len(masks)} masks")
    outside = (masks != IGNORED) & ((masks < 0) | (masks >= num_classes))
    if outside.any():
        raise ValueError(
            f"masks hold {int(masks[outside].max())}, of {num_classes} classes and {IGNORED}"
        )
    torch.manual_seed(seed)
    head = SegmentationHead(dense.shape[-1], num_classes).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), learning_rate)

    def loss(logits: Tensor, rows: np.ndarray) -> Tensor:
        targets = _cut_down(torch.as_tensor(masks[rows]), logits.shape[2:]).to(device)
        return segmentation_loss(logits, targets)

    losses = _train(head, optimizer, loss, lambda rows: dense[rows], len(dense), epochs, batch_size)
    return Segmenter(head.eval(), losses)


def segmentation_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy and Dice loss, of the pixels whose label is not 255.

    Args:
        logits: (B, C, H, W).
        targets: (B, H, W) int64.

    Returns:
        A scalar; of no pixels 0.
    """
    counted = targets != IGNORED
    if not counted.any():
        return logits.sum() * 0
    crossed = F.cross_entropy(logits, targets, ignore_index=IGNORED)
    one_hot = F.one_hot(targets.masked_fill(~counted, 0), logits.shape[1]).movedim(-1, 1)
    truth = one_hot * counted.unsqueeze(1)
    shares = logits.softmax(dim=1) * counted.unsqueeze(1)
    both, either = (shares * truth).sum((0, 2, 3)), (shares + truth).sum((0, 2, 3))
    return crossed + 1 - ((2 * both + SMOOTH) / (either + SMOOTH)).mean()


def mean_iou(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Intersection over union, averaged over the classes that are in either.

    Pixels whose target is 255 count for nothing.
    """
    counted = targets != IGNORED
    predicted, targets = predicted[counted], targets[counted]
    classes = np.union1d(predicted, targets)
    shares = [
        np.sum((predicted == each) & (targets == each))
        / np.sum((predicted == each) | (targets == each))
        for each in classes
    ]
    return float(np.mean(shares)) if shares else math.nan


def _cut_down(masks: Tensor, grid: Sequence[int]) -> Tensor:
    """Masks (B, H, W) at the cells of a grid: int64 (B, rows, columns)."""
    rows, columns = grid
    small = F.interpolate(masks.unsqueeze(1).float(), size=(rows, columns), mode="nearest")
    return small.squeeze(1).long()


def _tensor(rows: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(np.array(rows) if isinstance(rows, np.ndarray) else rows).float()


def _batches(count: int, size: int) -> Iterator[np.ndarray]:
    """All rows in random order, cut into batches, each in the order of the rows."""
    order = torch.randperm(count).numpy()
    for start in range(0, count, size):
        yield np.sort(order[start : start + size])


def _train(
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, np.ndarray], Tensor],
    read: Rows,
    count: int,
    epochs: int,
    batch_size: int,
    clip: float | None = None,
) -> list[float]:
    """Trains `head` on features that `read` gives: the mean loss of every epoch."""
    device = next(head.parameters()).device
    means = []
    for _ in range(epochs):
        total = 0.0
        for rows in _batches(count, batch_size):
            value = loss(head(_tensor(read(rows)).to(device)), rows)
            optimizer.zero_grad()
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(head.parameters(), clip)
            optimizer.step()
            total += value.item() * len(rows) / count
        means.append(total)
    return means
