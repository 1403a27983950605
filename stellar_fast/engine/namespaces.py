"""The ops of each backend, and what their weights and forwards need."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ..config import ModelConfig
from ..weights.packed import Linear, map_nodes
from ..weights.residency import in_file
from . import torch_ops
from .ops import Ops

if TYPE_CHECKING:
    from .openvino_graphs import OpenVINORunner

TYPICAL_BATCH = 8  # images in the product that weights are laid out for


def ops_of(backend: str) -> Ops:
    """The ops namespace of a resolved backend."""
    if backend == "torch":
        return torch_ops
    if backend == "openvino":
        from . import openvino_ops

        return cast(Ops, openvino_ops)  # over the nodes of a graph, in the place of tensors
    from .. import kernels

    return kernels


def float_runner(backend: str, precision: str) -> OpenVINORunner | None:
    """`runner_of` for a precision that names a float."""
    if backend != "openvino":
        return None
    from .openvino_graphs import OpenVINORunner

    return OpenVINORunner(precision)


def layout(backend: str, rows: int) -> Callable[[Linear], Linear]:
    """What puts the weights of one layer as a back end reads them, and leaves those that are so
    already; `rows` a product will typically have."""
    if backend == "torch":
        return functools.partial(torch_ops.laid_out, rows=rows)
    if backend == "openvino":
        return lambda layer: replace(layer, weight=in_file(layer.weight))
    return lambda layer: layer


def typical_rows(config: ModelConfig, max_batch: int) -> int:
    """Of the product that weights are laid out for."""
    return min(max_batch, TYPICAL_BATCH) * config.sequence_length


def prepare(backend: str, weights: Any, rows: int) -> Any:
    """`weights`, every layer in the layout of a back end."""
    return map_nodes(weights, Linear, layout(backend, rows))


def restore(backend: str, weights: Any) -> Any:
    """`weights` as they were before `prepare`."""
    return torch_ops.restore(weights) if backend == "torch" else weights
