"""`kernels.attention`: error budgets at every kind of head, edges, batch invariance."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    PARTS,
    assert_within_budget,
    cast,
    draw,
    on_part,
    oracles,
    poisoned,  # noqa: F401
    strided,
)
from memory_bounds import bounded  # noqa: F401
from stellar_fast.kernels import attention, launch

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("poisoned", "bounded")]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 40, 48, 64, 80, 96, 112, 128])
def test_every_head_dim(part, dtype, head_dim):
    query, key_value = draw(2, 45, 2 * head_dim), draw(2, 45, 4 * head_dim)
    with on_part(part):
        assert_within_budget(attention, query, key_value, 2, dtype=dtype)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (5, 64), (70, 65), (5, 128), (17, 213), (213, 213), (17, 273), (5, 700)],
)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_every_length(part, dtype, queries, keys, head_dim):
    with on_part(part):
        arguments = draw(1, queries, head_dim), draw(1, keys, 2 * head_dim), 1
        assert_within_budget(attention, *arguments, dtype=dtype)


def test_both_ways_of_holding_keys_are_covered():
    """The lengths above take the table's resident tile and its streaming one."""
    for head_dim in (64, 80):
        kinds = [
            launch.attention_tile(launch.PARTS[90], torch.float16, keys, head_dim, True).resident
            for keys in (213, 273, 700)
        ]
        assert kinds == [True, True, False]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(part, dtype):
    query, key_value = 30 * draw(1, 9, 64), 30 * draw(1, 213, 128)
    with on_part(part):
        assert_within_budget(attention, query, key_value, 1, dtype=dtype)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80])
def test_packed_views_in_poisoned_memory(part, dtype, width):
    qkv = cast(draw(3, 70, 3 * width), dtype)
    with on_part(part):
        expected = attention(qkv[..., :width].clone(), qkv[..., width:].clone(), 1)
        view = strided(qkv)
        for packed in (qkv, view, view[::2], view[:, :33]):
            found = attention(packed[..., :width], packed[..., width:], 1)
            if packed.shape == qkv.shape:
                assert torch.equal(found, expected)
            assert found.isfinite().all()
        shorter = view[:, :33]
        assert_within_budget(
            attention,
            shorter[..., :width].double(),
            shorter[..., width:].double(),
            1,
            dtype=dtype,
        )


@pytest.mark.parametrize("part", PARTS)
def test_no_images(part):
    with on_part(part):
        empty = torch.zeros(0, 45, 192, dtype=torch.float16, device=DEVICE)
        assert attention(empty[..., :64], empty[..., 64:], 4).shape == (0, 45, 64)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [213, 700])
def test_a_row_does_not_depend_on_the_batch(part, dtype, keys):
    query, key_value = cast(draw(3, 21, 80), dtype), cast(draw(3, keys, 160), dtype)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    with on_part(part):
        y = attention(query, key_value, 1)
        assert torch.equal(attention(query[order], key_value[order], 1), y[order])
        for i in range(3):
            assert torch.equal(attention(query[i : i + 1], key_value[i : i + 1], 1)[0], y[i])
        # Nor on how many rows one program takes.
        assert torch.equal(attention(query[:, 5:6], key_value, 1), y[:, 5:6])


@pytest.mark.parametrize("part", PARTS)
def test_quantized_output(part):
    query, key_value = cast(draw(2, 21, 80), torch.float16), cast(draw(2, 45, 160), torch.float16)
    with on_part(part):
        y = attention(query, key_value, 1, out_scale=0.001)
    exact = oracles.attention(query.double(), key_value.double(), 1)
    clipped = exact.clamp(-0.448, 0.448)
    assert y.dtype == launch.FP8
    assert (y.double() * 0.001 - clipped).norm() / clipped.norm() < 0.04
    assert (clipped != exact).any(), "nothing was held within range"


@pytest.mark.parametrize(
    ("query", "key_value", "heads", "named"),
    [
        ((2, 5, 64), (2, 7, 127), 4, "key_value must be"),
        ((2, 5, 64), (1, 7, 128), 4, "key_value must be"),
        ((2, 5, 64), (2, 7, 128), 3, "head_dim"),
        ((2, 5, 136), (2, 7, 272), 1, "head_dim"),
        ((2, 5, 64), (2, 0, 128), 1, "no rows"),
    ],
)
def test_shapes_that_do_not_fit(query, key_value, heads, named):
    with pytest.raises(ValueError, match=named):
        attention(torch.zeros(query, device=DEVICE), torch.zeros(key_value, device=DEVICE), heads)
