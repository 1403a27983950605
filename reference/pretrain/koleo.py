"""The Kozachenko-Leonenko regulariser (arXiv 1806.03198), among the tokens of one image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import at_least_float32

EPS = 1e-8


def koleo_loss(tokens: Tensor) -> Tensor:
    """Pushes every token away from its nearest neighbour.

    Tokens are l2-normalised; a token's distance is half of the Euclidean one to the other token of
    its image with the largest dot product. Computed in float32 or better, autocast or not.

    Args:
        tokens: (B, K, D), K at least 2.

    Returns:
        `-mean(log(distance + 1e-8))`, a scalar. The choice of neighbour has no gradient.

    Raises:
        ValueError: another shape, or a single token an image.
    """
    if tokens.ndim != 3 or tokens.shape[1] < 2:
        raise ValueError(
            "the KoLeo loss needs tokens (B, K, D) with two tokens an image or more, got shape "
            f"{tuple(tokens.shape)}"
        )
    with torch.autocast(tokens.device.type, enabled=False):
        x = F.normalize(at_least_float32(tokens), dim=-1, eps=EPS)
        with torch.no_grad():
            dots = x @ x.transpose(1, 2)
            dots.diagonal(dim1=1, dim2=2).fill_(-1.0)  # the least that a dot product can be
            nearest = dots.argmax(dim=-1)
        neighbours = x.gather(1, nearest.unsqueeze(-1).expand_as(x))
        distances = F.pairwise_distance(x, neighbours, eps=EPS) / 2
        return -(distances + EPS).log().mean()
