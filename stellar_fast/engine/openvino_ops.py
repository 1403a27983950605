"""The ops of the OpenVINO backend: those of `reference.ops` over the nodes of a graph.

Run over `Node`s instead of tensors, the forward of `encoder.py` or `decoder.py` computes nothing:
it leaves behind the graph that does, which `openvino_graphs.py` compiles and runs. Batch, size and
number of patches stay open in it. Weights are constants that share the engine's own memory; which
precision the runtime computes in is for the compiler to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import NORMALIZE_EPS
from ..weights.packed import Int8Scales
from .openvino_runtime import op, ov

INT8_LEVELS = 256
_TYPES = {torch.bfloat16: ov.Type.bf16, torch.float16: ov.Type.f16}


def _constant(value: Tensor) -> ov.Node:
    """A float constant on the memory of `value`, which the graph keeps alive, of its dtype.

    NumPy has no bfloat16, so half precisions travel as 16-bit integers under their own type.
    """
    value = value.detach().contiguous()
    kind = _TYPES.get(value.dtype)
    if kind is None:
        return op.constant(value.numpy(), shared_memory=True)
    bits = value.view(torch.int16).numpy().view(np.uint16)
    return ov.op.Constant(ov.Tensor(bits, ov.Shape(list(value.shape)), kind), shared_memory=True)


def constant(value: Tensor) -> ov.Output:
    """A constant that is float32 to its users: of half precision for small ones alone, since the
    runtime keeps what it converts."""
    node = _constant(value)
    return (op.convert(node, "f32") if value.dtype in _TYPES else node).output(0)


def _integers(*values: int) -> ov.Output:
    return op.constant(np.array(values, np.int64)).output(0)


def _number(value: float) -> ov.Output:
    return op.constant(np.float32(value)).output(0)


class Size:
    """A length that is known when the graph runs, and an integer more; two that differ by an
    integer have that as their difference.

    Args:
        axis: (1,) int64, the length of an axis.
    """

    def __init__(self, axis: ov.Output, more: int = 0) -> None:
        self.axis, self.more = axis, more

    def __add__(self, other: int) -> Size:
        return Size(self.axis, self.more + other)

    __radd__ = __add__

    def __sub__(self, other: Length) -> Length:
        if not isinstance(other, Size):
            return self + -other
        if self.axis is not other.axis:
            raise TypeError("these two lengths have nothing to do with each other")
        return self.more - other.more

    @property
    def output(self) -> ov.Output:
        """(1,) int64."""
        if not self.more:
            return self.axis
        return op.add(self.axis, _integers(self.more)).output(0)


Length = int | Size


def _shape_of(lengths: Sequence[Length]) -> ov.Output:
    """Lengths as the argument of a reshape, a slice or a broadcast: one int64 for each."""
    if not any(isinstance(length, Size) for length in lengths):
        return _integers(*(length for length in lengths if isinstance(length, int)))
    parts = [x.output if isinstance(x, Size) else _integers(x) for x in lengths]
    return op.concat(parts, 0).output(0)


class Node:
    """What of a tensor the forwards use, of the output of a graph's operation.

    Attributes:
        output: OpenVINO's.
        dtype: of the tensor that this stands for; all floats are float32 in the graph.
        part: of which node this is which part of the last axis, if it is one.
        columns: (start, stop) -> that part of the last axis, computed alone, where that can be.
        heads: (B, heads, S, width of one), what this was merged from, if it was.
    """

    def __init__(self, output: Any, dtype: torch.dtype = torch.float32) -> None:
        self.output: ov.Output = output if isinstance(output, ov.Output) else output.output(0)
        self.dtype = dtype
        self.part: tuple[Node, int, int] | None = None
        self.columns: Callable[[int, int], Node] | None = None
        self.heads: ov.Node | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """Lengths of the axes, those that are open as `Size`."""
        found: list[Length] = []
        for axis, length in enumerate(self.output.partial_shape):
            if length.is_static:
                found.append(length.get_length())
            else:
                every = op.shape_of(self.output, "i64")
                found.append(Size(op.gather(every, _integers(axis), _integers(0)).output(0)))
        return tuple(found)

    def __getitem__(self, index: Any) -> Node:
        index = index if isinstance(index, tuple) else (index,)
        if index[0] is Ellipsis:
            index = (slice(None),) * (len(self.output.partial_shape) - 1) + index[1:]
        node = self
        for axis, part in enumerate(index):
            if part != slice(None):
                node = node._sliced(axis, part)
        return node

    def _sliced(self, axis: int, part: slice) -> Node:
        length = self.shape[axis]
        start, stop = part.start or 0, length if part.stop is None else part.stop
        begin, end = _shape_of((start,)), _shape_of((stop,))
        node = Node(op.slice(self.output, begin, end, _integers(1), _integers(axis)), self.dtype)
        if axis == len(self.output.partial_shape) - 1:
            node.part = (self, start, stop)
        return node

    def transpose(self, one: int, other: int) -> Node:
        order = list(range(len(self.output.partial_shape)))
        order[one], order[other] = order[other], order[one]
        return self.permute(*order)

    def permute(self, *order: int) -> Node:
        return Node(op.transpose(self.output, _integers(*order)), self.dtype)

    def contiguous(self) -> Node:
        return self

    def to(self, dtype: torch.dtype) -> Node:
        """Another float: the runtime's to choose."""
        return self

    def flatten(self, start: int, stop: int) -> Node:
        shape = self.shape
        return self._reshaped((*shape[:start], -1, *shape[stop + 1 :]))

    def unflatten(self, axis: int, lengths: Sequence[Length]) -> Node:
        shape = self.shape
        return self._reshaped((*shape[:axis], *lengths, *shape[axis + 1 :]))

    def _reshaped(self, lengths: Sequence[Length]) -> Node:
        return Node(op.reshape(self.output, _shape_of(lengths), False), self.dtype)

    def expand(self, *lengths: Length) -> Node:
        """As of a tensor, a length of -1 leaves an axis as it is."""
        shape = _shape_of([1 if length == -1 else length for length in lengths])
        return Node(op.broadcast(self.output, shape, broadcast_spec="BIDIRECTIONAL"), self.dtype)

    def argmax(self, axis: int) -> Node:
        """The first of the largest."""
        best = op.topk(
            self.output, op.constant(np.int64(1)), axis, "max", "value", "i64", stable=True
        )
        return Node(op.squeeze(best.output(1), _integers(axis)), torch.int64)

    def __add__(self, other: Node) -> Node:
        return Node(op.add(self.output, other.output))

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, arguments: tuple = (), keywords: dict | None = None
    ) -> Node:
        return _FUNCTIONS[function](*arguments, **(keywords or {}))


def _cat(nodes: Sequence[Node], dim: int) -> Node:
    return Node(op.concat([node.output for node in nodes], dim))


def _conv2d(x: Node, weight: Tensor, bias: Tensor | None = None, padding: int = 0) -> Node:
    pads = [padding, padding]
    y = op.convolution(x.output, constant(weight), [1, 1], pads, pads, [1, 1])
    return Node(y if bias is None else op.add(y, constant(bias[:, None, None])))


def _conv_transpose2d(x: Node, weight: Tensor, bias: Tensor, *, stride: int) -> Node:
    y = op.convolution_backprop_data(x.output, constant(weight), [stride, stride])
    return Node(op.add(y, constant(bias[:, None, None])))


def _group_norm(x: Node, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Node:
    return Node(op.group_normalization(x.output, constant(weight), constant(bias), groups, eps))


def _interpolate(x: Node, *, scale_factor: float, mode: str, **_: Any) -> Node:
    axes = _integers(2, 3)
    scales = op.constant(np.array([scale_factor] * 2, np.float32))
    return Node(
        op.interpolate(
            x.output,
            scales,
            mode,
            "scales",
            axes=axes,
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    )


def _embedding(codes: Node, table: Tensor, **_: Any) -> Node:
    return Node(op.gather(constant(table), codes.output, _integers(0)))


# What the forwards take of torch itself; it hands on all of its arguments, defaults too.
_FUNCTIONS: dict[Callable, Callable[..., Node]] = {
    torch.cat: _cat,
    torch.clamp: lambda x, low, high: Node(op.clamp(x.output, low, high)),
    F.conv2d: _conv2d,
    F.conv_transpose2d: _conv_transpose2d,
    F.embedding: _embedding,
    F.group_norm: _group_norm,
    F.interpolate: _interpolate,
    F.silu: lambda x, inplace: Node(op.swish(x.output)),
}


def _normalised(x: Any, eps: float) -> ov.Node:
    return op.mvn(x, _integers(-1), True, eps, "inside_sqrt")


def _rounded(x: Node, scales: Int8Scales) -> ov.Node:
    """x in the 256 values that the runtime turns into integers, every channel times its own; heads
    before they are merged, so that integers are."""
    low, high = map(_number, scales.reach.tolist())
    if scales.channels is not None:
        y = op.multiply(x.output, constant(scales.channels))
        return op.fake_quantize(y, low, high, low, high, INT8_LEVELS)
    y = x.output if x.heads is None else x.heads
    y = op.fake_quantize(y, low, high, low, high, INT8_LEVELS)
    return y if x.heads is None else _merged(y)


def _merged(heads: ov.Node) -> ov.Node:
    """(B, heads, S, d) -> (B, S, heads d)."""
    shape = heads.get_output_partial_shape(0)
    width = shape[1].get_length() * shape[3].get_length()
    rows = op.transpose(heads, _integers(0, 2, 1, 3))
    return op.reshape(rows, _integers(0, 0, width), True)


def _product(x: Any, weight: Tensor, bias: Tensor, int8: Int8Scales | None) -> ov.Node:
    """x @ weight.T + bias, x rounded already if it is to be; in the dtype of `weight` unless that
    is int8."""
    if int8 is not None:
        integers = op.constant(weight.numpy(), shared_memory=True)
        steps = op.multiply(op.convert(integers, "f32"), constant(int8.step[:, None]))
        return op.add(op.matmul(x, steps, False, True), constant(bias))
    return op.add(op.matmul(x, _constant(weight), False, True), _constant(bias))


def _entering(x: Node, weight: Tensor, norm_eps: float | None, int8: Int8Scales | None) -> ov.Node:
    """What of x (B, S, D) enters a product."""
    if norm_eps is not None:
        x = Node(_normalised(x.output, norm_eps))
    if int8 is not None:
        return _rounded(x, int8)
    return op.convert(x.output, _TYPES[weight.dtype]) if weight.dtype in _TYPES else x.output


def _widened(y: Any, weight: Tensor) -> Any:
    return op.convert(y, "f32") if weight.dtype in _TYPES else y


def patch_embed(
    images: Node,
    weight: Tensor,
    table: Node,
    sparse_tokens: Tensor,
    patch_size: int,
    centre: float = 0.0,
) -> tuple[Node, None]:
    """`reference.ops.patch_embed`."""
    width, side = len(weight), [patch_size, patch_size]
    pixels = op.convert(images.output, "f32") if images.dtype == torch.uint8 else images.output
    pixels = op.subtract(pixels, _number(centre))
    kernel = constant(weight.unflatten(1, (3, *side)))
    y = op.convolution(pixels, kernel, side, [0, 0], [0, 0], [1, 1])
    y = op.transpose(op.reshape(y, _integers(0, width, -1), True), _integers(0, 2, 1))
    y = op.add(y, table[1:].output)
    batch = _shape_of((images.shape[0], 1, 1))
    cls, tokens = (
        op.broadcast(part, batch, broadcast_spec="BIDIRECTIONAL")
        for part in (table[:1].output, constant(sparse_tokens))
    )
    return Node(op.concat([cls, y, tokens], 1)), None


def norm(
    x: Node,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    lengths: Sequence[Length],
    out_dtype: torch.dtype,
) -> tuple[Node, ...]:
    """`reference.ops.norm`; float32, whatever `out_dtype` is."""
    y = op.add(op.multiply(_normalised(x.output, eps), constant(weight)), constant(bias))
    if len(lengths) == 1:
        return (Node(y),)
    open_ended = [-1 if isinstance(length, Size) else length for length in lengths]
    parts = op.variadic_split(y, _integers(1), _integers(*open_ended))
    return tuple(map(Node, parts.outputs()))


def linear(
    x: Node,
    weight: Tensor,
    bias: Tensor,
    *,
    norm_eps: float | None = None,
    sums: None = None,
    gelu: bool = False,
    int8: Int8Scales | None = None,
) -> Node:
    """`reference.ops.linear`; with `int8` on integers, `weight` int8."""
    rows = _entering(x, weight, norm_eps, int8)

    def columns(start: int, stop: int) -> Node:
        part = slice(start, stop)
        scales = None if int8 is None else replace(int8, step=int8.step[part])
        return Node(_widened(_product(rows, weight[part], bias[part], scales), weight))

    y = _product(rows, weight, bias, int8)
    node = Node(_widened(op.gelu(y, "erf") if gelu else y, weight))
    node.columns = None if gelu else columns
    return node


def linear_residual(
    x: Node, weight: Tensor, bias: Tensor, residual: Node, *, int8: Int8Scales | None = None
) -> tuple[Node, None]:
    """`reference.ops.linear_residual`; with `int8` on integers, `weight` int8."""
    y = _product(_entering(x, weight, None, int8), weight, bias, int8)
    return Node(op.add(_widened(y, weight), residual.output)), None


def attention(query: Node, key_value: Node, num_heads: int, *, int8: Tensor | None = None) -> Node:
    """`reference.ops.attention`; what is part of one product is computed apart, since the runtime
    would copy the parts. With `int8`, a block's `score_reach`, queries meet keys on integers."""
    width = query.shape[2]
    keys, values = _columns(key_value, 0, width), _columns(key_value, width, 2 * width)
    heads = _integers(0, 0, num_heads, width // num_heads)
    # Queries are scaled as they are computed; the runtime would do so with the keys, in a pass.
    scale = _number((width // num_heads) ** -0.5)
    rows = [op.multiply(_columns(query, 0, width).output, scale).output(0), keys.output]
    if int8 is not None:
        rows = [_symmetric(x, reach) for x, reach in zip(rows, int8.tolist(), strict=True)]

    def split(rows: Any) -> ov.Node:
        return op.transpose(op.reshape(rows, heads, True), _integers(0, 2, 1, 3))

    q, k, v = map(split, (*rows, values.output))
    # Not the operation of that name: its keys would be transposed by a pass, and here are as read.
    y = op.matmul(op.softmax(op.matmul(q, k, False, True), -1), v, False, False)
    node = Node(_merged(y))
    node.heads = y
    return node


def _symmetric(x: ov.Output, reach: float) -> ov.Output:
    """x in 256 values about zero, which two factors of a product can have as integers alone."""
    low, high = _number(-reach), _number(reach * 127 / 128)
    return op.fake_quantize(x, low, high, low, high, INT8_LEVELS).output(0)


def _columns(node: Node, start: int, stop: int) -> Node:
    whole, first = (node, 0) if node.part is None else node.part[:2]
    if whole.columns is not None:
        return whole.columns(first + start, first + stop)
    return node[..., start:stop]


def spatial_map(
    dense: Node,
    sparse: Node,
    dense_weight: Tensor,
    dense_bias: Tensor,
    sparse_weight: Tensor,
    sparse_bias: Tensor,
    temperature: float | None,
    *,
    lowrank: bool,
) -> tuple[Node, Node | None]:
    """`reference.ops.spatial_map`."""
    d = linear(dense, dense_weight, dense_bias).output
    s = linear(sparse, sparse_weight, sparse_bias).output
    if temperature is None:
        scale = _number(len(dense_bias) ** -0.5)
    else:
        d, s = _unit(d), _unit(s)
        scale = _number(1 / temperature)
    logits = op.matmul(d, op.multiply(s, scale), False, True)
    spatial = Node(op.softmax(logits, -1))
    return spatial, reassemble(spatial, sparse) if lowrank else None


def _unit(rows: ov.Output) -> ov.Node:
    squares = op.reduce_sum(op.multiply(rows, rows), _integers(-1), True)
    return op.divide(rows, op.maximum(op.sqrt(squares), _number(NORMALIZE_EPS)))


def reassemble(spatial: Node, sparse: Node) -> Node:
    """`reference.ops.reassemble`."""
    return Node(op.matmul(spatial.output, sparse.output, False, False))
