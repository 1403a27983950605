"""Benchmarks of single ops: arithmetic, right inputs, refusals, rivals, floors."""

import contextlib
from typing import ClassVar

import pytest
import torch
from harness import floors
from harness.budgets import refusal_of_op, tensors_of
from harness.results import ROOT
from harness.workloads import arguments, cases, flops_per_image, op_of
from peers import ops

from stellar_fast.config import MODELS
from stellar_fast.engine import torch_ops
from stellar_fast.reference import ops as oracles

CPU = torch.device("cpu")
NAMES = ["qkv", "attention", "proj", "fc1", "fc2", "patch_embed", "norm", "spatial_map"]
FP8 = ["qkv", "proj", "fc1", "fc2", "attention", "quantize_rows"]
CASES = [(name, "fp16") for name in (*NAMES, "reassemble")] + [(name, "fp8") for name in FP8]


def case_of(name: str, precision: str = "fp32", model: str = "stellar-b8"):
    (case,) = (c for c in cases(MODELS[model], 1, precision) if c.name == name)
    return case


@pytest.mark.parametrize(
    ("model", "gflops"), [("stellar-b16", 38.35), ("stellar-l16", 133.9), ("stellar-h16", 357.0)]
)
def test_arithmetic_of_an_image(model, gflops):
    assert flops_per_image(MODELS[model]) / 1e9 == pytest.approx(gflops, rel=2e-3)


def test_floors():
    assert floors.floor(790e12, 1e9, 790e12, 4.3e12) == (1.0, "flops")
    assert floors.floor(1e12, 8.6e12, 790e12, 4.3e12) == (2.0, "bytes")
    (proj,) = (c for c in cases(MODELS["stellar-h16"], 64, "bf16") if c.name == "proj")
    rows = 64 * 273
    assert proj.flops == 2 * rows * 1280 * 1280
    assert proj.moved == 2 * (3 * rows * 1280 + 1280 * 1280 + 1280)
    found = {case.name: case.launches for case in cases(MODELS["stellar-h16"], 1, "fp8")}
    assert found == dict.fromkeys(FP8, 30) | {"quantize_rows": 60}


def test_a_row_of_ours_gets_its_floor_from_the_ceilings_of_the_run():
    row = {"name": "kernel", "precision": "fp8", "flops": 2e12, "bytes": 1e9, "median": 0.004}
    known = floors.rates([{"key": "fp8", "rate": 1e15}, {"key": "copy", "rate": 4e12}])
    found = floors.with_floor(row, known)
    assert (found["floor"], found["bound"]) == (pytest.approx(0.002), "flops")
    assert found["of_floor"] == pytest.approx(0.5) == found["of_ceiling"]
    found = floors.with_floor({**row, "bytes": 16e9, "median": 0.008}, known)
    assert (found["bound"], found["of_floor"]) == ("bytes", pytest.approx(0.5))
    for other in ({"name": "eager"}, {"precision": "bf16"}):
        assert "floor" not in floors.with_floor({**row, **other}, known)
    assert "floor" not in floors.with_floor({"name": "kernel", "refused": "x"}, known)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_wrong_op_is_refused_and_a_right_one_is_not(name, precision):
    case = case_of(name, precision)
    oracle, inputs = getattr(oracles, op_of(case)), arguments(case, CPU, 0)
    assert refusal_of_op(case, oracle, inputs) is None

    def wrong(*values, **keywords):
        found = oracle(*values, **keywords)
        first = tensors_of(found)[0]
        if precision == "fp8":
            first[:, -20:] = first[:, -20:].float().mul(1.5).to(first.dtype)  # a tile of rows
        else:
            first[..., -1] += 0.2
        return found

    reason = refusal_of_op(case, wrong, inputs)
    assert reason is not None and "exceeds its budget" in reason


def raced(monkeypatch, name: str, change=None, compiles: bool = False) -> dict[str, dict]:
    """The rows of a case whose op is `change(op)`."""
    case = case_of(name)
    if change is not None:
        monkeypatch.setattr(torch_ops, op_of(case), change(getattr(torch_ops, op_of(case))))
    rows = ops.Race(case, CPU, compiles).run(least=3).rows()
    return {row["name"]: row for row in rows}


def test_ours_and_its_rivals_have_a_row_each(monkeypatch):
    rows = raced(monkeypatch, "attention")
    assert next(iter(rows)) == "engine" and {"eager", "sdpa flash", "sdpa math"} <= set(rows)
    assert len({row["key"] for row in rows.values()}) == 1
    own = rows["engine"]
    assert own["tflops"] == pytest.approx(own["flops"] / own["median"] / 1e12)
    (line,) = ops.report(list(rows.values()))
    assert own["key"] in line and f"eager {rows['eager']['median'] / own['median']:.2f}x" in line


def test_rivals_get_the_inputs_of_ours_in_turn(monkeypatch):
    seen = []

    def spy(name):
        def function(spatial, sparse):
            seen.append((name, spatial.data_ptr()))
            return oracles.reassemble(spatial, sparse)

        return function

    monkeypatch.setattr(torch_ops, "reassemble", spy("ours"))
    race = ops.Race(case_of("reassemble"), CPU, False, others=[("other", spy("other"))])
    seen.clear()
    race.run(least=4)
    rounds = [dict(seen[i : i + 2]) for i in range(0, 8, 2)]
    assert all(found["ours"] == found["other"] for found in rounds)
    inputs = [found["ours"] for found in rounds]
    assert len(set(inputs)) == 3 and inputs[0] == inputs[3]


def test_a_wrong_op_gets_no_figure(monkeypatch):
    def change(op):
        calls = iter(range(100))

        def wrong(*values, **keywords):
            found = op(*values, **keywords)
            if next(calls) == 1:  # on the second inputs alone
                found[..., 0] += 0.1
            return found

        return wrong

    rows = raced(monkeypatch, "reassemble", change)
    assert list(rows) == ["engine"] and "median" not in rows["engine"]
    assert rows["engine"]["refused"].startswith("inputs 1: result 0: error")
    assert "refused" in next(ops.report(list(rows.values())))


def broken(*_, **__):
    raise RuntimeError("no such backend\nand a trace")


def test_a_rival_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(ops, "rivals", lambda *_: iter([("broken", broken)]))
    rows = raced(monkeypatch, "norm")
    assert rows["broken"]["not_run"] == "RuntimeError: no such backend" and len(rows) == 2


def test_torch_compile_takes_part_and_its_time_is_told(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    row = raced(monkeypatch, "reassemble", compiles=True)[ops.COMPILED]
    assert row["compile_seconds"] > 0 and row["compile_mode"] == ops.COMPILE_MODE


def test_every_kernel_has_its_benchmark_and_every_op_its_points():
    wanted = {
        op_of(case)
        for precision in ("bf16", "fp8")
        for case in cases(MODELS["stellar-h16"], 1, precision)
    }
    files = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("test_*.py"))
    from stellar_fast import kernels

    assert {op for op in wanted if f'"{op}"' in files} == wanted == set(kernels.__all__)
    found = list(ops.points(CPU))
    assert {case.model for case, _ in found} == set(MODELS)
    assert {case.batch for case, compiles in found if compiles} == {8}


class FakeGraph:
    """Keeps what is called while it is captured, and calls it again at each replay."""

    capturing: ClassVar[list | None] = None

    def replay(self):
        for call in self.captured:
            call()


@contextlib.contextmanager
def fake_capture(graph):
    graph.captured = FakeGraph.capturing = []
    yield
    FakeGraph.capturing = None


@pytest.fixture
def graphs(monkeypatch, device):
    """A device with graphs; its cache holds two sets of the inputs."""
    properties = type("Properties", (), {"L2_cache_size": 2 * int(case_of("reassemble").moved)})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(ops, "has_graphs", lambda _: True)
    return device


def test_graphs_run_over_all_sets_and_time_is_of_one_call(monkeypatch, graphs):
    case, seen = case_of("reassemble"), []

    def call(name, milliseconds):
        def function(spatial, sparse):
            def run():
                seen.append((name, spatial.data_ptr()))
                graphs.event.now += milliseconds

            run() if FakeGraph.capturing is None else FakeGraph.capturing.append(run)
            return oracles.reassemble(spatial, sparse)

        return function

    monkeypatch.setattr(ops, "ours", lambda *_: ("kernel", call("kernel", 0.01)))
    race = ops.Race(case, CPU, False, others=[("eager", call("eager", 0.03))])
    seen.clear()
    own, eager = race.run(least=2).rows()
    calls = [pointer for name, pointer in seen if name == "kernel"]
    # Sets that are together twice the cache, repeated until a replay takes 200 us: 20 calls of 10.
    assert len(set(calls)) == 4 and len(calls) == 40 and calls == calls[:4] * 10
    assert (own["median"], eager["median"]) == (pytest.approx(1e-5), pytest.approx(3e-5))
    assert own["gb_per_second"] == pytest.approx(case.moved / 1e-5 / 1e9)


def test_a_lost_device_is_no_rival_that_cannot_run(monkeypatch, graphs):
    def lost():
        raise RuntimeError("CUDA error: all is lost")

    def breaks(*_, **__):
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ops, "ours", lambda *_: ("kernel", torch_ops.norm))
    with pytest.raises(RuntimeError, match="all is lost"):
        ops.Race(case_of("norm"), CPU, False, others=[("breaks", breaks)])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_race_on_the_device(precision):
    for case in cases(MODELS["stellar-b16"], 1, precision):
        own, *rivals = ops.Race(case, torch.device("cuda"), False).run(0.1).rows()
        assert "refused" not in own and 0 < own["median"] < 0.1
        assert "eager" in {row["name"] for row in rivals}
