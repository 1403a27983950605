"""FP8 blocks: e4m3 weights with a scale for each output channel, and static scales of activations.

Behind a norm, rows are quantized as they come, each by its own largest magnitude. What attention
and the MLP's GELU give is quantized by one static scale a layer, since a tile of a product cannot
know its row's largest magnitude. Without any data these scales come from bounds that nothing can
pass: a normalised row has length sqrt(D) at most, so a channel of `W x + b` is at most
`sqrt(D) |w| + |b|`; attention averages values, and GELU only shrinks. Such a bound is loose, but
e4m3 is a floating-point format: what is lost is its smallest numbers, not its precision. Measured
scales (`calibrated`) win them back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .packed import Block, EncoderWeights, Fp8Block, Fp8Linear, Linear

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite e4m3 number
HEADROOM = 2.0  # how far beyond what calibration saw an activation may go before it is clipped


def _quantized(layer: Linear, input_scale: float, dtype: torch.dtype) -> Fp8Linear:
    largest = layer.weight.abs().amax(1).double()
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    weight = (layer.weight.double() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX)
    return Fp8Linear(weight.float().to(FP8), layer.bias.to(dtype), (scale * input_scale).float())


def _bound(layer: Linear, rows: slice = slice(None)) -> float:
    """What no output channel of `rows` can pass, for an input of RMS 1."""
    weight, bias = layer.weight[rows].double(), layer.bias[rows].double()
    width = weight.shape[1]
    return float((torch.linalg.vector_norm(weight, dim=1) * width**0.5 + bias.abs()).max())


def _scale(largest: float) -> float:
    return largest / FP8_MAX if largest > 0 else 1.0


def quantize_block(block: Block, dtype: torch.dtype) -> Fp8Block:
    """`block`, best in float64, with FP8 products and biases in `dtype`."""
    width = block.qkv.weight.shape[1]
    attended = _scale(_bound(block.qkv, slice(2 * width, None)))
    hidden = _scale(_bound(block.fc1))
    return Fp8Block(
        qkv=_quantized(block.qkv, 1.0, dtype),
        proj=_quantized(block.proj, attended, dtype),
        fc1=_quantized(block.fc1, 1.0, dtype),
        fc2=_quantized(block.fc2, hidden, dtype),
        attended_scale=attended,
        hidden_scale=hidden,
    )


def _rescaled(block: Fp8Block, attended: float, hidden: float) -> Fp8Block:
    proj, fc2 = block.proj, block.fc2
    return dataclasses.replace(
        block,
        proj=dataclasses.replace(proj, scale=proj.scale * (attended / block.attended_scale)),
        fc2=dataclasses.replace(fc2, scale=fc2.scale * (hidden / block.hidden_scale)),
        attended_scale=attended,
        hidden_scale=hidden,
    )


def calibrated(
    ops: Any, weights: EncoderWeights, run: Callable[[Any, EncoderWeights], object]
) -> EncoderWeights:
    """`weights` with the static scales that the largest activations of a run ask for.

    Args:
        run: encodes images with the ops and weights that it is given.
    """
    largest: list[Tensor] = []

    def observed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def op(*arguments: Any, out_scale: float | None = None, **keywords: Any) -> Tensor:
            if out_scale is None:
                return function(*arguments, **keywords)
            exact = function(*arguments, **keywords)
            largest.append(exact.abs().amax().float())
            return (exact.float() / out_scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)

        return op

    watched = SimpleNamespace(**{name: op for name, op in vars(ops).items() if callable(op)})
    watched.attention, watched.linear = observed(ops.attention), observed(ops.linear)
    run(watched, weights)

    # Two of them a block, in order; a run of several batches gives as many rounds.
    quantized = sum(isinstance(block, Fp8Block) for block in weights.blocks)
    if not quantized or not largest:
        return weights
    peaks = torch.stack(largest).reshape(-1, quantized, 2).amax(0).tolist()
    scales = iter([[_scale(HEADROOM * peak) for peak in pair] for pair in peaks])
    return dataclasses.replace(
        weights,
        blocks=tuple(
            _rescaled(block, *next(scales)) if isinstance(block, Fp8Block) else block
            for block in weights.blocks
        ),
    )
