"""The launch layer: parts, what a launch is given, and the hook that sees it instead."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import draw
from triton.tools.tensor_descriptor import TensorDescriptor

from stellar_fast.kernels import gpus, launch, linear, linear_residual
from stellar_fast.kernels.linear import linear_tile
from stellar_fast.kernels.tables import EMPTY

ROOT = Path(__file__).parents[2]
KERNELS = gpus.GPUS
BF16, FP8 = torch.bfloat16, launch.FP8


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 7), 86),
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 3), 100),
        ((12, 1), 120),
    ],
)
def test_every_capability_has_its_part(capability, arch):
    assert gpus.gpu_of_capability(*capability) is KERNELS[arch]


def test_older_devices_are_refused():
    with pytest.raises(ValueError, match=r"8.0 or later, this device has 7.5"):
        gpus.gpu_of_capability(7, 5)


def test_a_hook_sees_launches_and_nothing_runs():
    seen = []
    x = torch.empty(3, 200, 64, dtype=torch.bfloat16, device="meta")
    weight, bias = x.new_empty(192, 64), x.new_empty(192)
    with launch.on_gpu(100, seen.append):
        out = linear(x, weight, bias, norm_eps=1e-6)
    assert out.shape == (3, 200, 192)
    (only,) = seen
    assert only.kernel.__name__ == "_linear_kernel"
    assert (only.arguments["M"], only.arguments["N"], only.arguments["K"]) == (600, 192, 64)
    assert only.options["num_warps"] == 8
    assert only.grid == (15,)


def test_the_part_is_put_back(monkeypatch):
    x = torch.zeros(1)
    outside = launch.gpu_of(x)
    with launch.on_gpu(80):
        assert launch.gpu_of(x).arch == 80
        with pytest.raises(KeyError), launch.on_gpu(75):
            pass
        with launch.on_gpu(120):
            assert launch.gpu_of(x).arch == 120
        assert launch.gpu_of(x).arch == 80
    assert launch.gpu_of(x) is outside


class Recording:
    """Stands for a kernel, for what is compiled of it, and for CUDA's current device."""

    __name__ = "recording"
    arg_names = ("x_ptr", "y_ptr", "N", "EARLY")

    def __init__(self, monkeypatch):
        self.current = [torch.device("cuda", 0)]
        self.launches: list = []
        monkeypatch.setattr(torch.cuda, "device", self._device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current[-1].index)

    @contextlib.contextmanager
    def _device(self, device):
        self.current.append(device)
        yield
        self.current.pop()

    def __getitem__(self, grid):
        def started(*values, **options):
            self.launches.append((grid, self.current[-1], values, options))
            return self

        return started


GIVEN = {"num_warps": 4, "enable_fp_fusion": True}


def test_a_launch_is_made_on_the_tensors_device(monkeypatch):
    kernel, x = Recording(monkeypatch), torch.zeros(8)
    for index in (1, 0):
        device = torch.device("cuda", index)
        for arch, early, more in ((80, False, {}), (90, True, {"launch_pdl": True})):
            with launch.on_gpu(arch):
                target = launch.target_of(device)
            plan = launch.Plan(target, kernel, (4, 2), {"num_warps": 4}, {"N": 3})
            values = (x, None, 3, early)
            launch.launch(plan, device, x_ptr=x, y_ptr=None)
            assert kernel.launches.pop() == ((4, 2), device, values, GIVEN | more)
            launch.launch(plan, device, x_ptr=x, y_ptr=None)
            assert kernel.launches.pop() == ((4, 2, 1), device, values, {}), "the compiled one"
    assert len(kernel.current) == 1


def test_an_empty_grid_launches_nothing(monkeypatch):
    kernel, device = Recording(monkeypatch), torch.device("cuda", 0)
    with launch.on_gpu(90):
        plan = launch.Plan(launch.target_of(device), kernel, (0, 2), {}, {"N": 0})
    launch.launch(plan, device, x_ptr=None, y_ptr=None)
    assert kernel.launches == []


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    kernel, device = Recording(monkeypatch), torch.device("cpu")
    plan = launch.Plan(launch.target_of(device), kernel, (1,), {}, {"N": 0})
    with pytest.raises(ValueError, match="run on CUDA tensors, got cpu"):
        launch.launch(plan, device, x_ptr=None, y_ptr=None)


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ({"x_ptr": None}, "recording needs 'y_ptr'"),
        ({"x_ptr": None, "y_ptr": None, "z_ptr": None}, "recording takes no z_ptr"),
    ],
)
def test_a_launch_has_all_of_its_tensors_and_no_more(monkeypatch, operands, message):
    device = torch.device("cpu")
    plan = launch.Plan(launch.target_of(device), Recording(monkeypatch), (1,), {}, {"N": 0})
    with pytest.raises(TypeError, match=message):
        launch.launch(plan, device, **operands)


@pytest.fixture(scope="module")
def kept():
    """What kept_kernels.py found, in a process in which Triton does not interpret."""
    support = ROOT / "tests" / "support"
    paths = os.pathsep.join([str(support), str(ROOT / "benchmarks"), *filter(None, sys.path)])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", support / "kept_kernels.py"],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kept_kernel_is_the_one_that_triton_would_take(kept):
    """Over shapes, strides, alignments, dtypes, numbers, tables, parts and devices."""
    assert kept["wrong"] == []
    assert kept["kernels"] > 90, "there is something to confuse"


def test_a_launch_that_was_there_does_not_ask_triton_for_its_kernel(kept):
    asked = kept["dispatched"]
    assert asked["first"] > 50 and asked["second"] == asked["third"] == 0
    assert asked["tuned"] == asked["first"], "another table, other plans"
    assert asked["debug"] > asked["first"], "whose kernels are others"


def test_what_tma_can_address():
    x = torch.zeros(8, 64, dtype=torch.float16)
    assert launch.aligned(x, x[2:], x[:, :32], x[:, 8:])
    assert not launch.aligned(x, x[:, 1:]), "misaligned start"
    for tensor in (x, x[2:], x[:, :32], x[:, 8:], x[None]):
        assert launch.describable(tensor.stride(), x.dtype)
    odd = torch.zeros(8, 63, dtype=torch.float16)
    assert not launch.describable(odd.stride(), x.dtype), "misaligned rows"
    assert not launch.describable(x[:, ::8].stride(), x.dtype), "columns apart"


@pytest.mark.parametrize("shape", [(6, 64), (2, 6, 64)])
def test_a_layout_makes_the_descriptor_that_triton_would(shape):
    """Though it spares Triton's checks, in all that TensorDescriptor has."""
    x = torch.zeros(*shape, dtype=torch.bfloat16)
    block = [1] * (len(shape) - 2) + [4, 32]
    ours = launch.Layout([*shape], [*x.stride()], block).of(x)
    theirs = TensorDescriptor(x, [*shape], [*x.stride()], block)
    assert type(ours) is type(theirs) and ours.base is theirs.base
    for field in dataclasses.fields(theirs)[1:]:
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_odd_widths_take_pointers():
    seen = []
    with launch.on_gpu(90, seen.append):
        for depth in (64, 63):
            x, weight = draw(1, 4, depth).half(), draw(16, depth).half()
            linear(x, weight, draw(16).half())
    assert [item.arguments["DESCRIPTORS"] for item in seen] == [True, False]
    assert [item.arguments["EVEN_K"] for item in seen] == [True, False]


@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_what_starts_off_the_grid_is_read_by_pointers(name):
    """Whatever was planned for the same shapes before."""
    seen = []
    given = {"x": draw(1, 9, 64).half(), "weight": draw(64, 64).half()}
    given["residual"] = draw(1, 9, 64).half()
    away = torch.zeros(given[name].numel() + 1, dtype=torch.float16)[1:].view(given[name].shape)
    with launch.on_gpu(90, seen.append):
        for operands in (given, given | {name: away}, given):
            linear_residual(bias=draw(64).half(), **operands)
            linear(operands["x"], operands["weight"], draw(64).half())
    found = [item.arguments["DESCRIPTORS"] for item in seen]
    assert found == [True, True, False, name == "residual", True, True]


@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    [
        (273, 1280, 64),  # 60 narrow tiles for 132 processors, 30 wider ones
        (273, 3840, 128),  # 180 narrow ones are two waves, 90 wider ones one
        (8 * 273, 3840, 256),
        (64 * 273, 1280, 256),
    ],
)
def test_wide_tiles_once_they_keep_all_processors_busy(rows, columns, width):
    with launch.tuned_by(EMPTY):
        tile = linear_tile(gpus.GPUS[90], torch.bfloat16, rows, columns, 1280)
    assert tile.block_n == width


@pytest.mark.parametrize(
    ("arch", "dtype", "rows", "columns", "depth", "width", "stages"),
    [
        (89, BF16, 273, 1280, 5120, 64, 5),  # 30 wide tiles for 142 processors
        (89, BF16, 273, 3840, 1280, 128, 4),  # 90 wide ones are one wave, 180 narrow ones two
        (89, BF16, 546, 3840, 1280, 64, 5),  # 150 are two waves, 300 narrower ones three
        (89, BF16, 64 * 273, 1280, 5120, 128, 4),
        (86, BF16, 64 * 273, 1280, 5120, 128, 3),
        (89, FP8, 64 * 273, 3840, 1280, 128, 4),
        (89, FP8, 64 * 273, 5120, 1280, 128, 3),  # 40 KiB: two programs of fc1
        (89, FP8, 273, 5120, 1280, 64, 4),
        (120, BF16, 64 * 273, 1280, 5120, 128, 3),
        (80, BF16, 64 * 273, 1280, 5120, 128, 3),
    ],
)
def test_tiles_of_parts_with_less_shared_memory(arch, dtype, rows, columns, depth, width, stages):
    with launch.tuned_by(EMPTY):
        tile = linear_tile(gpus.GPUS[arch], dtype, rows, columns, depth)
    assert (tile.block_n, tile.num_stages) == (width, stages)
