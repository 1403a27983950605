"""`kernels.linear` and `linear_residual`: error budgets, edges, batch invariance."""

import dataclasses
import importlib
from itertools import product

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    GPUS,
    TWO_WAYS,
    accumulation,
    assert_budget,
    assert_within_budget,
    cast,
    draw,
    on_gpu,
    oracles,
    rounding,
    shaken,
    strided,
)

from stellar_fast.kernels import gpus, launch, linear, linear_residual
from stellar_fast.kernels.linear import chunks_of, linear_tile
from stellar_fast.kernels.tables import EMPTY, Table, Tile

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.numerical,
    pytest.mark.usefixtures("poisoned", "bounded"),
]
MODULE = importlib.import_module("stellar_fast.kernels.linear")
BOTH = {"norm_eps": 1e-12, "gelu": True}
# Rows of two images, depth, columns: one that TMA cannot address; whole steps of the depth; two
# tiles of rows and three of columns, the last of each in gpu, and a step of the depth in part; a
# deep one.
ODD, EVEN, TILES, DEEP = (7, 13, 5), (5, 64, 72), (73, 80, 160), (3, 208, 66)


def operands(batch, rows, depth, columns):
    x = draw(batch, rows, depth)
    x = x - x.mean(-1, keepdim=True)
    return x, draw(columns, depth) / depth**0.5, draw(columns)


@pytest.mark.parametrize(("gpu", "dtype"), TWO_WAYS)
@pytest.mark.parametrize(
    ("shape", "flags"),
    [
        (ODD, {}),
        (ODD, BOTH),
        (EVEN, {}),
        (EVEN, {"norm_eps": 1e-12}),
        (EVEN, {"gelu": True}),
        (TILES, BOTH),
        (DEEP, {}),
    ],
)
def test_linear(gpu, dtype, shape, flags):
    with on_gpu(gpu):
        given = operands(2, *shape)
        assert_within_budget(linear, *given, dtype=dtype, terms=shape[1], **flags)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_over_all_its_arguments(dtype):
    """Through a product with 1: near zero, in the tails, and as far as the dtype goes."""
    fine = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    far = torch.tensor([12.0, 100.0, 3000.0, 65000.0], dtype=torch.float64)
    x = cast(torch.cat([fine, far, -far]).reshape(1, -1, 1), dtype)
    one, zero = x.new_ones(1, 1), x.new_zeros(1)
    y = linear(x, one, zero, gelu=True).double()
    exact = x.double() * torch.special.ndtr(x.double())
    stored = torch.finfo(dtype).eps / 2 * exact.abs()
    # By erf, whose implementations are within a few units of its last place near 1; or by the
    # polynomial, which promises 5e-5.
    by_erf = 8 * torch.finfo(torch.float32).eps * x.double().abs()
    bound = by_erf if dtype == torch.float32 else 5e-5
    assert ((y - exact).abs() <= stored + bound).all()
    odd = x.new_tensor([float("nan"), float("inf")]).reshape(1, 2, 1)
    found = linear(odd, one, zero, gelu=True).flatten()
    assert found[0].isnan() and found[1] == float("inf")


@pytest.mark.parametrize(("gpu", "dtype"), TWO_WAYS)
@pytest.mark.parametrize(("batch", "shape"), [(3, ODD), (2, TILES), (1, DEEP), (0, EVEN)])
def test_linear_residual_and_its_sums(gpu, dtype, batch, shape):
    x, weight, bias = (cast(v, dtype) for v in operands(batch, *shape))
    residual = cast(draw(batch, shape[0], shape[2], seed=5), dtype)
    kept = residual.clone()
    with on_gpu(gpu):
        y, sums = linear_residual(x, weight, bias, residual)
    operands_ = [tensor.double() for tensor in (x, weight, bias, residual)]
    exact, _ = oracles.linear_residual(*operands_)
    plain, _ = oracles.linear_residual(x, weight, bias, residual)
    floor, _ = oracles.linear_residual(*(shaken(tensor, shape[1]) for tensor in operands_))
    assert_budget(y, plain, exact, dtype, floor)
    assert torch.equal(kept, residual)
    # Each partial sum is of 64 columns, of the numbers before they are rounded to be stored.
    assert sums.shape == (-(-shape[2] // launch.SUM_BLOCK), batch, shape[0])
    # Their errors: of each number, by a float32 sum over the depth, on the scale of what is added
    # up there (three terms of about 1), counts twice in its square; and of the sum of squares.
    blocks = exact.square().split(launch.SUM_BLOCK, dim=-1)
    for found, block in zip(sums, blocks, strict=True):
        total = block.sum(-1)
        number = accumulation(shape[1]) * 3**0.5
        atol = 8 * (2 * number * total.sqrt() + accumulation(launch.SUM_BLOCK) * total)
        assert ((found.double() - total).abs() <= atol).all()


@pytest.mark.parametrize(("gpu", "dtype"), TWO_WAYS)
def test_sums_take_the_place_of_statistics(gpu, dtype):
    x, weight, bias = (cast(v, dtype) for v in operands(2, 21, 80, 48))
    # Three parts in memory where a fourth, NaN, is next: kernels read by powers of two.
    sums = x.new_full((4, 2, 21), float("nan"), dtype=torch.float32)[:3]
    for found, columns in zip(sums, x.split([40, 24, 16], dim=-1), strict=True):
        found.copy_(columns.float().square().sum(-1))
    with on_gpu(gpu):
        given = linear(x, weight, bias, norm_eps=1e-6, sums=sums)
        taken = linear(x, weight, bias, norm_eps=1e-6)
        other = linear(x, weight, bias, norm_eps=1e-6, sums=4 * sums)
    # The same product, but for the order of a float32 sum, times a row's factor: as stored, the
    # two may lie on either side of a tie. The other's factor is half as large.
    bias = bias.double()
    largest = max(float(y.abs().max()) for y in (given, taken, other))
    once = torch.finfo(dtype).eps / 2 * largest + 8 * accumulation(80) * largest
    torch.testing.assert_close(given.double(), taken.double(), rtol=0, atol=2 * once)
    halved = (other.double() - bias) * 2
    torch.testing.assert_close(halved, taken.double() - bias, rtol=0, atol=3 * once)


@pytest.mark.parametrize("gpu", GPUS)
def test_black_rows_are_the_bias(gpu):
    _, weight, bias = (cast(v, torch.float32) for v in operands(1, 5, 64, 48))
    with on_gpu(gpu):
        y = linear(torch.zeros(1, 5, 64, device=DEVICE), weight, bias, norm_eps=1e-12)
    assert torch.equal(y, bias.expand(1, 5, 48))


@pytest.mark.parametrize(("gpu", "dtype"), TWO_WAYS)
def test_views_in_poisoned_memory(gpu, dtype):
    x, weight, bias = (cast(v, dtype) for v in operands(2, 13, 48, 72))
    residual = cast(draw(2, 13, 72), dtype)
    with on_gpu(gpu):
        for function, tensors in ((linear, (x,)), (linear_residual, (x, residual))):
            plain = function(tensors[0], weight, bias, *tensors[1:])
            views = [strided(tensor) for tensor in tensors]
            found = function(views[0], strided(weight), bias, *views[1:])
            for a, b in zip(_tensors(plain), _tensors(found), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(("gpu", "dtype"), TWO_WAYS)
def test_a_row_does_not_depend_on_the_batch(gpu, dtype):
    x, weight, bias = (cast(v, dtype) for v in operands(3, 49, 64, 72))
    residual = cast(draw(3, 49, 72), dtype)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    with on_gpu(gpu):
        y = linear(x, weight, bias, norm_eps=1e-12, gelu=True)
        z, sums = linear_residual(x, weight, bias, residual)
        assert torch.equal(linear(x[order], weight, bias, norm_eps=1e-12, gelu=True), y[order])
        for i in range(3):
            alone = linear(x[i : i + 1], weight, bias, norm_eps=1e-12, gelu=True)
            assert torch.equal(alone[0], y[i])
            alone, alone_sums = linear_residual(x[i : i + 1], weight, bias, residual[i : i + 1])
            assert torch.equal(alone[0], z[i])
            assert torch.equal(alone_sums[:, 0], sums[:, i])


def few_processors(processors: int):
    """On a device with few processors, a program that writes by TMA goes on to its next tile."""
    gpu = launch.target_of(DEVICE).gpu
    return launch.on_gpu(dataclasses.replace(gpu, processors=processors))


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize(("gpu", "dtype"), TWO_WAYS)
def test_programs_of_many_tiles_in_many_groups(gpu, dtype, monkeypatch):
    """Five tiles of rows in groups of three or two, two of columns; few programs share them."""
    x, weight, bias = (cast(v, dtype) for v in operands(1, 530, 16, 72))
    residual = cast(draw(1, 530, 72), dtype)
    with on_gpu(gpu):
        expected = linear_residual(x, weight, bias, residual)
        for processors in (4, 3):
            monkeypatch.setattr(MODULE, "GROUP_M", processors - 1)
            with few_processors(processors):
                found = linear_residual(x, weight, bias, residual)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    exact, _ = oracles.linear_residual(*(v.double() for v in (x, weight, bias, residual)))
    plain, _ = oracles.linear_residual(x, weight, bias, residual)
    floor, _ = oracles.linear_residual(*(shaken(v, 16) for v in (x, weight, bias, residual)))
    assert_budget(expected[0], plain, exact, dtype, floor)


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("slices", [1, 2])
def test_what_is_read_before_the_products_changes_nothing(gpu, dtype, slices, monkeypatch):
    """A program with one tile reads bias, residual and factors of rows first; others behind."""
    x, weight, bias = (cast(v, dtype) for v in operands(1, 70, 80, 160))
    residual = cast(draw(1, 70, 160), dtype)
    sums = x.float().reshape(1, 70, 5, 16).square().sum(-1).permute(2, 0, 1).contiguous()
    tile = Tile(64, 128, 64, num_warps=4, num_stages=3, slices=slices)
    monkeypatch.setattr(MODULE, "linear_tile", lambda *_: tile)
    found = []
    for ahead in (True, False):
        monkeypatch.setattr(MODULE, "reads_ahead", lambda *_, ahead=ahead: ahead)
        with on_gpu(gpu):
            y = linear(x, weight, bias, **BOTH, sums=sums)
            found.append([y, *linear_residual(x, weight, bias, residual)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_programs_of_one_tile_read_ahead():
    """And no others: over a loop that also goes over tiles, it would be held for each stage."""
    seen = []
    x, weight, bias = (torch.empty(s, device="meta") for s in ((64, 9, 128), (1280, 128), (1280,)))
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 2, 64):
            with launch.on_gpu(90, seen.append), launch.tuned_by(EMPTY):
                images = x[:batch].to(dtype).repeat(1, 30, 1)
                residual = images.new_empty(batch, 270, 1280)
                linear_residual(images, weight.to(dtype), bias.to(dtype), residual)
    ahead = {(v["x"].base.dtype, v["M"]): v["AHEAD"] for v in (item.arguments for item in seen)}
    assert ahead == {
        **dict.fromkeys(((torch.float32, m) for m in (270, 540, 17280)), False),
        (torch.bfloat16, 270): True,
        (torch.bfloat16, 540): True,
        (torch.bfloat16, 17280): False,
    }
    for item in seen:
        given = item.arguments
        assert isinstance(given["residual"], torch.Tensor) == given["AHEAD"]
        tiles = -(-given["M"] // given["BLOCK_M"]) * -(-given["N"] // given["BLOCK_N"])
        assert (item.grid == (tiles,)) or not given["AHEAD"]


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("gpu", [80, 90, 120] if GPUS != [None] else GPUS)
def test_every_tile_of_the_table_gives_the_same(gpu, monkeypatch):
    """Tiles that the table takes for large products only, forced onto a small one."""
    x, weight, bias = (cast(v, torch.float16) for v in operands(1, 140, 80, 328))
    residual = cast(draw(1, 140, 328), torch.float16)
    operands_ = [v.double() for v in (x, weight, bias, residual)]
    exact, _ = oracles.linear_residual(*operands_)
    plain, _ = oracles.linear_residual(x, weight, bias, residual)
    with on_gpu(gpu):
        found: set[Tile] = set()
        device = launch.gpu_of(x)
        sums: list[torch.Tensor] = []
        for pretended in (1, 500, 1000, 2000, 10**6):
            tile = linear_tile(device, x.dtype, pretended, 1280, 128)
            if tile in found:
                continue
            monkeypatch.setattr(MODULE, "linear_tile", lambda *_, t=tile: t)
            found.add(tile)
            y, parts = linear_residual(x, weight, bias, residual)
            assert_budget(y, plain, exact, torch.float16)
            sums.append(parts)
        assert len(found) == (3 if device.shared > 200_000 else 2)
    for others in sums[1:]:
        # Rounded in another order, if at all: up to 64 squares of numbers of some 80 products.
        torch.testing.assert_close(others, sums[0], rtol=16 * accumulation(80 + 64), atol=0)


def test_tiles_of_sm_100_are_those_of_sm_90():
    """So that forcing them on one of the two is enough."""
    for dtype in (torch.float32, torch.float16, launch.FP8):
        with launch.tuned_by(EMPTY):
            tiles = [
                {linear_tile(gpus.GPUS[a], dtype, 2**n, 3840, 1280) for n in range(20)}
                for a in (90, 100)
            ]
        assert tiles[0] == tiles[1]


def test_choices_of_one_family_share_rows_and_warps():
    for gpu in gpus.GPUS.values():
        for dtype in (torch.float32, torch.float16, torch.bfloat16, launch.FP8):
            for depth in (768, 5120):
                shapes = product((1, 200, 2000, 20_000, 10**6), (64, 768, 3840, 5120))
                with launch.tuned_by(EMPTY):
                    tiles = {linear_tile(gpu, dtype, *shape, depth) for shape in shapes}
                assert len({(tile.block_m, tile.num_warps) for tile in tiles}) == 1


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize(("gpu", "dtype"), TWO_WAYS)
@pytest.mark.parametrize(("rows_scaled", "chunked"), [(True, False), (False, True)])
def test_fp8_products(gpu, dtype, rows_scaled, chunked, monkeypatch):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    depth = 336  # six steps, the last in part
    if chunked:
        monkeypatch.setattr(MODULE, "CHUNK", 256)
        assert chunks_of(launch.FP8, depth) == (2, 256)
    tile = Tile(128, 64, 64, num_warps=8, num_stages=4)
    with launch.tuned_by(Table(linear={("fp8", 72, depth): ((1, tile),)})):
        _fp8_product(gpu, dtype, rows_scaled, depth)


def test_deep_fp8_products_are_summed_up_in_chunks():
    for depth, chunks, chunk in ((80, 1, 256), (2048, 1, 2048), (2064, 2, 1280), (5120, 3, 1792)):
        assert chunks_of(launch.FP8, depth) == (chunks, chunk)
        assert chunks_of(torch.bfloat16, depth)[0] == 1


@pytest.mark.usefixtures("unplanned")
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="this GPU has no FP8",
)
@pytest.mark.parametrize("depth", [336, 512, 528])  # chunks: one and a part, two, two and a part
def test_chunks_of_every_tile_of_a_program(depth, monkeypatch):
    """One program with four tiles after one another gives what four programs give, bit for bit."""
    monkeypatch.setattr(MODULE, "CHUNK", 256)
    x, weight, residual = draw(1, 140, depth), draw(72, depth), cast(draw(1, 140, 72), DTYPES[1])
    x8, w8 = (cast(value, torch.float32).to(launch.FP8) for value in (x, weight))
    bias, scale = (cast(draw(72).abs() / n, d) for n, d in ((1, DTYPES[1]), (depth, torch.float32)))
    tile = Tile(128, 64, 64, num_warps=8, num_stages=4)
    found = []
    with launch.tuned_by(Table(linear={("fp8", 72, depth): ((1, tile),)})):
        for processors in (132, 3, 1):
            with few_processors(processors):
                both = linear_residual(x8, w8, bias, residual, weight_scale=scale)
            found.append(both)
    exact, _ = oracles.linear_residual(x8, w8, bias.double(), residual.double(), weight_scale=scale)
    plain, _ = oracles.linear_residual(x8, w8, bias, residual, weight_scale=scale)
    assert_budget(found[0][0], plain, exact, DTYPES[1])
    for y, sums in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(sums, found[0][1])


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "dtype"), TWO_WAYS)
@pytest.mark.parametrize("rows_scaled", [True, False])
@pytest.mark.parametrize("depth", [80, 2064])
def test_fp8_products_by_the_heuristics_tiles(gpu, dtype, rows_scaled, depth):
    _fp8_product(gpu, dtype, rows_scaled, depth)


def _fp8_product(gpu, dtype, rows_scaled, depth):
    x, weight = draw(2, 13, depth), draw(72, depth)
    bias = cast(draw(72), dtype)
    x8 = cast(x, torch.float32).to(launch.FP8)
    w8 = cast(weight, torch.float32).to(launch.FP8)
    scales = {"weight_scale": cast(draw(72).abs() / depth**0.5, torch.float32)}
    if rows_scaled:
        scales["x_scale"] = cast(draw(2, 13).abs(), torch.float32)
    exact = oracles.linear(x8, w8, bias.double(), gelu=True, **scales)
    plain = oracles.linear(x8, w8, bias, gelu=True, **scales)
    shaken_ = [shaken(v.double(), depth) for v in (x8, w8, bias)]
    floor = oracles.linear(*shaken_, gelu=True, **scales)
    with on_gpu(gpu):
        y = linear(x8, w8, bias, gelu=True, **scales)
        assert y.dtype == dtype
        assert_budget(y, plain, exact, dtype, floor)
        coarse = linear(x8, w8, bias, gelu=True, out_scale=0.004, **scales)
    assert coarse.dtype == launch.FP8
    assert coarse.float().isfinite().all()
    clipped = exact.clamp(max=448 * 0.004)
    error = (coarse.double() * 0.004 - clipped).norm() / clipped.norm()
    # GELU by the polynomial where the bias is not float32.
    assert error < rounding(launch.FP8) + 4 * rounding(torch.float16)
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
