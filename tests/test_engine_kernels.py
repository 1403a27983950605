"""The engine on the Triton kernels: published outputs, error budgets, and what only they promise.

Interpreted on CPU tensors where there is no GPU, compiled where there is one.
"""

import copy
import dataclasses

import pytest
import torch
from budgets import assert_within_budget, entitlement
from checkpoints import golden, images, relative_error
from engines import SMALL_META, config_of, engine_of, image, small_engine
from goldens import TINY_ENCODE, assert_encodes_as_published, assert_tokens_as_published
from kernel_checks import DEVICE, ON_GPU, PARTS, on_part
from references import reference_of
from stellar_fast.kernels import launch
from stellar_fast.reference import ops as oracles
from stellar_fast.reference.vqgan import VQGAN

from stellar_fast import decoder, encoder, kernels
from stellar_fast.encoder import OUTPUTS
from stellar_fast.weights import Fp8Block, map_nodes

pytestmark = pytest.mark.kernels
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
if ON_GPU:
    PRECISIONS["bf16"] = torch.bfloat16
# Nothing in it is a multiple of a tile, and no golden file has its like.
ODD = {
    "backbone": {
        "hidden_size": 120,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 200,
        "patch_size": 8,
        "image_size": 64,
    },
    "num_sparse_tokens": 5,
    "spatial_temp": 0.1,
    "weights_seed": 11,
}


def kernel_engine(meta, **keywords):
    return engine_of(meta, backend="triton", device=DEVICE, **keywords)


@pytest.fixture(scope="module")
def small():
    return small_engine(backend="triton", device=DEVICE, precision="fp16")


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("part", "name", "sizes"),
    [
        (PARTS[0], "encode-tiny16", [[96, 96]]),
        (PARTS[-1], "encode-tiny16", [[96, 96]]),
        (PARTS[0], "encode-tiny14-k8", [[98, 126]]),
        *(
            pytest.param(part, name, golden(name)[1]["sizes"], marks=pytest.mark.slow)
            for part in PARTS
            for name in TINY_ENCODE
        ),
    ],
    ids=str,
)
def test_encode_meets_the_published_outputs(part, name, sizes):
    """The smallest images quickly, all files and sizes on all parts in CI."""
    expected, meta = golden(name)
    engine = kernel_engine(meta)
    with on_part(part):
        assert_encodes_as_published(engine.encode, expected, meta | {"sizes": sizes})


@pytest.mark.numerical
@pytest.mark.slow
def test_reconstruct_meets_the_published_outputs(monkeypatch):
    """Of one image, up to its tokens: what is behind them is PyTorch's on every backend."""
    monkeypatch.setattr(decoder, "decode_codes", lambda _, codes: torch.zeros(1, 3, 224, 224))
    expected, meta = golden("reconstruct-tiny16")
    engine = kernel_engine(meta, purpose="reconstruct")
    features = {"sparse": expected["sparse"][:1], "spatial": expected["spatial"][:1]}
    out = engine.reconstruct(features)
    assert_tokens_as_published(out["logits"], out["tokens"], expected, meta)


@pytest.mark.numerical
def test_reconstruct_error_budget(monkeypatch):
    """The same of four patches, up to the logits."""
    monkeypatch.setattr(decoder, "decode_codes", lambda _, codes: torch.zeros(1, 3, 32, 32))
    meta = golden("reconstruct-tiny16")[1]
    engine = kernel_engine(meta, purpose="reconstruct")
    with torch.device("meta"):
        tokenizer = VQGAN()
    model = reference_of(meta, "reconstruct", vqgan=tokenizer)
    model.tokenizer = None
    x = image(1, 32, 32)
    lowrank = model.encode(x.double())["lowrank"].float()

    def logits(model, lowrank):
        return {"logits": model.apply_head(model.forward_decoder(lowrank))}

    exact = logits(model, lowrank.double())
    sound = entitlement(lambda: logits(model, lowrank.double()), exact, torch.float32, model)
    plain = logits(model.float(), lowrank)["logits"]
    ours = engine.reconstruct({"lowrank": lowrank})["logits"]
    assert_within_budget(ours, plain, exact["logits"], torch.float32, sound["logits"])


@pytest.fixture(scope="module", params=["encode-tiny16", "encode-tiny16-notemp", "odd"])
def encoding(request):
    """A geometry, images, the reference in float64 and what it gives."""
    meta = ODD if request.param == "odd" else golden(request.param)[1]
    x = images(2, *((29, 40) if request.param == "odd" else (48, 78)), 3)
    model = reference_of(meta)
    return meta, x, model, model.encode(x.double())


@pytest.mark.numerical
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_encode_error_budget(part, encoding, precision):
    meta, x, model, exact = encoding
    dtype = PRECISIONS[precision]
    engine = kernel_engine(meta, precision=precision, output_dtype=torch.float64)
    plain = copy.deepcopy(model).to(dtype).encode(x)
    sound = entitlement(lambda: model.encode(x.double()), exact, dtype, model)
    with on_part(part):
        ours = {key: value.cpu() for key, value in engine.encode(x).items()}
    for key in exact:
        assert_within_budget(ours[key], plain[key], exact[key], dtype, sound[key], key)
    sums = ours["spatial"].sum(-1)  # of K numbers of float32, each rounded
    assert (sums - 1).abs().max() <= meta["num_sparse_tokens"] * torch.finfo(torch.float32).eps


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("part", "calibrated"), [(PARTS[0], False), (PARTS[-1], True)], ids=["bounds", "calibrated"]
)
def test_fp8_error_budget(part, calibrated):
    """As far from float64 as the oracles are with the same weights, twice at most."""
    meta = golden("encode-tiny16")[1]
    meta = meta | {"backbone": meta["backbone"] | {"num_hidden_layers": 4}}
    engine = kernel_engine(meta, precision="fp8", output_dtype=torch.float64)
    assert sum(isinstance(block, Fp8Block) for block in engine._encoder.blocks) == 2
    x = images(1, 112, 112, 3)
    before = engine._encoder.blocks[1].hidden_scale
    with on_part(part):
        if calibrated:
            assert engine.calibrate(x) is engine
            assert engine._encoder.blocks[1].hidden_scale < before
        ours = {key: value.cpu() for key, value in engine.encode(x).items()}
    with torch.no_grad():
        exact = reference_of(meta).encode(x.double())
    weights = map_nodes(engine._encoder, torch.Tensor, torch.Tensor.cpu)
    plain = encoder.encode(
        oracles, weights, engine.config, x, weights.table.table(7, 7), OUTPUTS, torch.float32
    )
    for key in exact:
        assert_within_budget(ours[key], plain[key], exact[key], torch.float16, name=key)
        assert relative_error(plain[key], exact[key]) < 0.5  # a budget that is worth something


def test_calibration_needs_an_fp8_engine_and_images(small):
    with pytest.raises(ValueError, match="this one is fp16"):
        small.calibrate(image(1, 64, 64))
    engine = small_engine(precision="fp8", backend="triton", device=DEVICE)
    with pytest.raises(ValueError, match="empty batch"):
        engine.calibrate(torch.zeros(0, 3, 64, 64))


@pytest.mark.parametrize("part", PARTS)
def test_subsets_of_the_outputs_have_the_same_bits(part, small):
    x = image(1, 48, 64)
    with on_part(part):
        whole = small.encode(x)
        for outputs in (("cls",), ("sparse",), ("sparse", "cls"), ("dense",), ("lowrank",)):
            found = small.encode(x, outputs=outputs)
            assert set(found) == set(outputs)
            for name in outputs:
                assert torch.equal(found[name], whole[name])


@pytest.mark.parametrize(
    ("part", "precision"),
    [
        (PARTS[0], "fp32"),
        *((part, precision) for part in PARTS for precision in [*PRECISIONS, "fp8"][1:]),
    ],
)
def test_an_image_does_not_see_its_batch(part, precision):
    engine = small_engine(backend="triton", device=DEVICE, precision=precision, max_batch=2)
    x = image(3, 32, 48)
    order = torch.tensor([2, 0, 1])
    with on_part(part):
        whole = engine.encode(x)
        shuffled = engine.encode(x[order])
        alone = engine.encode(x[1:2])
    for name, tensor in whole.items():
        assert torch.equal(shuffled[name], tensor[order.to(DEVICE)])
        assert torch.equal(alone[name], tensor[1:2])


@pytest.mark.parametrize("part", PARTS)
def test_forms_of_a_batch(part, small):
    pixels = (image(2, 16, 32) * 255).byte()
    with on_part(part):
        expected = small.encode(pixels)
        forms = [
            pixels.permute(0, 2, 3, 1).contiguous(),
            pixels.permute(0, 2, 3, 1).numpy(),
            pixels.flip(3).flip(3),
            torch.nn.functional.pad(pixels, (3, 5))[..., 3:-5],
        ]
        for form in forms:
            found = small.encode(form)
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor)
        near = small.encode(pixels.float() / 255)
    # The same pixels another way: twice what float16 rounding makes of them, as a budget has it.
    model = reference_of(SMALL_META)
    exact = model.encode(pixels.double() / 255)
    sound = entitlement(lambda: model.encode(pixels.double() / 255), exact, torch.float16, model)
    for name, tensor in exact.items():
        assert_within_budget(near[name], tensor, tensor, torch.float16, sound[name], name)
        assert_within_budget(expected[name], tensor, tensor, torch.float16, sound[name], name)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [0, 255, 128])
def test_constant_images_are_finite(part, small, value):
    with on_part(part):
        out = small.encode(torch.full((1, 3, 32, 32), value, dtype=torch.uint8))
    assert all(tensor.isfinite().all() for tensor in out.values())


@pytest.mark.parametrize("part", PARTS)
def test_no_images(part, small):
    with on_part(part):
        out = small.encode(torch.zeros(0, 3, 64, 64))
    assert {name: tuple(tensor.shape) for name, tensor in out.items()} == {
        "sparse": (0, 8, 64),
        "spatial": (0, 16, 8),
        "dense": (0, 16, 64),
        "lowrank": (0, 16, 64),
        "cls": (0, 1, 64),
    }


def launches(engine, outputs=OUTPUTS, arch=90) -> list[str]:
    """The kernels that a batch is, in order, as the audit's hook sees them."""
    weights = map_nodes(engine._encoder, torch.Tensor, lambda tensor: tensor.to("meta"))
    x = torch.empty(2, 3, 96, 96, dtype=torch.uint8, device="meta")
    seen: list[launch.Launch] = []
    with launch.on_part(arch, seen.append):
        encoder.encode(
            kernels, weights, engine.config, x, weights.table.table(6, 6), outputs, torch.float32
        )
    return [item.kernel.__name__.strip("_").removesuffix("_kernel") for item in seen]


def test_a_layer_is_five_launches():
    seen = launches(small_engine(backend="triton", precision="fp16", device=DEVICE))
    layer = ["linear", "attention", "linear", "linear", "linear"]
    # The last layer's query has a launch of its own, so that it can run on fewer rows.
    assert seen[:-4] == ["patch_embed", *layer, *layer, "linear", *layer]
    assert seen[-4] == "norm"
    assert "linear" in seen[-3:], "the sparse tokens' projection"


def test_an_fp8_layer_has_a_quantizing_launch_behind_each_norm():
    seen = launches(small_engine(backend="triton", precision="fp8", device=DEVICE))
    layer = ["linear", "attention", "linear", "linear", "linear"]
    fp8_layer = ["quantize_rows", "linear", "attention", "linear", "quantize_rows", "linear"]
    assert seen[:13] == ["patch_embed", *layer, *fp8_layer, "linear"]


def test_what_is_not_asked_for_is_not_launched():
    engine = small_engine(backend="triton", precision="fp16", device=DEVICE)
    assert launches(engine, ("cls",))[-1] == "norm"
    assert len(launches(engine, ("spatial",))) == len(launches(engine))


def test_a_kernel_engine_is_saved_and_loaded(tmp_path, small):
    import stellar_fast

    small.config = dataclasses.replace(config_of(SMALL_META), name="small")
    small.save(tmp_path)
    again = stellar_fast.load("small", repo=tmp_path, backend="triton", device=DEVICE)
    assert (again.backend, again.precision) == ("triton", "fp16")
    x = image(1, 64, 64)
    assert torch.equal(again.encode(x)["cls"], small.encode(x)["cls"])
    assert "fp16, triton" in repr(again)
