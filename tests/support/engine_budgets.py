"""What every backend's engine is held to."""

import copy
from typing import Any

import torch
from budgets import assert_stored_as, assert_within_budget, entitlement
from checkpoints import golden
from engines import engine_of
from goldens import assert_pixels_as_published, assert_tokens_as_published, golden_image
from torch import Tensor

from stellar_fast.engine.engine import Engine
from stellar_fast.engine.vqgan import decode_codes
from stellar_fast.reference import STELLARModel


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
