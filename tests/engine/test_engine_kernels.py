"""The engine on the Triton kernels: published outputs, error budgets, and what only they promise.

Interpreted on CPU tensors where there is no GPU, compiled where there is one.
"""

import dataclasses

import pytest
import torch
from budgets import assert_within_budget, entitlement
from checkpoints import golden, images, relative_error
from engines import SMALL, SMALL_META, config_of, engine_of, image, small_engine
from kernel_checks import DEVICE, GPUS, ON_GPU, assert_budget, on_gpu, shaken
from references import reference_of

from stellar_fast import kernels
from stellar_fast.engine import decoder, encoder
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.kernels import launch
from stellar_fast.reference import ops as oracles
from stellar_fast.weights.packed import Fp8Block, map_nodes, position_code

pytestmark = [pytest.mark.kernels, pytest.mark.numerical]
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


SHALLOW = SMALL_META | {"backbone": SMALL | {"num_hidden_layers": 2, "intermediate_size": 128}}


@pytest.fixture(scope="module")
def shallow():
    """One block that runs on all rows, and the last one, which runs on those that are asked for."""
    return kernel_engine(SHALLOW, precision="fp16")


@pytest.mark.parametrize(
    ("gpu", "name", "size"),
    [
        *((gpu, "encode-tiny16", (96, 96)) for gpu in GPUS),
        (GPUS[-1], "encode-tiny14-k8", (98, 126)),
        pytest.param(GPUS[-1], "encode-tiny16-notemp", (224, 224), marks=pytest.mark.slow),
        *(
            pytest.param(gpu, name, size, marks=pytest.mark.slow)
            for gpu in GPUS
            for name in ("encode-tiny16", "encode-tiny14-k8")
            for size in ((224, 224), (160, 288))[: 2 if name == "encode-tiny16" else 1]
        ),
    ],
)
def test_encode_meets_the_published_outputs(gpu, name, size):
    """The first image: no image sees its batch, as is shown below."""
    expected, meta = golden(name)
    published = {key: expected[f"{size[0]}x{size[1]}.{key}"][:1] for key in OUTPUTS}
    x = images(meta["batch"], *size, meta["image_seed"])[:1]
    with on_gpu(gpu):
        out = {key: value.cpu() for key, value in kernel_engine(meta).encode(x).items()}
    for key in ("sparse", "cls", "dense", "lowrank"):
        assert relative_error(out[key], published[key]) < 2e-5, key
    mean = 1 / meta["num_sparse_tokens"]
    assert relative_error(out["spatial"] - mean, published["spatial"] - mean) < 1e-4


@pytest.mark.parametrize(
    ("gpu", "precision"),
    [
        (GPUS[-1], "fp16"),
        pytest.param(GPUS[0], "fp16", marks=pytest.mark.slow),
        pytest.param(GPUS[-1], "fp32", marks=pytest.mark.slow),
    ],
)
def test_reconstruct_error_budget(gpu, precision):
    engine = small_engine(
        purpose="reconstruct",
        pixel_head=True,
        backend="triton",
        device=DEVICE,
        precision=precision,
        output_dtype=torch.float64,
    )
    dtype = PRECISIONS[precision]
    lowrank = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with on_gpu(gpu):
        ours = engine.reconstruct({"lowrank": lowrank})["reconstruction"]

    def computed(change):
        """By the oracles, on the weights as `change` makes them."""
        weights = map_nodes(
            engine._decoder,
            torch.Tensor,
            lambda t: change(t.cpu()) if t.is_floating_point() else t.cpu(),
        )
        x = change(lowrank)
        code = position_code(weights.fourier.double(), 2, 2).unflatten(0, (2, 2)).to(x.dtype)
        return decoder.reconstruct(oracles, weights, engine.config, x, code)["reconstruction"]

    plain, exact = computed(lambda t: t), computed(torch.Tensor.double)
    floor = computed(lambda t: shaken(t, max(t.shape[-1], 2)))
    assert_budget(ours, plain, exact, torch.float64, floor)


@pytest.mark.slow
def test_reconstruct_meets_the_published_outputs():
    expected, meta = golden("reconstruct-tiny16")
    engine = kernel_engine(meta, purpose="reconstruct")
    features = {"sparse": expected["sparse"][:1], "spatial": expected["spatial"][:1]}
    out = {key: value.cpu() for key, value in engine.reconstruct(features).items()}
    stride = meta["patch_stride_of_decoder_output_and_logits"]
    assert relative_error(out["logits"][:, ::stride], expected["logits"][:1]) < 2e-5
    assert relative_error(out["reconstruction"], expected["reconstruction"][:1]) < 2**-11


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize(
    ("gpu", "name", "size"),
    [
        *((gpu, "odd", (61, 72)) for gpu in GPUS),
        (GPUS[-1], "encode-tiny14-k8", (42, 70)),
        *(
            pytest.param(gpu, name, (224, 224), marks=pytest.mark.slow)
            for gpu in GPUS
            for name in ("encode-tiny16", "encode-tiny14-k8")
        ),
    ],
)
def test_encode_error_budget(gpu, name, size, precision):
    meta = ODD if name == "odd" else golden(name)[1]
    engine = kernel_engine(meta, precision=precision, output_dtype=torch.float64)
    x = images(1, *size, 3)
    model, other = reference_of(meta), reference_of(meta)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(shaken(parameter, max(parameter.shape[-1], 2)))
        exact, floor = model.encode(x.double()), other.encode(x.double())
        plain = model.to(PRECISIONS[precision]).encode(x)
    with on_gpu(gpu):
        ours = {key: value.cpu() for key, value in engine.encode(x).items()}
    for key in ours:
        assert_budget(ours[key], plain[key], exact[key], torch.float64, floor[key])
    peak, *peaks = ((o["spatial"] - exact["spatial"]).abs().max() for o in (ours, plain, floor))
    assert peak <= 2 * max(peaks)
    # As stored in the precision, before they were widened: see test_spatial_map.py.
    stored = torch.finfo(PRECISIONS[precision]).eps + 4 * torch.finfo(torch.float32).eps
    assert ((ours["spatial"].sum(-1) - 1).abs() <= stored).all()


@pytest.mark.parametrize(
    ("gpu", "calibrated"), [(GPUS[0], False), (GPUS[-1], True)], ids=["bounds", "calibrated"]
)
def test_fp8_error_budget(gpu, calibrated):
    """As far from float64 as the oracles are with the same weights, twice at most."""
    meta = golden("encode-tiny16")[1]
    meta = meta | {"backbone": meta["backbone"] | {"num_hidden_layers": 4}}
    engine = kernel_engine(meta, precision="fp8", output_dtype=torch.float64)
    assert sum(isinstance(block, Fp8Block) for block in engine._encoder.blocks) == 2
    x = images(1, 48, 64, 3)
    before = engine._encoder.blocks[1].hidden_scale
    with on_gpu(gpu):
        if calibrated:
            assert engine.calibrate(x) is engine
            assert engine._encoder.blocks[1].hidden_scale < before
        ours = {key: value.cpu() for key, value in engine.encode(x).items()}
    with torch.no_grad():
        exact = reference_of(meta).encode(x.double())
    weights = map_nodes(engine._encoder, torch.Tensor, torch.Tensor.cpu)
    plain = encoder.encode(
        oracles, weights, engine.config, x, weights.table.table(3, 4), OUTPUTS, torch.float32
    )
    for key in ours:
        assert_budget(ours[key], plain[key], exact[key], torch.float16)
        assert relative_error(plain[key], exact[key]) < 0.5


def test_calibration_needs_an_fp8_engine_and_images(small):
    with pytest.raises(ValueError, match="this one is fp16"):
        small.calibrate(image(1, 64, 64))
    engine = small_engine(precision="fp8", backend="triton", device=DEVICE)
    with pytest.raises(ValueError, match="empty batch"):
        engine.calibrate(torch.zeros(0, 3, 64, 64))


@pytest.mark.parametrize(
    "gpu", [GPUS[-1], *(pytest.param(gpu, marks=pytest.mark.slow) for gpu in GPUS[:-1])]
)
def test_subsets_of_the_outputs_have_the_same_bits(gpu, shallow):
    x = image(1, 32, 48)
    with on_gpu(gpu):
        whole = shallow.encode(x)
        for outputs in (("cls",), ("sparse",), ("sparse", "cls"), ("dense",), ("lowrank",)):
            found = shallow.encode(x, outputs=outputs)
            assert set(found) == set(outputs)
            for name in outputs:
                assert torch.equal(found[name], whole[name])


@pytest.mark.parametrize(
    ("gpu", "precision"),
    [
        *((GPUS[-1], precision) for precision in [*PRECISIONS, "fp8"] if precision != "fp32"),
        *(
            pytest.param(GPUS[0], precision, marks=pytest.mark.slow)
            for precision in PRECISIONS
            if not ON_GPU
        ),
    ],
)
def test_an_image_does_not_see_its_batch(gpu, precision):
    """Each is in a chunk of two and alone in one. The kernels' own tests hold the same of each."""
    engine = small_engine(backend="triton", device=DEVICE, precision=precision, max_batch=2)
    x = image(3, 32, 48)
    order = torch.tensor([2, 0, 1])
    with on_gpu(gpu):
        whole = engine.encode(x)
        shuffled = engine.encode(x[order])
    for name, tensor in whole.items():
        assert torch.equal(shuffled[name], tensor[order.to(DEVICE)])


def test_forms_of_a_batch(shallow):
    pixels = (image(1, 32, 48) * 255).byte()
    with on_gpu(GPUS[-1]):
        expected = shallow.encode(pixels)
        forms = [
            pixels.permute(0, 2, 3, 1).contiguous(),
            pixels.permute(0, 2, 3, 1).numpy(),
            pixels.flip(3).flip(3),
            torch.nn.functional.pad(pixels, (3, 5))[..., 3:-5],
        ]
        for form in forms:
            found = shallow.encode(form)
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor)
        near = shallow.encode(pixels.float() / 255)
    # The same pixels another way: each as far from float64 as rounding to float16 entitles to.
    model, x = reference_of(SHALLOW), pixels.double() / 255
    exact = model.encode(x)
    sound = entitlement(lambda: model.encode(x), exact, torch.float16, model)
    for found in (near, expected):
        for name, tensor in found.items():
            right = exact[name]
            assert_within_budget(tensor.cpu(), right, right, torch.float16, sound[name], name)


@pytest.mark.parametrize("gpu", GPUS)
def test_constant_images_are_finite(gpu, shallow):
    constant = torch.tensor([0, 255, 128], dtype=torch.uint8).reshape(3, 1, 1, 1)
    with on_gpu(gpu):
        out = shallow.encode(constant.expand(3, 3, 32, 48))
    assert all(tensor.isfinite().all() for tensor in out.values())


@pytest.mark.parametrize("gpu", GPUS)
def test_no_images(gpu, small):
    with on_gpu(gpu):
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
    with launch.on_gpu(arch, seen.append):
        encoder.encode(
            kernels, weights, engine.config, x, weights.table.table(6, 6), outputs, torch.float32
        )
    return [item.kernel.__name__.strip("_").removesuffix("_kernel") for item in seen]


def test_a_layer_is_five_launches():
    seen = launches(small_engine(backend="triton", precision="fp16", device=DEVICE))
    layer = ["linear", "attention", "linear", "linear", "linear"]
    # The last layer's query has a launch of its own, so that it can run on fewer rows.
    assert seen[:-4] == ["unfold", "patch_embed", *layer, *layer, "linear", *layer]
    assert seen[-4] == "norm"
    assert "linear" in seen[-3:], "the sparse tokens' projection"


def test_an_fp8_layer_has_a_quantizing_launch_behind_each_norm():
    seen = launches(small_engine(backend="triton", precision="fp8", device=DEVICE))
    layer = ["linear", "attention", "linear", "linear", "linear"]
    fp8_layer = ["quantize_rows", "linear", "attention", "linear", "quantize_rows", "linear"]
    assert seen[:14] == ["unfold", "patch_embed", *layer, *fp8_layer, "linear"]


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
