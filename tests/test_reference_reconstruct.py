"""The reference decoder and tokenizer against the published outputs."""

import pytest
import torch
import torch.nn.functional as F
from checkpoints import filled, golden, images, relative_error, synthetic
from stellar_fast.reference.model import STELLARModel
from stellar_fast.reference.position import RandomFourierPosition
from stellar_fast.reference.vqgan import VQGAN

from stellar_fast.config import BackboneConfig
from stellar_fast.names import vqgan_shapes

TOLERANCE = 2e-5  # golden/README.md: relative L2
LOSS_TOLERANCE = 1e-4  # relative
TIE = 1e-3  # tokens may differ where the two best logits are nearer than this
HALF_ULP_OF_FLOAT16 = 2.0**-11  # the goldens hold pixels in float16
GOLDENS = ["reconstruct-tiny16", "reconstruct-tiny14", "reconstruct-b16"]
TINY = BackboneConfig(64, 1, 4, 128, 16, image_size=64)


@pytest.fixture(scope="module")
def tokenizer() -> VQGAN:
    with torch.device("meta"):
        model = VQGAN()
    model.load_state_dict(synthetic(vqgan_shapes(), seed=7), assign=True)
    return model


def reference(meta: dict, tokenizer: VQGAN | None) -> STELLARModel:
    with torch.device("meta"):
        model = STELLARModel(
            meta["num_sparse_tokens"],
            meta["spatial_temp"],
            num_decoder_layers=meta["num_decoder_layers"],
            vq_model=tokenizer,
            do_clustering=False,
            vit_pretrained=meta["backbone"],
        )
    return filled(model, meta["weights_seed"]).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=GOLDENS)
def case(request, tokenizer):
    """The golden tensors, the image, and everything the reference makes of it."""
    expected, meta = golden(request.param)
    assert meta["vq_weights_seed"] == 7
    image = images(meta["batch"], 224, 224, meta["image_seed"])
    model = reference(meta, tokenizer)
    features = model.encode(image)
    found = features | model.reconstruct(features)
    found["decoder_output"] = model.forward_decoder(features["lowrank"])
    target = image
    if meta["backbone"]["patch_size"] == 14:
        target = F.interpolate(image, size=(256, 256), mode="bicubic", align_corners=False)
    found["target_tokens"] = tokenizer.encode(target)
    return expected, meta, found


def test_features(case):
    expected, meta, found = case
    k = meta["num_sparse_tokens"]
    assert relative_error(found["sparse"], expected["sparse"]) < TOLERANCE
    assert relative_error(found["spatial"] - 1 / k, expected["spatial"] - 1 / k) < 1e-4


def test_decoder_output_and_logits(case):
    expected, meta, found = case
    stride = meta["patch_stride_of_decoder_output_and_logits"]
    for key in ("decoder_output", "logits"):
        assert relative_error(found[key][:, ::stride], expected[key]) < TOLERANCE, key


def test_tokens_differ_only_at_ties(case):
    expected, _, found = case
    differ = found["tokens"] != expected["tokens"]
    best = found["logits"][differ].topk(2).values
    assert (best[:, 0] - best[:, 1] < TIE).all()
    assert torch.equal(found["tokens"], found["logits"].argmax(-1))


def test_pixels(case, tokenizer):
    """Of the golden's own tokens, so that a tie decided otherwise does not count."""
    expected, _, found = case
    side = int(expected["tokens"].shape[1] ** 0.5)
    pixels = tokenizer.decode(expected["tokens"].unflatten(1, (side, side)))
    want = expected["reconstruction"].float()
    difference = (pixels - want).abs()
    assert difference.shape == found["reconstruction"].shape
    assert (difference <= HALF_ULP_OF_FLOAT16 * want + 1e-5).all()
    if torch.equal(found["tokens"], expected["tokens"].long()):
        torch.testing.assert_close(found["reconstruction"], pixels)


def test_codes_of_the_image_and_their_cross_entropy(case):
    expected, _, found = case
    codes = found["target_tokens"]
    assert torch.equal(codes, expected["target_tokens"].long())
    loss = F.cross_entropy(found["logits"].flatten(0, 1), codes.flatten())
    assert loss.item() == pytest.approx(expected["vq_ce"].item(), rel=LOSS_TOLERANCE)


def test_pixel_head():
    expected, meta = golden("reconstruct-pixelhead-tiny16")
    image = images(meta["batch"], 224, 224, meta["image_seed"])
    model = reference(meta, None)
    out = model.reconstruct(model.encode(image))
    assert set(out) == {"reconstruction"}
    want = expected["x_hat"].float()
    difference = (out["reconstruction"] - want).abs()
    assert (difference <= HALF_ULP_OF_FLOAT16 * want.abs() + 2e-5 * want.std()).all()
    loss = F.mse_loss(out["reconstruction"], image)
    assert loss.item() == pytest.approx(expected["mse"].item(), rel=LOSS_TOLERANCE)


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
    without_lowrank = model.reconstruct({key: features[key] for key in ("sparse", "spatial")})
    for key, value in expected.items():
        assert torch.equal(by_factors[key], value), key
        assert torch.equal(without_lowrank[key], value), key
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
    with pytest.raises(ValueError, match="not both"):
        model.reconstruct(square, square["spatial"])
    with pytest.raises(ValueError, match=r"\(1, 4, 3\) and \(1, 4, 64\)"):
        model.reconstruct(square["sparse"], square["spatial"][:, :, :3])
    encoder_only = small(None, do_recon=False)
    with pytest.raises(ValueError, match="do_recon=False"):
        encoder_only.reconstruct(square)


def test_position_code_is_that_of_its_cell():
    code = RandomFourierPosition(16)
    matrix = code.positional_encoding_gaussian_matrix
    found = code(3, 5)
    assert found.shape == (15, 16)
    x, y = 2 * (4 + 0.5) / 5 - 1, 2 * (1 + 0.5) / 3 - 1  # row 1, column 4
    angles = 2 * torch.pi * (x * matrix[0] + y * matrix[1])
    torch.testing.assert_close(found[1 * 5 + 4, 0::2], angles.sin(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1 * 5 + 4, 1::2], angles.cos(), rtol=1e-4, atol=1e-5)


def test_codes_come_from_the_nearest_row(tokenizer):
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(2, 256, 3, 4, generator=generator)
    rows = tokenizer.quantize.embedding.weight
    distance = torch.cdist(cells.movedim(1, -1).flatten(0, 2).double(), rows.double())
    assert torch.equal(tokenizer.quantize.nearest(cells).flatten(), distance.argmin(-1))
    codes = torch.randint(1024, (2, 3, 4), generator=generator)
    assert torch.equal(tokenizer.quantize.nearest(tokenizer.quantize(codes)), codes)


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
