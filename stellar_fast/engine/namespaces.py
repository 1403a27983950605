"""The ops of each backend, and what their weights and forwards need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from . import torch_ops
from .ops import Ops

if TYPE_CHECKING:
    from .openvino_graphs import OpenVINORunner


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


def prepare(ops: Ops, weights: Any, rows: int) -> Any:
    """`weights` laid out as `ops` read them; `rows` a product will typically have."""
    return torch_ops.prepare(weights, rows) if ops is torch_ops else weights


def restore(ops: Ops, weights: Any) -> Any:
    """`weights` as they were before `prepare`."""
    return torch_ops.restore(weights) if ops is torch_ops else weights
