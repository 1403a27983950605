"""Benchmarks of single ops: right inputs, refusals, rivals, floors; the slow ones are caught."""

import contextlib
import json
import time
from typing import ClassVar

import compare
import harness
import op_race
import op_rivals
import pytest
import torch
from cases import cases
from gpu_ops import arguments, op_of, refusal, results
from stellar_fast.reference import ops as oracles

from stellar_fast import torch_ops
from stellar_fast.config import MODELS

CPU = torch.device("cpu")
ROUNDS = 5
FP8 = ["qkv", "proj", "fc1", "fc2", "attention", "quantize_rows"]


def case_of(name: str, precision: str = "fp32", model: str = "stellar-b8"):
    (case,) = (c for c in cases(MODELS[model], 1, precision) if c.name == name)
    return case


def raced(monkeypatch, name: str, change=None, compiles: bool = False) -> dict:
    """The row of a case whose op is `change(op)`."""
    case = case_of(name)
    if change is not None:
        op = getattr(torch_ops, op_of(case))
        monkeypatch.setattr(torch_ops, op_of(case), change(op))
    match = op_race.Race(case, CPU, compiles)
    for _ in range(ROUNDS if match.refused is None else 0):
        match.others()
        match.our_turn()
    return match.row()


def record(rows: list[dict]) -> op_race.Record:
    found = op_race.Record(CPU, {"product fp32": 1e11, "copy": 1e10})
    for row in rows:
        found.add(row)
    return found


@pytest.mark.parametrize("name", FP8)
def test_fp8_inputs_are_those_of_the_op(name):
    case = case_of(name, "fp8")
    oracle, inputs = getattr(oracles, op_of(case)), arguments(case, CPU, 0)
    assert refusal(case, oracle, inputs) is None

    def wrong(*values, **keywords):
        found = oracle(*values, **keywords)
        first = results(found)[0]
        first[:, -20:] = first[:, -20:].float().mul(1.5).to(first.dtype)  # a tile of rows
        return found

    reason = refusal(case, wrong, inputs)
    assert reason is not None and "exceeds its budget" in reason


def test_fp8_is_of_the_blocks_that_compute_in_it():
    found = {case.name: case.launches for case in cases(MODELS["stellar-h16"], 1, "fp8")}
    assert found == dict.fromkeys(FP8, 30) | {"quantize_rows": 60}


def test_a_row_has_ours_its_rivals_and_the_floor(monkeypatch):
    row = raced(monkeypatch, "attention")
    assert row["ours"] == "engine"
    assert {"eager", "sdpa flash", "sdpa math"} <= set(row)
    (found,) = record([row]).rows
    by_flops = found["flops"] / 1e11
    assert found["bound"] == "flops" and found["floor"] == pytest.approx(by_flops)
    assert found["of_floor"] == pytest.approx(by_flops / found["engine"]["median"])
    text = "\n".join(op_race.table([found], {"product fp32": 1e11, "copy": 1e10}))
    assert found["key"] in text and "eager" in text and "floor by flops" in text


def test_rivals_get_the_inputs_of_ours_in_turn(monkeypatch):
    seen = []

    def spy(name):
        def function(spatial, sparse):
            seen.append((name, spatial.data_ptr()))
            return oracles.reassemble(spatial, sparse)

        return function

    monkeypatch.setattr(torch_ops, "reassemble", spy("ours"))
    monkeypatch.setattr(op_race, "rivals", lambda *_: iter([("other", spy("other"))]))
    match = op_race.Race(case_of("reassemble"), CPU, compiles=False)
    seen.clear()
    for _ in range(4):
        match.others()
        match.our_turn()
    assert [name for name, _ in seen] == ["other", "ours"] * 4
    turns = [seen[i][1] for i in range(0, 8, 2)]
    assert turns == [seen[i][1] for i in range(1, 8, 2)]
    assert len(set(turns)) == 3 and turns[0] == turns[3]


def test_a_wrong_op_gets_no_figure(monkeypatch):
    def change(op):
        calls = iter(range(100))

        def wrong(*values, **keywords):
            found = op(*values, **keywords)
            if next(calls) == 1:  # on the second inputs alone
                found[..., 0] += 0.1
            return found

        return wrong

    row = raced(monkeypatch, "reassemble", change)
    assert row["refused"].startswith("inputs 1: result 0: error")
    assert "engine" not in row and "eager" not in row
    (line,) = list(op_race.table(record([row]).rows, {"copy": 1.0}))[1:]
    assert "refused" in line and "us" not in line.split("refused")[0].split("/")[-1]


def test_a_rival_that_cannot_run_says_why(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such backend\nand a trace")

    monkeypatch.setattr(op_race, "rivals", lambda *_: iter([("broken", broken)]))
    row = raced(monkeypatch, "norm")
    assert row["not_run"] == {"broken": "RuntimeError: no such backend"} and "broken" not in row


def test_a_lost_device_is_no_rival_that_cannot_run(monkeypatch):
    def broken(*_, **__):
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost():
        raise RuntimeError("CUDA error: all is lost")

    on_a_device(monkeypatch, case_of("norm"))
    monkeypatch.setattr(op_race, "ours", lambda *_: ("kernel", torch_ops.norm))
    monkeypatch.setattr(op_race, "rivals", lambda *_: iter([("broken", broken)]))
    with pytest.raises(RuntimeError, match="all is lost"):
        op_race.Race(case_of("norm"), CPU, compiles=False)


def test_torch_compile_takes_part_and_its_time_is_told(monkeypatch):
    row = raced(monkeypatch, "reassemble", compiles=True)
    assert op_rivals.COMPILED in row and row["compile_seconds"] > 0


def test_a_slowed_op_is_caught_by_the_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    before = record([raced(monkeypatch, "norm"), raced(monkeypatch, "reassemble")]).write()
    before = before.rename(tmp_path / "before.json")

    def change(op):
        def slowed(*values, **keywords):
            time.sleep(0.05)
            return op(*values, **keywords)

        return slowed

    after = record([raced(monkeypatch, "norm", change), raced(monkeypatch, "reassemble")]).write()
    lines, slower = compare.report(after, before)
    assert slower
    (line,) = (line for line in lines if "SLOWER" in line and "norm" in line)
    assert "stellar-b8 norm fp32" in line
    result = json.loads(after.read_text())
    result["rows"][1] = {**result["rows"][1], "refused": "wrong"}
    after.write_text(json.dumps(result))
    lines, slower = compare.report(after, before)
    assert slower and any("no figure now: wrong" in line for line in lines)


def test_every_kernel_file_has_its_benchmark():
    ops = {op_of(case) for precision in ("bf16", "fp8") for case in
           cases(MODELS["stellar-h16"], 1, precision)}  # fmt: skip
    found = set()
    for path in (harness.ROOT / "benchmarks").glob("test_*.py"):
        found |= {op for op in ops if f'"{op}"' in path.read_text()}
    from stellar_fast import kernels

    assert found == ops == set(kernels.__all__)


def test_without_a_gpu_the_kernels_are_skipped_with_a_reason(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(op_race, "precisions_of", lambda device: ("fp32",))
    _, found = op_race.parameters("norm", "quantize_rows")
    assert [p.id for p in found if not p.marks] == [
        *(f"{model}/b1/fp32/norm" for model in MODELS),
        "stellar-b16/b8/fp32/norm",
    ]
    (skipped,) = (p for p in found if p.marks)
    assert "CUDA device" in skipped.marks[0].kwargs["reason"]


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


class FakeEvent:
    now = 0.0  # milliseconds

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, stop):
        return stop.at - self.at


def on_a_device(monkeypatch, case) -> None:
    """Stand-ins for what needs a GPU; its cache holds two sets of the case's inputs."""
    properties = type("Properties", (), {"L2_cache_size": 2 * int(case.moved)})
    for name, fake in {
        "CUDAGraph": FakeGraph,
        "graph": fake_capture,
        "Event": FakeEvent,
        "synchronize": lambda: None,
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(op_race, "on_gpu", lambda device: True)


def test_graphs_run_over_all_sets_and_time_is_of_one_call(monkeypatch):
    """The way of a GPU, with stand-ins for what needs a device."""
    case = case_of("reassemble")
    seen = []

    def call(milliseconds):
        def function(spatial, sparse):
            def run():
                seen.append(spatial.data_ptr())
                FakeEvent.now += milliseconds

            run() if FakeGraph.capturing is None else FakeGraph.capturing.append(run)
            return oracles.reassemble(spatial, sparse)

        return function

    on_a_device(monkeypatch, case)
    monkeypatch.setattr(op_race, "ours", lambda *_: ("kernel", call(0.01)))
    monkeypatch.setattr(op_race, "rivals", lambda *_: iter([("eager", call(0.03))]))
    match = op_race.Race(case, CPU, compiles=False)
    seen.clear()
    match.others()
    rival = list(seen)
    assert len(set(rival)) == 4  # sets that are together twice the cache
    seen.clear()
    match.our_turn()
    # Repeated until a replay takes 200 us: 20 calls of 10 us, over 4 sets.
    assert len(seen) == 20 and seen == seen[:4] * 5
    match.others()
    match.our_turn()
    row = match.row()
    assert row["kernel"]["median"] == pytest.approx(1e-5)
    assert row["eager"]["median"] == pytest.approx(3e-5)
    assert row["gb_per_second"] == pytest.approx(case.moved / 1e-5 / 1e9)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_race_on_the_device(precision):
    for case in cases(MODELS["stellar-b16"], 1, precision):
        row = op_race.measure(case, 0.1, compiles=False)
        assert "refused" not in row
        assert 0 < row["kernel"]["median"] < 0.1 and "eager" in row
