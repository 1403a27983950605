"""Engines on synthetic weights, straight from tests/golden/recipe.py, without a file in between."""

import copy
from typing import Any

import torch
from budgets import assert_stored_as, assert_within_budget, entitlement
from checkpoints import golden, synthetic
from checkpoints import images as image_of
from goldens import assert_pixels_as_published, assert_tokens_as_published, golden_image
from torch import Tensor

from stellar_fast.config import BackboneConfig, ModelConfig
from stellar_fast.engine.engine import Engine
from stellar_fast.engine.vqgan import decode_codes
from stellar_fast.precision import DTYPES
from stellar_fast.reference import STELLARModel
from stellar_fast.weights import names
from stellar_fast.weights import pack as weights
from stellar_fast.weights.quantize import quantize_block

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "patch_size": 16,
}


def config_of(meta: dict) -> ModelConfig:
    """The geometry that a golden file's metadata gives."""
    return ModelConfig(
        name="golden",
        backbone=BackboneConfig.resolve(meta["backbone"]),
        num_sparse_tokens=meta["num_sparse_tokens"],
        num_decoder_layers=meta.get("num_decoder_layers", 6),
        spatial_temp=meta["spatial_temp"],
    )


def image(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return image_of(batch, height, width, seed)


def engine_of(
    meta: dict,
    *,
    precision: str = "fp32",
    purpose: str = "encode",
    pixel_head: bool = False,
    max_batch: int = 16,
    output_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "torch",
    cuda_graphs: bool = False,
) -> Engine:
    """An engine with the weights of a golden file's metadata."""
    config, dtype, device = config_of(meta), DTYPES[precision], torch.device(device)
    if precision == "fp8" and device.type == "cpu":
        dtype = torch.float16  # Triton's interpreter has no bf16 products
    shapes = names.encode_shapes(config)
    if purpose == "reconstruct":
        shapes |= names.reconstruct_shapes(config, pixel_head=pixel_head)
    state = synthetic(shapes, meta["weights_seed"])
    decoder = None
    if purpose == "reconstruct":
        vqgan = None
        if not pixel_head:
            tokenizer = synthetic(names.vqgan_decoder_shapes(), meta["vq_weights_seed"])
            vqgan = weights.pack_vqgan(tokenizer, dtype, device)
        decoder = weights.pack_decoder(state, config, vqgan, dtype, device)
    return Engine(
        config,
        weights.pack_encoder(
            state, config, dtype, device, quantize=quantize_block if precision == "fp8" else None
        ),
        decoder,
        device=device,
        precision=precision,
        output_dtype=output_dtype,
        max_batch=max_batch,
        weights="recipe",
        backend=backend,
        cuda_graphs=cuda_graphs,
    )


SMALL_META = {
    "backbone": SMALL,
    "num_sparse_tokens": 8,
    "spatial_temp": 0.06,
    "num_decoder_layers": 1,
    "weights_seed": 1,
    "vq_weights_seed": 7,
}


def small_engine(**keywords) -> Engine:
    return engine_of(SMALL_META, **keywords)


def assert_encodes_within_budget(
    engine: Engine, model: STELLARModel, x: Tensor, dtype: torch.dtype
) -> None:
    """Features as far from those of `model`, in float64, as plain PyTorch's in `dtype`, twice at
    most."""
    exact = model.encode(x.double())
    plain = copy.deepcopy(model).to(dtype).encode(x)
    sound = entitlement(lambda: model.encode(x.double()), exact, dtype, model)
    ours = engine.encode(x, outputs=tuple(exact))
    for key in ours:
        assert_within_budget(ours[key], plain[key], exact[key], dtype, sound[key], key)


def assert_reconstructs_as_published(name: str, **keywords: Any) -> None:
    """Holds an engine to a reconstruct file: tokens, and the pixels of the published ones."""
    expected, meta = golden(name)
    engine = engine_of(meta, purpose="reconstruct", **keywords)
    out = engine.reconstruct(engine.encode(golden_image(meta)))
    assert_tokens_as_published(out["logits"], out["tokens"], expected, meta)

    def decode(codes: Tensor) -> Tensor:
        assert engine._decoder is not None and engine._decoder.vqgan is not None
        return decode_codes(engine._decoder.vqgan, codes).clamp(0, 1)

    assert_pixels_as_published(out["reconstruction"], out["tokens"], decode, expected)


def assert_draws_as_published(**keywords: Any) -> None:
    """Holds an engine to the file of the pixel head."""
    expected, meta = golden("reconstruct-pixelhead-tiny16")
    engine = engine_of(meta, purpose="reconstruct", pixel_head=True, **keywords)
    out = engine.reconstruct(engine.encode(golden_image(meta)))
    assert set(out) == {"reconstruction"}
    assert_stored_as(out["reconstruction"], expected["x_hat"])
