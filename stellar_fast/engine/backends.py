"""Where to compute, and which ops: PyTorch's own fused paths, or the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch

from . import torch_ops
from .ops import Ops

BACKENDS = ("auto", "triton", "torch")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """`device`, or "cuda" where there is one, with its index.

    Raises:
        ValueError: no such device on this machine.
    """
    try:
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:  # a type that torch does not know, or no index
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from None
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = (
            wanted.index if wanted.index is not None or not count else torch.cuda.current_device()
        )
        if (index or 0) >= count:
            raise ValueError(
                f"device {str(wanted)!r} was asked for, but this machine has {count} usable "
                "CUDA devices"
            )
        return torch.device("cuda", index)
    if wanted.type != "cpu":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(wanted)!r}")
    return wanted


def resolve_backend(backend: str, device: torch.device, precision: str) -> str:
    """`backend`; for "auto" the kernels where they run on matrix units, else PyTorch.

    That is on a CUDA device from sm_80 in bf16, fp16 or fp8. In fp32 the kernels keep to exact
    float32 products, without tensor cores, where PyTorch's are as good.

    Raises:
        ValueError: an unknown backend, or one that cannot compute there or so.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if backend == "auto":
        half = precision in ("bf16", "fp16", "fp8")
        fits = capability is not None and capability >= (8, 0) and has_triton()
        backend = "triton" if half and fits else "torch"
    if backend == "torch":
        if precision == "fp8":
            raise ValueError(
                "precision='fp8' is computed by the Triton kernels, on a CUDA device of compute "
                f"capability 8.9 or later; got {_described(device, capability)}"
            )
        return backend
    if not has_triton():
        raise ValueError("backend='triton' needs the package triton, which is not installed")
    if capability is None:
        from ..kernels.launch import is_interpreted

        if not is_interpreted():
            raise ValueError(
                f"backend='triton' needs a CUDA device, got {device}; set TRITON_INTERPRET=1 "
                "before Python starts to interpret the kernels on the CPU, slowly"
            )
        if precision == "bf16":
            raise ValueError("Triton's interpreter computes bf16 wrongly; take fp32 or fp16")
    elif capability < (8, 0) or (precision == "fp8" and capability < (8, 9)):
        least = "8.9" if precision == "fp8" else "8.0"
        raise ValueError(
            f"backend='triton' with precision={precision!r} needs compute capability {least} or "
            f"later, got {_described(device, capability)}"
        )
    return backend


def _described(device: torch.device, capability: tuple[int, int] | None) -> str:
    if capability is None:
        return str(device)
    return f"{device}, {torch.cuda.get_device_name(device)} with {capability[0]}.{capability[1]}"


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported to find out."""
    from importlib.util import find_spec

    return find_spec("triton") is not None


def ops_of(backend: str) -> Ops:
    """The ops namespace of a resolved backend."""
    if backend == "torch":
        return torch_ops
    from .. import kernels

    return kernels


def prepare(ops: Ops, weights: Any, rows: int) -> Any:
    """`weights` laid out as `ops` read them; `rows` a product will typically have."""
    return torch_ops.prepare(weights, rows) if ops is torch_ops else weights


def restore(ops: Ops, weights: Any) -> Any:
    """`weights` as they were before `prepare`."""
    return torch_ops.restore(weights) if ops is torch_ops else weights
