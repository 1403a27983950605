"""Where to compute, and in which precision."""

from __future__ import annotations

import torch

# The dtype of everything that a precision does not name: fp8 is that of most products alone.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}


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


def resolve_precision(precision: str, device: torch.device) -> str:
    """`precision`; for "auto" bf16 where the device has bf16 matrix units (AMX, sm_80), else fp32.

    Raises:
        ValueError: unknown precision.
    """
    if precision == "auto":
        if device.type == "cuda":
            matrix_units = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            matrix_units = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        return "bf16" if matrix_units else "fp32"
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}; known: auto, {', '.join(DTYPES)}")
    return precision
