"""The launch layer: parts, what a launch is given, and the hook that sees it instead."""

import contextlib
import types

import pytest
import torch
from kernel_checks import draw

from stellar_fast.kernels import gpus, launch, linear
from stellar_fast.kernels.linear import linear_tile
from stellar_fast.kernels.tables import EMPTY

KERNELS = gpus.GPUS


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
    """Stands for a compiled kernel and for CUDA's current device."""

    def __init__(self, monkeypatch):
        self.current: list = []
        self.launches: list = []
        monkeypatch.setattr(torch.cuda, "device", self._device)

    @contextlib.contextmanager
    def _device(self, device):
        self.current.append(device)
        yield
        self.current.pop()

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((grid, list(self.current), arguments))


def test_a_launch_is_made_on_the_tensors_device(monkeypatch):
    kernel = Recording(monkeypatch)
    device = torch.device("cuda", 1)
    given = {"x_ptr": "x", "N": 3, "num_warps": 4, "enable_fp_fusion": True}
    for arch, more in ((80, {"EARLY": False}), (90, {"EARLY": True, "launch_pdl": True})):
        with launch.on_gpu(arch):
            launch.launch(kernel, (4, 2), device=device, options={"num_warps": 4}, x_ptr="x", N=3)
        assert kernel.launches.pop() == ((4, 2), [device], given | more)
    assert kernel.current == []


def test_an_empty_grid_launches_nothing(monkeypatch):
    kernel = Recording(monkeypatch)
    with launch.on_gpu(90):
        launch.launch(kernel, (0, 2), device=torch.device("cuda", 0), options={})
    assert kernel.launches == []


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    kernel = types.SimpleNamespace()
    with pytest.raises(ValueError, match="run on CUDA tensors, got cpu"):
        launch.launch(kernel, (1,), device=torch.device("cpu"), options={})


def test_what_tma_can_address():
    x = torch.zeros(8, 64, dtype=torch.float16)
    assert launch.describable(x, x[2:], x[:, :32], x[:, 8:])
    assert not launch.describable(x[:, 1:]), "misaligned start"
    assert not launch.describable(torch.zeros(8, 63, dtype=torch.float16)), "misaligned rows"
    assert not launch.describable(x[:, ::8]), "columns apart"


def test_odd_widths_take_pointers():
    seen = []
    with launch.on_gpu(90, seen.append):
        for depth in (64, 63):
            x, weight = draw(1, 4, depth).half(), draw(16, depth).half()
            linear(x, weight, draw(16).half())
    assert [item.arguments["DESCRIPTORS"] for item in seen] == [True, False]
    assert [item.arguments["EVEN_K"] for item in seen] == [True, False]


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
