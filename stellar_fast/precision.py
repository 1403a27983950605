"""Precisions: their names and dtypes, and what a device has for them."""

from __future__ import annotations

import torch

# The dtype of everything that a precision does not name: fp8 and int8 are those of most products.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
    "int8": torch.float32,
}
# By the names of `torch.cpu.get_capabilities`: x86's, then ARM's.
INT8_UNITS = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "dot")


def check_precision(precision: str) -> str:
    """`precision`, "auto" or one of `DTYPES`.

    Raises:
        ValueError: unknown precision.
    """
    if precision != "auto" and precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}; known: auto, {', '.join(DTYPES)}")
    return precision


def has_int8_units() -> bool:
    """Whether this processor multiplies 8-bit integers faster than floats."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in INT8_UNITS)
