"""What the tests of the module share that `load_stellar` returns."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from budgets import assert_same_features
from checkpoints import images
from torch import Tensor

from stellar_fast.config import BackboneConfig
from stellar_fast.reference import STELLARModel

TINY = BackboneConfig(32, 2, 2, 64, 16, 64)
X = images(3, 64, 64, 5)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def fast(model: STELLARModel, x: Tensor | None = None) -> dict[str, Tensor]:
    """Features of `x`, or of `X`, as an engine may give them."""
    with torch.no_grad():
        return model.encode(_on_device_of(model) if x is None else x)


def plain(model: STELLARModel, x: Tensor | None = None) -> dict[str, Tensor]:
    """The reference's features of the parameters as they are."""
    with torch.no_grad():
        return model.features(_on_device_of(model) if x is None else x)


def _on_device_of(model: STELLARModel) -> Tensor:
    return X.to(model.sparse_tokens.device)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """One computation twice: the same bits on a CPU. A GPU may take another algorithm the second
    time, in a graph."""
    if next(iter(expected.values())).device.type != "cpu":
        assert_same_features(found, expected)
        return
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
