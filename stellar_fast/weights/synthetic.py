"""Seeded random weights of sane magnitudes, for demos, benchmarks and tests without a download."""

from __future__ import annotations

import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .names import Shapes

TOKEN_SCALE = 0.7
# Small, so that what a patch shows counts for more than where it is.
POSITION_SCALE = 0.1
BIAS_SCALE = 0.02
GAIN_SCALE = 0.1
# Above 1, so that attention prefers some tokens, as a trained model's does.
QUERY_KEY_GAIN = 1.5
# What a block adds to the residual stream; below 1, or the tokens of a deep model become all alike.
BLOCK_SCALE = 0.25
# Directions that the spatial map compares patches and sparse tokens in. Random vectors are nearly
# orthogonal in many dimensions, which would leave the map flat.
MAP_RANK = 16

_TOKENS = ("cls_token", "sparse_tokens")
_MAP_PROJECTIONS = ("dense_proj.weight", "sparse_proj.weight")
_UNIT = (
    "positional_encoding_gaussian_matrix",
    "clustering_head.layer.weight",
    "cls_cluster_head.layer.weight",
    "teacher_head.layer.weight",
    "teacher_cls_head.layer.weight",
    "embedding.weight",
)


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    # The two projections of the spatial map share a draw: patches and tokens meet in one space.
    source = "dense_proj.weight" if name in _MAP_PROJECTIONS else name
    stream = np.random.Generator(np.random.PCG64([seed, zlib.crc32(source.encode())]))
    draw = torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))
    if name.endswith(_UNIT):
        return draw
    if name.endswith(_TOKENS):
        return draw.mul_(TOKEN_SCALE)
    if name.endswith("position_embeddings"):
        return draw.mul_(POSITION_SCALE)
    if name.endswith(".bias"):
        return draw.mul_(BIAS_SCALE)
    if len(shape) == 1:
        return draw.mul_(GAIN_SCALE).add_(1)
    if name in _MAP_PROJECTIONS:
        draw = (draw[:, :MAP_RANK] @ draw[:MAP_RANK]).div_(math.sqrt(MAP_RANK))
    gain = 1.0
    if name.endswith((".query.weight", ".key.weight")):
        gain = QUERY_KEY_GAIN
    elif name.endswith(".output.dense.weight"):
        gain = BLOCK_SCALE
    return draw.mul_(gain / math.sqrt(math.prod(shape[1:])))


def synthetic_state(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """A float32 state dict of these names and shapes.

    Every tensor has a stream of its own, keyed by seed and name: asking for fewer tensors changes
    none of the others.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tensors = pool.map(lambda item: _tensor(item[0], item[1], seed), shapes.items())
        return dict(zip(shapes, tensors, strict=True))
