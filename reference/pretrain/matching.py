"""Matching of predicted tokens to target tokens by entropic optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import at_least_float32

EPSILON = 0.1  # entropic weight, in units of distance
ROUNDS = 5


@torch.no_grad()
def match(
    predictions: Tensor,
    targets: Tensor,
    epsilon: float = EPSILON,
    rounds: int = ROUNDS,
    wanted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For every prediction the target that most of its mass is carried to.

    Euclidean distances are the cost; each round sets the dual potentials of the predictions, then
    those of the targets (Sinkhorn in the log domain, arXiv 1306.0895).

    Args:
        predictions: (B, Q, D).
        targets: (B, T, D).
        wanted: (B, T), above 0 for the targets that count: to the others all distances are twice
            the largest of the batch.

    Returns:
        index (B, Q) int64 into the targets, several predictions may share one; and the plan
        (B, Q, T), of which every column sums to 1. Both without gradient.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    shapes = tuple(predictions.shape), tuple(targets.shape)
    if predictions.ndim != 3 or targets.ndim != 3 or shapes[0][::2] != shapes[1][::2]:
        raise ValueError(
            f"predictions must be (B, Q, D) and targets (B, T, D), got {shapes[0]} and {shapes[1]}"
        )
    cost = torch.cdist(
        at_least_float32(predictions),
        at_least_float32(targets),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    if wanted is not None:
        cost = cost.masked_fill(wanted.unsqueeze(1) <= 0, 2 * cost.max())
    v = cost.new_zeros(cost.shape[0], 1, cost.shape[2])
    for _ in range(rounds):
        u = -epsilon * ((v - cost) / epsilon).logsumexp(dim=2, keepdim=True)
        v = -epsilon * ((u - cost) / epsilon).logsumexp(dim=1, keepdim=True)
    plan = ((u + v - cost) / epsilon).exp()
    return plan.argmax(dim=2), plan
