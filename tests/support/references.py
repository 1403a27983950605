"""The reference model on the golden recipe's weights, straight from the recipe."""

from __future__ import annotations

from typing import Any

import torch
from checkpoints import filled, synthetic

from stellar_fast.reference import STELLARModel
from stellar_fast.reference.vqgan import VQGAN
from stellar_fast.weights.names import vqgan_shapes


def vqgan_of(seed: int = 7) -> VQGAN:
    """The tokenizer, float32; 7 is the seed of every golden file that has one."""
    with torch.device("meta"):  # nothing to initialise: every tensor is assigned
        model = VQGAN()
    model.load_state_dict(synthetic(vqgan_shapes(), seed), assign=True)
    return model.requires_grad_(False)


def reference_of(
    meta: dict[str, Any],
    purpose: str = "encode",
    dtype: torch.dtype = torch.float64,
    vqgan: VQGAN | None = None,
) -> STELLARModel:
    """The reference on a golden file's weights, in eval mode and without gradients.

    Args:
        meta: the file's metadata.
        purpose: "encode" or "reconstruct".
        vqgan: with it the decoder predicts codes, and without it pixels.
    """
    with torch.device("meta"):
        model = STELLARModel(
            meta["num_sparse_tokens"],
            meta["spatial_temp"],
            num_decoder_layers=meta.get("num_decoder_layers", 6),
            do_recon=purpose == "reconstruct",
            do_clustering=False,
            vq_model=vqgan,
            vit_pretrained=meta["backbone"],
        )
    filled(model, meta["weights_seed"])
    return model.to(dtype).eval().requires_grad_(False)
