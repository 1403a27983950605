"""What memory weights take while they are read, packed and kept, as the operating system counts."""

import math
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import write_checkpoint

from stellar_fast.engine import backends
from stellar_fast.weights import names, residency
from stellar_fast.weights.manifest import read_model
from stellar_fast.weights.residency import in_file, let_go

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is counted by Linux")
MIB = 1 << 20


def resident(kind: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_tensor_in_a_file_is_let_go_and_comes_back(dtype):
    tensor = torch.randint(-99, 99, (8 * MIB // dtype.itemsize,)).to(dtype).view(64, -1)
    moved = in_file(tensor)
    assert moved.data_ptr() != tensor.data_ptr() and moved.dtype == dtype
    assert in_file(moved) is moved
    assert torch.equal(moved, tensor)
    before = resident("RssFile")
    let_go([moved])
    assert before - resident("RssFile") > 7 * MIB
    assert torch.equal(moved, tensor)
    moved += 1  # what is written comes back too
    let_go([moved])
    assert torch.equal(moved, tensor + 1)


def test_what_is_not_in_a_file_is_left_alone():
    tensors = [torch.ones(4 * MIB), torch.ones(3), torch.ones(4 * MIB)[5:], torch.empty(9, 0)]
    let_go([*tensors, torch.ones(4 * MIB, device="meta")])
    assert all(tensor.eq(1).all() for tensor in tensors)


def test_it_stays_in_memory_where_there_is_no_place_for_files(monkeypatch, tmp_path):
    tensor = torch.ones(MIB)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    assert in_file(tensor) is tensor
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert in_file(tensor) is not tensor and os.listdir(tmp_path) == []
    small = torch.ones(8)
    assert in_file(small) is small

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(residency.tempfile, "TemporaryFile", full)
    assert in_file(tensor) is tensor


# A model of 200 MiB, so that its weights count for more than what Python, PyTorch and OpenVINO
# take. Wide layers and few of them: no packed layer is small against the rest.
WIDE = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16}
WIDE |= {"intermediate_size": 4096, "patch_size": 16, "image_size": 224}
MEASURE = """
import sys, torch, stellar_fast
from stellar_fast.weights.packed import map_nodes

backend, precision = sys.argv[1:]
def resident(kind):
    with open("/proc/self/status") as status:
        return int(next(x for x in status if x.startswith(kind + ":")).split()[1]) * 1024
x = torch.rand(1, 3, 32, 32)
options = {"repo": "tiny", "device": "cpu", "precision": precision, "backend": backend}
stellar_fast.load("tiny", **options).encode(x)  # imports, and what the libraries keep for good
options["repo"] = "wide"
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = resident("VmRSS")
engine = stellar_fast.load("wide", **options)
engine.encode(x)
after = resident("VmRSS")
engine.encode(x, outputs=("sparse",))
engine.encode((x * 255).to(torch.uint8))
print(resident("VmHWM") - before, after - before, resident("VmRSS") - before)
assert "torch._dynamo" not in sys.modules, "a second of imports"
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    small = {**WIDE, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
    write_checkpoint(folder / "tiny", "tiny", backbone=small, num_sparse_tokens=8)
    write_checkpoint(folder / "wide", "wide", backbone=WIDE, num_sparse_tokens=8)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_weights_are_there_once_and_twice_while_they_are_packed(models, backend, precision):
    """By how much memory the process has: 2.2 times the float32 weights at its peak, 1.3 times the
    packed ones afterwards, and no more for other outputs and pixels than the last block again."""
    if backend == "openvino" and not backends.has_openvino():
        pytest.skip("OpenVINO is not installed (extra cpu)")
    command = [sys.executable, "-P", "-c", MEASURE, backend, precision]
    done = subprocess.run(command, cwd=models, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, after, later = map(int, done.stdout.split())
    print(f"{backend} {precision}: {peak=} {after=} {later=}")
    config, _ = read_model(models / "wide" / "config.json", "wide")
    file = 4 * sum(map(math.prod, names.encode_shapes(config).values()))
    width, hidden = WIDE["hidden_size"], WIDE["intermediate_size"]
    block = 4 * (4 * width**2 + 2 * width * hidden)
    packed = file if precision == "fp32" else file / 2
    assert peak < 2.2 * file, f"{peak / file:.2f} times its weights at the peak"
    assert after < 1.3 * packed + 16 * MIB, f"{after / packed:.2f} times its weights afterwards"
    assert later < 1.3 * packed + 2 * block + 16 * MIB
