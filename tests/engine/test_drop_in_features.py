"""What `encode` and `reconstruct` of the module give, and when an engine gives it."""

import copy

import pytest
import torch
from budgets import TENSOR, assert_same_features, assert_within_budget, entitlement
from checkpoints import relative_error
from drop_in import X, assert_same, fast, plain
from torch import Tensor

import stellar_fast
from stellar_fast.module import FEATURES, FastSTELLARModel
from stellar_fast.reference import STELLARModel

pytestmark = pytest.mark.numerical


def test_features_are_the_references_and_an_engine_makes_them(model, x, encodes):
    found = fast(model)
    assert list(found) == list(FEATURES) and encodes == ["encode"]
    assert not any(value.requires_grad for value in found.values())
    assert_same_features(found, plain(model))
    for given in ({"image": x, "labels": None}, (x * 255).round().byte(), X.numpy()):
        assert list(fast(model, given)) == list(FEATURES)
    with torch.inference_mode():
        inferred = model.encode(x)
    assert_same(inferred, found)
    assert not fast(model, x[:0])["cls"].numel()
    assert len(encodes) == 6


def test_gradients_flow_through_encode(model, x, encodes):
    x = x.clone().requires_grad_()
    found = model.encode(x)
    assert [name for name, value in found.items() if not value.requires_grad] == ["peak_dist"]
    (found["sparse"].square().sum() + found["lowrank"].sum()).backward()
    assert x.grad.abs().sum() > 0 and model.sparse_tokens.grad.abs().sum() > 0
    assert not encodes
    model.requires_grad_(False)
    assert model.encode(x)["cls"].requires_grad  # of the images
    assert not encodes
    assert not model.encode(x.detach())["cls"].requires_grad
    assert encodes == ["encode"]
    # as with an input of bytes, which has no gradient
    model.requires_grad_(True)
    assert model.encode((x * 255).byte())["cls"].requires_grad


def test_only_the_parameters_that_are_used_decide(decoding, x, encodes):
    model = decoding
    for part in (model.encoder, model.dense_proj, model.sparse_proj):
        part.requires_grad_(False)
    model.sparse_tokens.requires_grad_(False)
    features = model.encode(x)  # the decoder is trained, on frozen features
    assert encodes == ["encode"] and not features["lowrank"].requires_grad
    logits = model.reconstruct(features)["logits"]
    assert logits.requires_grad and encodes == ["encode"]
    with torch.no_grad():
        found = model.reconstruct(features)
    assert encodes == ["encode", "reconstruct"]
    assert relative_error(found["logits"], logits) < TENSOR


def test_reconstruct_as_published(published, decoding, x, encodes):
    model = decoding.requires_grad_(False)
    features = model.encode(x)
    expected = model.reconstruct(features)
    sparse, spatial = features["sparse"], features["spatial"]
    for found in (
        model.reconstruct(sparse=sparse, spatial=spatial),
        model.reconstruct({"lowrank": None, "sparse": sparse, "spatial": spatial}),
        model.reconstruct(features, spatial.flip(1)),
    ):
        assert_same_features(found, expected)
    assert encodes.count("reconstruct") == 4
    with pytest.raises(ValueError, match="spatial"):
        model.reconstruct(sparse)
    pixels = stellar_fast.load_stellar("pixels", "reconstruct", repo_id=published, device=x.device)
    pixels.requires_grad_(False)
    found = pixels.reconstruct(pixels.encode(x))
    assert set(found) == {"reconstruction", "logits"} and found["logits"] is found["reconstruction"]
    with pytest.raises(RuntimeError, match="no decoder"):
        stellar_fast.load_stellar("tiny", repo_id=published).reconstruct(features)


def test_the_overshoot_of_a_resize_passes_and_more_does_not(model, x):
    over = x * 2 - 0.5
    assert_same_features(fast(model, over), plain(model, over))
    for wrong, message in ((x * 255, "0..255 go in as uint8"), (x * 4 - 2, "inside the model")):
        for run in (fast, FastSTELLARModel.encode):
            with pytest.raises(ValueError, match=message):
                run(model, wrong)


def assert_within_the_budget_of(dtype, model: STELLARModel, found: dict[str, Tensor]) -> None:
    """Features of `model`, as far from float64 as plain PyTorch in `dtype` is, twice at most."""
    exactly = copy.deepcopy(model).cpu().double()
    exact, plainly = plain(exactly, X.double()), plain(copy.deepcopy(model).cpu().to(dtype))
    sound = entitlement(lambda: plain(exactly, X.double()), exact, dtype, exactly)
    for name, value in exact.items():
        assert_within_budget(found[name], plainly[name], value, dtype, sound[name], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_choose_the_dtype_of_features(model, encodes, dtype):
    found = fast(copy.deepcopy(model).to(dtype))
    assert {value.dtype for value in found.values()} == {dtype} and encodes == ["encode"]
    assert_within_the_budget_of(dtype, model, found)
    assert fast(copy.deepcopy(model).half())["cls"].dtype == torch.float16


def test_float64_is_the_references(model, encodes):
    model.double()
    assert_same(fast(model), plain(model))
    assert not encodes


def test_autocast(model, device, encodes):
    expected = fast(model)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = fast(model)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_within_the_budget_of(torch.bfloat16, model, found)
    assert not torch.equal(found["cls"], expected["cls"])
    assert_same(fast(model), expected)
    assert len(encodes) == 3


def test_on_the_meta_device_the_reference_gives_shapes(model, x):
    with torch.no_grad():
        found = copy.deepcopy(model).to("meta").encode(x.to("meta"))
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in plain(model).items()
    }
