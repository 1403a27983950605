"""The engine on a CUDA device: the same goldens and budgets, devices, streams, memory."""

import pytest
import torch
from checkpoints import golden, images, relative_error
from engine_budgets import assert_encodes_within_budget
from engines import engine_of, image, small_engine
from goldens import ENCODE, assert_encodes_as_published
from references import reference_of

import stellar_fast
from stellar_fast.precision import DTYPES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32")]


@pytest.mark.parametrize("name", ENCODE)
def test_encode_meets_the_published_outputs(name):
    expected, meta = golden(name)
    assert_encodes_as_published(engine_of(meta, device="cuda").encode, expected, meta, "cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["encode-tiny16", "encode-tiny14-k8", "encode-b16"])
def test_encode_error_budget(name, precision):
    _, meta = golden(name)
    x = images(4, 224, 224, meta["image_seed"] + 1).cuda()
    engine = engine_of(meta, precision=precision, device="cuda", output_dtype=torch.float64)
    assert_encodes_within_budget(engine, reference_of(meta).cuda(), x, DTYPES[precision])


def test_reconstruct_agrees_with_the_cpu():
    keywords = {"purpose": "reconstruct"}
    features = small_engine(**keywords).encode(image(2, 224, 224))
    on_cpu = small_engine(**keywords).reconstruct(features)
    on_gpu = small_engine(**keywords, device="cuda").reconstruct(features)
    assert relative_error(on_gpu["logits"].cpu(), on_cpu["logits"]) < 2e-5


def test_load_takes_the_gpu_and_its_precision():
    engine = stellar_fast.load("stellar-b8", weights="synthetic")
    assert engine.device == torch.device("cuda", torch.cuda.current_device())
    expected = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    assert engine.precision == expected
    assert stellar_fast.load_stellar("stellar-b8", weights="synthetic").precision == "fp32"


def test_an_engine_moves_there_and_back():
    engine, x = small_engine(), image(2, 96, 96)
    before = engine.encode(x)["dense"]
    assert engine.to("cuda") is engine
    assert engine.encode(x)["dense"].device.type == "cuda"
    assert torch.equal(engine.to("cpu").encode(x)["dense"], before)


def test_images_on_either_device_and_pinned_give_the_same():
    engine = small_engine(device="cuda")
    x = image(3, 96, 96)
    expected = engine.encode(x)["dense"]
    for form in (x.cuda(), x.pin_memory(), x.numpy()):
        assert torch.equal(engine.encode(form)["dense"], expected)


def test_work_is_ordered_on_the_callers_stream():
    engine = small_engine(device="cuda")
    x = image(8, 224, 224).cuda()
    expected = engine.encode(x)["dense"]
    side = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # the copy below is still to come when encode is called
        late.copy_(x)
        found = engine.encode(late, check_range=False)["dense"]
    side.synchronize()
    assert relative_error(found, expected) < 1e-6


def test_out_of_memory_halves_the_batch_and_loses_nothing():
    engine = small_engine(device="cuda", max_batch=4096)
    x = torch.rand(4096, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = small_engine(device="cuda", max_batch=64).encode(x, outputs=("cls",))["cls"]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(6e9 / total)
    try:
        found = engine.encode(x, outputs=("cls",))["cls"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert relative_error(found, expected) < 1e-5
