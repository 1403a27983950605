"""`encode` end to end on a GPU: the engine beside plain PyTorch and transformers' ViT, in turns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import ceilings
import gpu_encode
import gpu_subjects
import harness
import pytest
import torch
from gpu_parts import has_fp8

from stellar_fast.config import MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
BATCHES = (1, 8, 64)
AGAINST = {"bf16": ("eager_fp32", "eager_bf16", "vit_bf16"), "fp8": ("eager_fp32",)}


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    rates = {name: ceilings.measure(name) for name in ("bf16", *(("fp8",) if has_fp8() else ()))}
    yield found
    if not found:
        return
    name = torch.cuda.get_device_name()
    path = harness.write_result(
        harness.folder_of(name), "encode", found, processor={"name": name}, ceilings=rates
    )
    harness.SUMMARY.append(f"\nencode on {name} -> {path.name}")
    harness.SUMMARY.extend(_line(row, rates) for row in found)


def _line(row: dict[str, Any], rates: dict[str, dict[str, Any]]) -> str:
    label = f"  {row['model']} {row['precision']}, batch {row['batch']}"
    if "refused" in row:
        return f"{label}: refused: {row['refused']}"
    ours = row["engine"]
    used = row["tflops"] / rates[row["precision"]]["tflops"]
    others = ", ".join(
        f"{name} {row[name]['median'] / ours['median']:.2f}x"
        for name in AGAINST[row["precision"]]
        if name in row
    )
    missing = "".join(f"; {name}: {why}" for name, why in row.get("not_run", {}).items())
    return (
        f"{label}: {ours['images_per_second']:.0f} images/s, {used:.0%} of the matrix ceiling; "
        f"{others}{missing}"
    )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("model", MODELS)
def test_encode_on_a_gpu(model, precision, batch, benchmark, rows):
    """No figure outside the error budget."""
    if precision == "fp8" and not has_fp8():
        pytest.skip("this GPU has no FP8")
    against = AGAINST[precision] if model == "stellar-b16" else AGAINST[precision][:2]
    row = gpu_encode.throughput(model, batch, precision, against=against)
    rows.append(row)
    assert "refused" not in row
    engine = gpu_subjects.engines(model, precision).engine
    sets = itertools.cycle(gpu_subjects.inputs(batch))

    def call() -> None:
        engine.encode(next(sets), check_range=False)
        torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20, warmup_rounds=2, iterations=1)
    benchmark.extra_info["row"] = row
