"""The reference encoder against the published outputs, and what follows from the formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from budgets import FLOAT64, TENSOR, assert_same_features, assert_within_budget, entitlement
from checkpoints import filled, golden, images, relative_error
from goldens import REAL_ENCODE, TINY_ENCODE, assert_encodes_as_published, slow
from references import reference_of

from stellar_fast.config import BackboneConfig
from stellar_fast.reference import STELLARModel

pytestmark = pytest.mark.numerical
TINY = BackboneConfig(64, 2, 4, 128, 16, image_size=96)


def encoder_only(tokens: int, backbone: object, temperature: float | None = 0.06) -> STELLARModel:
    with torch.device("meta"):
        return STELLARModel(
            tokens, temperature, do_recon=False, do_clustering=False, vit_pretrained=backbone
        )


@pytest.fixture(scope="module")
def tiny() -> STELLARModel:
    return filled(encoder_only(8, TINY), seed=1).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*TINY_ENCODE, *slow(*REAL_ENCODE)])
def test_golden(name, dtype):
    """Float64 too: a bound that the model itself does not meet is one of the rounding it had."""
    expected, meta = golden(name)
    model = reference_of(meta, dtype=dtype)

    def encode(images):
        found = model({"image": images.to(dtype)}, mode="eval")["predictions"]
        concat = torch.cat([found["sparse"], found["spatial"].transpose(1, 2)], dim=2)
        assert torch.equal(found.pop("concat"), concat)
        assert torch.equal(found["peak_dist"], found["spatial"].amax(1))
        return found

    assert_encodes_as_published(encode, expected, meta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_keys(dtype):
    """All seven, in their order, of images and of a mapping that holds them."""
    expected, meta = golden("encode-keys-tiny16")
    model = reference_of(meta, dtype=dtype).requires_grad_()

    def encode(images):
        found = model.encode(images.to(dtype))
        assert list(found) == meta["order_of_keys"]
        without = [key for key, value in found.items() if not value.requires_grad]
        assert without == meta["keys_without_gradient"]
        again = model.encode({meta["dict_input_key"]: images.to(dtype), "labels": None})
        assert all(torch.equal(again[key], value) for key, value in found.items())
        return found

    assert_encodes_as_published(encode, expected, meta)


def test_shapes_of_features_and_evaluation_gives_the_same(tiny):
    batch = images(2, 96, 96, 3)
    features = tiny.encode(batch)
    shapes = {key: tuple(value.shape) for key, value in features.items()}
    assert shapes == {
        "sparse": (2, 8, 64),
        "spatial": (2, 36, 8),
        "concat": (2, 8, 100),
        "lowrank": (2, 36, 64),
        "dense": (2, 36, 64),
        "cls": (2, 1, 64),
        "peak_dist": (2, 8),
    }
    with pytest.raises(ValueError, match=r"'image' of a mapping; this one holds \['picture'\]"):
        tiny.encode({"picture": batch})
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
    sums = features["spatial"].sum(-1)  # of five numbers, each rounded
    assert (sums - 1).abs().max() <= 5 * torch.finfo(torch.float32).eps
    mixture = torch.einsum("bpk,bkd->bpd", features["spatial"], features["sparse"])
    assert relative_error(features["lowrank"], mixture) < TENSOR


def test_an_image_does_not_see_its_batch(tiny):
    batch = images(3, 96, 64, 5)
    together, alone = tiny.encode(batch), tiny.encode(batch[1:2])
    assert_same_features({key: value[1:2] for key, value in together.items()}, alone)


def test_what_is_left_beyond_whole_patches_is_dropped(tiny):
    batch = images(2, 80, 120, 6)
    assert_same_features(tiny.encode(batch), tiny.encode(batch[:, :, :80, :112]))


def test_position_table_of_another_grid_with_as_many_patches_is_resized(tiny):
    embeddings = copy.deepcopy(tiny.encoder.embeddings).double()
    own, other = embeddings.positions(6, 6), embeddings.positions(4, 9)
    assert relative_error(other, own) > 0.1
    # by the definition of bicubic with half-pixel centres, at the one cell computed here by hand
    a = -0.75
    near = lambda x: (a + 2) * x**3 - (a + 3) * x**2 + 1  # noqa: E731
    far = lambda x: a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a  # noqa: E731

    def weights(cell: int, scale: float) -> tuple[list[int], list[float]]:
        place = (cell + 0.5) * scale - 0.5
        start = int(place // 1)
        t = place - start
        taps = [min(max(start + offset, 0), 5) for offset in (-1, 0, 1, 2)]
        return taps, [far(1 + t), near(t), near(1 - t), far(2 - t)]

    patches = embeddings.position_embeddings[0, 1:].unflatten(0, (6, 6))
    (rows, row_weights), (columns, column_weights) = weights(2, 6 / 4), weights(0, 6 / 9)
    outer = patches.new_tensor([[r * c for c in column_weights] for r in row_weights])
    by_hand = torch.einsum("rcd,rc->d", patches[rows][:, columns], outer)
    assert relative_error(other[2 * 9 + 0], by_hand) < FLOAT64


def test_keeping_every_patch_is_encoding_and_order_only_permutes(tiny):
    batch = images(2, 96, 96, 7)
    cls, sparse, dense = tiny.forward_image(batch)
    order = torch.stack(
        [torch.randperm(36, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    )
    kept_cls, kept_sparse, kept_dense = tiny.encode_kept(batch, keep=order)
    assert relative_error(kept_cls, cls) < TENSOR
    assert relative_error(kept_sparse, sparse) < TENSOR
    expected = torch.stack([dense[image, order[image]] for image in (0, 1)])
    assert relative_error(kept_dense, expected) < TENSOR


def test_layer_norms_add_1e_12_to_the_variance(tiny):
    """The backbones' value: of rows as small as its root it is half of the sum, and nowhere else
    would another one show."""
    wide = copy.deepcopy(tiny.encoder).double()
    norms = [module for module in wide.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 2 + 1
    x = 1e-6 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()
    for norm in norms:
        assert relative_error(norm(x), unit * norm.weight + norm.bias) < FLOAT64


def test_a_masked_patch_is_not_seen(tiny):
    batch = images(2, 96, 96, 8)
    keep = torch.stack([torch.arange(0, 36, 3), torch.arange(1, 36, 3)])
    painted = batch.clone()
    painted[:, :, :16, 32:48] = 0.5  # patch 2, kept by neither
    for found, expected in zip(
        tiny.encode_kept(painted, keep), tiny.encode_kept(batch, keep), strict=True
    ):
        assert torch.equal(found, expected)
    painted[:, :, :16, :16] = 0.5  # patch 0, kept by the first image alone
    first, second = tiny.encode_kept(painted, keep)[1]
    expected = tiny.encode_kept(batch, keep)[1]
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
    wide = copy.deepcopy(tiny).double()
    exact = wide.encode(batch)
    assert {value.dtype for value in exact.values()} == {torch.float64}
    for dtype in (torch.float32, torch.bfloat16):
        found = copy.deepcopy(tiny).to(dtype).encode(batch)
        sound = entitlement(lambda: wide.encode(batch), exact, dtype, wide)
        for key in exact:
            assert found[key].dtype == dtype
            assert_within_budget(found[key], exact[key], exact[key], dtype, sound[key], key)


def test_images_may_be_of_another_dtype_than_the_weights(tiny):
    batch = images(1, 96, 96, 10).half()
    expected = tiny.encode(batch.float())
    for key, value in tiny.encode(batch).items():
        assert torch.equal(value, expected[key]), key
    found = tiny.encode(batch.double())
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_same_features(found, expected)


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
