"""Synthetic checkpoints in the published layout, the golden files, and the measure of agreement."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stellar_fast.config import BackboneConfig, ModelConfig
from stellar_fast.weights.names import Shapes, published_shapes, vqgan_shapes

Model = TypeVar("Model", bound=nn.Module)
GOLDEN = Path(__file__).parents[1] / "golden"
# part of a block's name in the published spelling -> in the renamed one
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def _recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = _recipe()


# Elements of what is drawn once a process and kept: the tokenizer has 55 million, all else that is
# drawn again and again is small.
KEPT = 60_000_000
_kept = functools.lru_cache(maxsize=2000)(recipe.tensor)


def synthetic(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """The golden recipe's tensors of these names and shapes, float32, the caller's own."""
    draw = _kept if sum(map(math.prod, shapes.values())) <= KEPT else recipe.tensor
    return {
        name: torch.from_numpy(draw(name, tuple(shape), seed).copy())
        for name, shape in shapes.items()
    }


def images(batch: int, height: int, width: int, seed: int) -> Tensor:
    """The golden recipe's images: (batch, 3, height, width) float32 in [0, 1]."""
    return torch.from_numpy(recipe.image(batch, height, width, seed))


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and decoded metadata of `tests/golden/<name>.safetensors`."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    return load_file(path), {key: json.loads(value) for key, value in meta.items()}


def filled(model: Model, seed: int) -> Model:
    """`model`, made on any device (meta: nothing to initialise), with the golden recipe's weights.

    A tokenizer in it keeps its own.
    """
    shapes = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if not name.startswith("tokenizer.")
    }
    model.load_state_dict(synthetic(shapes, seed), strict=False, assign=True)
    return model


def relative_error(found: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of `expected`, in float64 on the CPU.

    What is not finite agrees with nothing, and of no numbers the error is 0.
    """
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    found, expected = (tensor.detach().double().cpu() for tensor in (found, expected))
    assert found.isfinite().all()
    scale = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found - expected).norm() / scale)


def respell(name: str) -> str:
    """A published tensor name in the renamed spelling of the ViT blocks."""
    tree, found, block = name.partition(".encoder.layer.")
    if not found:
        return name
    layer, _, part = block.partition(".")
    module, _, leaf = part.rpartition(".")
    return f"{tree}.layers.{layer}.{RENAMED.get(module, module)}.{leaf}"


def write_checkpoint(
    folder: Path,
    name: str,
    *,
    backbone: Mapping[str, int] | str,
    num_sparse_tokens: int,
    num_decoder_layers: int = 6,
    spatial_temp: float | None = 0.06,
    seed: int = 0,
    spelling: Literal["published", "renamed"] = "published",
    pixel_head: bool = False,
    teacher: bool = False,
    prefix: str = "",
) -> Path:
    """Writes `<name>.safetensors` with the golden recipe's weights, and its entry in `config.json`.

    Args:
        folder: made if it is not there; models already in its `config.json` stay.
        backbone: a published name, or the fields of `BackboneConfig`.
        spelling: of the ViT blocks.
        prefix: put before every tensor name.

    Returns:
        `folder`.
    """
    geometry = BackboneConfig.resolve(backbone)
    config = ModelConfig(name, geometry, num_sparse_tokens, num_decoder_layers, spatial_temp)
    state = synthetic(published_shapes(config, pixel_head=pixel_head, teacher=teacher), seed)
    rename = respell if spelling == "renamed" else str
    folder.mkdir(parents=True, exist_ok=True)
    file = f"{name}.safetensors"
    save_file({prefix + rename(key): value for key, value in state.items()}, folder / file)

    index = folder / "config.json"
    models = json.loads(index.read_text())["models"] if index.exists() else {}
    models[name] = {
        "weights": file,
        "num_sparse_tokens": num_sparse_tokens,
        "num_decoder_layers": num_decoder_layers,
        "spatial_temp": spatial_temp,
        "backbone": backbone if isinstance(backbone, str) else dict(backbone),
    }
    index.write_text(json.dumps({"models": models}, indent=1))
    return folder


def write_vqgan(path: Path, seed: int) -> Path:
    """Writes the tokenizer's tensors: safetensors, or for any other suffix a torch pickle."""
    state = synthetic(vqgan_shapes(), seed)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path
