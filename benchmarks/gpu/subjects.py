"""What is timed on a GPU end to end: engines, the plain model, others' models, and their inputs.

Weights are seeded and random, pixels are noise. An engine gets a figure when its error on the first
images of the very batch that is timed is within its budget.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.budgets import errors_of, over_budget
from harness.results import EAGER_BF16, EAGER_FP32, VIT_BF16, Row
from harness.timing import Call
from harness.workloads import BATCHES, flops_per_image
from peers.footprint import plain_model, synthetic
from peers.models import Subject
from torch import Tensor

import stellar_fast
from stellar_fast.config import MODELS
from stellar_fast.engine import encoder, torch_ops
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.reference import STELLARModel
from stellar_fast.reference import ops as oracles
from stellar_fast.weights.packed import map_nodes

CHECKED = 4  # images on which the error budget is held
SETS = 4
SIDE = 224
COMPILE_MODE = "max-autotune"
DEVICE = torch.device("cuda")
Maker = Callable[[], list[Call]]


class Kept:
    """What was made last; it is dropped before another is made, since both may not fit."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._key: tuple[Any, ...] | None = None
        self._value: Any = None

    def __call__(self, *key: Any) -> Any:
        if key != self._key:
            self._key = self._value = None
            gc.collect()
            torch.cuda.empty_cache()
            self._value = self._make(*key)
            self._key = key
        return self._value


@dataclass(frozen=True)
class Loaded:
    """An engine, the seconds that loading took, and the bytes that it keeps on the device."""

    engine: stellar_fast.Engine
    seconds: float
    size: int


def load(model: str, precision: str) -> Loaded:
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    engine = stellar_fast.load(
        model, weights="synthetic", device=DEVICE, precision=precision, max_batch=max(BATCHES)
    )
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Loaded(engine, seconds, torch.cuda.memory_allocated() - before)


def _reference(model: str) -> STELLARModel:
    """The published model in plain PyTorch, float32, with the engine's weights."""
    return plain_model(MODELS[model], synthetic(MODELS[model])).to(DEVICE)


def _pixels(count: int, side: int, seed: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shape = (count, 3, side, side)
    return torch.randint(0, 256, shape, generator=generator, device=DEVICE, dtype=torch.uint8)


def _truth(model: str, side: int) -> dict[str, Tensor]:
    """The model in float64 on the images that are checked."""
    exact = copy.deepcopy(reference(model)).double()
    with torch.no_grad():
        return exact.encode(_pixels(CHECKED, side, 0).double() / 255)


engines = Kept(load)
reference = Kept(_reference)
truth = Kept(_truth)


def inputs(batch: int, side: int = SIDE) -> list[Tensor]:
    """Sets of (batch, 3, side, side) uint8 noise; the first begins with the checked images."""
    sets = [_pixels(batch, side, seed) for seed in range(1, 1 + SETS)]
    count = min(batch, CHECKED)
    sets[0][:count] = _pixels(CHECKED, side, 0)[:count]
    return sets


def refusal(
    engine: stellar_fast.Engine, images: Tensor, outputs: Collection[str] = OUTPUTS
) -> str | None:
    """Why the engine gets no figure on this batch, which `inputs` made; None where it is right.

    Its error against float64 may be twice that of the oracles with the engine's own weights.
    """
    count, side = min(len(images), CHECKED), images.shape[-1]
    found = engine.encode(images, outputs=outputs, check_range=False)
    weights = torch_ops.restore(engine._encoder)
    cells = side // engine.config.backbone.patch_size
    with torch.no_grad():
        exact = {name: truth(engine.config.name, side)[name][:count] for name in found}
        plain = encoder.encode(
            oracles,
            weights,
            engine.config,
            images[:count],
            weights.table.table(cells, cells),
            tuple(found),
            torch.float32,
        )
    ours = {name: tensor[:count] for name, tensor in found.items()}
    return over_budget(errors_of(ours, exact), errors_of(plain, exact))


def weight_bytes(engine: stellar_fast.Engine) -> int:
    """Of the encoder's tensors, which a forward pass reads at least once."""
    sizes: list[int] = []

    def add(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    map_nodes(torch_ops.restore(engine._encoder), Tensor, add)
    return sum(sizes)


def sized(model: str, side: int) -> Any:
    """The model's config for images of another size."""
    config = MODELS[model]
    return dataclasses.replace(
        config, backbone=dataclasses.replace(config.backbone, image_size=side)
    )


def facts(model: str, batch: int, precision: str, side: int, engine: stellar_fast.Engine) -> Row:
    """What a row says of itself, FLOPs and bytes of a batch included."""
    return {
        "name": f"engine {precision}",
        "model": model,
        "batch": batch,
        "precision": precision,
        "side": side,
        "tokens": MODELS[model].num_sparse_tokens,
        "backend": engine.backend,
        "flops": batch * flops_per_image(sized(model, side)),
        "bytes": weight_bytes(engine) + batch * 3 * side**2,
    }


def encode_calls(engine: stellar_fast.Engine, sets: list[Tensor], **options: Any) -> list[Call]:
    """`engine.encode` on each set."""
    return [partial(engine.encode, x, check_range=False, **options) for x in sets]


def _eager(model: str, dtype: torch.dtype, sets: list[Tensor]) -> list[Call]:
    plain = reference(model)
    if dtype != torch.float32:
        plain = copy.deepcopy(plain).to(dtype)

    def encode(x: Tensor) -> object:
        return plain.encode(x.to(dtype) / 255)

    return [partial(encode, x) for x in sets]


def _vit(model: str, sets: list[Tensor]) -> list[Call]:
    """transformers' ViTModel in bfloat16: the backbone alone, so it does less."""
    with tempfile.TemporaryDirectory() as folder:
        vit = Subject(MODELS[model], Path(folder)).vit("bf16").to(DEVICE)

    def encode(x: Tensor) -> object:
        return vit(x.bfloat16() / 255).last_hidden_state

    return [partial(encode, x) for x in sets]


def compiled_calls(model: str, sets: list[Tensor]) -> list[Call]:
    """torch.compile of the model in bfloat16, compiled anew at its first call."""
    torch.compiler.reset()
    half = copy.deepcopy(reference(model)).bfloat16()
    encode = torch.compile(
        lambda x: half.encode(x.bfloat16() / 255), mode=COMPILE_MODE, dynamic=False
    )
    return [partial(encode, x) for x in sets]


def rivals(model: str, sets: list[Tensor], names: Collection[str]) -> dict[str, Maker]:
    """What else can encode these sets; to add a rival, add it here and to `stages.py`."""
    every: dict[str, Maker] = {
        EAGER_FP32: lambda: _eager(model, torch.float32, sets),
        EAGER_BF16: lambda: _eager(model, torch.bfloat16, sets),
        VIT_BF16: lambda: _vit(model, sets),
    }
    return {name: every[name] for name in names}
