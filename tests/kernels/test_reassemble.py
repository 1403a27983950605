"""`spatial @ sparse` against float64: any number of tokens, strides, dtypes that differ."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    KERNEL_MARKS,
    assert_budget,
    assert_every_part_launches_alike,
    assert_within_budget,
    draw,
    shaken,
    strided,
)

from stellar_fast.kernels.reassemble import reassemble
from stellar_fast.reference import ops as oracles

pytestmark = KERNEL_MARKS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "patches", "tokens", "width"),
    [
        (2, 71, 16, 64),  # three tiles of patches, the last of 7
        (3, 33, 24, 64),
        (3, 7, 8, 200),  # two tiles of columns
        (2, 31, 64, 136),
        (1, 1, 17, 83),
        (1, 5, 1, 64),
        (0, 9, 16, 64),
    ],
)
def test_reassemble(dtype, batch, patches, tokens, width):
    spatial = draw(batch, patches, tokens).mul(4).softmax(-1)
    assert_within_budget(reassemble, spatial, draw(batch, tokens, width), dtype=dtype, terms=tokens)


def test_every_part_launches_alike():
    spatial, sparse = (torch.empty(2, 9, width, device="meta") for width in (9, 64))
    assert_every_part_launches_alike(lambda: reassemble(spatial, sparse))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_in_the_midst_of_nan(dtype):
    spatial = draw(3, 37, 24).softmax(-1).to(DEVICE, dtype)
    sparse = draw(3, 24, 80).to(DEVICE, dtype)
    expected = reassemble(spatial, sparse)
    nan = float("nan")
    last = torch.cat([sparse, sparse.new_full((1, 24, 80), nan)])[:3]
    sequence = torch.cat([sparse.new_full((3, 38, 80), nan), sparse], dim=1)[:, 38:]
    scattered = sparse.mT.contiguous().mT
    for view in (strided(sparse), last, sequence, scattered):
        assert torch.equal(view, sparse)
        assert torch.equal(reassemble(spatial, view), expected)
    rows = torch.cat([spatial, spatial.new_full((3, 7, 24), nan)], dim=1)[:, :37]
    for view in (strided(spatial), rows, spatial.mT.contiguous().mT):
        assert torch.equal(view, spatial)
        assert torch.equal(reassemble(view, sparse), expected)


def test_the_wider_of_two_dtypes():
    spatial, sparse = draw(2, 9, 16).softmax(-1).float().to(DEVICE), draw(2, 16, 64).to(DEVICE)
    for left, right in ((torch.float32, torch.float16), (torch.float16, torch.float32)):
        pair = spatial.to(left), sparse.to(right)
        exact = oracles.reassemble(*(tensor.double() for tensor in pair))
        plain = oracles.reassemble(*(tensor.float() for tensor in pair))
        floor = oracles.reassemble(*(shaken(tensor, 16) for tensor in pair))
        ours = reassemble(*pair)
        assert ours.dtype == torch.float32
        assert_budget(ours, plain, exact, torch.float32, floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_its_batch(dtype):
    spatial = draw(4, 40, 24).softmax(-1).to(DEVICE, dtype)
    sparse = draw(4, 24, 80).to(DEVICE, dtype)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    whole = reassemble(spatial, sparse)
    assert torch.equal(whole[order], reassemble(spatial[order], sparse[order]))
    for i in range(4):
        assert torch.equal(whole[i], reassemble(spatial[i : i + 1], sparse[i : i + 1])[0])


@pytest.mark.parametrize(
    ("spatial", "sparse", "message"),
    [
        ((9, 16), (2, 16, 64), r"spatial must be \(B, P, K\), got \(9, 16\)"),
        ((2, 9, 16), (2, 17, 64), r"sparse must be \(2, 16, D\).*got \(2, 17, 64\)"),
        ((2, 9, 16), (3, 16, 64), r"sparse must be \(2, 16, D\).*got \(3, 16, 64\)"),
        ((2, 9, 65), (2, 65, 64), r"1 to 64 tokens, got 65"),
        ((2, 9, 0), (2, 0, 64), r"1 to 64 tokens, got 0"),
    ],
)
def test_says_what_does_not_fit(spatial, sparse, message):
    with pytest.raises(ValueError, match=message):
        reassemble(torch.zeros(spatial, device=DEVICE), torch.zeros(sparse, device=DEVICE))
