"""How close reconstructions are to their images: rFID and LPIPS, by torchmetrics (extra `metrics`).

Both compare features of networks that torchmetrics downloads: Inception's of all images, and those
of each pair. Figures of the paper are of ImageNet's 50,000 validation images; an FID of fewer is
larger, and neither figure compares with one of another network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.engine import MAX_PATCHES, Engine
from ..engine.inputs import as_batch
from ..errors import MissingExtraError
from ..module import FastSTELLARModel


def reconstruction_metrics(
    model: Engine | FastSTELLARModel,
    batches: Iterable[Any],
    *,
    preset: str = "eval",
    fid: Any = None,
    lpips: Any = None,
) -> dict[str, float]:
    """rFID and mean LPIPS of what `model` reconstructs of images.

    Args:
        model: loaded with purpose="reconstruct".
        batches: batches of images as `Engine.encode` takes them, square.
        preset: how listed images are resized; "eval" is the published evaluation's.
        fid, lpips: torchmetrics' to use instead of `FrechetInceptionDistance(2048)` and
            `LearnedPerceptualImagePatchSimilarity("alex")`, made with `normalize=True`: another
            network, or one on the disk.

    Returns:
        rfid, lpips, and images, how many there were. For patch 14, reconstructed at 256x256, the
        image is resized to that, as in training.

    Raises:
        ValueError: there are fewer than two images, or as `encode` and `reconstruct`.
        MissingExtraError: torchmetrics, or what a network of it needs, is not installed.
    """
    device = model.device if isinstance(model, Engine) else model.sparse_tokens.device
    fid, lpips = (metric.to(device) for metric in _metrics(fid, lpips))
    patch = model.config.backbone.patch_size
    count = 0
    with torch.no_grad():
        for images in batches:
            pixels, _ = as_batch(images, preset, patch, MAX_PATCHES)
            pixels = pixels.to(device)
            if not pixels.is_floating_point():
                pixels = pixels.float() / 255
            found = model.reconstruct(model.encode(pixels))["reconstruction"].float().clamp(0, 1)
            original = _resized(pixels.float(), found)
            fid.update(original, real=True)
            fid.update(found, real=False)
            lpips.update(found, original)
            count += len(pixels)
    if count < 2:
        raise ValueError(f"a distance of distributions needs two images or more, got {count}")
    return {"rfid": float(fid.compute()), "lpips": float(lpips.compute()), "images": count}


def _resized(pixels: Tensor, like: Tensor) -> Tensor:
    size = like.shape[2:]
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size=tuple(size), mode="bicubic", align_corners=False)
    return pixels.clamp(0, 1)


def _metrics(fid: Any, lpips: Any) -> tuple[Any, Any]:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        if fid is None:
            fid = FrechetInceptionDistance(2048, normalize=True)
        if lpips is None:
            lpips = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    except ImportError as error:
        raise MissingExtraError("comparing reconstructions", "metrics") from error
    return fid, lpips
