"""Arithmetic of Triton's interpreter that is put right for the tests: FP8 casts and products.

Its conversion to FP8 (3.9) rounds ties away from zero and drops the carry into the exponent: 7.9
comes out as 4. GPUs round ties to even.

Its products are NumPy's, which on some processors sum a row up in another order at another place of
its tile. On a GPU all rows of a tile are summed up alike, which batch invariance rests on. Added
one after another, they are the same bits on every processor.
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


def _numbers(operand, dtype: np.dtype) -> np.ndarray:
    """The operand of a product, in the dtype of its accumulator."""
    values = operand.data
    if operand.dtype == tl.float8e4nv:
        values = _convert_float(values, operand.dtype, tl.float16, None).view(np.float16)
    return values.astype(dtype)


def _dot(builder, a, b, acc, input_precision, max_num_imprecise_acc):
    left, right = (_numbers(operand, acc.data.dtype) for operand in (a, b))
    total = np.zeros_like(acc.data)
    product = np.empty_like(total)
    for k in range(left.shape[1]):
        total += np.multiply(left[:, k, None], right[k], out=product)
    return interpreter.TensorHandle(total + acc.data, acc.dtype.scalar)


def install() -> None:
    interpreter._convert_float = _converted
    interpreter.InterpreterBuilder.create_dot = _dot
