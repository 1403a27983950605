"""Which patches of a view the encoder gets to see."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAUSSIAN_PROBABILITY = 0.5
GAUSSIAN_SIGMA = (0.1, 0.5)  # of the grid's side
FOCAL_MODES = ("gaussian", "block", None)


def random_masking(
    batch: int,
    patches: int,
    ratio: float,
    focal_mode: str | None = None,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws the patches to keep: those with the lowest of uniform noise that `focal_mode` biases.

    Args:
        batch: views.
        patches: P of each; for both focal modes a square number, the grid row by row.
        ratio: share of the patches to drop, in [0, 1).
        focal_mode: None; "gaussian", which for half of the views makes patches around a random cell
            likelier (`gaussian_focus`); "block", which keeps a whole random square of each view
            (`block_focus`).
        generator: of `device`; None draws from torch's global stream.

    Returns:
        The patches kept, (batch, kept) int64 with kept = int(P * (1 - ratio)), and the others,
        (batch, P - kept): each with the lowest noise first.

    Raises:
        ValueError: an argument is out of range, or no patch would be kept.
    """
    if focal_mode not in FOCAL_MODES:
        raise ValueError(f"focal_mode must be one of {FOCAL_MODES}, got {focal_mode!r}")
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"masking ratio must be in [0, 1), got {ratio!r}")
    kept = int(patches * (1 - ratio))
    if kept < 1:
        raise ValueError(f"a masking ratio of {ratio} keeps none of {patches} patches")
    noise = torch.rand(batch, patches, device=device, generator=generator)
    if focal_mode == "gaussian":
        noise = gaussian_focus(noise, generator=generator)
    elif focal_mode == "block":
        noise = block_focus(noise, kept, generator=generator)
    kept_first = noise.argsort(dim=1)
    return kept_first[:, :kept], kept_first[:, kept:]


def gaussian_focus(noise: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """`noise` less a Gaussian bump of height 1 at a random cell, in half of the views.

    Sigma is uniform between 0.1 and 0.5 of the grid's side.

    Args:
        noise: (B, P) in [0, 1), P a square number.

    Returns:
        (B, P).

    Raises:
        ValueError: P is no square number.
    """
    batch, side, device = noise.shape[0], _side(noise), noise.device
    cells = torch.arange(side, device=device)

    def cell() -> Tensor:
        return torch.randint(0, side, (batch, 1), device=device, generator=generator)

    column, row = cell(), cell()
    sigma = torch.empty(batch, 1, device=device).uniform_(*GAUSSIAN_SIGMA, generator=generator)
    squared = (cells - row).square().unsqueeze(2) + (cells - column).square().unsqueeze(1)
    bump = (-squared.flatten(1) / (2 * (sigma * side).square())).exp()
    focused = torch.rand(batch, 1, device=device, generator=generator) < GAUSSIAN_PROBABILITY
    return torch.where(focused, noise - bump, noise)


def block_focus(noise: Tensor, kept: int, *, generator: torch.Generator | None = None) -> Tensor:
    """`noise` with a random square of side int(sqrt(kept)) set to zero in every view.

    Args:
        noise: (B, P) in [0, 1), P a square number.
        kept: patches that will be kept, 1 to P.

    Returns:
        (B, P).

    Raises:
        ValueError: P is no square number.
    """
    batch, side, device = noise.shape[0], _side(noise), noise.device
    block = math.isqrt(kept)
    corner = torch.randint(
        0, side - block + 1, (batch, 2), device=device, generator=generator
    ).unsqueeze(2)
    offset = torch.arange(side, device=device) - corner  # (B, 2, side): from the corner, per axis
    inside = (offset >= 0) & (offset < block)
    square = inside[:, 0].unsqueeze(2) & inside[:, 1].unsqueeze(1)
    return noise.masked_fill(square.flatten(1), 0.0)


def _side(noise: Tensor) -> int:
    side = math.isqrt(noise.shape[1])
    if side * side != noise.shape[1]:
        raise ValueError(
            f"focal masking needs a square grid of patches, and {noise.shape[1]} is no square "
            "number; use focal_mode=None"
        )
    return side
