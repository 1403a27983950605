"""Triton kernels, one op a file, with the names and signatures of `reference.ops`.

Installed as `stellar_fast.kernels`. Imported only where a Triton backend is asked for.
"""

from .attention import attention
from .linear import linear, linear_residual
from .norm import norm, quantize_rows
from .patch_embed import patch_embed
from .reassemble import reassemble
from .spatial_map import spatial_map

__all__ = [
    "attention",
    "linear",
    "linear_residual",
    "norm",
    "patch_embed",
    "quantize_rows",
    "reassemble",
    "spatial_map",
]
