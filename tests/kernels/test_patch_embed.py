"""The patch embedding against float64: pixels of any kind and layout, odd sizes, all rows."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    KERNEL_MARKS,
    accumulation,
    assert_budget,
    assert_every_part_launches_alike,
    draw,
    rounding,
    shaken,
)

from stellar_fast.kernels.launch import SUM_BLOCK
from stellar_fast.kernels.patch_embed import patch_embed
from stellar_fast.reference import ops as oracles

pytestmark = KERNEL_MARKS
PIXELS = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def photos(batch: int, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, 3, H, W) pixels in [0, 1], or 0..255 of uint8."""
    pixels = draw(batch, 3, height, width).mul(0.2).add(0.4).clamp(0, 1)
    return (
        (pixels * 255).round().to(DEVICE, dtype)
        if dtype == torch.uint8
        else pixels.to(DEVICE, dtype)
    )


def parameters(
    images: torch.Tensor, patch: int, width: int, tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight and sparse tokens in `dtype`, table in float32; rows of about the same length."""
    patches = (images.shape[2] // patch) * (images.shape[3] // patch)
    span = 255 if images.dtype == torch.uint8 else 1
    weight = draw(width, 3 * patch**2) / (patch * span)
    table, sparse = draw(1 + patches, width, seed=1), draw(tokens, width, seed=2)
    return (
        weight.to(DEVICE, dtype),
        table.to(DEVICE, torch.float32),
        sparse.to(DEVICE, dtype),
    )


def assert_right(images, weight, table, sparse, patch, centre) -> torch.Tensor:
    """x and its sums, within the budget; CLS and sparse tokens to the bit."""
    dtype = weight.dtype
    x, sums = patch_embed(images, weight, table, sparse, patch, centre)
    plain, _ = oracles.patch_embed(images, weight, table, sparse, patch, centre)
    operands = images.double(), weight.double(), table.double(), sparse.double()
    exact, _ = oracles.patch_embed(*operands, patch, centre)
    depth = weight.shape[1]
    floor, _ = oracles.patch_embed(*(shaken(v, depth) for v in operands), patch, centre)
    assert x.dtype == dtype
    for rows in (slice(None), slice(1, len(table))):
        assert_budget(x[:, rows], plain[:, rows], exact[:, rows], dtype, floor[:, rows])
    assert torch.equal(x[:, :1], plain[:, :1])
    assert torch.equal(x[:, len(table) :], plain[:, len(table) :])
    squares = torch.nn.functional.pad(x.double().square(), (0, -x.shape[2] % SUM_BLOCK))
    expected = squares.unflatten(2, (-1, SUM_BLOCK)).sum(3).permute(2, 0, 1).float()
    # A float32 sum of SUM_BLOCK squares that are rounded alike.
    torch.testing.assert_close(sums, expected, rtol=8 * accumulation(SUM_BLOCK), atol=0)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "size", "patch", "width", "tokens"),
    [
        (2, (32, 48), 16, 80, 8),
        (1, (29, 44), 14, 64, 24),  # one pixel row and two columns are dropped
        (3, (35, 42), 5, 72, 3),  # 180 rows: two tiles at least, and the depth is no block's
        (2, (9, 4), 4, 200, 1),  # two tiles of columns, the second with a half left empty
        (0, (32, 48), 16, 64, 16),
    ],
)
def test_patch_embed(dtype, batch, size, patch, width, tokens):
    images = photos(batch, *size, torch.float32)
    assert_right(images, *parameters(images, patch, width, tokens, dtype), patch, 0.5)


def test_every_part_launches_alike():
    images, weight, table, sparse = (
        torch.empty(shape, device="meta") for shape in ((2, 3, 9, 9), (64, 48), (5, 64), (4, 64))
    )
    assert_every_part_launches_alike(lambda: patch_embed(images, weight, table, sparse, 4, 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
def test_pixels_of_every_kind_in_both_layouts(dtype, pixels):
    planes, patch = photos(2, 11, 17, pixels), 5
    interleaved = planes.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    centre = 127.5 if pixels == torch.uint8 else 0.5
    arguments = parameters(planes, patch, 64, 4, dtype)
    x = assert_right(planes, *arguments, patch, centre)
    assert torch.equal(x, patch_embed(interleaved, *arguments, patch, centre)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    images = photos(2, 11, 17, torch.float32)
    arguments = parameters(images, 5, 64, 4, dtype)
    expected = assert_right(images, *arguments, 5, 0.5)
    nan = float("nan")
    within = images.new_full((3, 4, 18, 28), nan)
    within[:2, 1:, 3:14, 5:22] = images
    every_second = images.new_full((2, 3, 22, 34), nan)
    every_second[:, :, ::2, ::2] = images
    views = (
        within[:2, 1:, 3:14, 5:22],
        every_second[:, :, ::2, ::2],
        images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        images.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    )
    for view in views:
        assert torch.equal(view, images)
        assert torch.equal(patch_embed(view, *arguments, 5, 0.5)[0], expected)
    one = patch_embed(images[:1].expand(3, -1, -1, -1), *arguments, 5, 0.5)[0]
    assert torch.equal(one, expected[:1].expand(3, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_in_the_midst_of_nan(dtype):
    images = photos(2, 11, 11, torch.float32)
    weight, table, sparse = parameters(images, 5, 80, 4, dtype)
    expected, sums = patch_embed(images, weight, table, sparse, 5, 0.5)

    def followed(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_full((256, x.shape[1]), float("nan"))])[: len(x)]

    def every_second(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]

    for view in (followed, every_second):
        views = [view(tensor) for tensor in (weight, table, sparse)]
        x, found = patch_embed(images, *views, 5, 0.5)
        assert torch.equal(x, expected)
        assert torch.equal(found, sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_black_white_and_grey_images(dtype):
    images = torch.zeros(3, 3, 10, 10, dtype=torch.uint8, device=DEVICE)
    images[1], images[2] = 255, 127
    arguments = parameters(images, 5, 64, 4, dtype)
    assert_right(images, *arguments, 5, 127.5)
    weight, table, sparse = arguments
    grey = torch.full((1, 3, 10, 10), 0.5, device=DEVICE)
    x, _ = patch_embed(grey, weight, table, sparse, 5, 0.5)
    assert torch.equal(x[0, :5], table.to(dtype))
    assert_right(grey, weight, table, sparse, 5, 0.0)


@pytest.mark.parametrize(
    ("dtype", "pixels", "step"),
    [
        (torch.float32, torch.float64, 2**-30),
        *((dtype, torch.float32, 2**-20) for dtype in DTYPES),
    ],
)
def test_the_centre_goes_before_the_rounding(dtype, pixels, step):
    """Pixels next to the centre: rounded first, no step would be left of them."""
    images = torch.full((1, 3, 16, 16), 0.5, device=DEVICE, dtype=pixels)
    images[0, :, ::2] += step
    weight, table, sparse = parameters(images, 16, 64, 1, dtype)
    table = torch.zeros_like(table)
    weight = weight.abs() * 64
    x, _ = patch_embed(images, weight, table, sparse, 16, 0.5)
    expected = (images.double() - 0.5).flatten() @ weight.double().T
    # Weights and steps of one sign: no sum is smaller than what was rounded in it, each term by
    # `dtype` once, all by the same; float32 sums of them, and the result's rounding.
    rtol = 4 * rounding(dtype) + 8 * accumulation(weight.shape[1])
    torch.testing.assert_close(x[0, 1].double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_its_batch(dtype):
    images = photos(4, 31, 36, torch.uint8)
    arguments = (*parameters(images, 5, 80, 5, dtype), 5, 127.5)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    x, sums = patch_embed(images, *arguments)
    moved, moved_sums = patch_embed(images[order], *arguments)
    assert torch.equal(x[order], moved)
    assert torch.equal(sums[:, order], moved_sums)
    for i in range(4):
        alone, alone_sums = patch_embed(images[i : i + 1], *arguments)
        assert torch.equal(x[i], alone[0])
        assert torch.equal(sums[:, i], alone_sums[:, 0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": (3, 32, 32)}, r"images must be \(B, 3, H, W\), got \(3, 32, 32\)"),
        ({"images": (2, 32, 32, 3)}, r"images must be \(B, 3, H, W\), got \(2, 32, 32, 3\)"),
        ({"images": (2, 3, 15, 32)}, r"at least 16 pixels.*got \(2, 3, 15, 32\)"),
        ({"weight": (64, 588)}, r"weight must be \(D, 768\).*got \(64, 588\)"),
        ({"table": (6, 64)}, r"table must be \(5, 64\).*got \(6, 64\)"),
        ({"sparse_tokens": (4, 63)}, r"sparse_tokens must be \(K, 64\), got \(4, 63\)"),
    ],
)
def test_says_what_does_not_fit(changed, message):
    shapes = {
        "images": (2, 3, 32, 32),
        "weight": (64, 768),
        "table": (5, 64),
        "sparse_tokens": (4, 64),
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        patch_embed(
            **{name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()},
            patch_size=16,
        )
