"""The norm kernels against float64: split outputs, any width and strides, FP8 rows with scales."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    KERNEL_MARKS,
    accumulation,
    assert_budget,
    assert_every_part_launches_alike,
    assert_within_budget,
    draw,
    rounding,
    shaken,
    strided,
)

from stellar_fast.kernels.launch import FP8, FP8_MAX
from stellar_fast.kernels.norm import norm, quantize_rows
from stellar_fast.reference import ops as oracles

pytestmark = KERNEL_MARKS
EPS = 1e-12


def stream(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different lengths, as those of a residual stream are."""
    x = draw(*shape, seed=seed)
    lengths = torch.logspace(-2, 2, shape[0] * shape[1], dtype=torch.float64)
    return x * lengths.reshape(*shape[:2], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "width", "lengths"),
    [
        (3, 64, (1, 5, 2)),
        (2, 80, (4,)),
        (3, 83, (1, 4)),
        (2, 1280, (1, 3, 2)),
        (2, 16, (0, 2, 1)),
        (0, 64, (1, 20, 4)),
    ],
)
def test_norm(dtype, batch, width, lengths):
    x, weight, bias = stream(batch, sum(lengths), width), draw(width), draw(width, seed=1)
    assert_within_budget(norm, x, weight, bias, EPS, lengths, dtype, dtype=dtype, terms=width)


def test_every_part_launches_alike():
    x, weight = torch.empty(2, 5, 80, device="meta"), torch.empty(80, device="meta")

    def call():
        norm(x, weight, weight, EPS, (1, 4), torch.float16)
        quantize_rows(x, EPS)

    assert_every_part_launches_alike(call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_takes_strides_and_writes_the_callers_dtype(dtype):
    x, weight, bias = strided(stream(3, 11, 80)).to(DEVICE, dtype), draw(80), draw(80, seed=1)
    weight, bias = weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)
    for view in (strided(x), x[:, 2:9], x[::2], x.transpose(0, 1), x.transpose(1, 2)[:, :11, :]):
        width = view.shape[2]
        lengths = (1, view.shape[1] - 1)
        w, b = weight[:width], bias[:width]
        ours = norm(view, w, b, EPS, lengths, torch.float32)
        plain = oracles.norm(view, w, b, EPS, lengths, torch.float32)
        exact = oracles.norm(view.double(), w.double(), b.double(), EPS, lengths, torch.float64)
        floor = oracles.norm(*(shaken(v, width) for v in (view, w, b)), EPS, lengths, torch.float64)
        for ours_, plain_, exact_, floor_ in zip(ours, plain, exact, floor, strict=True):
            assert ours_.dtype == torch.float32
            assert ours_.is_contiguous()
            assert_budget(ours_, plain_, exact_, torch.float32, floor_)


def test_norm_of_every_second_weight():
    x, weight = stream(2, 5, 48).float().to(DEVICE), draw(96).float().to(DEVICE)[::2]
    (ours,) = norm(x, weight, weight, EPS, (5,), torch.float32)
    assert torch.equal(ours, norm(x, weight.clone(), weight.clone(), EPS, (5,), torch.float32)[0])


def test_norm_knows_eps_and_constant_rows():
    x = torch.zeros(2, 3, 80, device=DEVICE)
    x[1] = 7.0
    x[0, 2] = 1e-4
    weight, bias = draw(80).float().to(DEVICE), draw(80, seed=1).float().to(DEVICE)
    (ours,) = norm(x, weight, bias, 1e-8, (3,), torch.float32)
    assert torch.equal(ours[0, :2], bias.expand(2, -1))
    # Every number's own roundings: of the mean, the root, its reciprocal and what it multiplies.
    tolerance = {"rtol": 0, "atol": 8 * rounding(torch.float32) * (weight.abs() + bias.abs()).max()}
    torch.testing.assert_close(ours[1], (weight + bias).expand(3, -1), **tolerance)
    torch.testing.assert_close(ours[0, 2], weight * 2**-0.5 + bias, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_its_batch(dtype):
    x, weight, bias = (v.to(DEVICE, dtype) for v in (stream(4, 9, 80), draw(80), draw(80)))
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    whole = norm(x, weight, bias, EPS, (1, 5, 3), dtype)
    moved = norm(x[order], weight, bias, EPS, (1, 5, 3), dtype)
    alone = [norm(x[i : i + 1], weight, bias, EPS, (1, 5, 3), dtype) for i in range(4)]
    for index, (full, permuted) in enumerate(zip(whole, moved, strict=True)):
        assert torch.equal(full[order], permuted)
        assert torch.equal(full, torch.cat([one[index] for one in alone]))
    codes, scale = quantize_rows(x, EPS)
    for i in range(4):
        one, one_scale = quantize_rows(x[i : i + 1], EPS)
        assert torch.equal(codes[i].view(torch.uint8), one[0].view(torch.uint8))
        assert torch.equal(scale[i], one_scale[0])


def order_of(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 numbers as integers in the same order, neighbours one apart."""
    bits = codes.view(torch.uint8).short()
    return torch.where(bits < 128, bits, 128 - bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "width"), [(2, 4, 80), (1, 2, 1280), (2, 3, 83), (0, 5, 64)]
)
def test_quantize_rows(dtype, batch, length, width):
    x = stream(batch, length, width).to(DEVICE, dtype)
    for view in (x, strided(x), x[:, 1:], x.transpose(0, 1)):
        codes, scale = quantize_rows(view, EPS)
        plain_codes, plain_scale = oracles.quantize_rows(view, EPS)
        assert codes.dtype == FP8
        assert codes.shape == view.shape
        assert scale.dtype == torch.float32
        steps = (order_of(codes) - order_of(plain_codes)).abs()
        assert (steps <= 1).all()
        assert (codes.float().abs().amax(-1) == FP8_MAX).all()
        # Codes differ at ties alone: within the roundings of x / step and of step.
        wide = view.double()
        quotients = wide * (FP8_MAX / wide.abs().amax(-1, keepdim=True))
        ties = (codes.double() + plain_codes.double()) / 2
        at_tie = (quotients - ties).abs() <= 8 * torch.finfo(torch.float32).eps * ties.abs()
        assert at_tie[steps > 0].all()
        expected = wide.abs().amax(-1) / FP8_MAX / torch.sqrt(wide.square().mean(-1) + EPS)
        torch.testing.assert_close(scale.double(), expected, rtol=8 * accumulation(width), atol=0)

        exact = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + EPS)
        ours, plain = (
            q.double() * s.double()[..., None]
            for q, s in ((codes, scale), (plain_codes, plain_scale))
        )
        if exact.numel():
            error, budget = (ours - exact).norm(), (plain - exact).norm()
            assert error <= 1.001 * budget  # the same roundings, but for ties


def test_quantized_rows_of_nothing_and_next_to_nothing_are_finite():
    x = torch.zeros(1, 5, 80, device=DEVICE)
    x[0, 1, 3] = 1e-42  # subnormal
    x[0, 2] = -1e-37
    x[0, 3, ::2] = 1e17
    codes, scale = quantize_rows(x, EPS)
    assert torch.equal(codes[0, 0].float(), torch.zeros(80, device=DEVICE))
    assert codes.float().isfinite().all()
    assert scale.isfinite().all()
    back = codes.double() * scale.double()[..., None]
    exact = x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    assert ((back - exact).norm(dim=-1) <= exact.norm(dim=-1) / 16 + 1e-34).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (5, 48)}, r"x must be \(B, S, D\), got \(5, 48\)"),
        ({"weight": (47,)}, r"weight must be \(48,\), got \(47,\)"),
        ({"bias": (1, 48)}, r"bias must be \(48,\), got \(1, 48\)"),
        ({"lengths": (1, 3)}, r"sum to S = 5, got \[1, 3\]"),
        ({"lengths": (1, 1, 1, 2)}, r"1 to 3 numbers.*\[1, 1, 1, 2\]"),
        ({"lengths": (6, -1)}, r"got \[6, -1\]"),
    ],
)
def test_norm_says_what_does_not_fit(changed, message):
    shapes = {"x": (2, 5, 48), "weight": (48,), "bias": (48,), **changed}
    lengths = shapes.pop("lengths", (1, 4))
    tensors = {name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        norm(**tensors, eps=EPS, lengths=lengths, out_dtype=torch.float32)


def test_quantize_rows_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"x must be \(B, S, D\), got \(5, 48\)"):
        quantize_rows(torch.zeros(5, 48, device=DEVICE), EPS)
