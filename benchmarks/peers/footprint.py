"""What one implementation takes to load, and at its peak, in a process that does nothing else.

    python -P benchmarks/peers/footprint.py engine-fp32 FOLDER stellar-b16 8 224

prints one line of JSON. FOLDER holds `config.json` and a weights file; `write_checkpoint` makes it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import stellar_fast
from stellar_fast.config import ModelConfig
from stellar_fast.loading import SYNTHETIC_SEED
from stellar_fast.reference import STELLARModel
from stellar_fast.weights.manifest import write_config
from stellar_fast.weights.names import encode_shapes
from stellar_fast.weights.source import locate
from stellar_fast.weights.synthetic import synthetic_state

WEIGHTS = "weights.safetensors"
NAMES = ("engine-auto", "engine-fp32", "engine-bf16", "reference-fp32")
Encode = Callable[[Tensor], object]


def synthetic(config: ModelConfig) -> dict[str, Tensor]:
    """The weights that `stellar_fast.load` draws for `weights="synthetic"`."""
    return dict(synthetic_state(encode_shapes(config), SYNTHETIC_SEED))


def plain_model(config: ModelConfig, state: dict[str, Tensor]) -> STELLARModel:
    """The published model in plain PyTorch, float32, to encode with."""
    model = STELLARModel(
        num_sparse_tokens=config.num_sparse_tokens,
        spatial_temp=config.spatial_temp,
        vit_pretrained=config.backbone,
        do_recon=False,
        do_clustering=False,
    )
    model.load_state_dict(state, strict=False)
    return model.eval().requires_grad_(False)


def write_checkpoint(config: ModelConfig, folder: Path) -> None:
    """`config.json`, and a file of the encoder's seeded random weights."""
    write_config(folder, config, WEIGHTS)
    save_file(synthetic(config), folder / WEIGHTS)


def _load(name: str, folder: Path, model: str) -> Encode:
    kind, precision = name.split("-")
    if kind == "engine":
        return stellar_fast.load(model, repo=folder, device="cpu", precision=precision).encode
    located = locate(model, repo=folder)
    plain = plain_model(located.config, load_file(located.weights))
    return torch.no_grad()(plain.encode)


def _peak() -> int:
    """The most memory this program has had resident, in MiB.

    Linux's own count: `ru_maxrss` goes on from that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


def measure(name: str, folder: Path, model: str, batch: int, side: int) -> dict[str, object]:
    before = _peak()
    start = time.perf_counter()
    encode = _load(name, folder, model)
    seconds = time.perf_counter() - start
    loaded = _peak()
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    encode(images[:1])
    first = time.time() - psutil.Process().create_time()
    encode(images)
    return {
        "stage": "footprint",
        "key": f"{model}/b{batch}",
        "model": model,
        "name": name.replace("-", " "),
        "batch": batch,
        "load_seconds": seconds,
        "first_result_seconds": first,  # of one image, from the start of the process
        "imported_mib": before,
        "loaded_mib": loaded,
        "peak_mib": _peak(),
    }


def measure_all(
    config: ModelConfig, folder: Path, batch: int, side: int = 224
) -> list[dict[str, object]]:
    """Each of NAMES in a new process, on one checkpoint, which is warm in the page cache."""
    write_checkpoint(config, folder)
    found = []
    for name in NAMES:
        numbers = (str(batch), str(side))
        command = [sys.executable, "-P", __file__, name, str(folder), config.name, *numbers]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return found


if __name__ == "__main__":
    name, folder, model, *numbers = sys.argv[1:]
    print(json.dumps(measure(name, Path(folder), model, *map(int, numbers))))
