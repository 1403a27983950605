"""`kernels.attention`: error budgets at every kind of head, edges, batch invariance."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    GPUS,
    KERNEL_MARKS,
    ON_GPU,
    TWO_WAYS,
    assert_within_budget,
    cast,
    draw,
    launches,
    on_gpu,
    oracles,
    rounding,
    strided,
)

from stellar_fast.kernels import attention, gpus, launch, tables
from stellar_fast.kernels.attention import attention_tile
from stellar_fast.kernels.tables import AttentionTile, Table

pytestmark = KERNEL_MARKS
# Pointers, or descriptors: in float32, where all parts take pointers, only the first.
WAYS = TWO_WAYS if ON_GPU else [way for way in TWO_WAYS if way != (90, torch.float32)]
# Where keys stay in shared memory, if they are not too many.
DESCRIBED = [way for way in WAYS if way[0] != 80]
BEYOND = 480


@pytest.mark.parametrize(("gpu", "dtype"), WAYS)
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 80, 112])
def test_every_kind_of_head(gpu, dtype, head_dim):
    """One piece or two, filled or not; the other sizes of these kinds are slow tests."""
    query, key_value = draw(2, 5, 2 * head_dim), draw(2, 37, 4 * head_dim)
    with on_gpu(gpu):
        assert_within_budget(attention, query, key_value, 2, dtype=dtype, terms=128)


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "dtype"), WAYS)
@pytest.mark.parametrize("head_dim", [32, 48, 96, 128])
def test_every_other_head(gpu, dtype, head_dim):
    test_every_kind_of_head(gpu, dtype, head_dim)


@pytest.mark.parametrize(("gpu", "dtype"), WAYS)
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"),
    [
        (1, 1, 80),
        (70, 65, 64),  # a tile and a bit of queries; a block of keys and one more
        (70, 97, 80),
        (5, 128, 80),  # whole blocks
        (3, 213, 80),
    ],
)
def test_every_length(gpu, dtype, queries, keys, head_dim):
    with on_gpu(gpu):
        arguments = draw(1, queries, head_dim), draw(1, keys, 2 * head_dim), 1
        assert_within_budget(attention, *arguments, dtype=dtype, terms=keys + head_dim)


@pytest.mark.parametrize(("gpu", "dtype"), DESCRIBED)
@pytest.mark.parametrize(("keys", "head_dim"), [(BEYOND, 64), (BEYOND + 1, 80)])
def test_keys_that_do_not_fit_into_shared_memory(gpu, dtype, keys, head_dim):
    test_every_length(gpu, dtype, 3, keys, head_dim)


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "dtype"), WAYS)
@pytest.mark.parametrize(("queries", "keys"), [(213, 213), (17, 273), (5, 700)])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_the_models_lengths(gpu, dtype, queries, keys, head_dim):
    test_every_length(gpu, dtype, queries, keys, head_dim)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_every_batch_has_blocks_of_the_same_keys(head_dim):
    """Or an image's sums would depend on its batch; large ones have more query rows a program."""
    gpu = gpus.GPUS[90]
    with launch.tuned_by(tables.EMPTY):
        tiles = [attention_tile(gpu, torch.bfloat16, 2**n, 12, 213, head_dim) for n in range(10)]
    assert {tile.block_k for tile in tiles} == {64}
    assert [tile.block_q for tile in tiles[:5]] == [64] * 5
    assert tiles[-1].block_q == (128 if head_dim == 64 else 64)


def test_float32_is_launched_alike_on_every_part():
    query, key_value = (torch.empty(1, 70, width, device="meta") for width in (80, 160))
    first, *others = launches(lambda: attention(query, key_value, 1))
    assert first and all(other == first for other in others)


@pytest.mark.parametrize(("gpu", "dtype"), WAYS)
def test_more_query_rows_a_program_give_the_same(gpu, dtype):
    query, key_value = (cast(draw(1, 150, width), dtype) for width in (32, 64))
    name = launch.NAMES[dtype]
    with on_gpu(gpu):
        narrow, wide = (
            Table(attention={(name, 150, 16): ((1, AttentionTile(rows, 64, rows // 16, 2)),)})
            for rows in (64, 128)
        )
        with launch.tuned_by(narrow):
            expected = attention(query, key_value, 2)
        with launch.tuned_by(wide):
            assert torch.equal(attention(query, key_value, 2), expected)


@pytest.mark.parametrize(("gpu", "dtype"), WAYS)
def test_large_scores_do_not_overflow(gpu, dtype):
    query, key_value = 30 * draw(1, 9, 64), 30 * draw(1, 133, 128)
    with on_gpu(gpu):
        assert_within_budget(attention, query, key_value, 1, dtype=dtype, terms=133)


@pytest.mark.parametrize(("gpu", "dtype"), WAYS)
@pytest.mark.parametrize("width", [64, 80])
def test_packed_views_in_poisoned_memory(gpu, dtype, width):
    qkv = cast(draw(3, 21, 3 * width), dtype)
    with on_gpu(gpu):
        expected = attention(qkv[..., :width].clone(), qkv[..., width:].clone(), 1)
        view = strided(qkv)
        for packed, wanted in ((qkv, expected), (view, expected), (view[::2], expected[::2])):
            assert torch.equal(attention(packed[..., :width], packed[..., width:], 1), wanted)
        shorter = view[:, :19]
        assert_within_budget(
            attention,
            shorter[..., :width].double(),
            shorter[..., width:].double(),
            1,
            dtype=dtype,
            terms=width,
        )


@pytest.mark.parametrize("gpu", GPUS)
def test_no_images(gpu):
    with on_gpu(gpu):
        empty = torch.zeros(0, 45, 192, dtype=torch.float16, device=DEVICE)
        assert attention(empty[..., :64], empty[..., 64:], 4).shape == (0, 45, 64)


@pytest.mark.parametrize(
    ("gpu", "dtype", "keys"), [(*way, 97) for way in WAYS] + [(*way, BEYOND) for way in DESCRIBED]
)
def test_a_row_does_not_depend_on_the_batch(gpu, dtype, keys):
    query, key_value = cast(draw(2, 70, 80), dtype), cast(draw(2, keys, 160), dtype)
    order = torch.tensor([1, 0], device=DEVICE)
    with on_gpu(gpu):
        y = attention(query, key_value, 1)
        assert torch.equal(attention(query[order], key_value[order], 1), y[order])
        assert torch.equal(attention(query[1:], key_value[1:], 1)[0], y[1])
        # Nor on how many rows one program takes.
        assert torch.equal(attention(query[:, 67:68], key_value, 1), y[:, 67:68])


@pytest.mark.parametrize("gpu", GPUS)
def test_quantized_output(gpu):
    query, key_value = cast(draw(2, 21, 80), torch.float16), cast(draw(2, 45, 160), torch.float16)
    with on_gpu(gpu):
        y = attention(query, key_value, 1, out_scale=0.001)
    exact = oracles.attention(query.double(), key_value.double(), 1)
    clipped = exact.clamp(-0.448, 0.448)
    assert y.dtype == launch.FP8
    bound = rounding(launch.FP8) + 4 * rounding(torch.float16)
    assert (y.double() * 0.001 - clipped).norm() / clipped.norm() < bound
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


@pytest.mark.skipif(ON_GPU, reason="which way is taken depends on the part")
@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "beside", "described"),
    [
        (torch.float16, 2, 80, 0, True),
        (torch.float16, 2, 80, 8, True),
        (torch.float16, 2, 80, 1, False),  # rows that start anywhere
        (torch.float16, 2, 40, 0, False),  # pieces that reach into the next head
        (torch.float32, 2, 80, 0, False),
    ],
)
def test_what_tma_cannot_address_takes_pointers(dtype, heads, head_dim, beside, described):
    width = heads * head_dim
    query, key_value = cast(draw(2, 5, width), dtype), cast(draw(2, 21, 2 * width), dtype)
    wide = torch.nn.functional.pad(key_value, (0, beside), value=float("nan"))
    view = wide[..., : 2 * width]
    seen = []
    with launch.on_gpu(90, seen.append):
        attention(query, view, heads)
    assert [item.arguments["DESCRIPTORS"] for item in seen] == [described]
    if not described:
        with on_gpu(80):
            expected = attention(query, key_value, heads)
        with on_gpu(90):
            assert torch.equal(attention(query, view, heads), expected)
