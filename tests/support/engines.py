"""Engines on synthetic weights, straight from tests/golden/recipe.py, without a file in between."""

import torch
from checkpoints import images as image_of
from checkpoints import synthetic

from stellar_fast.config import BackboneConfig, ModelConfig
from stellar_fast.engine.engine import Engine
from stellar_fast.precision import DTYPES
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
