"""What the GPU command measures end to end, run on a CPU with a tiny model under CUDA's names."""

import json
import time
from types import SimpleNamespace

import gpu_encode
import gpu_energy
import gpu_parts
import gpu_subjects
import gpu_waterfall
import pytest
import test_encode_gpu
import torch
from gpu_timing import time_in_turn

from stellar_fast.config import MODELS, BackboneConfig, ModelConfig
from stellar_fast.engine import Engine

TINY = ModelConfig("tiny", BackboneConfig(64, 3, 2, 128, 16, 64), num_sparse_tokens=4)


class HostEvent:
    def __init__(self, enable_timing=True):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, stop):
        return 1e3 * (stop.at - self.at)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The CPU under the names that CUDA has."""
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(gpu_encode, "LATENCY_CALLS", 20)
    monkeypatch.setattr(gpu_encode, "COMPILE_SECONDS", 0)
    monkeypatch.setattr(gpu_waterfall, "SECONDS", 0)
    monkeypatch.setattr(gpu_encode, "ENERGY_SECONDS", 0.05)
    for module in (gpu_encode, gpu_subjects):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    for name in ("engines", "reference", "truth"):
        kept = gpu_subjects.Kept(getattr(gpu_subjects, name)._make)
        monkeypatch.setattr(gpu_subjects, name, kept)
        for module in (gpu_encode, gpu_waterfall):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, kept)
    fakes = {
        "Event": HostEvent,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 150,
        "reset_peak_memory_stats": lambda: None,
        "get_device_properties": lambda _: SimpleNamespace(uuid="0-1"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


class Library:
    """NVML with a counter that goes up by 500 mJ a reading."""

    def __init__(self, status=0):
        self.status, self.readings, self.name = status, 0, b""

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        self.name = name.value
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, found):
        self.readings += 1
        found._obj.value = 500 * self.readings
        return self.status


def test_energy_is_a_difference_of_the_drivers_counter():
    library = Library()
    meter = gpu_energy.EnergyMeter("12-34", library)
    assert library.name == b"GPU-12-34" and meter.joules() == 1.0
    ticks = iter(range(100))
    calls = []
    joules = gpu_energy.joules_per_call(
        meter, lambda: calls.append(1), lambda: None, 5, lambda: next(ticks)
    )
    assert len(calls) == 4 and joules == pytest.approx(0.5 / 4)
    with pytest.raises(OSError, match="NVML error 3"):
        gpu_energy.EnergyMeter("12-34", Library(3))


def test_without_a_driver_the_energy_is_not_reported():
    row = gpu_encode.throughput("tiny", 1, "fp32", side=64, seconds=0, closely=True)
    assert row["energy"].startswith("not reported: ") and "joules_per_image" not in row


def test_a_row_has_everything(monkeypatch):
    meter = gpu_energy.EnergyMeter("0-1", Library())
    monkeypatch.setattr(gpu_encode, "EnergyMeter", lambda uuid: meter)
    rivals = ("eager_fp32", "eager_bf16")
    row = gpu_encode.throughput("tiny", 1, "bf16", side=64, against=rivals, seconds=0, closely=True)
    for name in ("engine", *rivals):
        assert row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert row[name]["images_per_second"] == pytest.approx(1 / row[name]["median"])
    assert row["tflops"] == pytest.approx(row["flops"] / row["engine"]["median"] / 1e12)
    assert 0 < row["latency_median"] <= row["latency_p99"] and row["latency_calls"] == 20
    assert row["joules_per_image"] > 0
    assert row["peak_bytes"] == 50 and not row["cuda_graphs"]
    assert row["load_seconds"] > 0 < row["first_call_seconds"]
    weights = 2 * (3 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 64 * 64 + 3 * 64 * 256)
    assert weights < row["bytes"] - 3 * 64**2 < 1.5 * weights
    json.dumps(row)


def test_flops_follow_the_image_size():
    engine = gpu_subjects.engines("tiny", "fp32").engine
    facts = [gpu_subjects.facts("tiny", 2, "fp32", side, engine) for side in (64, 128)]
    assert 3 < facts[1]["flops"] / facts[0]["flops"] < 5
    one = gpu_subjects.facts("tiny", 1, "fp32", 64, engine)
    assert facts[0]["flops"] == 2 * one["flops"]


def test_a_wrong_engine_gets_no_figure(monkeypatch):
    encode = Engine.encode

    def wrong(self, images, **options):
        out = encode(self, images, **options)
        out["spatial"] = out["spatial"].roll(1, -1)
        return out

    monkeypatch.setattr(Engine, "encode", wrong)
    row = gpu_encode.throughput("tiny", 8, "bf16", side=64, seconds=0)
    assert "spatial: error" in row["refused"] and "engine" not in row and "tflops" not in row
    row = gpu_encode.compiled("tiny", 2, ("bf16",))
    assert row["refused"].startswith("bf16: spatial") and "compile" not in row


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more")


@pytest.mark.parametrize("when", ["made", "warmed up", "timed"])
def test_a_rival_that_runs_out_of_memory_costs_no_one_elses_figure(monkeypatch, when):
    calls = iter(range(10**6))

    def late():
        if when == "warmed up" or next(calls) >= 4:
            out_of_memory()

    def eager(model, dtype, sets):
        if dtype == torch.float32:
            return out_of_memory() if when == "made" else [late]
        return [lambda: None]

    monkeypatch.setattr(gpu_subjects, "_eager", eager)
    rivals = ("eager_fp32", "eager_bf16")
    row = gpu_encode.throughput("tiny", 1, "bf16", side=64, against=rivals, seconds=0, least=6)
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"
    assert row["not_run"] == {"eager_fp32": reason} and "eager_fp32" not in row
    assert row["engine"]["rounds"] == row["eager_bf16"]["rounds"] == 6


def test_an_engine_that_fails_has_a_failed_row():
    with pytest.raises(RuntimeError, match=r"engine: .*out of memory"):
        gpu_encode.in_turn({"engine": [out_of_memory]}, {}, 1, seconds=0)


def test_a_lost_device_is_no_rivals_fault():
    ran = []

    def lost():
        ran.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    not_run: dict[str, str] = {}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        time_in_turn(
            {"a": [lambda: None], "b": [lost]}, seconds=0, not_run=not_run, event=HostEvent,
            synchronize=lambda: lost() if ran else None,
        )  # fmt: skip
    assert not not_run


def test_the_compiler_is_timed_beside_ours_and_may_fail(monkeypatch):
    def compiled_calls(model, sets):
        assert len(sets) == gpu_subjects.SETS
        return [lambda: time.sleep(0.05)]

    monkeypatch.setattr(gpu_encode, "compiled_calls", compiled_calls)
    row = gpu_encode.compiled("tiny", 2, ("bf16", "fp32"))
    assert {"engine_bf16", "engine_fp32", "compile"} <= set(row)
    assert row["compile"]["median"] >= 0.05 <= row["compile_seconds"]
    assert row["compile_mode"] == "max-autotune"

    def fails(model, sets):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu_encode, "compiled_calls", fails)
    row = gpu_encode.compiled("tiny", 2, ("bf16",))
    assert row["not_run"] == {"compile": "RuntimeError: no compiler"} and "engine_bf16" in row


def test_transformers_vit_takes_the_same_pixels(monkeypatch):
    pytest.importorskip("transformers")
    sets = gpu_subjects.inputs(2, 64)
    calls = gpu_subjects.rivals("tiny", sets, ["vit_bf16"])["vit_bf16"]()
    assert len(calls) == gpu_subjects.SETS
    assert calls[0]().shape == (2, 17, 64) and calls[0]().dtype == torch.bfloat16


def test_the_waterfall_times_the_whole_and_what_lacks_something(monkeypatch):
    from switches import SWITCHES

    monkeypatch.setattr(gpu_waterfall, "inputs", lambda batch: gpu_subjects.inputs(batch, 64))
    for name in ("wanted rows", "flash attention", "spatial map"):
        (switch,) = (s for s in SWITCHES if s.name == name)
        row = gpu_waterfall.measure("tiny", 2, "fp32", switch)
        assert row["ratio"] == row["without"]["median"] / row["full"]["median"]
        assert row["switch"] == name and "refused" not in row
    keys = [key for key, _ in gpu_waterfall.jobs(("bf16", "fp8"))]
    assert keys[0].startswith("stellar-h16/b64/bf16/") and len(set(keys)) == len(keys)
    assert "stellar-h16/b1/fp8/fp8" in keys and "stellar-h16/b1/bf16/fp8" not in keys


def test_rows_of_encode_and_compile_lead_to_the_functions(monkeypatch):
    monkeypatch.setattr(gpu_parts, "has_fp8", lambda: True)
    seen = []
    for name in ("throughput", "compiled"):
        monkeypatch.setattr(
            gpu_encode, name, lambda *a, name=name, **k: seen.append((name, a, k)) or {}
        )
    for part in ("encode", "compile", "sweep", "curves"):
        for job in gpu_parts.jobs(part):
            job.run()
    assert (
        "throughput",
        ("stellar-h16", 64, "fp8"),
        {"against": ("eager_fp32",), "closely": True},
    ) in seen
    assert ("compiled", ("stellar-h16", 64, ("bf16", "fp8")), {}) in seen
    swept = {(a[0], a[1], a[2]) for n, a, k in seen if k.get("least") == 4}
    assert len(swept) == 5 * 10 * 4
    assert {k["side"] for n, a, k in seen if "side" in k} == {224, 384, 512}


def test_the_terminal_has_a_line_for_a_row(monkeypatch):
    row = gpu_encode.throughput("tiny", 3, "fp32", against=("eager_fp32",))
    monkeypatch.setitem(test_encode_gpu.AGAINST, "fp32", ("eager_fp32", "vit_bf16"))
    row["not_run"] = {"vit_bf16": "transformers is not installed"}
    rates = {"fp32": {"tflops": 4 * row["tflops"]}}
    line = test_encode_gpu._line(row, rates)
    ratio = row["eager_fp32"]["median"] / row["engine"]["median"]
    rate = 3 / row["engine"]["median"]
    assert line == (
        f"  tiny fp32, batch 3: {rate:.0f} images/s, 25% of the matrix ceiling; eager_fp32 "
        f"{ratio:.2f}x; vit_bf16: transformers is not installed"
    )
    refused = {"model": "m", "precision": "fp8", "batch": 1, "refused": "exceeds its budget"}
    line = test_encode_gpu._line(refused, rates)
    assert line == "  m fp8, batch 1: refused: exceeds its budget"
