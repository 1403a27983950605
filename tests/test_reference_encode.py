"""The reference encoder against the published outputs, and what follows from the formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from checkpoints import filled, golden, images, relative_error
from stellar_fast.reference.model import STELLARModel

from stellar_fast.config import BackboneConfig

TOLERANCE = 2e-5  # golden/README.md: relative L2
SPATIAL_TOLERANCE = 1e-4  # of the deviation from 1/K
GOLDENS = [
    "encode-tiny16",
    "encode-tiny14-k8",
    "encode-tiny16-notemp",
    "encode-b8",
    "encode-b16",
    "encode-b24",
    pytest.param("encode-l16", marks=pytest.mark.slow),
    pytest.param("encode-h16", marks=pytest.mark.slow),
]
TINY = BackboneConfig(64, 2, 4, 128, 16, image_size=96)


def encoder_only(tokens: int, backbone: object, temperature: float | None = 0.06) -> STELLARModel:
    with torch.device("meta"):
        return STELLARModel(
            tokens, temperature, do_recon=False, do_clustering=False, vit_pretrained=backbone
        )


@pytest.fixture(scope="module")
def tiny() -> STELLARModel:
    return filled(encoder_only(8, TINY), seed=1).eval().requires_grad_(False)


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name):
    expected, meta = golden(name)
    model = encoder_only(meta["num_sparse_tokens"], meta["backbone"], meta["spatial_temp"])
    filled(model, meta["weights_seed"]).eval()
    stride, k = meta["patch_stride_of_dense_and_lowrank"], meta["num_sparse_tokens"]
    for height, width in meta["sizes"]:
        batch = images(meta["batch"], height, width, meta["image_seed"])
        with torch.no_grad():
            found = model({"image": batch}, mode="eval")["predictions"]
        want = {key: expected[f"{height}x{width}.{key}"] for key in found if key != "concat"}
        for key in ("sparse", "cls"):
            assert relative_error(found[key], want[key]) < TOLERANCE, key
        for key in ("dense", "lowrank"):
            assert relative_error(found[key][:, ::stride], want[key]) < TOLERANCE, key
        for key in ("spatial", "peak_dist"):
            error = relative_error(found[key] - 1 / k, want[key] - 1 / k)
            assert error < SPATIAL_TOLERANCE, key
        concat = torch.cat([want["sparse"], want["spatial"].transpose(1, 2)], dim=2)
        assert relative_error(found["concat"], concat) < TOLERANCE


def test_encode_gives_five_features_and_evaluation_the_same(tiny):
    batch = images(2, 96, 96, 3)
    features = tiny.encode(batch)
    shapes = {key: tuple(value.shape) for key, value in features.items()}
    assert shapes == {
        "sparse": (2, 8, 64),
        "spatial": (2, 36, 8),
        "dense": (2, 36, 64),
        "lowrank": (2, 36, 64),
        "cls": (2, 1, 64),
    }
    predictions = tiny({"image": batch}, mode="eval")["predictions"]
    for key, value in features.items():
        assert torch.equal(predictions[key], value), key


@pytest.mark.parametrize("temperature", [0.06, 1.0, None])
@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        (TINY, (96, 96)),
        (TINY, (16, 16)),
        (TINY, (64, 320)),
        (BackboneConfig(80, 1, 1, 160, 14), (70, 154)),
        (BackboneConfig(96, 2, 3, 192, 8, image_size=64), (128, 40)),
    ],
)
def test_spatial_rows_are_distributions_and_lowrank_their_mixtures(backbone, size, temperature):
    model = filled(encoder_only(5, backbone, temperature), seed=2).eval()
    with torch.no_grad():
        features = model.encode(images(2, *size, 4))
    rows, columns = (side // backbone.patch_size for side in size)
    assert features["spatial"].shape == (2, rows * columns, 5)
    assert features["spatial"].min() >= 0
    torch.testing.assert_close(features["spatial"].sum(-1), torch.ones(2, rows * columns))
    mixture = torch.einsum("bpk,bkd->bpd", features["spatial"], features["sparse"])
    torch.testing.assert_close(features["lowrank"], mixture)


def test_an_image_does_not_see_its_batch(tiny):
    batch = images(3, 96, 64, 5)
    together, alone = tiny.encode(batch), tiny.encode(batch[1:2])
    for key, value in alone.items():
        assert relative_error(together[key][1:2], value) < 1e-6, key


def test_what_is_left_beyond_whole_patches_is_dropped(tiny):
    batch = images(2, 80, 120, 6)
    ragged, whole = tiny.encode(batch), tiny.encode(batch[:, :, :80, :112])
    for key, value in whole.items():
        assert torch.equal(ragged[key], value), key


def test_position_table_of_another_grid_with_as_many_patches_is_resized(tiny):
    embeddings = tiny.encoder.embeddings
    own, other = embeddings.table(6, 6), embeddings.table(4, 9)
    torch.testing.assert_close(other[0], own[0])
    assert relative_error(other, own) > 0.1
    # by the definition of bicubic with half-pixel centres, at the one cell computed here by hand
    a = -0.75
    near = lambda x: (a + 2) * x**3 - (a + 3) * x**2 + 1  # noqa: E731
    far = lambda x: a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a  # noqa: E731

    def weights(cell: int, scale: float) -> tuple[list[int], torch.Tensor]:
        place = (cell + 0.5) * scale - 0.5
        start = int(place // 1)
        t = place - start
        taps = [min(max(start + offset, 0), 5) for offset in (-1, 0, 1, 2)]
        return taps, torch.tensor([far(1 + t), near(t), near(1 - t), far(2 - t)])

    bias = embeddings.patch_embeddings.projection.bias
    patches = embeddings.position_embeddings[0, 1:].unflatten(0, (6, 6))
    (rows, row_weights), (columns, column_weights) = weights(2, 6 / 4), weights(0, 6 / 9)
    by_hand = torch.einsum("rcd,r,c->d", patches[rows][:, columns], row_weights, column_weights)
    torch.testing.assert_close(other[1 + 2 * 9 + 0] - bias, by_hand, rtol=1e-4, atol=1e-5)


def test_keeping_every_patch_is_encoding_and_order_only_permutes(tiny):
    batch = images(2, 96, 96, 7)
    cls, sparse, dense = tiny.encode_tokens(batch)
    order = torch.stack(
        [torch.randperm(36, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    )
    kept_cls, kept_sparse, kept_dense = tiny.encode_tokens(batch, keep=order)
    assert relative_error(kept_cls, cls) < 1e-6
    assert relative_error(kept_sparse, sparse) < 1e-6
    expected = torch.stack([dense[image, order[image]] for image in (0, 1)])
    assert relative_error(kept_dense, expected) < 1e-6


def test_a_masked_patch_is_not_seen(tiny):
    batch = images(2, 96, 96, 8)
    keep = torch.stack([torch.arange(0, 36, 3), torch.arange(1, 36, 3)])
    painted = batch.clone()
    painted[:, :, :16, 32:48] = 0.5  # patch 2, kept by neither
    for found, expected in zip(
        tiny.encode_tokens(painted, keep), tiny.encode_tokens(batch, keep), strict=True
    ):
        assert torch.equal(found, expected)
    painted[:, :, :16, :16] = 0.5  # patch 0, kept by the first image alone
    first, second = tiny.encode_tokens(painted, keep)[1]
    expected = tiny.encode_tokens(batch, keep)[1]
    assert relative_error(first, expected[0]) > 1e-3
    assert torch.equal(second, expected[1])


def test_gradients_reach_every_part_that_encode_uses():
    model = filled(encoder_only(8, TINY), seed=1).train()
    model.encode(images(1, 96, 96, 9))["lowrank"].square().mean().backward()
    without = {name for name, value in model.named_parameters() if value.grad is None}
    assert without == {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}
    assert model.encode(images(1, 96, 96, 9))["sparse"].requires_grad


def test_features_are_in_the_dtype_of_the_weights(tiny):
    batch = images(1, 96, 96, 10)
    expected = tiny.encode(batch)
    for dtype, bound in ((torch.float64, 1e-5), (torch.bfloat16, 5e-2)):
        found = copy.deepcopy(tiny).to(dtype).encode(batch)
        for key in ("sparse", "dense", "cls"):
            assert found[key].dtype == dtype
            assert relative_error(found[key], expected[key]) < bound, (key, dtype)


def test_images_may_be_of_another_dtype_than_the_weights(tiny):
    batch = images(1, 96, 96, 10).half()
    expected = tiny.encode(batch.float())
    for key, value in tiny.encode(batch).items():
        assert torch.equal(value, expected[key]), key
    for key, value in tiny.encode(batch.double()).items():
        assert value.dtype == torch.float32
        assert relative_error(value, expected[key]) < 1e-5, key


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 3, 96, 96, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 4, 96, 96), r"\(2, 4, 96, 96\)"),
        (torch.zeros(3, 96, 96), r"\(3, 96, 96\)"),
        (torch.zeros(1, 3, 15, 96), "15x96 pixels hold no patch of 16"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(tiny, batch, message):
    with pytest.raises(ValueError, match=message):
        tiny.encode(batch)


def test_new_models_start_at_usable_scales():
    torch.manual_seed(0)
    model = STELLARModel(4, do_recon=False, do_clustering=False, vit_pretrained=TINY)
    weight = model.encoder.encoder.layer[0].intermediate.dense.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.encoder.encoder.layer[0].intermediate.dense.bias.any()
    assert model.encoder.embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.1)
    features = model.encode(F.sigmoid(torch.randn(1, 3, 96, 96)))
    assert all(value.isfinite().all() for value in features.values())


def test_unknown_mode_is_refused(tiny):
    with pytest.raises(ValueError, match="'test'"):
        tiny({"image": images(1, 96, 96, 0)}, mode="test")
