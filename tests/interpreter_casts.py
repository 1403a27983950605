"""Rounds to FP8 in Triton's interpreter as GPUs do.

Its own conversion (3.9) rounds ties away from zero and drops the carry into the exponent: 7.9 comes
out as 4. The casts are the interpreter's, not the kernels', so they are put right here.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float


def _converted(values, input_dtype, output_dtype, rounding_mode):
    if output_dtype != tl.float8e4nv or input_dtype not in (tl.float32, tl.float16):
        return _convert_float(values, input_dtype, output_dtype, rounding_mode)
    numbers = np.ascontiguousarray(values).view(
        np.float32 if input_dtype == tl.float32 else np.float16
    )
    return torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def install() -> None:
    interpreter._convert_float = _converted
