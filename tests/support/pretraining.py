"""A model small enough to train in a test, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from checkpoints import filled, images
from torch import Tensor

from stellar_fast.config import BackboneConfig
from stellar_fast.reference import STELLARModel

TINY = BackboneConfig(32, 2, 2, 64, 16, image_size=64)
GRID = 4


def unchanged(images: Tensor) -> Tensor:
    """In the place of colour augmentation, which would make every loss of a view random."""
    return images


def tiny_model(seed: int = 1, **arguments: Any) -> STELLARModel:
    """A training model with the golden recipe's weights: pixel head, 4 tokens, 24 clusters, nothing
    random unless asked for."""
    defaults: dict[str, Any] = {
        "num_sparse_tokens": 4,
        "num_decoder_layers": 1,
        "num_clusters": 24,
        "prototype_dim": 8,
        "num_masks": 2,
        "masking_ratio": 0.0,
        "focal_mode": None,
        "color_augmentation": False,
        "num_local_crops": 2,
        "vit_pretrained": TINY,
    }
    model = filled(STELLARModel(**(defaults | arguments)), seed).train()
    model.augment = unchanged
    return model


def tiny_inputs(batch: int = 3, views: int = 2, crops: int = 2, seed: int = 2) -> dict[str, Tensor]:
    """Images (batch, 3, 64, 64), as many global views a piece, local views of 32x32."""
    return {
        "image": images(batch, 64, 64, seed),
        "labels": torch.arange(batch),
        "global_views": images(batch * views, 64, 64, seed + 1).unflatten(0, (batch, views)),
        "local_views": images(batch * crops, 32, 32, seed + 2).unflatten(0, (batch, crops)),
    }
