"""The published outputs, and the one place that says how far from them an implementation may be.

Every implementation is held to them by the same functions: the reference in float32, the reference
in float64, the engine on each backend and device. That float64 passes too shows that the bounds are
no property of the processor whose float32 they were first tried on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from budgets import SPATIAL, TENSOR, TIE, assert_stored_as
from checkpoints import images, relative_error
from torch import Tensor

TINY_ENCODE = ["encode-tiny16", "encode-tiny14-k8", "encode-tiny16-notemp"]


def slow(*names: str) -> list[Any]:
    """Parameters that are run in CI alone."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


REAL_ENCODE = ["encode-b16", "encode-b8", "encode-b24", "encode-l16", "encode-h16"]
ENCODE = [*TINY_ENCODE, REAL_ENCODE[0], *slow(*REAL_ENCODE[1:])]


def golden_image(meta: Mapping[str, Any], height: int = 224, width: int = 224) -> Tensor:
    return images(meta["batch"], height, width, meta["image_seed"])


def assert_encodes_as_published(
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    expected: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    device: str | None = None,
) -> None:
    """Holds `encode` to an encode file, at every size in it; and its tensors to a device."""
    stride, mean = meta["patch_stride_of_dense_and_lowrank"], 1 / meta["num_sparse_tokens"]
    for height, width in meta["sizes"]:
        found = encode(golden_image(meta, height, width))
        assert {"sparse", "spatial", "dense", "lowrank", "cls"} <= found.keys()
        assert device is None or {tensor.device.type for tensor in found.values()} == {device}
        for key, value in found.items():
            where = f"{height}x{width}.{key}"
            if key in ("spatial", "peak_dist"):
                error = relative_error(value - mean, expected[where] - mean)
                assert error < SPATIAL, f"{where}: {error:.3g}"
            else:
                of_golden = value[:, ::stride] if key in ("dense", "lowrank") else value
                error = relative_error(of_golden, expected[where])
                assert error < TENSOR, f"{where}: {error:.3g}"


def assert_features_as_published(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Holds `sparse` and `spatial` to those that a reconstruct file was made from."""
    mean = 1 / meta["num_sparse_tokens"]
    assert relative_error(found["sparse"], expected["sparse"]) < TENSOR
    assert relative_error(found["spatial"] - mean, expected["spatial"] - mean) < SPATIAL


def assert_tokens_as_published(
    logits: Tensor, tokens: Tensor, expected: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Logits (B, P, 1024) and their tokens, of the file's first B images."""
    logits, tokens = logits.detach().cpu(), tokens.cpu()
    stride = meta["patch_stride_of_decoder_output_and_logits"]
    published = expected["tokens"][: len(tokens)].long()
    error = relative_error(logits[:, ::stride], expected["logits"][: len(logits)])
    assert error < TENSOR, f"logits: {error:.3g}"
    assert torch.equal(tokens, logits.argmax(-1))
    # The published token is the best one, or one that float32 cannot tell from it.
    lost = logits.amax(-1) - logits.gather(-1, published[..., None])[..., 0]
    assert (lost < TIE).all(), f"a published token is {lost.max():.3g} below the best"
    assert ((tokens == published) | (lost > 0)).all()


def assert_pixels_as_published(
    pixels: Tensor,
    tokens: Tensor,
    decode: Callable[[Tensor], Tensor],
    expected: Mapping[str, Tensor],
) -> None:
    """The pixels that `reconstruct` made of `tokens`, of the file's first images.

    A token that is a tie changes all pixels around it, and a processor may decide it either way.
    Then `decode` (codes (B, h, w) to pixels) has to give the published pixels for the published
    tokens, and `pixels` for `tokens`. Pixels are stored in float16.
    """
    published = expected["tokens"][: len(tokens)].long()
    side = int(published.shape[1] ** 0.5)
    tokens, pixels = tokens.cpu(), pixels.clone().cpu()
    for image in (tokens != published).any(1).nonzero()[:, 0]:
        one = slice(image, image + 1)
        own = decode(tokens[one].unflatten(1, (side, side)))
        assert relative_error(pixels[one], own) < TENSOR
        pixels[one] = decode(published[one].unflatten(1, (side, side)))
    assert_stored_as(pixels, expected["reconstruction"][: len(pixels)])
