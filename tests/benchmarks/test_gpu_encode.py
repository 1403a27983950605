"""What the GPU command measures end to end, run on a CPU with a tiny model under CUDA's names."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from gpu import encode, stages, subjects, waterfall
from gpu.switches import SWITCHES
from harness.results import COMPILED_BF16, EAGER_BF16, EAGER_FP32, VIT_BF16

from stellar_fast.config import MODELS
from stellar_fast.engine import backends
from stellar_fast.engine.engine import Engine


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, device, tiny):
    """The CPU under the names that CUDA has; nothing is kept from another test."""
    monkeypatch.setitem(MODELS, "tiny", tiny)
    monkeypatch.setattr(backends, "has_openvino", lambda: False)  # nor has a GPU
    for name, value in (("LATENCY_CALLS", 20), ("COMPILE_SECONDS", 0), ("ENERGY_SECONDS", 0.05)):
        monkeypatch.setattr(encode, name, value)
    monkeypatch.setattr(waterfall, "SECONDS", 0)
    for module in (encode, subjects):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    for name in ("engines", "reference", "truth"):
        kept = subjects.Kept(getattr(subjects, name)._make)
        for module in (subjects, encode, waterfall):
            monkeypatch.setattr(module, name, kept, raising=False)


def named(rows: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in rows}


def plant_nvml(monkeypatch, **others) -> list[str]:
    """NVML with a counter that goes up by 500 mJ a reading."""
    asked: list[str] = []
    readings = iter(range(0, 10**6, 500))
    fakes = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": asked.append,
        "nvmlDeviceGetTotalEnergyConsumption": lambda device: next(readings),
    }
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**fakes | others))
    return asked


def test_a_row_has_everything(monkeypatch):
    asked = plant_nvml(monkeypatch)
    against = (EAGER_FP32, EAGER_BF16)
    rows = encode.throughput(
        "tiny", 1, "bf16", side=64, against=against, seconds=0, closely=True
    )  # fmt: skip
    assert [row["name"] for row in rows] == ["engine bf16", *against]
    for row in rows:
        assert row["low"] <= row["median"] <= row["high"] and row["rounds"] == 5
        assert row["images_per_second"] == pytest.approx(1 / row["median"])
    row = rows[0]
    assert row["tflops"] == pytest.approx(row["flops"] / row["median"] / 1e12)
    assert 0 < row["latency_median"] <= row["latency_p99"] and row["latency_calls"] == 20
    assert row["joules_per_image"] > 0 and asked == ["GPU-0-1"]
    assert row["peak_bytes"] == 50 and not row["cuda_graphs"]
    assert row["load_seconds"] > 0 < row["first_call_seconds"]
    weights = 2 * (2 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 64 * 64 + 3 * 64 * 256)
    assert weights < row["bytes"] - 3 * 64**2 < 1.5 * weights
    json.dumps(rows)


def test_energy_is_a_difference_of_the_drivers_counter(monkeypatch):
    plant_nvml(monkeypatch)
    ticks = iter(range(100))
    monkeypatch.setattr(encode.time, "perf_counter", lambda: next(ticks) * 0.02)
    calls = []
    row = encode.energy(lambda: calls.append(1), batch=2)
    # The counter is read before and after: 500 mJ for all of the calls.
    assert len(calls) == 16 and row["joules_per_image"] == pytest.approx(0.5 / 16 / 2)


def test_energy_that_is_not_reported_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert encode.energy(lambda: None, 1)["energy"].startswith("not reported: nvidia-ml-py is not")

    def refuses(device):
        raise OSError("Not Supported")

    plant_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=refuses)
    assert encode.energy(lambda: None, 1)["energy"] == "not reported: OSError: Not Supported"


def test_flops_follow_the_image_size():
    engine = subjects.engines("tiny", "fp32").engine
    large, small, one = (
        subjects.facts("tiny", batch, "fp32", side, engine)["flops"]
        for batch, side in ((2, 128), (2, 64), (1, 64))
    )
    assert 3 < large / small < 5 and small == 2 * one


def test_a_wrong_engine_gets_no_figure(monkeypatch):
    original = Engine.encode

    def wrong(self, images, **options):
        out = original(self, images, **options)
        out["spatial"] = out["spatial"].roll(1, -1)
        return out

    monkeypatch.setattr(Engine, "encode", wrong)
    (row,) = encode.throughput("tiny", 8, "bf16", side=64, seconds=0)
    assert "spatial: error" in row["refused"] and "median" not in row and "tflops" not in row
    (row,) = encode.compiled("tiny", 2, ("bf16",))
    assert row["refused"].startswith("spatial") and row["name"] == "engine bf16"
    switch = SWITCHES[0]
    monkeypatch.setattr(waterfall, "inputs", lambda batch: subjects.inputs(batch, 64))
    (row,) = waterfall.measure("tiny", 2, "bf16", switch)
    assert row["refused"].startswith("spatial") and row["switch"] == switch.name


@pytest.mark.parametrize("when", ["made", "timed"])
def test_a_rival_that_runs_out_of_memory_costs_no_one_elses_figure(monkeypatch, when):
    calls = iter(range(10**6))

    def out_of_memory():
        if when == "made" or next(calls) >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more")

    def eager(model, dtype, sets):
        if dtype == torch.float32 and when == "made":
            out_of_memory()
        return [out_of_memory if dtype == torch.float32 else lambda: None]

    monkeypatch.setattr(subjects, "_eager", eager)
    rivals = (EAGER_FP32, EAGER_BF16)
    rows = encode.throughput("tiny", 1, "bf16", side=64, against=rivals, seconds=0, least=6)
    found = named(rows)
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"
    assert found[EAGER_FP32]["not_run"] == reason and "median" not in found[EAGER_FP32]
    assert found["engine bf16"]["rounds"] == found[EAGER_BF16]["rounds"] == 6


def test_the_compiler_is_timed_beside_ours_and_may_fail(monkeypatch):
    def compiled_calls(model, sets):
        assert len(sets) == subjects.SETS
        return [lambda: time.sleep(0.05)]

    monkeypatch.setattr(encode, "compiled_calls", compiled_calls)
    found = named(encode.compiled("tiny", 2, ("bf16", "fp32")))
    assert set(found) == {"engine bf16", "engine fp32", COMPILED_BF16}
    assert found[COMPILED_BF16]["median"] >= 0.05 <= found[COMPILED_BF16]["compile_seconds"]

    def fails(model, sets):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(encode, "compiled_calls", fails)
    found = named(encode.compiled("tiny", 2, ("bf16",)))
    assert found[COMPILED_BF16]["not_run"] == "RuntimeError: no compiler"
    assert "median" in found["engine bf16"]


def test_transformers_vit_takes_the_same_pixels():
    pytest.importorskip("transformers")
    sets = subjects.inputs(2, 64)
    calls = subjects.rivals("tiny", sets, [VIT_BF16])[VIT_BF16]()
    assert len(calls) == subjects.SETS
    assert calls[0]().shape == (2, 17, 64) and calls[0]().dtype == torch.bfloat16


def test_the_waterfall_times_the_whole_and_what_lacks_something(monkeypatch):
    monkeypatch.setattr(waterfall, "inputs", lambda batch: subjects.inputs(batch, 64))
    for name in ("wanted rows", "flash attention"):
        (switch,) = (s for s in SWITCHES if s.name == name)
        full, without = waterfall.measure("tiny", 2, "fp32", switch)
        assert (full["name"], without["name"]) == ("engine", "engine without")
        assert full["switch"] == without["switch"] == name and without["median"] > 0
    keys = [key for key, _ in waterfall.jobs(("bf16", "fp8"))]
    assert keys[0].startswith("stellar-h16/b64/bf16/") and len(set(keys)) == len(keys)
    assert "stellar-h16/b1/fp8/fp8" in keys and "stellar-h16/b1/bf16/fp8" not in keys


def test_the_points_of_the_goals_are_measured(monkeypatch):
    monkeypatch.setattr(stages, "has_fp8", lambda: True)
    seen = []
    for name in ("throughput", "compiled"):
        record = lambda *a, name=name, **k: seen.append((name, a, k))  # noqa: E731
        monkeypatch.setattr(encode, name, record)
    for stage in ("encode", "compile", "compilers", "sweep", "curves"):
        for job in stages.jobs(stage):
            job.run()
    options = {"against": [EAGER_FP32], "closely": True}
    assert ("throughput", ("stellar-h16", 64, "fp8"), options) in seen
    assert ("compiled", ("stellar-h16", 64, ("bf16", "fp8")), {}) in seen
    assert len({a for n, a, k in seen if k.get("least") == 4}) == 5 * 10 * 4
    assert {k["side"] for n, a, k in seen if "side" in k} == {224, 384, 512}
