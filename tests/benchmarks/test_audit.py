"""The static audit: it passes over the kernels as they are, and names every planted fault."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from audit.compilation import _matrix_faults, _offset_faults, held_up

from stellar_fast.kernels import gpus

ROOT = Path(__file__).parents[2]


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: Triton interprets in this one."""
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-P", str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": paths},
    )


def findings(*arguments: str) -> dict:
    done = run(ROOT / "tests" / "support" / "audit_faults.py", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # the assembler writes there too


@pytest.fixture(scope="module")
def found():
    return findings()


@pytest.fixture
def planted(found):
    return found["faults"]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("narrow_offset", r"32-bit offset: .*%width : i32"),
        ("wide_constant", r"32-bit offset"),
        ("empty", r"empty: it stores nothing"),
        ("spilling", r"spills: \d+ B of stack"),
        ("hopeless", r"does not compile"),
        ("too_much_shared", r"shared memory: 131072 B, the GPU has 101376 B"),
        ("rounded", r"float32 products are not exact: HGMMA.*TF32"),
        ("badly_tuned", r"spills: \d+ B of stack"),
        ("differing", r"tiles of one family differ"),
    ],
)
def test_a_planted_fault_is_named(planted, name, named):
    assert any(re.search(named, fault) for fault in planted[name]), planted[name]


@pytest.mark.parametrize("name", ["sound", "small_products"])
def test_a_sound_kernel_passes(planted, name):
    assert planted[name] == []


def test_products_that_wait_for_one_another_are_named():
    serial = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to non wgmma instructions defining accumulator registers of a wgmma"
    )
    arrival = "ptxas info    : (C7519) warpgroup.arrive is injected in around line 1008 by compiler"
    assert held_up(f"{arrival}\n{serial}\n") == [serial]


def test_products_off_the_matrix_units_are_named():
    dot = "%1 = tt.dot %a, %b, %c : tensor<128x64xbf16> * tensor<64x64xbf16> -> tensor<128x64xf32>"
    assert _matrix_faults(90, dot, ["HGMMA.64x64x16.F32.BF16"]) == []
    for arch, found in ((90, []), (90, ["HMMA.16816.F32.BF16"]), (100, ["HMMA.16816.F32.BF16"])):
        assert "products of bf16 without" in _matrix_faults(arch, dot, found)[0]
    fp8 = dot.replace("bf16", "f8E4M3FN")
    assert _matrix_faults(89, fp8, ["QMMA.16832.F32.E4M3.E4M3"]) == []
    assert "any instruction of the GPU" in _matrix_faults(80, fp8, ["HMMA.16816.F32"])[0]


def test_wide_offsets_and_small_steps_pass():
    wide = """
      %c = arith.constant 128 : i32
      %pid = tt.get_program_id x : i32
      %row = arith.muli %pid, %c : i32
      %row64 = arith.extsi %row : i32 to i64
      %at = arith.muli %row64, %stride : i64
      %p = tt.addptr %base, %at : !tt.ptr<f16>, i64
    """
    assert _offset_faults(wide) == []
    narrow = wide.replace("%at = arith.muli %row64, %stride : i64", """
      %at32 = arith.muli %row, %width : i32
      %at = arith.extsi %at32 : i32 to i64""")  # fmt: skip
    assert len(_offset_faults(narrow)) == 1


def test_what_is_audited_is_what_is_launched(found):
    """To the key in Triton's cache, which a tuner's trials and an engine's start then find full."""
    assert_same_keys(found["keys"])


@pytest.mark.slow
def test_every_part_and_every_precision():
    found = findings("all")
    assert found["faults"] == {f"sound_{arch}": [] for arch in gpus.GPUS}
    assert_same_keys(found["keys"])


def assert_same_keys(keys: list) -> None:
    assert {arch for arch, _, _ in keys} == {80, 90}
    kernels = {name for _, name, _ in keys}
    assert kernels >= {"_linear_kernel", "_attention_kernel", "_patch_embed_kernel"}
    assert [item for item in keys if not item[2]] == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_kernel_passes_on_every_part(tmp_path):
    """Two models in bf16 and fp8; the command without --quick takes the others too."""
    out = tmp_path / "audit.json"
    done = run(ROOT / "benchmarks" / "audit" / "run.py", "--quick", "--json", str(out))
    bad = "\n".join(line for line in done.stdout.splitlines() if not line.endswith(" ok"))
    assert done.returncode == 0, bad + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["arch"] for row in rows} == set(gpus.GPUS)
    for arch in gpus.GPUS:
        found = [row for row in rows if row["arch"] == arch]
        kernels = {row["kernel"] for row in found}
        assert kernels >= {"linear", "attention", "norm", "patch_embed", "similarity", "spatial"}
        assert ("quantize_rows" in kernels) == (arch >= 89)
        # Every tile that the table has for a product was taken.
        widths = {row["tile"].split("x")[1] for row in found if row["kernel"] == "linear"}
        large = gpus.GPUS[arch].shared > 200_000
        assert widths == ({"64", "128", "256"} if large else {"64", "128"})
