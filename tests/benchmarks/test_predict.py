"""Predicted times: what machine code is read as, the work of a launch, and the arithmetic."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from audit import machine_code, predict
from audit import run as audit
from audit.compilation import Compilation, Finding
from audit.machine_code import Anatomy, Instruction
from audit.waits import Waits
from harness.results import read
from harness.workloads import flops_per_image

from stellar_fast.config import MODELS

CHIP = predict.Chip("chip", 10, 1000, 1e9, matrix=8e12, copy=1e12, trip=1e-6, source="a test")
ANATOMY = Anatomy(100, 1000, False, {"HGMMA": 4})
FINDING = Finding(128, 0, 0, 0, 1, ("HGMMA",), (), ANATOMY, Waits(0, 0, 0, None, None))
WORK = predict.Work(tiles=20, passes=10, products=0.0, read=0.0, flops=0.0, moved=0.0)


def code(*names: str) -> list[Instruction]:
    """Instructions at addresses 0, 16, …; "BRA:3" branches to the one numbered 3."""
    found = []
    for index, name in enumerate(names):
        kind, _, target = name.partition(":")
        found.append(Instruction(16 * index, kind, 16 * int(target) if target else None))
    return found


def seconds(work: predict.Work, finding: Finding = FINDING, warps: int = 4, **changes) -> float:
    fp8 = changes.pop("fp8", False)
    return predict.predict(work, finding, warps, fp8, replace(CHIP, **changes), 1e9).seconds


def test_listings_are_read():
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA 0x30 ;
        /*0020*/              @!P1 HMMA.16816.F32 R4, R2, R3, R4 ;
        /*0030*/                   EXIT ;
    """
    found = machine_code.parse(text)
    assert [(item.name, item.target) for item in found] == [
        ("MOV", None), ("BRA", 0x30), ("HMMA.16816.F32", None), ("EXIT", None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "arch", "expected"),
    [
        (["FFMA"] * 10, 90, 10),
        (["FFMA"] * 10, 80, 20),
        (["MUFU.EX2"] * 10, 90, 80),
        (["LDS"] * 10, 90, 40),
        (["LOP3"] * 10, 90, 20),
        (["FFMA"] * 10 + ["LOP3"] * 10, 90, 20),
        (["HMMA.16816.F32"] * 10 + ["BAR"], 90, 0),
    ],
)
def test_cycles_are_those_of_the_busiest_pipe(names, arch, expected):
    assert machine_code.cycles(code(*names), arch) == expected


def test_a_nested_loop_is_told_from_its_tile():
    names = ["FADD", *["FMUL"] * 20, "FFMA", "HMMA.1", "FFMA", "BRA:21"]
    names += [*["FMUL"] * 29, "STG", "BRA:1"]
    found = machine_code.anatomy(code(*names), 90)
    assert (found.loop, found.tile, found.flattened) == (2, 50, False)
    assert found.matrix == {"HMMA.1": 1}


def test_a_loop_over_chunks_is_of_the_tile_that_is_stored():
    names = [
        "FADD",
        "FMUL",
        "FMUL",
        "HMMA.1",
        "BRA:3",
        "FADD",
        "BRA:2",
        *["FMUL"] * 9,
        "STG",
        "BRA:1",
    ]
    found = machine_code.anatomy(code(*names), 90)
    assert (found.loop, found.tile) == (0, 13)


def test_what_a_flattened_loop_skips_is_of_the_tile():
    names = ["FADD", "FFMA", "HMMA.1", "BRA:74", *["FMUL"] * 70, "FADD", "BRA:1"]
    found = machine_code.anatomy(code(*names), 90)
    assert (found.loop, found.tile, found.flattened) == (2, 70, True)


@pytest.mark.parametrize("model", MODELS)
def test_the_launches_do_the_arithmetic_of_the_model(model):
    """Counted from a forward's launches, and from the model's sizes: two separate ways.

    The launches leave out the mixtures with K tokens, under a hundredth of it.
    """
    items = audit.forward(MODELS[model], "bf16", 2, 90)
    found = sum(predict.work_of(item).flops for item in items)
    assert found == pytest.approx(2 * flops_per_image(MODELS[model]), rel=0.01)


def test_bytes_are_those_of_operands_and_results():
    items = audit.forward(MODELS["stellar-h16"], "bf16", 64, 90)
    rows, width = 64 * 273, 1280
    moved = {}
    for item in items:
        moved.setdefault(predict.label(item), predict.work_of(item).moved)
    assert moved["qkv"] == pytest.approx(2 * width * (rows + 3 * width + 3 * rows), rel=0.01)
    assert moved["proj"] == pytest.approx(2 * width * (3 * rows + width), rel=0.02)
    assert moved["attention"] == pytest.approx(2 * 4 * rows * width, rel=0.01)


def test_fp8_reads_half():
    bf16, fp8 = (
        {
            predict.work_of(item).read
            for item in audit.forward(MODELS["stellar-b16"], precision, 64, 100)
            if predict.label(item) == "qkv"
        }
        for precision in ("bf16", "fp8")
    )
    assert len(bf16) == 1
    assert fp8 == bf16 | {read / 2 for read in bf16}  # the first block stays in bf16


def test_an_unknown_kernel_is_refused():
    item = audit.forward(MODELS["stellar-b16"], "bf16", 1, 90)[0]

    def _other_kernel(): ...

    other = SimpleNamespace(fn=_other_kernel, arg_names=item.kernel.arg_names)
    plan = SimpleNamespace(kernel=other, grid=item.grid)
    with pytest.raises(ValueError, match="no prediction for _other_kernel"):
        predict.work_of(item._replace(plan=plan))


def test_two_waves_of_instructions():
    # 10 passes of 100 cycles and 1,000 beside them, twice, by a scheduler each. A warp that has a
    # scheduler for itself takes more for a pass.
    assert seconds(WORK) == pytest.approx(predict.START + 2 * (1e-6 * predict.ALONE + 1e-6))
    two = replace(FINDING, programs=2)
    assert seconds(WORK, two) == pytest.approx(predict.START + 4e-6)  # they hide one another
    many = predict.START + 2 * (2e-6 * max(1.0, predict.ALONE / 2) + 2e-6)
    assert seconds(WORK, warps=8) == pytest.approx(many)
    assert seconds(WORK, warps=16) == pytest.approx(predict.START + 2 * (4e-6 + 4e-6))


def test_a_pipeline_has_as_many_passes_in_a_trip_as_are_under_way():
    def found(anatomy: Anatomy = ANATOMY, **changes: int | None) -> float:
        assert FINDING.waits is not None
        waits = replace(FINDING.waits, **changes)
        return seconds(WORK, replace(FINDING, anatomy=anatomy, waits=waits)) - predict.START

    one_pass = 1e-6 + 1e-7 * predict.ALONE
    assert found(under_way=0) == pytest.approx(2 * (10 * one_pass + 1e-6 + 1e-6))
    assert found(under_way=1) == pytest.approx(2 * (5 * one_pass + 1e-6 + 1e-6))
    flattened = replace(ANATOMY, flattened=True)
    assert found(flattened, under_way=1) == pytest.approx(2 * (5 * one_pass + 1e-6) + 1e-6)
    deep = 2 * (1e-6 * predict.ALONE + 1e-6 + 1e-6)  # instructions take longer than the trips
    assert found(under_way=9) == pytest.approx(deep)
    beside = predict.CACHED * 1e-6
    assert found(under_way=9, before=2, after=3) == pytest.approx(deep + 2 * 5 * beside)
    assert found(under_way=9, each=2) == pytest.approx(2 * (one_pass + 20e-6 + 1e-6 + 1e-6))


def test_products_hide_instructions_unless_they_wait_for_one_another():
    work = replace(WORK, products=1e12 * 3e-6, tiles=10)  # 3 us of a processor's matrix rate
    slowly = 1e-6 * predict.ALONE
    assert seconds(work) == pytest.approx(predict.START + 3e-6 + 1e-6)
    assert seconds(work, fp8=True) == pytest.approx(predict.START + max(1.5e-6, slowly) + 1e-6)
    waiting = replace(work, alternates=True, tiles=20)
    both = 2 * (3e-6 + slowly + 1e-6)
    assert seconds(waiting) == pytest.approx(predict.START + both)
    two = replace(FINDING, programs=2)
    assert seconds(waiting, two) == pytest.approx(predict.START + both), "they hide nothing"


def test_a_launch_takes_its_bytes_and_the_caches_time():
    assert seconds(replace(WORK, moved=1e8)) == pytest.approx(predict.START + 1e-4)
    assert seconds(replace(WORK, read=1e6)) == pytest.approx(
        predict.START + 20 * 1e6 / (predict.CACHE * 1e9 * 10) + 1e-6
    )


@pytest.fixture
def planted(monkeypatch) -> None:
    """FINDING for every compilation: Triton interprets in this process and compiles nothing."""

    def compilation(item, arch):
        name, options = item.kernel.fn.__name__, tuple(sorted(item.options.items()))
        return Compilation(arch, ("kernels", name), (), (), (), options)

    monkeypatch.setattr(audit, "compilation", compilation)
    monkeypatch.setattr(audit, "audit", lambda items, workers: [FINDING] * len(items))


@pytest.mark.usefixtures("planted")
def test_nothing_is_predicted_below_its_floor_and_all_is_labelled(tmp_path, capsys):
    out = tmp_path / "p.json"
    assert predict.main(["--model", "stellar-b16", "--batch", "64", "--json", str(out)]) == 0
    assert "PREDICTED" in capsys.readouterr().out.splitlines()[0]
    content = read(out)
    assert content.facts["prediction"] is True
    totals = content.rows("predicted", op="forward")
    assert [total["precision"] for total in totals] == ["bf16", "fp8"]
    for result in totals:
        rows = [row for row in content.jobs["predicted", result["key"]] if row is not result]
        assert {"qkv", "attention", "proj", "fc1", "fc2", "patch_embed"} <= {r["op"] for r in rows}
        assert all(row["seconds"] >= row["floor"] for row in rows)
        total = sum(row["times"] * row["seconds"] for row in rows)
        assert result["seconds"] == pytest.approx(total)
        assert result["images_per_second"] == pytest.approx(64 / total)


@pytest.mark.usefixtures("planted")
def test_code_that_fails_its_audit_is_not_predicted(monkeypatch):
    bad = replace(FINDING, faults=("8 bytes of stack",))
    monkeypatch.setattr(audit, "audit", lambda items, workers: [bad] * len(items))
    with pytest.raises(ValueError, match="8 bytes of stack"):
        predict.rows_of(MODELS["stellar-b16"], "bf16", 1, CHIP, 90, 1)


@pytest.mark.slow
def test_the_program_predicts_from_compiled_kernels():
    command = [sys.executable, "-P", predict.__file__, "--model", "stellar-b16"]
    done = subprocess.run(
        [*command, "--precision", "bf16", "--batch", "1"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PREDICTED")
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if "/SM" in line}
    assert {"qkv", "attention", "proj", "fc1", "fc2", "patch_embed", "norm"} <= set(rows)
    assert all(float(row[2]) >= float(row[3]) > 0 for row in rows.values())
