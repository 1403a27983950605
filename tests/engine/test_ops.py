"""The torch backend's ops against their oracles: odd sizes, strides, empty batches, every flag."""

import budgets
import pytest
import torch
from budgets import entitlement

from stellar_fast.engine import torch_ops
from stellar_fast.reference import ops
from stellar_fast.weights.packed import Linear

pytestmark = pytest.mark.numerical


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def strided(x: torch.Tensor) -> torch.Tensor:
    """`x` as a view into memory poisoned with NaN."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def tensors(result) -> list[torch.Tensor]:
    """What of an op's result is tensors; the sums of squares are checked by themselves."""
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]


def assert_within_budget(name: str, *arguments, dtype: torch.dtype, **keywords) -> None:
    """The op of this name within its budget, on arguments drawn in float64."""

    def cast(value, dtype: torch.dtype):
        if isinstance(value, torch.dtype):
            return dtype
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    def run(module, wide: torch.dtype) -> list[torch.Tensor]:
        # Float64 sees the numbers after they were rounded to the dtype under test.
        return tensors(
            getattr(module, name)(
                *(cast(cast(v, dtype), wide) for v in arguments),
                **{k: cast(cast(v, dtype), wide) for k, v in keywords.items()},
            )
        )

    compare(run(torch_ops, dtype), run(ops, dtype), lambda: run(ops, torch.float64), dtype)


def compare(ours, plain, evaluate, dtype: torch.dtype) -> None:
    """Each of our results against what `evaluate` gives in float64, sums of squares left out."""

    def exactly() -> dict[str, torch.Tensor]:
        return dict(zip(map(str, range(len(ours))), evaluate(), strict=False))

    exact = exactly()
    sound = entitlement(exactly, exact, dtype)
    for one, other, (name, value) in zip(ours, plain, exact.items(), strict=False):
        budgets.assert_within_budget(one, other, value, dtype, sound[name])


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("flags", [{}, {"norm_eps": 1e-12}, {"gelu": True}, "all"])
def test_linear(dtype, batch, flags):
    x, weight, bias = draw(batch, 13, 48), draw(72, 48) / 7, draw(72)
    x = x - x.mean(-1, keepdim=True)
    if flags == "all":
        flags = {"norm_eps": 1e-12, "gelu": True}
    assert_within_budget("linear", x, weight, bias, dtype=dtype, **flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_linear_residual(dtype, batch):
    arguments = draw(batch, 13, 48), draw(72, 48) / 7, draw(72), draw(batch, 13, 72, seed=5)
    assert_within_budget("linear_residual", *arguments, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [{}, {"gelu": True}, {"residual": True}])
def test_linear_on_a_prepared_weight(dtype, flags):
    x, weight, bias = (t.to(dtype) for t in (draw(2, 13, 48), draw(72, 48) / 7, draw(72)))
    layer = torch_ops.laid_out(Linear(weight, bias), rows=26)
    if torch.backends.mkldnn.is_available() and dtype == torch.float32:
        assert layer.weight.is_mkldnn
    if "residual" in flags:
        residual = draw(2, 13, 72, seed=5).to(dtype)
        kept = residual.clone()
        ours, _ = torch_ops.linear_residual(strided(x), layer.weight, layer.bias, residual)
        assert torch.equal(kept, residual), "the residual's memory belongs to the caller"
        wide = [t.double() for t in (x, weight, bias, residual)]
        plain, _ = ops.linear_residual(x, weight, bias, residual)
        compare([ours], [plain], lambda: [ops.linear_residual(*wide)[0]], dtype)
    else:
        ours = torch_ops.linear(strided(x), layer.weight, layer.bias, **flags)
        wide = [t.double() for t in (x, weight, bias)]
        plain = ops.linear(x, weight, bias, **flags)
        compare([ours], [plain], lambda: [ops.linear(*wide, **flags)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (1, 213, 213), (2, 9, 45)])
@pytest.mark.parametrize(("heads", "width"), [(4, 64), (1, 80), (3, 48)])
def test_attention(dtype, batch, queries, keys, heads, width):
    query, key_value = draw(batch, queries, width), draw(batch, keys, 2 * width)
    assert_within_budget("attention", query, key_value, heads, dtype=dtype)


def test_attention_reads_views_of_a_packed_qkv():
    qkv = strided(draw(2, 33, 3 * 64)).float()
    ours = torch_ops.attention(qkv[..., :64], qkv[..., 64:], 4)
    wide = qkv.double()
    plain = ops.attention(qkv[..., :64], qkv[..., 64:], 4)
    compare([ours], [plain], lambda: [ops.attention(wide[..., :64], wide[..., 64:], 4)], qkv.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("tokens", [8, 16, 24])
@pytest.mark.parametrize("temperature", [0.06, None])
def test_spatial_map(dtype, batch, tokens, temperature):
    width = 64
    arguments = (
        draw(batch, 37, width),
        draw(batch, tokens, width),
        draw(width, width) / 8,
        draw(width),
        draw(width, width, seed=1) / 8,
        draw(width, seed=1),
        temperature,
    )
    assert_within_budget("spatial_map", *arguments, dtype=dtype, lowrank=True)
    low = [v.to(dtype) if isinstance(v, torch.Tensor) else v for v in arguments]
    spatial, lowrank = torch_ops.spatial_map(*low, lowrank=False)
    assert lowrank is None
    assert spatial.dtype == torch.float32
    if batch:  # each row is the sum of so many numbers, each rounded
        assert (spatial.sum(-1) - 1).abs().max() <= tokens * torch.finfo(torch.float32).eps


def test_spatial_map_of_zero_rows_is_finite():
    zero = torch.zeros(1, 5, 16)
    weight, bias = torch.eye(16), torch.zeros(16)
    out, _ = torch_ops.spatial_map(
        zero, zero[:, :3], weight, bias, weight, bias, 0.06, lowrank=False
    )
    assert (out - 1 / 3).abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 2])
def test_norm_reassemble_and_patch_embed(dtype, batch):
    x = draw(batch, 7, 48)
    x = x - x.mean(-1, keepdim=True)
    assert_within_budget("norm", x, draw(48), draw(48, seed=1), 1e-12, (3, 4), dtype, dtype=dtype)
    spatial = draw(batch, 37, 8).softmax(-1)
    assert_within_budget("reassemble", spatial, draw(batch, 8, 48), dtype=dtype)
    pixels, weight = draw(batch, 3, 37, 50).sigmoid(), draw(48, 3 * 64) / 14
    table, sparse = draw(1 + 4 * 6, 48), draw(5, 48)
    assert_within_budget("patch_embed", pixels, weight, table, sparse, 8, 0.5, dtype=dtype)
