"""The spatial map against float64: both temperatures, odd sizes, mixed dtypes, degenerate rows."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    GPUS,
    KERNEL_MARKS,
    assert_budget,
    draw,
    on_gpu,
    shaken,
    strided,
)

from stellar_fast.kernels.reassemble import reassemble
from stellar_fast.kernels.spatial_map import spatial_map
from stellar_fast.reference import ops as oracles

pytestmark = KERNEL_MARKS
TEMPERATURE = 0.06


@pytest.fixture(params=GPUS)
def gpu(request):
    with on_gpu(request.param):
        yield


def arguments(batch: int, patches: int, tokens: int, width: int) -> tuple[torch.Tensor, ...]:
    """dense, sparse, and their projections' weights and biases, in float64.

    Patches resemble the tokens, as the trained model's do, so that a softmax has peaks.
    """
    sparse = draw(batch, tokens, width)
    nearest = torch.arange(patches) % tokens
    dense = sparse[:, nearest] + draw(batch, patches, width)
    shared = draw(width, width) / width**0.5
    return (
        dense,
        sparse,
        shared,
        draw(width, seed=1) / 4,
        shared + draw(width, width, seed=2) / width**0.5 / 4,
        draw(width, seed=3) / 4,
    )


def rounded(tensors, features: torch.dtype, weights: torch.dtype) -> list[torch.Tensor]:
    """On the device: dense and sparse in one dtype, the projections in another."""
    return [
        tensor.to(DEVICE, features if index < 2 else weights)
        for index, tensor in enumerate(tensors)
    ]


def assert_right(given: list[torch.Tensor], temperature: float | None) -> None:
    """Both results within the budget, rows of spatial that sum to 1, lowrank made of spatial."""
    dtype = given[0].dtype
    spatial, lowrank = spatial_map(*given, temperature, lowrank=True)
    plain, plain_lowrank = oracles.spatial_map(*given, temperature, lowrank=True)
    exact, exact_lowrank = oracles.spatial_map(
        *(tensor.double() for tensor in given), temperature, lowrank=True
    )
    width = given[0].shape[2]  # summed up twice, in a projection and in the product of two
    floor, floor_lowrank = oracles.spatial_map(
        *(shaken(tensor, 2 * width) for tensor in given), temperature, lowrank=True
    )
    assert spatial.dtype == lowrank.dtype == dtype
    assert_budget(spatial, plain, exact, dtype, floor)
    assert_budget(lowrank, plain_lowrank, exact_lowrank, dtype, floor_lowrank)
    totals = spatial.double().sum(-1)
    # The rounding of each number, and of the float32 sum of up to 64 and the division by it.
    atol = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(totals, torch.ones_like(totals), rtol=0, atol=atol)
    assert torch.equal(lowrank, reassemble(spatial, given[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("temperature", "batch", "patches", "tokens", "width"),
    [
        (TEMPERATURE, 1, 71, 16, 64),  # two tiles of patches, or three of the mixture
        (None, 2, 35, 24, 64),
        (TEMPERATURE, 2, 6, 8, 136),  # tiles of columns: two, or five
        (None, 1, 33, 17, 83),
        (TEMPERATURE, 1, 20, 64, 72),
        (TEMPERATURE, 2, 5, 1, 64),
    ],
)
def test_spatial_map(dtype, temperature, batch, patches, tokens, width):
    given = rounded(arguments(batch, patches, tokens, width), dtype, dtype)
    assert_right(given, temperature)


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("temperature", [TEMPERATURE, None])
def test_features_wider_than_the_weights(gpu, weights, temperature):
    """What the engine does: float32 features, products in the weights' dtype."""
    given = rounded(arguments(2, 21, 16, 80), torch.float32, weights)
    assert_right(given, temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_lowrank(dtype):
    given = rounded(arguments(2, 9, 5, 64), dtype, dtype)
    spatial, _ = spatial_map(*given, TEMPERATURE, lowrank=True)
    alone, nothing = spatial_map(*given, TEMPERATURE, lowrank=False)
    assert torch.equal(alone, spatial)
    assert nothing is None


def test_empty_batches():
    given = rounded(arguments(0, 9, 4, 64), torch.float32, torch.float32)
    spatial, lowrank = spatial_map(*given, TEMPERATURE, lowrank=True)
    assert spatial.shape == (0, 9, 4)
    assert lowrank.shape == (0, 9, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_in_the_midst_of_nan(dtype):
    """Also what lies between the parts of a sequence, and behind the last weight and bias."""
    dense, sparse, *weights = rounded(arguments(2, 19, 9, 80), dtype, dtype)
    expected = spatial_map(dense, sparse, *weights, TEMPERATURE, lowrank=True)
    nan = float("nan")
    gap = dense.new_full((2, 1, 80), nan)
    sequence = torch.cat([gap, dense, gap, sparse, gap], dim=1)
    followed = [torch.cat([w, w.new_full((256, *w.shape[1:]), nan)])[: len(w)] for w in weights]
    apart = [torch.stack([w, torch.full_like(w, nan)], -1)[..., 0] for w in weights]
    cases = (
        (sequence[:, 1:20], sequence[:, 21:30], weights),
        (strided(dense), strided(sparse), weights),
        (dense.mT.contiguous().mT, sparse.mT.contiguous().mT, weights),
        (dense, sparse, followed),
        (dense, sparse, apart),
    )
    for d, s, w in cases:
        found = spatial_map(d, s, *w, TEMPERATURE, lowrank=True)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [TEMPERATURE, None])
def test_rows_of_nothing(dtype, temperature):
    """No length to divide by: every token is as near as any other."""
    dense, sparse, weight, bias, sparse_weight, sparse_bias = rounded(
        arguments(2, 20, 5, 64), torch.float32, dtype
    )
    zeros = torch.zeros_like(bias)
    dense[:, 3:7] = 0
    given = dense, sparse, weight, zeros, sparse_weight, sparse_bias
    spatial, lowrank = spatial_map(*given, temperature, lowrank=True)
    assert lowrank.isfinite().all()
    fifth = {"rtol": 2 * torch.finfo(torch.float32).eps, "atol": 0}  # a division by 5
    torch.testing.assert_close(spatial[:, 3:7], torch.full_like(spatial[:, 3:7], 0.2), **fifth)
    given = dense, torch.zeros_like(sparse), weight, bias, sparse_weight, zeros
    spatial, lowrank = spatial_map(*given, temperature, lowrank=True)
    torch.testing.assert_close(spatial, torch.full_like(spatial, 0.2), **fifth)
    assert torch.equal(lowrank, torch.zeros_like(lowrank))


def test_lengths_below_the_floor_are_taken_as_the_floor():
    dense, sparse, *_ = rounded(arguments(1, 8, 4, 64), torch.float32, torch.float32)
    weight = torch.eye(64, device=DEVICE)
    bias = torch.zeros(64, device=DEVICE)
    for shrunk in ((dense * 1e-9, sparse), (dense, sparse * 1e-9)):
        assert_right([*shrunk, weight, bias, weight, bias], 1e-3)


def test_large_logits_do_not_overflow():
    dense, sparse, weight, *_ = rounded(arguments(1, 20, 8, 64), torch.float32, torch.float32)
    bias = torch.zeros(64, device=DEVICE)
    assert_right([dense * 30, sparse * 30, weight, bias, weight, bias], None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_its_batch(gpu, dtype):
    dense, sparse, *weights = rounded(arguments(3, 20, 9, 80), torch.float32, dtype)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    whole = spatial_map(dense, sparse, *weights, TEMPERATURE, lowrank=True)
    moved = spatial_map(dense[order], sparse[order], *weights, TEMPERATURE, lowrank=True)
    alone = [
        spatial_map(dense[i : i + 1], sparse[i : i + 1], *weights, TEMPERATURE, lowrank=True)
        for i in range(3)
    ]
    for index, (full, permuted) in enumerate(zip(whole, moved, strict=True)):
        assert torch.equal(full[order], permuted)
        assert torch.equal(full, torch.cat([one[index] for one in alone]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dense": (9, 64)}, r"dense must be \(B, P, D\), got \(9, 64\)"),
        ({"sparse": (2, 4, 63)}, r"sparse must be \(2, K, 64\).*got \(2, 4, 63\)"),
        ({"sparse": (1, 4, 64)}, r"sparse must be \(2, K, 64\).*got \(1, 4, 64\)"),
        ({"sparse": (2, 65, 64)}, r"1 to 64 tokens, got 65"),
        ({"dense_weight": (64, 63)}, r"dense_weight must be \(64, 64\), got \(64, 63\)"),
        ({"sparse_weight": (63, 64)}, r"sparse_weight must be \(64, 64\), got \(63, 64\)"),
        ({"dense_bias": (63,)}, r"dense_bias must be \(64,\), got \(63,\)"),
        ({"sparse_bias": (65,)}, r"sparse_bias must be \(64,\), got \(65,\)"),
    ],
)
def test_says_what_does_not_fit(changed, message):
    shapes = {
        "dense": (2, 9, 64),
        "sparse": (2, 4, 64),
        "dense_weight": (64, 64),
        "dense_bias": (64,),
        "sparse_weight": (64, 64),
        "sparse_bias": (64,),
        **changed,
    }
    tensors = {name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        spatial_map(**tensors, temperature=TEMPERATURE, lowrank=True)


def test_weights_of_two_dtypes_are_refused():
    given = rounded(arguments(1, 9, 4, 64), torch.float32, torch.float32)
    given[4] = given[4].half()
    with pytest.raises(ValueError, match=r"one dtype.*float16.*float32"):
        spatial_map(*given, TEMPERATURE, lowrank=True)
