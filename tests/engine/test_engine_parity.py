"""The engine against the published outputs, and every precision against its error budget."""

import copy

import pytest
import torch
from budgets import assert_within_budget, entitlement
from checkpoints import golden, images
from engine_budgets import (
    assert_draws_as_published,
    assert_encodes_within_budget,
    assert_reconstructs_as_published,
)
from engines import engine_of
from goldens import ENCODE, assert_encodes_as_published, slow
from references import reference_of, vqgan_of

from stellar_fast.engine import decoder
from stellar_fast.engine.vqgan import decode_codes
from stellar_fast.reference.vqgan import VQGAN
from stellar_fast.weights.pack import pack_vqgan

pytestmark = pytest.mark.numerical
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ENCODE)
def test_encode_meets_the_published_outputs(name):
    expected, meta = golden(name)
    assert_encodes_as_published(engine_of(meta).encode, expected, meta)


@pytest.mark.parametrize(
    "name", ["reconstruct-tiny16", *slow("reconstruct-tiny14", "reconstruct-b16")]
)
def test_reconstruct_meets_the_published_outputs(name):
    assert_reconstructs_as_published(name)


def test_the_pixel_head_meets_the_published_output():
    assert_draws_as_published()


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("name", ["encode-tiny16", "encode-tiny14-k8", *slow("encode-b16")])
def test_encode_error_budget(name, precision):
    _, meta = golden(name)
    engine = engine_of(meta, precision=precision, output_dtype=torch.float64)
    x = images(2, 224, 224, meta["image_seed"] + 1)
    assert_encodes_within_budget(engine, reference_of(meta), x, PRECISIONS[precision])


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_reconstruct_error_budget(precision, monkeypatch):
    """Of the logits: the tokenizer's decoder has a budget of its own."""
    monkeypatch.setattr(decoder, "decode_codes", lambda _, codes: torch.zeros(2, 3, 64, 64))
    _, meta = golden("reconstruct-tiny16")
    dtype = PRECISIONS[precision]
    engine = engine_of(meta, precision=precision, purpose="reconstruct", output_dtype=torch.float64)
    with torch.device("meta"):
        tokenizer = VQGAN()
    model = reference_of(meta, "reconstruct", vqgan=tokenizer)
    model.tokenizer = None
    lowrank = model.encode(images(2, 64, 64, 5).double())["lowrank"].to(dtype)

    def logits(model, lowrank):
        return {"logits": model.apply_head(model.forward_decoder(lowrank))}

    exact = logits(model, lowrank.double())
    plain = logits(copy.deepcopy(model).to(dtype), lowrank)
    sound = entitlement(lambda: logits(model, lowrank.double()), exact, dtype, model)
    ours = engine.reconstruct({"lowrank": lowrank})
    exact = exact["logits"]
    assert_within_budget(ours["logits"], plain["logits"], exact, dtype, sound["logits"])
    # Logits off by e each leave a choice by more than 2 e as it is.
    best = exact.topk(2, dim=-1).values
    decided = best[..., 0] - best[..., 1] > 2 * (ours["logits"] - exact).abs().max()
    assert decided.any()
    assert torch.equal(ours["tokens"][decided], exact.argmax(-1)[decided])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vqgan_decoder_meets_its_error_budget(dtype):
    codes = torch.randint(0, 1024, (1, 2, 3), generator=torch.Generator().manual_seed(0))
    model = vqgan_of()
    ours = decode_codes(pack_vqgan(model.state_dict(), dtype, CPU), codes).clamp(0, 1)
    plain = copy.deepcopy(model).to(dtype).decode(codes)
    model.double()
    exact = {"pixels": model.decode(codes)}
    sound = entitlement(lambda: {"pixels": model.decode(codes)}, exact, dtype)
    assert_within_budget(ours, plain, exact["pixels"], dtype, sound["pixels"])
