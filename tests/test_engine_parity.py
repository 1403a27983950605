"""The engine against the published outputs, and every precision against its error budget."""

import pytest
import torch
from checkpoints import golden, images, relative_error, synthetic
from engines import config_of, engine_of
from stellar_fast.reference.model import STELLARModel
from stellar_fast.reference.vqgan import VQGAN

from stellar_fast.names import encode_shapes, reconstruct_shapes, vqgan_shapes

ENCODE = [
    "encode-tiny16",
    "encode-tiny14-k8",
    "encode-tiny16-notemp",
    "encode-b16",
    "encode-b8",
    "encode-b24",
    pytest.param("encode-l16", marks=pytest.mark.slow),
    pytest.param("encode-h16", marks=pytest.mark.slow),
]
RECONSTRUCT = ["reconstruct-tiny16", "reconstruct-tiny14", "reconstruct-b16"]


@pytest.mark.parametrize("name", ENCODE)
def test_encode_meets_the_published_outputs(name):
    expected, meta = golden(name)
    engine = engine_of(meta)
    stride = meta["patch_stride_of_dense_and_lowrank"]
    for height, width in meta["sizes"]:
        out = engine.encode(images(meta["batch"], height, width, meta["image_seed"]))
        for key in ("sparse", "cls"):
            assert relative_error(out[key], expected[f"{height}x{width}.{key}"]) < 2e-5, key
        for key in ("dense", "lowrank"):
            published = expected[f"{height}x{width}.{key}"]
            assert relative_error(out[key][:, ::stride], published) < 2e-5, key
        mean = 1 / meta["num_sparse_tokens"]
        published = expected[f"{height}x{width}.spatial"]
        assert relative_error(out["spatial"] - mean, published - mean) < 1e-4


@pytest.mark.parametrize("name", RECONSTRUCT)
def test_reconstruct_meets_the_published_outputs(name):
    expected, meta = golden(name)
    engine = engine_of(meta, purpose="reconstruct")
    features = engine.encode(images(meta["batch"], 224, 224, meta["image_seed"]))
    stride = meta["patch_stride_of_decoder_output_and_logits"]
    out = engine.reconstruct(features)
    assert relative_error(out["logits"][:, ::stride], expected["logits"]) < 2e-5
    top = out["logits"].topk(2, dim=-1).values
    decided = top[..., 0] - top[..., 1] > 1e-3
    assert decided.float().mean() > 0.9
    assert torch.equal(out["tokens"][decided], expected["tokens"].long()[decided])
    # The golden pixels are float16, whose rounding alone is a relative error of up to 2**-11.
    assert relative_error(out["reconstruction"], expected["reconstruction"]) < 2**-11


def test_the_pixel_head_meets_the_published_output():
    expected, meta = golden("reconstruct-pixelhead-tiny16")
    engine = engine_of(meta, purpose="reconstruct", pixel_head=True)
    x = images(meta["batch"], 224, 224, meta["image_seed"])
    out = engine.reconstruct(engine.encode(x))
    assert set(out) == {"reconstruction"}
    assert relative_error(out["reconstruction"], expected["x_hat"]) < 2**-11


def reference_of(meta: dict, purpose: str = "encode") -> STELLARModel:
    """The reference on a golden file's weights, in float64."""
    config = config_of(meta)
    vqgan = None
    shapes = encode_shapes(config)
    if purpose == "reconstruct":
        vqgan = VQGAN()
        vqgan.load_state_dict(synthetic(vqgan_shapes(), meta["vq_weights_seed"]))
        shapes |= reconstruct_shapes(config)
    model = STELLARModel(
        num_sparse_tokens=config.num_sparse_tokens,
        num_decoder_layers=config.num_decoder_layers,
        spatial_temp=config.spatial_temp,
        vit_pretrained=config.backbone,
        do_recon=purpose == "reconstruct",
        do_clustering=False,
        vq_model=vqgan,
    )
    missing, unexpected = model.load_state_dict(
        synthetic(shapes, meta["weights_seed"]), strict=False
    )
    assert not unexpected
    assert all(
        "pooler" in name or "decoder.embeddings" in name or name.startswith("tokenizer.")
        for name in missing
    )
    return model.double().eval()


def assert_within_budget(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Error against float64 at most twice that of plain PyTorch at the same dtype."""
    error, budget = relative_error(ours, exact), 2 * relative_error(plain, exact)
    assert error <= budget, f"error {error:.2e} exceeds twice plain PyTorch's, {budget:.2e}"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["encode-tiny16", "encode-tiny14-k8", "encode-b16"])
def test_encode_error_budget(name, precision):
    _, meta = golden(name)
    engine = engine_of(meta, precision=precision, output_dtype=torch.float64)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    x = images(2, 224, 224, meta["image_seed"] + 1)
    model = reference_of(meta)
    with torch.no_grad():
        exact = model.encode(x.double())
        plain = model.to(dtype).encode(x)
    ours = engine.encode(x)
    for key in exact:
        assert_within_budget(ours[key], plain[key], exact[key])
    peak = (ours["spatial"] - exact["spatial"]).abs().max()
    assert peak <= 2 * (plain["spatial"].double() - exact["spatial"]).abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_reconstruct_error_budget(precision):
    _, meta = golden("reconstruct-tiny16")
    engine = engine_of(meta, precision=precision, purpose="reconstruct", output_dtype=torch.float64)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = reference_of(meta, "reconstruct")
    with torch.no_grad():
        lowrank = model.encode(images(1, 224, 224, 5).double())["lowrank"].to(dtype)
        exact = model.reconstruct({"lowrank": lowrank.double()})
        plain = model.to(dtype).reconstruct({"lowrank": lowrank})
    ours = engine.reconstruct({"lowrank": lowrank})
    assert_within_budget(ours["logits"], plain["logits"], exact["logits"])
    top = exact["logits"].topk(2, dim=-1).values
    margin = (ours["logits"] - exact["logits"]).abs().max() * 2
    decided = top[..., 0] - top[..., 1] > margin
    assert torch.equal(ours["tokens"][decided], exact["tokens"][decided])


def test_the_vqgan_decoder_meets_its_error_budget():
    _, meta = golden("reconstruct-tiny16")
    model = reference_of(meta, "reconstruct")
    codes = torch.randint(0, 1024, (1, 14, 14), generator=torch.Generator().manual_seed(0))
    from stellar_fast.vqgan import decode_codes
    from stellar_fast.weights import pack_vqgan

    state = synthetic(vqgan_shapes(), meta["vq_weights_seed"])
    with torch.no_grad():
        exact = model.tokenizer.decode(codes)
        for dtype in (torch.float32, torch.bfloat16):
            plain = model.tokenizer.to(dtype).decode(codes)
            ours = decode_codes(pack_vqgan(state, dtype, torch.device("cpu")), codes).clamp(0, 1)
            assert_within_budget(ours, plain, exact)
