"""`kernels.linear` and `linear_residual`: error budgets, edges, batch invariance."""

import importlib

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    PARTS,
    assert_budget,
    assert_within_budget,
    cast,
    draw,
    on_part,
    oracles,
    poisoned,  # noqa: F401
    strided,
)
from memory_bounds import bounded  # noqa: F401
from stellar_fast.kernels import launch, linear, linear_residual

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("poisoned", "bounded")]
FLAGS = [{}, {"norm_eps": 1e-12}, {"gelu": True}, {"norm_eps": 1e-12, "gelu": True}]
# Rows, depth, columns: odd ones, cut-down layers of the models, and widths past a tile.
SHAPES = [(7, 13, 5), (213, 64, 192), (273, 80, 160), (45, 208, 272)]


def operands(batch, rows, depth, columns):
    x = draw(batch, rows, depth)
    x = x - x.mean(-1, keepdim=True)
    return x, draw(columns, depth) / depth**0.5, draw(columns)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(part, dtype, flags, shape):
    with on_part(part):
        assert_within_budget(linear, *operands(2, *shape), dtype=dtype, **flags)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_over_all_its_arguments(dtype):
    """Through a product with 1: near zero, in the tails, and as far as the dtype goes."""
    fine = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    far = torch.tensor([12.0, 100.0, 3000.0, 65000.0], dtype=torch.float64)
    x = cast(torch.cat([fine, far, -far]).reshape(1, -1, 1), dtype)
    one, zero = x.new_ones(1, 1), x.new_zeros(1)
    y = linear(x, one, zero, gelu=True).double()
    exact = x.double() * torch.special.ndtr(x.double())
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    bound = 1e-6 * x.double().abs() if dtype == torch.float32 else 5e-5
    assert ((y - exact).abs() <= rounding + bound).all()
    odd = x.new_tensor([float("nan"), float("inf")]).reshape(1, 2, 1)
    found = linear(odd, one, zero, gelu=True).flatten()
    assert found[0].isnan() and found[1] == float("inf")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_residual_and_its_sums(part, dtype, batch, shape):
    x, weight, bias = (cast(v, dtype) for v in operands(batch, *shape))
    residual = cast(draw(batch, shape[0], shape[2], seed=5), dtype)
    kept = residual.clone()
    with on_part(part):
        y, sums = linear_residual(x, weight, bias, residual)
    exact, _ = oracles.linear_residual(*(tensor.double() for tensor in (x, weight, bias, residual)))
    plain, _ = oracles.linear_residual(x, weight, bias, residual)
    assert_budget(y, plain, exact, dtype)
    assert torch.equal(kept, residual)
    # Each partial sum is of 64 columns, of the numbers before they are rounded to be stored.
    assert sums.shape == (-(-shape[2] // launch.SUM_BLOCK), batch, shape[0])
    blocks = exact.square().split(launch.SUM_BLOCK, dim=-1)
    for found, block in zip(sums, blocks, strict=True):
        torch.testing.assert_close(found.double(), block.sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_take_the_place_of_statistics(part, dtype):
    x, weight, bias = (cast(v, dtype) for v in operands(2, 21, 80, 48))
    # Three parts in memory where a fourth, NaN, is next: kernels read by powers of two.
    sums = x.new_full((4, 2, 21), float("nan"), dtype=torch.float32)[:3]
    for found, columns in zip(sums, x.split([40, 24, 16], dim=-1), strict=True):
        found.copy_(columns.float().square().sum(-1))
    with on_part(part):
        given = linear(x, weight, bias, norm_eps=1e-6, sums=sums)
        taken = linear(x, weight, bias, norm_eps=1e-6)
        other = linear(x, weight, bias, norm_eps=1e-6, sums=4 * sums)
    torch.testing.assert_close(given, taken, rtol=1e-3, atol=1e-3)
    bias = bias.float()
    torch.testing.assert_close((other.float() - bias) * 2, taken.float() - bias, rtol=0, atol=2e-2)


@pytest.mark.parametrize("part", PARTS)
def test_black_rows_are_the_bias(part):
    _, weight, bias = (cast(v, torch.float32) for v in operands(1, 5, 64, 48))
    with on_part(part):
        y = linear(torch.zeros(1, 5, 64, device=DEVICE), weight, bias, norm_eps=1e-12)
    torch.testing.assert_close(y, bias.expand(1, 5, 48))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_in_poisoned_memory(part, dtype):
    x, weight, bias = (cast(v, dtype) for v in operands(2, 13, 48, 72))
    residual = cast(draw(2, 13, 72), dtype)
    with on_part(part):
        for function, tensors in ((linear, (x,)), (linear_residual, (x, residual))):
            plain = function(tensors[0], weight, bias, *tensors[1:])
            views = [strided(tensor) for tensor in tensors]
            found = function(views[0], strided(weight), bias, *views[1:])
            for a, b in zip(_tensors(plain), _tensors(found), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(part, dtype):
    x, weight, bias = (cast(v, dtype) for v in operands(5, 37, 64, 192))
    residual = cast(draw(5, 37, 192), dtype)
    order = torch.tensor([3, 0, 4, 1, 2], device=DEVICE)
    with on_part(part):
        y = linear(x, weight, bias, norm_eps=1e-12, gelu=True)
        z, sums = linear_residual(x, weight, bias, residual)
        assert torch.equal(linear(x[order], weight, bias, norm_eps=1e-12, gelu=True), y[order])
        for i in range(5):
            alone = linear(x[i : i + 1], weight, bias, norm_eps=1e-12, gelu=True)
            assert torch.equal(alone[0], y[i])
            alone, alone_sums = linear_residual(x[i : i + 1], weight, bias, residual[i : i + 1])
            assert torch.equal(alone[0], z[i])
            assert torch.equal(alone_sums[:, 0], sums[:, i])


@pytest.mark.parametrize("part", [*PARTS, 100, 120] if PARTS != [None] else PARTS)
@pytest.mark.parametrize("rows", [40, 300])
def test_every_tile_of_the_table_gives_the_same(part, rows, monkeypatch):
    """Tiles that the table takes for large products only, forced onto a small one."""
    module = importlib.import_module("stellar_fast.kernels.linear")
    x, weight, bias = (cast(v, torch.float16) for v in operands(1, rows, 128, 320))
    residual = cast(draw(1, rows, 320), torch.float16)
    with on_part(part):
        found = set()
        expected = linear_residual(x, weight, bias, residual)
        device = launch.part_of(x)
        for pretended in (1, 500, 1000, 2000, 10**6):
            tile = launch.linear_tile(device, x.dtype, pretended, 1280, 128)
            monkeypatch.setattr(module, "linear_tile", lambda *_, t=tile: t)
            found.add(tile)
            y, sums = linear_residual(x, weight, bias, residual)
            torch.testing.assert_close(y, expected[0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(sums, expected[1], rtol=2e-3, atol=2e-3)
        assert len(found) == (3 if device.shared > 200_000 else 2)


def test_choices_of_one_family_share_rows_and_warps():
    for part in launch.PARTS.values():
        for dtype in (torch.float32, torch.float16, torch.bfloat16, launch.FP8):
            for depth in (768, 5120):
                tiles = {
                    (tile.block_m, tile.num_warps)
                    for rows in (1, 200, 2000, 20_000, 10**6)
                    for columns in (64, 768, 3840, 5120)
                    if (tile := launch.linear_tile(part, dtype, rows, columns, depth))
                }
                assert len(tiles) == 1


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_scaled", [True, False])
@pytest.mark.parametrize("depth", [80, 2064])
def test_fp8_products(part, dtype, rows_scaled, depth):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    x, weight = draw(2, 13, depth), draw(72, depth)
    bias = cast(draw(72), dtype)
    x8 = cast(x, torch.float32).to(launch.FP8)
    w8 = cast(weight, torch.float32).to(launch.FP8)
    scales = {"weight_scale": cast(draw(72).abs() / depth**0.5, torch.float32)}
    if rows_scaled:
        scales["x_scale"] = cast(draw(2, 13).abs(), torch.float32)
    exact = oracles.linear(x8, w8, bias.double(), gelu=True, **scales)
    plain = oracles.linear(x8, w8, bias, gelu=True, **scales)
    with on_part(part):
        y = linear(x8, w8, bias, gelu=True, **scales)
        assert y.dtype == dtype
        assert_budget(y, plain, exact, dtype)
        coarse = linear(x8, w8, bias, gelu=True, out_scale=0.004, **scales)
    assert coarse.dtype == launch.FP8
    assert coarse.float().isfinite().all()
    clipped = exact.clamp(max=448 * 0.004)
    error = (coarse.double() * 0.004 - clipped).norm() / clipped.norm()
    assert error < 0.04  # e4m3 rounds to 3 bits: at most 1/16, and 1/16/sqrt(3) on average
    assert (clipped < exact).any(), "nothing was held within range"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": (2, 13, 47)}, "x must be"),
        ({"x": (13, 48)}, "x must be"),
        ({"bias": (71,)}, "bias must be"),
        ({"residual": (2, 13, 71)}, "residual must be"),
    ],
)
def test_shapes_that_do_not_fit(change, named):
    shapes = {"x": (2, 13, 48), "weight": (72, 48), "bias": (72,), "residual": (2, 13, 72)}
    tensors = {name: torch.zeros(s, device=DEVICE) for name, s in (shapes | change).items()}
    with pytest.raises(ValueError, match=named):
        linear_residual(**tensors)


def test_dtypes_that_do_not_fit():
    x, weight, bias = (torch.zeros(s, device=DEVICE) for s in ((1, 2, 16), (4, 16), (4,)))
    with pytest.raises(ValueError, match="one dtype"):
        linear(x, weight.half(), bias)
    with pytest.raises(ValueError, match="weight_scale"):
        linear(x, weight, bias, weight_scale=bias)
    with pytest.raises(ValueError, match="norm_eps"):
        eight = x.to(launch.FP8), weight.to(launch.FP8)
        linear(*eight, bias, norm_eps=1e-6, x_scale=torch.ones(1, 2), weight_scale=bias)


def _tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)
