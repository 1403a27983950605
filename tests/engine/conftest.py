"""Settings of a GPU that the engine is measured under; the module of the drop-in, and its files."""

import copy
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
from checkpoints import write_checkpoint, write_vqgan
from drop_in import DEVICES, TINY, X
from torch import Tensor

import stellar_fast
from stellar_fast.engine.engine import Engine
from stellar_fast.module import FastSTELLARModel


@pytest.fixture
def full_float32():
    """No tf32: what is called float32 is held to float32's tolerances."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A folder in the published layout: models that predict codes and that draw pixels."""
    path = tmp_path_factory.mktemp("published")
    common = {"backbone": asdict(TINY), "num_sparse_tokens": 4, "num_decoder_layers": 1}
    write_checkpoint(path, "tiny", **common, seed=3)
    write_checkpoint(path, "pixels", **common, seed=3, pixel_head=True)
    write_vqgan(path / "vq.safetensors", 7)
    return path


@pytest.fixture(params=DEVICES)
def device(request, full_float32) -> str:
    return request.param


@pytest.fixture
def model(published, device) -> FastSTELLARModel:
    return stellar_fast.load_stellar("tiny", repo_id=published, device=device)


@pytest.fixture
def x(device) -> Tensor:
    """Images on the model's device."""
    return X.to(device)


@pytest.fixture(scope="session")
def whole(published) -> FastSTELLARModel:
    """To pretrain; reading the tokenizer takes most of the time."""
    few = {"num_masks": 2, "num_local_crops": 2, "color_augmentation": False}
    vq_model = published / "vq.safetensors"
    return stellar_fast.load_stellar("tiny", "pretrain", vq_model, published, **few)


@pytest.fixture
def decoding(whole, device) -> FastSTELLARModel:
    return copy.deepcopy(whole).eval().to(device)


@pytest.fixture
def encodes(monkeypatch) -> Iterator[list[str]]:
    """What of an engine was called."""
    calls: list[str] = []
    for name in ("encode", "reconstruct"):
        own = getattr(Engine, name)

        def called(engine, *arguments, own=own, name=name, **keywords):
            calls.append(name)
            return own(engine, *arguments, **keywords)

        monkeypatch.setattr(Engine, name, called)
    return calls
