"""The reference decoder and tokenizer against the published outputs."""

import copy

import budgets
import pytest
import torch
import torch.nn.functional as F
from budgets import LOSS, TENSOR, TIE, assert_same_features, assert_stored_as
from checkpoints import filled, golden, images, relative_error
from goldens import (
    assert_features_as_published,
    assert_pixels_as_published,
    assert_tokens_as_published,
    golden_image,
)
from references import reference_of, vqgan_of

from stellar_fast.config import BackboneConfig
from stellar_fast.reference import STELLARModel
from stellar_fast.reference.position import RandomFourierPosition
from stellar_fast.reference.vqgan import VQGAN

pytestmark = pytest.mark.numerical
TINY = BackboneConfig(64, 1, 4, 128, 16, image_size=64)


@pytest.fixture(scope="module")
def tokenizer() -> VQGAN:
    return vqgan_of()


FLOAT32, FLOAT64 = torch.float32, torch.float64
# The tokenizer in float64 takes seconds an image.
CASES = [
    pytest.param(("reconstruct-tiny16", FLOAT32), id="tiny16"),
    pytest.param(("reconstruct-tiny14", FLOAT32), id="tiny14", marks=pytest.mark.slow),
    pytest.param(("reconstruct-tiny16", FLOAT64), id="tiny16-float64", marks=pytest.mark.slow),
    pytest.param(("reconstruct-b16", FLOAT32), id="b16", marks=pytest.mark.slow),
    pytest.param(("reconstruct-tiny14", FLOAT64), id="tiny14-float64", marks=pytest.mark.slow),
    pytest.param(("reconstruct-b16", FLOAT64), id="b16-float64", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """The golden tensors, the model in one dtype, the file's first image and its features."""
    name, dtype = request.param
    expected, meta = golden(name)
    assert meta["vq_weights_seed"] == 7
    model = reference_of(meta, "reconstruct", dtype, vqgan_of())
    image = golden_image(meta).to(dtype)
    return expected, meta, model, image, model.encode(image)


def test_features_and_decoder_output(case):
    expected, meta, model, _, features = case
    assert_features_as_published(features, expected, meta)
    decoded = model.forward_decoder(features["lowrank"])
    stride = meta["patch_stride_of_decoder_output_and_logits"]
    assert relative_error(decoded[:, ::stride], expected["decoder_output"]) < TENSOR


def test_logits_and_tokens(case):
    expected, meta, model, _, features = case
    logits = model.apply_head(model.forward_decoder(features["lowrank"]))
    assert_tokens_as_published(logits, logits.argmax(-1), expected, meta)
    best = logits.topk(2, dim=-1).values
    assert (best[..., 0] - best[..., 1] > TIE).float().mean() > 0.9  # few tokens are excused


def test_pixels(case):
    expected, _, model, _, features = case
    found = model.reconstruct({"lowrank": features["lowrank"][:1]})
    assert found["reconstruction"].dtype == features["lowrank"].dtype
    assert_pixels_as_published(
        found["reconstruction"], found["tokens"], model.tokenizer.decode, expected
    )


def test_codes_of_the_image_and_their_cross_entropy(case):
    """Every code is decided: its row is nearer than the next by more than both may be off."""
    expected, meta, model, image, features = case
    logits = model.apply_head(model.forward_decoder(features["lowrank"]))
    published = expected["target_tokens"].long()
    loss = F.cross_entropy(logits.flatten(0, 1), published.flatten())
    assert loss.item() == pytest.approx(expected["vq_ce"].item(), rel=LOSS)

    target = image[:1]
    if meta["backbone"]["patch_size"] == 14:
        target = F.interpolate(target, size=(256, 256), mode="bicubic", align_corners=False)
    cells = model.tokenizer.encoder(target).movedim(1, -1).flatten(0, 2)
    assert torch.equal(model.tokenizer.encode(target), published[:1])
    nearest = torch.cdist(cells.double(), model.tokenizer.quantize.embedding.weight.double())
    two = nearest.square().topk(2, largest=False).values
    off = TENSOR * cells.norm(dim=-1).double()  # of the cell, and so of its distance to any row
    assert (two[:, 1] - two[:, 0] > 4 * off * two[:, 1].sqrt()).all()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_pixel_head(dtype):
    expected, meta = golden("reconstruct-pixelhead-tiny16")
    image = golden_image(meta).to(dtype)
    model = reference_of(meta, "reconstruct", dtype)
    out = model.reconstruct(model.encode(image))
    assert set(out) == {"reconstruction", "logits"}
    assert out["logits"] is out["reconstruction"]
    assert_stored_as(out["reconstruction"], expected["x_hat"])
    loss = F.mse_loss(out["reconstruction"], image)
    assert loss.item() == pytest.approx(expected["mse"].item(), rel=LOSS)


def small(tokenizer: VQGAN | None, **arguments) -> STELLARModel:
    with torch.device("meta"):
        model = STELLARModel(
            4,
            num_decoder_layers=1,
            vq_model=tokenizer,
            do_clustering=False,
            vit_pretrained=TINY,
            **arguments,
        )
    return filled(model, seed=3).eval().requires_grad_(False)


def test_sparse_and_spatial_give_what_the_features_give(tokenizer):
    model = small(tokenizer)
    features = model.encode(images(2, 32, 32, 1))
    expected = model.reconstruct(features)
    by_factors = model.reconstruct(features["sparse"], features["spatial"])
    by_factors = model.reconstruct(sparse=features["sparse"], spatial=features["spatial"])
    without_lowrank = model.reconstruct(
        {"sparse": features["sparse"], "spatial": features["spatial"], "lowrank": None}
    )
    beside = model.reconstruct(features, features["spatial"].flip(-1))  # a mapping's own goes first
    assert torch.equal(beside["logits"], expected["logits"])
    assert_same_features(by_factors, expected)
    assert_same_features(without_lowrank, expected)
    assert expected["reconstruction"].shape == (2, 3, 32, 32)
    assert expected["reconstruction"].min() >= 0
    assert expected["reconstruction"].max() <= 1
    assert expected["tokens"].dtype == torch.int64


def test_pixels_are_as_large_as_the_patches_drawn():
    with torch.device("meta"):
        backbone = BackboneConfig(40, 1, 2, 80, 10, image_size=40)
        model = STELLARModel(4, num_decoder_layers=1, do_clustering=False, vit_pretrained=backbone)
    filled(model, seed=4)
    with torch.no_grad():
        pixels = model.reconstruct(model.encode(images(1, 30, 30, 2)))["reconstruction"]
    assert pixels.shape == (1, 3, 30, 30)


def test_what_cannot_be_reconstructed_is_refused(tokenizer):
    model = small(None)
    features = model.encode(images(1, 32, 48, 1))
    with pytest.raises(ValueError, match="square grid of patches, and 6 is no square"):
        model.reconstruct(features)
    square = model.encode(images(1, 32, 32, 1))
    with pytest.raises(ValueError, match="spatial beside sparse"):
        model.reconstruct(square["sparse"])
    with pytest.raises(ValueError, match=r"hold \['cls'\]"):
        model.reconstruct({"cls": square["cls"]})
    with pytest.raises(ValueError, match=r"\(1, 4, 3\) and \(1, 4, 64\)"):
        model.reconstruct(square["sparse"], square["spatial"][:, :, :3])
    encoder_only = small(None, do_recon=False)
    with pytest.raises(RuntimeError, match="do_recon=False"):
        encoder_only.reconstruct(square)


def test_position_code_is_that_of_its_cell():
    code = RandomFourierPosition(16).double()
    matrix = code.positional_encoding_gaussian_matrix
    found = code(3, 5)
    assert found.shape == (15, 16)
    x, y = 2 * (4 + 0.5) / 5 - 1, 2 * (1 + 0.5) / 3 - 1  # row 1, column 4
    angles = 2 * torch.pi * (x * matrix[0] + y * matrix[1])
    expected = torch.stack([angles.sin(), angles.cos()], dim=1).flatten()
    assert relative_error(found[1 * 5 + 4], expected) < budgets.FLOAT64


def test_codes_come_from_the_nearest_row(tokenizer):
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(2, 256, 3, 4, generator=generator)
    rows = tokenizer.quantize.embedding.weight
    distance = torch.cdist(cells.movedim(1, -1).flatten(0, 2).double(), rows.double()).square()
    two = distance.topk(2, largest=False).values
    assert (two[:, 1] - two[:, 0] > 2 * TENSOR * two[:, 1]).all(), "draw cells that decide"
    assert torch.equal(tokenizer.quantize.nearest(cells).flatten(), distance.argmin(-1))
    codes = torch.randint(1024, (2, 3, 4), generator=generator)
    assert torch.equal(tokenizer.quantize.nearest(tokenizer.quantize(codes)), codes)
    square = codes[:, :, :3]
    assert torch.equal(tokenizer.decode(square.flatten(1)), tokenizer.decode(square))


def test_group_norms_add_1e_6_to_the_variance(tokenizer):
    """Of numbers as small as its root it is half of the sum; nowhere else would it show."""
    norms = [module for module in tokenizer.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert len(norms) > 40
    generator = torch.Generator().manual_seed(1)
    for norm in norms:
        x = 1e-3 * torch.randn(2, norm.num_channels, 3, generator=generator, dtype=torch.float64)
        groups = x.unflatten(1, (32, -1)).flatten(2)
        variance = groups.var(-1, correction=0, keepdim=True)
        unit = ((groups - groups.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()).view_as(x)
        gain, bias = (value.double()[:, None] for value in (norm.weight, norm.bias))
        assert relative_error(copy.deepcopy(norm).double()(x), unit * gain + bias) < budgets.FLOAT64


def test_tokenizer_is_never_trained(tokenizer):
    model = small(tokenizer).train()
    assert model.training
    assert not any(module.training for module in tokenizer.modules())
    assert not any(value.requires_grad for value in tokenizer.parameters())
    model.requires_grad_(True)
    assert not tokenizer.decode(torch.zeros(1, 1, 1, dtype=torch.int64)).requires_grad
    tokenizer.requires_grad_(False)


def test_tokenizer_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="got int"):
        STELLARModel(4, vq_model=7, do_clustering=False, vit_pretrained=TINY)
