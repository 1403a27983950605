"""`encode` end to end on the CPU: the engine, the eager reference, and OpenVINO, in one run."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import harness
import pytest
import torch
from stellar_fast.reference.model import STELLARModel
from torch import Tensor

import stellar_fast
from stellar_fast.config import MODELS
from stellar_fast.encoder import OUTPUTS
from stellar_fast.loading import SYNTHETIC_SEED
from stellar_fast.names import encode_shapes
from stellar_fast.synthetic import synthetic_state

MODEL = "stellar-b16"
BATCH = 8
ROUNDS = 9


@functools.cache
def reference(dtype: torch.dtype) -> STELLARModel:
    config = MODELS[MODEL]
    model = STELLARModel(
        num_sparse_tokens=config.num_sparse_tokens,
        spatial_temp=config.spatial_temp,
        vit_pretrained=config.backbone,
        do_recon=False,
        do_clustering=False,
    )
    model.load_state_dict(
        dict(synthetic_state(encode_shapes(config), SYNTHETIC_SEED)), strict=False
    )
    return model.to(dtype).eval()


def eager(dtype: torch.dtype, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return reference(dtype).encode(images)


class _Tuple(torch.nn.Module):
    """The reference with its outputs as a tuple, which model converters want."""

    def __init__(self, model: STELLARModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out = self.model.encode(images)
        return tuple(out[name] for name in OUTPUTS)


@functools.cache
def _openvino(precision: str) -> Callable[[Tensor], dict[str, Tensor]]:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed (extra `peers`)")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        example = torch.zeros(BATCH, 3, 224, 224)
        model = openvino.convert_model(_Tuple(reference(torch.float32)), example_input=example)
    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", hints)

    def encode(images: Tensor) -> dict[str, Tensor]:
        found = compiled(images.numpy())
        return {name: torch.from_numpy(found[index]) for index, name in enumerate(OUTPUTS)}

    return encode


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth pictures with noise: zeros would flatter every implementation."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(BATCH, 3, 14, 14, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=224, mode="bilinear")
    noise = torch.rand(BATCH, 3, 224, 224, generator=generator)
    return (0.8 * smooth + 0.2 * noise).clamp(0, 1)


@pytest.mark.timeout(1800)
def test_encode_batch_8(benchmark, images):
    """The engine's precisions against fp32 eager, plain bf16 eager and OpenVINO, alternated."""
    engines = {
        precision: stellar_fast.load(
            MODEL, device="cpu", precision=precision, weights="synthetic", max_batch=BATCH
        )
        for precision in ("fp32", "bf16")
    }
    exact = eager(torch.float64, images)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        plain = eager(dtype, images)
        harness.within_budget(engines[precision].encode(images), plain, exact)
    reference.cache_clear()

    functions: dict[str, Callable[[], object]] = {
        "reference fp32 eager": lambda: eager(torch.float32, images),
        "reference bf16 eager": lambda: eager(torch.bfloat16, images),
        "engine fp32": lambda: engines["fp32"].encode(images),
        "engine bf16": lambda: engines["bf16"].encode(images),
    }
    try:
        peers = {precision: _openvino(precision) for precision in ("f32", "bf16")}
    except pytest.skip.Exception as reason:
        print(f"\nwithout OpenVINO: {reason}")
    else:
        harness.within_budget(peers["f32"](images), eager(torch.float32, images), exact)
        functions["OpenVINO fp32"] = lambda: peers["f32"](images)
        functions["OpenVINO bf16"] = lambda: peers["bf16"](images)

    measured = functions.pop("engine fp32")
    others = harness.Alternation(functions)
    benchmark.pedantic(measured, setup=others.round, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    timings = others.timings()
    timings["engine fp32"] = harness.Timing.of(benchmark.stats.stats.data)

    base = timings["reference fp32 eager"].median
    rows = [
        harness.row(
            timing, BATCH, name=name, model=MODEL, batch=BATCH, speedup=base / timing.median
        )
        for name, timing in timings.items()
    ]
    benchmark.extra_info["rows"] = rows
    path = harness.write_result(
        "cpu", "encode", rows, processor=harness.processor(), baseline="reference fp32 eager"
    )
    print(f"\n{MODEL}, batch {BATCH}, {torch.get_num_threads()} threads -> {path.name}")
    for line in sorted(rows, key=lambda line: line["median"]):
        print(
            f"  {line['name']:22} {line['images_per_second']:7.2f} img/s "
            f"{line['speedup']:6.2f}x  ({line['low']:.3f}-{line['high']:.3f} s a batch)"
        )
