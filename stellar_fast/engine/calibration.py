"""The scales of an int8 encoder, from what images bring forth in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..config import ModelConfig
from ..weights.int8 import quantized_encoder
from ..weights.packed import EncoderWeights, LastBlock
from . import torch_ops
from .encoder import OUTPUTS, embed, run_block, run_last_block, wanted_rows


def int8_of(
    weights: EncoderWeights, config: ModelConfig, images: Sequence[Tensor], table: Tensor
) -> EncoderWeights:
    """`weights`, in float32 on the CPU, with the products of the blocks on 8-bit integers.

    Args:
        images: batches (B, 3, H, W) of one size, uint8 or floats in [0, 1].
        table: of that size, as `encoder.encode` takes it.
    """
    heads = config.backbone.num_attention_heads
    rows = wanted_rows(OUTPUTS, table.shape[0] - 1, config.num_sparse_tokens).values()

    def run(ops: Any, block: Any, x: Tensor) -> Tensor:
        if isinstance(block, LastBlock):
            return run_last_block(ops, block, x, None, rows, heads)
        return run_block(ops, block, x, None, heads)[0]

    chunks = [embed(torch_ops, weights, config, chunk, table)[0] for chunk in images]
    return quantized_encoder(weights, chunks, run, torch_ops)
