"""Online clustering: the heads, their Sinkhorn-Knopp targets and the loss between the two.

Formulas: arXiv 2602.01905 and the code published with it; the assignment follows SwAV (arXiv
2006.09882).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import NORMALIZE_EPS
from ...weights.names import CLUSTERS, HEAD_HIDDEN, PROTOTYPE_DIM
from ..precision import at_least_float32
from .distributed import several_processes

SINKHORN_EPS = 1e-8
# What each column's largest exponent is set to: exp(50) times any batch's rows fits in float32, and
# as much as can be of what is far below the largest stays above zero.
LARGEST_EXPONENT = 50.0


class ClusteringHead(nn.Module):
    """Similarity of tokens to learned prototypes.

    Args:
        width: D, channels of the tokens.
        num_clusters: prototypes.
        predictor_layers: linear layers of the MLP (GELU between them, 2048 hidden channels) that
            takes tokens to the prototypes' space; None: no MLP, the prototypes have D channels.
        prototype_dim: channels of the prototypes; None: D.
        n_sk_iter, sk_scale, target_temp: rounds and column exponent of Sinkhorn-Knopp, and the
            temperature of the logits it starts from.
        pred_temp: temperature of the predictions that are held against its assignments.

    Raises:
        ValueError: an argument is not positive.
    """

    def __init__(
        self,
        width: int,
        num_clusters: int = CLUSTERS,
        predictor_layers: int | None = 2,
        prototype_dim: int | None = PROTOTYPE_DIM,
        n_sk_iter: int = 3,
        sk_scale: float = 1.0,
        target_temp: float = 0.06,
        pred_temp: float = 0.12,
    ) -> None:
        super().__init__()
        self.n_sk_iter, self.sk_scale = n_sk_iter, sk_scale
        self.target_temp, self.pred_temp = target_temp, pred_temp
        if prototype_dim is None or predictor_layers is None:
            prototype_dim = width
        sizes = {
            "width": width,
            "num_clusters": num_clusters,
            "prototype_dim": prototype_dim,
            "predictor_layers": 1 if predictor_layers is None else predictor_layers,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} of a clustering head must be positive, got {size}")
        self.layer = nn.Linear(prototype_dim, num_clusters, bias=False)
        nn.init.normal_(self.layer.weight)
        self.predictor = (
            None if predictor_layers is None else MLP(width, prototype_dim, predictor_layers)
        )

    def forward(
        self, tokens: Tensor, do_sinkhorn: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits of tokens, and with `do_sinkhorn` what they are assigned to.

        Args:
            tokens: (B, T, D).
            do_sinkhorn: assign too. Where several processes train together they must call this
                together.

        Returns:
            logits (B, T, num_clusters), in float32 or better; their assignments, of all B T rows
            together and without gradient; the cross-entropy of the two, a scalar. None and None
            without `do_sinkhorn`.
        """
        x = tokens if self.predictor is None else self.predictor(tokens)
        logits = at_least_float32(self.layer(F.normalize(x, dim=-1, eps=NORMALIZE_EPS)))
        if not do_sinkhorn:
            return logits, None, None
        scores = logits.detach().flatten(0, -2) / self.target_temp
        assigned = sinkhorn_knopp(scores, self.n_sk_iter, self.sk_scale).view_as(logits)
        return logits, assigned, soft_cross_entropy(logits, assigned, self.pred_temp)


class MLP(nn.Module):
    """`layers` linear layers with GELU between them; one layer is a plain `nn.Linear`."""

    def __init__(self, width: int, outputs: int, layers: int) -> None:
        super().__init__()
        if layers == 1:
            self.layers: nn.Module = nn.Linear(width, outputs)
            return
        widths = [width] + [HEAD_HIDDEN] * (layers - 1)
        hidden: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            hidden += [nn.Linear(inner, outer), nn.GELU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(HEAD_HIDDEN, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, iterations: int = 3, scale: float = 1.0) -> Tensor:
    """Soft assignment of rows to clusters that uses the clusters evenly.

    Starts from `exp(scores - largest of the column + 50)` and in each round divides by the columns'
    sums (to the power of `scale`), then by the rows' sums. Where several processes train together
    they must call this together: the columns' maxima and sums run over the rows of all of them.

    Args:
        scores: (rows, clusters), logits over the targets' temperature.
        iterations: rounds.
        scale: 1 evens the clusters out fully, less does so less; above 1 is as 1.

    Returns:
        (rows, clusters) in float32 or better, without gradient: rows that sum to 1.

    Raises:
        ValueError: scores are not a floating-point matrix, or fewer than one iteration.
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floating point (rows, clusters), got {scores.dtype} of shape "
            f"{tuple(scores.shape)}"
        )
    if iterations < 1:
        raise ValueError(f"Sinkhorn-Knopp needs at least one iteration, got {iterations}")
    scores = at_least_float32(scores)
    largest = scores.amax(dim=0, keepdim=True)
    if several_processes():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    plan = (scores + (LARGEST_EXPONENT - largest)).exp()
    for _ in range(iterations):
        columns = plan.sum(dim=0, keepdim=True)
        if several_processes():
            dist.all_reduce(columns)
        columns += SINKHORN_EPS
        if scale < 1.0:
            columns = columns.pow(scale)
        plan = plan / columns
        plan /= plan.sum(dim=1, keepdim=True) + SINKHORN_EPS
    return plan


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """`-sum(targets * log_softmax(logits / temperature))`, averaged over rows.

    Args:
        logits: (..., clusters).
        targets: as logits, distributions over the clusters; no gradient flows into them.
        weights: (...), what each row's term is multiplied by before all are averaged.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(
            f"targets must have the shape of the logits {tuple(logits.shape)}, got "
            f"{tuple(targets.shape)}"
        )
    log_p = (logits / temperature).log_softmax(dim=-1)
    rows = -(targets.detach() * log_p).sum(dim=-1)
    return rows.mean() if weights is None else (rows * weights).mean()
