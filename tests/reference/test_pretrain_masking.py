"""Which patches of a masked view are kept."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from budgets import FLOAT64
from hypothesis import given, settings
from hypothesis import strategies as st

from stellar_fast.reference.pretrain.masking import block_focus, gaussian_focus, random_masking

pytestmark = pytest.mark.numerical


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 5),
    side=st.integers(1, 16),
    ratio=st.floats(0.0, 0.99),
    mode=st.sampled_from(["gaussian", "block", None]),
    seed=st.integers(0, 2**31),
)
def test_kept_patches_are_as_many_as_asked_for_and_distinct(batch, side, ratio, mode, seed):
    patches = side * side
    kept = int(patches * (1 - ratio))
    if kept == 0:
        with pytest.raises(ValueError, match=f"keeps none of {patches} patches"):
            random_masking(batch, patches, ratio, mode)
        return
    keep, dropped = random_masking(batch, patches, ratio, mode, generator=generator(seed))
    assert keep.shape == (batch, kept) and keep.dtype == torch.int64
    every = torch.cat([keep, dropped], dim=1).sort(dim=1).values
    assert torch.equal(every, torch.arange(patches).expand(batch, -1))
    again, _ = random_masking(batch, patches, ratio, mode, generator=generator(seed))
    assert torch.equal(keep, again)


@pytest.mark.parametrize(("ratio", "kept"), [(0.8, 39), (0.75, 49), (0.0, 196)])
def test_published_ratios(ratio, kept):
    assert random_masking(1, 196, ratio)[0].shape == (1, kept)


@pytest.mark.parametrize("mode", ["gaussian", "block", None])
def test_masks_follow_the_global_stream_and_differ_between_views(mode):
    torch.manual_seed(3)
    first, _ = random_masking(16, 196, 0.75, mode)
    second, _ = random_masking(16, 196, 0.75, mode)
    torch.manual_seed(3)
    assert torch.equal(random_masking(16, 196, 0.75, mode)[0], first)
    assert not torch.equal(first, second)
    assert len({frozenset(row) for row in first.tolist()}) > 8  # there are 64 places for a block


def test_plain_masks_keep_every_patch_alike_and_lowest_noise_first():
    keep, dropped = random_masking(4000, 16, 0.75, generator=generator(9))
    share = keep.flatten().bincount(minlength=16) / 4000
    assert (share - 0.25).abs().max() < 0.04
    noise = torch.rand(4000, 16, generator=generator(9))
    assert (noise.gather(1, torch.cat([keep, dropped], dim=1)).diff(dim=1) >= 0).all()


def test_gaussian_lowers_the_noise_around_a_cell_in_half_of_the_views():
    side, views = 14, 4000
    noise = torch.rand(views, side * side, generator=generator(10), dtype=torch.float64)
    lowered = noise - gaussian_focus(noise, generator=generator(11))
    focused = lowered.any(dim=1)
    assert 0.46 < focused.float().mean() < 0.54
    bump = lowered[focused].double()
    peak, centre = bump.max(dim=1)
    assert (peak - 1).abs().max() < FLOAT64
    assert bump.min() > -FLOAT64
    assert set(centre.tolist()) == set(range(side * side))  # any cell may be the centre
    # exp(-d^2 / (2 sigma^2)) at the neighbours tells sigma, in cells, which is 0.1 to 0.5 of 14
    row, column = centre // side, centre % side
    grid = torch.arange(side)
    squared = (grid - row[:, None]).square()[:, :, None] + (grid - column[:, None]).square()[
        :, None
    ]
    beside = torch.where(column > 0, centre - 1, centre + 1).unsqueeze(1)
    sigma = (-0.5 / bump.gather(1, beside).log()).sqrt()
    assert 0.099 < sigma.min() / side < 0.11 and 0.49 < sigma.max() / side < 0.501
    assert (sigma / side).mean().item() == pytest.approx(0.3, abs=0.01)
    expected = (-squared.flatten(1) / (2 * sigma.square())).exp()
    # The bump is float32; beside the centre it is 0.99 or less, so that its logarithm, and with it
    # sigma squared, is known to a hundred times that.
    assert (bump - expected).abs().max() < 100 * torch.finfo(torch.float32).eps


def test_block_zeroes_a_square_anywhere():
    side, kept = 7, 14
    noise = 0.5 + torch.rand(3000, side * side, generator=generator(12)) / 2
    focused = block_focus(noise, kept, generator=generator(13)).unflatten(1, (side, side))
    zero = focused == 0
    block = int(kept**0.5)
    corners = set()
    for view in zero[:400]:
        rows, columns = view.any(1).nonzero().flatten(), view.any(0).nonzero().flatten()
        assert len(rows) == len(columns) == block
        assert view[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert view.sum() == block * block
        corners.add((int(rows[0]), int(columns[0])))
    assert corners == set(itertools.product(range(side - block + 1), repeat=2))
    assert torch.equal(focused[~zero], noise.unflatten(1, (side, side))[~zero])


def test_a_block_is_kept_whole():
    keep, _ = random_masking(50, 49, 0.7, "block", generator=generator(14))
    block = math.isqrt(keep.shape[1])
    for row in keep.tolist():
        seen = torch.zeros(49).index_fill(0, torch.tensor(row), 1.0).view(1, 1, 7, 7)
        assert F.avg_pool2d(seen, block, stride=1).max() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 49, 0.5, "ring"), "'ring'"),
        ((1, 49, 1.0), r"\[0, 1\), got 1.0"),
        ((1, 49, -0.1), "got -0.1"),
        ((1, 50, 0.5, "gaussian"), "50 is no square number"),
        ((1, 50, 0.5, "block"), "50 is no square number"),
        ((1, 49, 0.99), "keeps none of 49"),
    ],
)
def test_masking_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_masking(*arguments)
    assert random_masking(1, 50, 0.5)[0].shape == (1, 25)
