"""A tiny model with its images and truth, and a folder of result files to plant."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import results
from harness.budgets import Pool
from harness.workloads import pictures
from peers import models

from stellar_fast.config import BackboneConfig, ModelConfig

TINY = ModelConfig("tiny", BackboneConfig(64, 2, 2, 128, 16, 64), num_sparse_tokens=4)
PROCESSOR = {
    "name": "x", "family": "6", "model": "1", "threads": 2, "cores": 2, "bf16_matrix_units": False,
}  # fmt: skip
FACTS = {
    "name": "encode", "date": "2026-01-01", "time": "10:00:00", "commit": "abc",
    "versions": {"torch": "2", "triton": "3", "openvino": "3"}, "processor": PROCESSOR,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def subject(tmp_path_factory) -> models.Subject:
    return models.Subject(TINY, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pool(subject) -> Pool:
    plain = {precision: subject.eager(precision) for precision in ("fp32", "bf16")}
    reference = subject.reference("fp64")
    return Pool("tiny", pictures(5, 64, 0), subject.eager("fp64"), plain, reference)


@pytest.fixture(scope="session")
def entrants(subject, pool) -> list[models.Local]:
    names = ("reference fp32 eager", "engine fp32", "engine bf16")
    found = [models.local(subject, name, pool.images[:2]) for name in names]
    for entrant in found:
        entrant.encode(pool.images[:2])  # warm
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder in the place of `benchmarks/results`."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    results.RESULTS.mkdir(parents=True)
    return results.RESULTS


def consistent(row: dict) -> dict:
    """A row that has no figure where it says why, and a rate that is that of its time."""
    if results.problem(row):
        return {k: v for k, v in row.items() if k not in ("median", "images_per_second")}
    if {"images_per_second", "median"} <= set(row):
        return {**row, "images_per_second": row["batch"] / row["median"]}
    return row


@pytest.fixture
def plant(folder, monkeypatch) -> Callable[..., Path]:
    """Writes a result file of these rows."""
    from report import tables

    monkeypatch.setattr(tables, "ROOT", results.ROOT)

    def write(rows: list[dict], place: str = "cpu", **facts: object) -> Path:
        return results.write(place, {**FACTS, **facts}, map(consistent, rows))

    return write


@pytest.fixture
def spread() -> Callable[[float], dict]:
    """The timing of a row, ten per cent below and above."""
    return lambda s: {"median": s, "low": 0.9 * s, "high": 1.1 * s, "rounds": 5}


@pytest.fixture
def stored(plant, spread):
    def row(name: str, batch: int, seconds: float, **facts: object) -> dict:
        place = {"stage": "encode", "key": f"stellar-b16/b{batch}", "model": "stellar-b16"}
        rates = {"speedup": 0.2 * batch / seconds, "images_per_second": batch / seconds}
        own = {"name": name, "batch": batch, "precision": "fp32", "error": {"cls": 2e-6}}
        return {**place, **own, **spread(seconds), **rates, **facts}

    refused = {**row("OpenVINO fp32", 8, 1.0), "refused": "cls: error 2 exceeds 1"}
    absent = {**row("ONNX Runtime fp32", 1, 1.0), "not_run": "onnxruntime is not installed"}
    base = {"key": "k", "model": "stellar-b16", "name": "engine fp32", "median": 0.1}
    rows = [
        row("reference fp32 eager", 1, 0.2), row("engine fp32", 1, 0.1),
        row("OpenVINO fp32", 1, 0.4, prepare_seconds=5.4), row("reference fp32 eager", 8, 1.6),
        row("engine fp32", 8, 0.8), refused, absent,
        {**base, "stage": "latency", "p99": 0.13, "calls": 321},
        {**base, "stage": "footprint", "load_seconds": 1.25,
         "first_result_seconds": 2.5, "peak_mib": 900},
    ]  # fmt: skip
    plan = {"1": {"sets": 8, "rounds": 7}, "8": {"sets": 2, "rounds": 5}}
    facts = {"plan": plan, "load_average_before": [0.25, 0, 0]}
    plant(rows, **facts)
    plant(rows, **facts, commit="old", date="2025-01-01")
    return lambda **others: plant(rows, **facts, **others)


class FakeEvent:
    """An event of a device whose time, in ms, is what the test says."""

    now = 0.0

    def __init__(self, enable_timing: bool = True) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, stop: "FakeEvent") -> float:
        return stop.at - self.at


@pytest.fixture
def device(monkeypatch) -> SimpleNamespace:
    """What CUDA is asked for while something is timed; `event.now` is its clock, in ms."""
    import torch

    FakeEvent.now = 0.0
    fakes = {
        "Event": FakeEvent,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 150,
        "reset_peak_memory_stats": lambda: None,
        "get_device_properties": lambda _: SimpleNamespace(uuid="0-1"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return SimpleNamespace(event=FakeEvent)
