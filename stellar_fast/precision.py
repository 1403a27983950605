"""Precisions: their names, their dtypes, and which of them a device computes fastest."""

from __future__ import annotations

import torch

# The dtype of everything that a precision does not name: fp8 is that of most products alone.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}


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
