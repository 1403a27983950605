"""The contract of the ops: what a namespace must have for the forward to run on it.

`reference.ops` says what each computes, with shapes and formulas, and is held to this contract too;
`engine.torch_ops` and `kernels` compute the same within an error budget. Arguments are float
tensors of one dtype on one device unless `reference.ops` says otherwise. Results may be in memory
that an op allocates, never in its arguments'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Ops(Protocol):
    """What every backend has."""

    def patch_embed(
        self,
        images: Tensor,
        weight: Tensor,
        table: Tensor,
        sparse_tokens: Tensor,
        patch_size: int,
        centre: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """The sequence that enters the first block, and the sums of squares of its rows; None from
        a namespace whose `linear` takes its own."""

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        norm_eps: float | None = None,
        sums: Tensor | None = None,
        gelu: bool = False,
    ) -> Tensor: ...

    def linear_residual(
        self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What writes to the residual stream, and its sums as of `patch_embed`."""

    def attention(self, query: Tensor, key_value: Tensor, num_heads: int) -> Tensor: ...

    def norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        lengths: Sequence[int],
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, ...]: ...

    def spatial_map(
        self,
        dense: Tensor,
        sparse: Tensor,
        dense_weight: Tensor,
        dense_bias: Tensor,
        sparse_weight: Tensor,
        sparse_bias: Tensor,
        temperature: float | None,
        *,
        lowrank: bool,
    ) -> tuple[Tensor, Tensor | None]: ...

    def reassemble(self, spatial: Tensor, sparse: Tensor) -> Tensor: ...


class Fp8Ops(Ops, Protocol):
    """What a backend has that computes in FP8: the same, with scales, and `quantize_rows`."""

    def quantize_rows(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        norm_eps: float | None = None,
        sums: Tensor | None = None,
        gelu: bool = False,
        x_scale: Tensor | None = None,
        weight_scale: Tensor | None = None,
        out_scale: float | None = None,
    ) -> Tensor: ...

    def linear_residual(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        *,
        weight_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...

    def attention(
        self, query: Tensor, key_value: Tensor, num_heads: int, *, out_scale: float | None = None
    ) -> Tensor: ...
