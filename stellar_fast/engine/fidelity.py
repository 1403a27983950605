"""How far an engine's features are from those of the same weights in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder import OUTPUTS


@dataclass(frozen=True)
class Agreement:
    """Of one output: the relative L2 error of all of it; cosines of vectors, in the mean and the
    least of any."""

    error: float
    cosine: float
    least_cosine: float


@dataclass(frozen=True)
class Fidelity:
    """What `Engine.fidelity` found.

    Attributes:
        precision, backend: of the engine.
        images: how many were compared.
        outputs: by name. Vectors are rows of channels, in `spatial` the K weights of a patch.
        strongest: share of the patches whose strongest token is the same.
        neighbours: share of the images whose nearest other image is the same, by the cosine of
            "cls" and of the mean of "sparse"; empty of fewer than three images.
    """

    precision: str
    backend: str
    images: int
    outputs: Mapping[str, Agreement]
    strongest: float
    neighbours: Mapping[str, float]

    def __str__(self) -> str:
        lines = [
            f"{self.precision} on {self.backend} against fp32, {self.images} images",
            f"{'output':10}{'error':>10}{'cosine':>10}{'least':>10}",
        ]
        lines += [
            f"{name:10}{found.error:10.2e}{found.cosine:10.5f}{found.least_cosine:10.5f}"
            for name, found in self.outputs.items()
        ]
        lines.append(f"strongest token the same in {self.strongest:.2%} of the patches")
        lines += [
            f"nearest image by {name} the same for {share:.2%} of the images"
            for name, share in self.neighbours.items()
        ]
        return "\n".join(lines)


def compare(
    pairs: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    precision: str,
    backend: str,
) -> Fidelity:
    """The fidelity of batches of features.

    Args:
        pairs: all outputs as an engine found them, and as they should be, on any device.
    """
    off, whole = (dict.fromkeys(OUTPUTS, 0.0) for _ in range(2))
    cosines: dict[str, list[Tensor]] = {name: [] for name in OUTPUTS}
    vectors: dict[str, list[tuple[Tensor, Tensor]]] = {"cls": [], "sparse": []}
    same: list[Tensor] = []
    images = 0
    for found, exact in pairs:
        images += len(exact["cls"])
        for name in OUTPUTS:
            one, other = found[name].double().cpu(), exact[name].double().cpu()
            off[name] += float((one - other).square().sum())
            whole[name] += float(other.square().sum())
            cosines[name].append(F.cosine_similarity(one, other, dim=-1).flatten())
            if name in vectors:
                vectors[name].append((one.mean(1), other.mean(1)))
        same.append((found["spatial"].argmax(-1) == exact["spatial"].argmax(-1)).cpu().flatten())
    outputs = {}
    for name in OUTPUTS:
        every = torch.cat(cosines[name])
        error = (off[name] / whole[name]) ** 0.5 if whole[name] else 0.0
        outputs[name] = Agreement(error, float(every.mean()), float(every.amin()))
    neighbours = {}
    if images > 2:
        for name, batches in vectors.items():
            ours, right = (_nearest(torch.cat(side)) for side in zip(*batches, strict=True))
            neighbours[name] = float((ours == right).double().mean())
    strongest = float(torch.cat(same).double().mean())
    return Fidelity(precision, backend, images, outputs, strongest, neighbours)


def _nearest(vectors: Tensor) -> Tensor:
    """For each of (N, D) which other one is the nearest by its cosine."""
    unit = F.normalize(vectors, dim=-1)
    return (unit @ unit.T).fill_diagonal_(-2).argmax(-1)
