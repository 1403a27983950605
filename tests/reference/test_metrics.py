"""Reconstruction metrics, with networks that need no download."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import images
from engines import small_engine
from torch import nn

from stellar_fast.errors import MissingExtraError
from stellar_fast.recipes import metrics

torchmetrics = pytest.importorskip("torchmetrics", reason="the extra 'metrics' is not installed")


class Moments(nn.Module):
    """Four features of an image; in the place of Inception."""

    num_features = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([*x.mean((2, 3)).unbind(1), x.std((1, 2, 3))], dim=1).double()


def of(model, batches, **keywords):
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(Moments(), normalize=True).set_dtype(torch.float64)
    pairs = torchmetrics.MeanSquaredError()
    return metrics.reconstruction_metrics(model, batches, fid=fid, lpips=pairs, **keywords)


@pytest.mark.numerical
def test_metrics_by_their_formulas():
    engine = small_engine(purpose="reconstruct", pixel_head=True)
    batches = [images(5, 64, 64, 1), (images(4, 64, 64, 2) * 255).round().byte()]
    found = of(engine, batches)
    originals = torch.cat([batches[0], batches[1].float() / 255])
    made = engine.reconstruct(engine.encode(originals))["reconstruction"].clamp(0, 1)
    assert found["images"] == 9
    assert found["lpips"] == pytest.approx(F.mse_loss(made, originals).item(), rel=1e-4)
    one, other = (Moments()(x).numpy() for x in (originals, made))
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    apart = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * cross
    assert found["rfid"] == pytest.approx(apart, rel=1e-3)


def test_a_perfect_reconstruction_is_no_distance_away():
    model = small_engine(purpose="reconstruct", pixel_head=True)
    batch = images(6, 64, 64, 1)
    model.reconstruct = lambda features: {"reconstruction": batch}
    found = of(model, [batch])
    assert found["lpips"] == 0 and abs(found["rfid"]) < 1e-6


def test_originals_are_brought_to_the_size_of_what_is_made():
    model = small_engine(purpose="reconstruct", pixel_head=True)
    batch = images(3, 56, 56, 1)
    larger = F.interpolate(batch, size=(64, 64), mode="bicubic", align_corners=False).clamp(0, 1)
    model.reconstruct = lambda features: {"reconstruction": larger}
    assert of(model, [batch])["lpips"] == 0


def test_too_few_images_and_missing_extras(monkeypatch):
    engine = small_engine(purpose="reconstruct", pixel_head=True)
    with pytest.raises(ValueError, match="two images or more, got 1"):
        of(engine, [images(1, 64, 64, 1)])
    with pytest.raises(ValueError, match="got 0"):
        of(engine, [])
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(MissingExtraError, match=r"stellar-fast\[metrics\]"):
        metrics.reconstruction_metrics(engine, [])
