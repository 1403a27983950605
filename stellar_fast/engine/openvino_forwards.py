"""The engine's two paths as graphs: `encode`, whole or in three parts, and `reconstruct`.

Most engines encode one kind of pixels to one set of outputs, by one graph. Where there are more
kinds, what comes before the blocks depends on the dtype of the pixels, what comes behind them on
the outputs that are asked for, and in between one graph serves all, and packs the weights once. The
parts give the bits that the whole does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..weights.packed import DecoderWeights, EncoderWeights, position_code
from . import decoder, encoder
from .encoder import OUTPUTS, with_parts
from .ops import Ops

if TYPE_CHECKING:
    from .openvino_graphs import OpenVINORunner

FACTORS = ("spatial", "sparse")  # of `lowrank`
SETS_KEPT = 4  # of outputs


def encode(
    runner: OpenVINORunner,
    ops: Ops,
    weights: EncoderWeights,
    config: ModelConfig,
    images: Tensor,
    table: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
    out: Mapping[str, Tensor],
) -> None:
    """Fills `out`. `lowrank` is the float32 product of the other two, whatever the precision; where
    the graph would take it in bfloat16, PyTorch does it.

    Args:
        images: (B, 3, H, W), uint8 or floats in [0, 1].
        table: of that size, as `encoder.encode` takes it.
        shapes: of each output of one image.
        out: contiguous, of any float dtype, by the outputs' names.
    """
    apart = "lowrank" in out and runner.precision != "fp32"
    needed = with_parts(out) & set(OUTPUTS)
    if apart:
        needed = (needed | set(FACTORS)) - {"lowrank"}
    given = dict(out)
    for name in needed:
        exact = apart and name in FACTORS
        if name not in given or (exact and given[name].dtype != torch.float32):
            given[name] = torch.empty((len(images), *shapes[name]), dtype=torch.float32)
    names = tuple(name for name in OUTPUTS if name in needed)
    width, tokens = config.backbone.hidden_size, config.num_sparse_tokens

    parts = {name: given[name] for name in names}
    pixels = [(images, (-1, 3, -1, -1)), (table, (-1, width))]

    def whole(images: Any, table: Any) -> Mapping[str, Any]:
        return encoder.encode(ops, weights, config, images, table, names, torch.float32)

    def embed(images: Any, table: Any) -> Mapping[str, Any]:
        return {"x": encoder.embed(ops, weights, config, images, table)[0]}

    def blocks(x: Any) -> Mapping[str, Any]:
        return {"x": encoder.run_blocks(ops, weights, config, x, None)[0]}

    def features(x: Any) -> Mapping[str, Any]:
        patches = x.shape[1] - (1 + tokens)
        return encoder.features_of(ops, weights, config, x, None, patches, names, torch.float32)

    if runner.is_sole("encode", (names, images.dtype)):
        runner.run("encode", whole, pixels, parts, (weights.blocks, weights.last), kept=1)
    else:
        shape, opened = (len(images), len(table) + tokens, width), (-1, -1, width)
        x, y = torch.empty(shape), torch.empty(shape)
        runner.run("embed", embed, pixels, {"x": x})
        if weights.blocks:
            runner.run("blocks", blocks, [(x, opened)], {"x": y}, weights.blocks, kept=1)
        else:  # a model of the last block alone; and the runtime fills nothing by an empty graph
            y = x
        runner.run("features", features, [(y, opened)], parts, weights.last, kept=SETS_KEPT)
    for name in names:
        if name in out and given[name] is not out[name]:
            out[name].copy_(given[name])
    if apart:
        out["lowrank"].copy_(given["spatial"] @ given["sparse"])
    for name, tensor in encoder.derived(given, out).items():
        out[name].copy_(tensor)


def reconstruct(
    runner: OpenVINORunner,
    ops: Ops,
    weights: DecoderWeights,
    config: ModelConfig,
    features: Sequence[Tensor],
    side: int,
    out: Mapping[str, Tensor],
) -> None:
    """Fills `out` with what `decoder.reconstruct` gives of low-rank features (B, P, D), or of
    `spatial` and `sparse`, whose product they are; P is the square of `side`."""
    code = position_code(weights.fourier, side, side).unflatten(0, (side, side))

    def forward(*parts: Any) -> Mapping[str, Any]:
        *features, code = parts
        lowrank = features[0] if len(features) == 1 else ops.reassemble(*features)
        return decoder.reconstruct(ops, weights, config, lowrank, code)

    inputs = [(part, (-1, -1, part.shape[2])) for part in (*features, code)]
    runner.run("reconstruct", forward, inputs, out, weights)
