"""Products on 8-bit integers: weights by output channel, inputs by static scales that images give.

Three things keep the error down. Outlying channels of an input move into the weights: input channel
c is multiplied by 1 / s_c and its column of weights by s_c, made of how far the channel and its
column reach; behind a norm that is one more factor, behind attention it is in the values already.
The range of what enters is the one with the least error behind the weights, not the widest: a rare
number is rather cut off than all others made coarse. And the mean of what rounding does to each
output goes into the bias. Queries meet keys on integers too, balanced channel by channel; how much
of which value attention takes stays in floats, of which most are far below 1 / 256.

Scales are sought block by block on a sample of the rows that float32 brings there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import (
    EncoderWeights,
    Int8Block,
    Int8LastBlock,
    Int8Linear,
    Int8Scales,
    LastBlock,
    Linear,
)

STEPS = 255  # of an input between the ends of its range
LARGEST = 127  # weight
ROWS = 512  # of each input that scales are sought on
OF_TOKENS = 3  # one of so many of them is that of a CLS or sparse token, which are few and differ
POWERS = (0.35, 0.5, 0.65)  # of the input's reach in s_c, the rest the weights'
INPUT_CUTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the whole range
WEIGHT_CUTS = (1.0, 0.94, 0.88, 0.82)
TINY = 1e-8
UNSCALED = ("proj", "fc2")  # what has no factors of its input's channels, once all is done


def _values(x: Tensor, reach: Tensor) -> Tensor:
    low, high = reach.tolist()
    step = (high - low) / STEPS
    return x.sub(low).div_(step).round_().clamp_(0, STEPS).mul_(step).add_(low)


def _reach(x: Tensor, whole: Tensor, importance: Tensor) -> Tensor:
    """The part of `whole` (low, high) that x (R, I) is rounded in with the least squared error,
    each channel's times its importance."""
    errors = [(_values(x, whole * cut) - x).square().sum(0) @ importance for cut in INPUT_CUTS]
    return whole * INPUT_CUTS[int(torch.stack(errors).argmin())]


def _integers(weight: Tensor, step: Tensor) -> Tensor:
    return weight.div(step[:, None]).round_().clamp_(-LARGEST, LARGEST)


def _step(weight: Tensor, squares: Tensor) -> Tensor:
    """For each row of (O, I) the step of its integers with the least error behind inputs whose
    channels have these mean squares."""
    whole = weight.abs().amax(1).clamp_min(TINY) / LARGEST
    errors = []
    for cut in WEIGHT_CUTS:
        step = whole * cut
        rounded = _integers(weight, step).mul_(step[:, None])
        errors.append(rounded.sub_(weight).square_() @ squares)
    return whole * torch.tensor(WEIGHT_CUTS)[torch.stack(errors).argmin(0)]


@dataclasses.dataclass
class Inputs:
    """What entered a product: a sample of rows, each (R, I), and the ends of every channel (I,)."""

    rows: list[Tensor]
    low: Tensor
    high: Tensor


def quantized(layer: Linear, seen: Inputs, scaled: bool = True) -> Int8Linear:
    """`layer`, in float32, on integers; `scaled` if its input channels may have factors."""
    inputs = torch.cat(seen.rows)
    exact = inputs @ layer.weight.T
    reach = torch.maximum(-seen.low, seen.high).clamp_min(TINY)
    of_weight = layer.weight.abs().amax(0).clamp_min(TINY)
    factors = [of_weight ** (1 - power) / reach**power for power in POWERS]
    errors, found = [], []
    for channels in factors if scaled else [torch.ones_like(reach)]:
        weight, x = layer.weight / channels, inputs * channels
        whole = torch.stack([(seen.low * channels).amin(), (seen.high * channels).amax()])
        limits = _reach(x, whole, weight.square().sum(0))
        step = weight.abs().amax(1).clamp_min(TINY) / LARGEST
        rounded = _integers(weight, step).mul_(step[:, None])
        error = exact - _values(x, limits) @ rounded.T
        errors.append((error - error.mean(0)).square().sum().item())
        found.append((channels, limits))
    channels, limits = found[errors.index(min(errors))]
    weight, x = layer.weight / channels, inputs * channels
    step = _step(weight, x.square().mean(0))
    integers = _integers(weight, step)
    lost = (exact - _values(x, limits) @ integers.mul(step[:, None]).T).mean(0)
    scales = Int8Scales(step, channels if scaled else None, limits)
    return Int8Linear(integers.to(torch.int8), layer.bias + lost, scales)


def quantized_encoder(
    weights: EncoderWeights,
    chunks: Sequence[Tensor],
    run: Callable[[Any, Any, Tensor], Tensor],
    ops: ModuleType,
) -> EncoderWeights:
    """`weights` with the products of every block on integers.

    Args:
        weights: in float32.
        chunks: each (B, S, D), what enters the first block.
        run: (ops, block, chunk) -> what leaves it.
        ops: float ops to run them by.
    """
    tokens = len(weights.sparse_tokens)
    total = sum(map(len, chunks)), chunks[0].shape[1] - tokens - 1
    every = (
        max(1, total[0] * total[1] * OF_TOKENS // (ROWS * (OF_TOKENS - 1))),
        max(1, total[0] * (1 + tokens) * OF_TOKENS // ROWS),
    )

    def sample(x: Tensor) -> Tensor:
        patches = x[:, 1:-tokens].flatten(0, 1)[:: every[0]]
        return torch.cat(
            [patches, torch.cat([x[:, :1], x[:, -tokens:]], 1).flatten(0, 1)[:: every[1]]]
        )

    blocks: list[Any] = []
    for block in (*weights.blocks, weights.last):
        seen: dict[Hashable, Inputs] = {}
        chunks = [run(_watched(ops, seen, sample), block, chunk) for chunk in chunks]
        # Behind GELU factors would be one more product for each of its many numbers.
        layers = {
            name: quantized(layer, seen[id(layer.weight)], scaled=name != "fc2")
            for name, layer in _layers(block).items()
        }
        channels, reach = scores(seen["queries"], seen["keys"])
        blocks.append(_unscaled_attention(_kind(block)(**layers, score_reach=reach), channels))
    return dataclasses.replace(weights, blocks=tuple(blocks[:-1]), last=blocks[-1])


def _layers(block: Any) -> dict[str, Linear]:
    return {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}


def _kind(block: Any) -> Callable[..., Int8Block | Int8LastBlock]:
    return Int8LastBlock if isinstance(block, LastBlock) else Int8Block


def scores(queries: Inputs, keys: Inputs) -> tuple[Tensor, Tensor]:
    """How queries, already scaled, meet keys on integers.

    Returns:
        (D,), what queries are multiplied and keys divided by, so that each channel of both reaches
        as far; and the `score_reach` of a block, each with the least error behind the other factor.
    """
    ends = [torch.maximum(-seen.low, seen.high).clamp_min(TINY) for seen in (queries, keys)]
    channels = (ends[1] / ends[0]).sqrt()
    q, k = torch.cat(queries.rows) * channels, torch.cat(keys.rows) / channels
    whole = (ends[0] * channels).amax() * torch.tensor([-1.0, 127 / 128])
    limits = _reach(q, whole, k.square().sum(0)), _reach(k, whole, q.square().sum(0))
    return channels, -torch.stack([low for low, _ in limits])


def _unscaled_attention(block: Any, channels: Tensor) -> Any:
    """`block` with the factors of proj's inputs in the values that attention averages, and those of
    queries and keys, `channels`, in what makes them: no product more, and the same result."""
    values = block.proj.scales.channels
    factors = {"query": channels, "key_value": torch.cat([1 / channels, values])}
    if isinstance(block, Int8Block):
        factors = {"qkv": torch.cat([channels, 1 / channels, values])}
    made = {}
    for name, factor in factors.items():
        maker = getattr(block, name)
        scales = dataclasses.replace(maker.scales, step=maker.scales.step * factor)
        made[name] = dataclasses.replace(maker, bias=maker.bias * factor, scales=scales)
    scales = dataclasses.replace(block.proj.scales, channels=None)
    return dataclasses.replace(block, **made, proj=dataclasses.replace(block.proj, scales=scales))


def _watched(
    ops: ModuleType, seen: dict[Hashable, Inputs], sample: Callable[[Tensor], Tensor]
) -> Any:
    """`ops` that leave in `seen` what enters a product, by its weight's id, and the "queries", as
    they are scaled, and "keys" of attention."""

    def note(key: Hashable, x: Tensor) -> None:
        low, high = x.flatten(0, -2).aminmax(dim=0)
        found = seen.setdefault(key, Inputs([], low, high))
        found.rows.append(sample(x))
        found.low, found.high = torch.minimum(found.low, low), torch.maximum(found.high, high)

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        def op(x: Tensor, weight: Tensor, *arguments: Any, **keywords: Any) -> Any:
            eps = keywords.get("norm_eps")
            entering = x if eps is None else F.layer_norm(x, x.shape[-1:], None, None, eps)
            note(id(weight), entering)
            return function(x, weight, *arguments, **keywords)

        return op

    def attention(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
        width = query.shape[-1]
        note("queries", query * (width // num_heads) ** -0.5)
        note("keys", key_value[..., :width])
        return ops.attention(query, key_value, num_heads)

    watched = SimpleNamespace(**{name: op for name, op in vars(ops).items() if callable(op)})
    watched.linear, watched.linear_residual = watch(ops.linear), watch(ops.linear_residual)
    watched.attention = attention
    return watched


def unmeasured(encoder: EncoderWeights) -> EncoderWeights:
    """`encoder` on the meta device as `quantized_encoder` would leave it: shapes and dtypes."""

    def layer(linear: Linear, scaled: bool) -> Int8Linear:
        out, depth = linear.weight.shape
        channels: Tensor | None = torch.empty(depth) if scaled else None
        scales = Int8Scales(torch.empty(out), channels, torch.empty(2))
        return Int8Linear(linear.weight.to(torch.int8), linear.bias, scales)

    def block(node: Any) -> Any:
        layers = {n: layer(each, n not in UNSCALED) for n, each in _layers(node).items()}
        return _kind(node)(**layers, score_reach=torch.empty(2))

    return dataclasses.replace(
        encoder, blocks=tuple(map(block, encoder.blocks)), last=block(encoder.last)
    )


def is_quantized(weights: EncoderWeights) -> bool:
    """Whether the products of `weights` are on integers already."""
    return isinstance(weights.last.proj, Int8Linear)
