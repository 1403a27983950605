"""Colour augmentation and the views of a photograph, by kornia."""

import sys

import pytest
import torch
from checkpoints import images

from stellar_fast.errors import MissingExtraError
from stellar_fast.reference.pretrain import augment

pytestmark = pytest.mark.numerical


def test_colours_stay_in_range_and_follow_the_seed():
    batch = images(6, 32, 40, 20)
    kept = batch.clone()
    torch.manual_seed(5)
    found = augment.augment_colors(batch)
    torch.manual_seed(5)
    assert torch.equal(augment.augment_colors(batch), found)
    assert torch.equal(batch, kept)
    assert found.shape == batch.shape and found.min() >= 0 and found.max() <= 1
    assert not torch.equal(augment.augment_colors(batch), found)


def test_colours_change_as_often_as_published():
    batch = images(1, 24, 24, 21).expand(1500, -1, -1, -1)
    torch.manual_seed(6)
    found = augment.augment_colors(batch, same_on_batch=False)
    changed = (found - batch).abs().flatten(1).amax(1) > 1e-3
    grey = (found - found.mean(1, keepdim=True)).abs().flatten(1).amax(1) < 1e-4
    # unchanged: neither jitter nor grey nor blur
    assert (~changed).float().mean().item() == pytest.approx(0.2 * 0.8 * 0.5, abs=0.025)
    assert grey.float().mean().item() == pytest.approx(0.2, abs=0.035)


def test_blur_comes_as_often_and_as_wide_as_published():
    # two colours side by side: jitter and grey leave two, blur alone mixes them at the border
    batch = torch.tensor([0.3, 0.4, 0.5]).view(1, 3, 1, 1).repeat(1500, 1, 12, 24)
    batch[..., 12:] = torch.tensor([0.6, 0.5, 0.4]).view(3, 1, 1)
    torch.manual_seed(6)
    found = augment.augment_colors(batch, same_on_batch=False)[:, :, 6]
    step = (found[..., -1] - found[..., 0]).norm(dim=1)
    found, step = found[step > 0.01], step[step > 0.01]
    assert len(found) > 1400
    beside = (found[..., 11] - found[..., 0]).norm(dim=1) / step
    # one pixel off the border a Gaussian of sigma 0.27 mixes 1 in 1000: 0.1 to 0.27 do not show
    shown = (2.0 - 0.27) / (2.0 - 0.1)
    assert (beside > 1e-3).float().mean().item() == pytest.approx(0.5 * shown, abs=0.04)
    # four of the nine taps are across the border: of sigma 2 they hold 0.398 of the weight
    assert 0.38 < beside.max().item() < 0.399
    reach = (found[..., :12] - found[..., :1]).norm(dim=1) > 1e-4 * step.unsqueeze(1)
    assert reach.any(0).sum() == 4  # of nine taps


def test_colours_are_drawn_once_for_a_batch_unless_asked_otherwise():
    batch = images(1, 24, 24, 22).expand(8, -1, -1, -1)
    torch.manual_seed(7)
    for _ in range(5):
        together = augment.augment_colors(batch)
        assert (together - together[:1]).abs().max() < 1e-6
        apart = augment.augment_colors(batch, same_on_batch=False)
        assert (apart - apart[:1]).abs().max() > 1e-2


def test_half_precision_colours_are_computed_in_float32():
    batch = images(2, 24, 24, 23)
    torch.manual_seed(8)
    expected = augment.augment_colors(batch)
    torch.manual_seed(8)
    found = augment.augment_colors(batch.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05


def test_training_views_are_crops_of_the_photograph():
    # red and green tell the place in the photograph, blue is 0
    y, x = torch.meshgrid(torch.linspace(0, 1, 260), torch.linspace(0, 1, 330), indexing="ij")
    torch.manual_seed(9)
    views = augment.training_views(torch.stack([y, x, torch.zeros_like(x)]), 40, 40)
    assert views["global_views"].shape == (40, 3, 224, 224)
    assert views["local_views"].shape == (40, 3, 96, 96)
    assert torch.equal(views["image"], views["global_views"][0])
    for name, (low, high) in (("global_views", (0.36, 1)), ("local_views", (0.06, 0.36))):
        found = views[name]
        assert found.min() >= 0 and found.max() <= 1
        tall = (found[:, 0].amax((1, 2)) - found[:, 0].amin((1, 2))).double()
        wide = (found[:, 1].amax((1, 2)) - found[:, 1].amin((1, 2))).double()
        area = tall * wide
        assert low - 0.03 < area.min() and area.max() < high + 0.03, name
        assert area.max() - area.min() > 0.15, name
        mirrored = (found[:, 1, 0, 0] > found[:, 1, 0, -1]).sum()
        assert 5 < mirrored < 35, name


@pytest.mark.parametrize(
    ("image", "counts", "message"),
    [
        (torch.zeros(1, 3, 32, 32), (2, 2), r"\(1, 3, 32, 32\)"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), (2, 2), "uint8"),
        (torch.zeros(3, 32, 32), (0, 2), "num_global=0"),
    ],
)
def test_training_views_refuse(image, counts, message):
    with pytest.raises(ValueError, match=message):
        augment.training_views(image, *counts)


@pytest.mark.parametrize(
    ("call", "shape"),
    [(augment.augment_colors, (1, 3, 32, 32)), (augment.training_views, (3, 32, 32))],
)
def test_without_kornia_the_extra_is_named(monkeypatch, call, shape):
    for name in [name for name in sys.modules if name.partition(".")[0] == "kornia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_NoKornia(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"stellar-fast\[pretrain\]"):
        call(torch.zeros(shape))


class _NoKornia:
    """Finds what a machine without kornia finds."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "kornia":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
