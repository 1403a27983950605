"""Which ops an engine gets, and what it is told when they cannot run."""

import os
import subprocess
import sys

import pytest
import torch

from stellar_fast.engine import backends
from stellar_fast.engine.backends import resolve_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch):
    """Pretends that the device has this compute capability."""

    def pretend(*version: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: version)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")

    return pretend


@pytest.mark.parametrize(
    ("version", "precision", "expected"),
    [
        ((9, 0), "bf16", "triton"),
        ((8, 0), "fp16", "triton"),
        ((8, 9), "fp8", "triton"),
        ((9, 0), "fp32", "torch"),
        ((7, 5), "fp16", "torch"),
    ],
)
def test_auto_on_a_gpu(capability, version, precision, expected):
    capability(*version)
    assert resolve_backend("auto", GPU, precision) == expected


def test_auto_on_a_cpu_never_takes_the_interpreter():
    assert os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
    for precision in ("fp32", "bf16", "fp16"):
        assert resolve_backend("auto", CPU, precision) in ("openvino", "torch")


@pytest.mark.parametrize(
    ("backend", "device", "version", "precision", "message"),
    [
        ("cublas", CPU, None, "fp32", "'cublas'; known: auto, triton, openvino, torch"),
        ("auto", CPU, None, "fp8", "capability 8.9 or later; got cpu"),
        ("torch", GPU, (9, 0), "fp8", "computed by the Triton kernels.*Some GPU with 9.0"),
        ("triton", GPU, (8, 0), "fp8", "capability 8.9 or later, got cuda:0, Some GPU with 8.0"),
        ("triton", GPU, (7, 5), "fp16", "capability 8.0 or later"),
        ("auto", GPU, (8, 0), "fp8", "capability 8.9"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    capability, backend, device, version, precision, message
):
    if version:
        capability(*version)
    with pytest.raises(ValueError, match=message):
        resolve_backend(backend, device, precision)


def test_no_triton(monkeypatch, capability):
    capability(9, 0)
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert resolve_backend("auto", GPU, "bf16") == "torch"
    with pytest.raises(ValueError, match="not installed"):
        resolve_backend("triton", GPU, "bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_the_interpreter_is_refused_bf16_and_asked_for_by_name():
    with pytest.raises(ValueError, match="bf16 wrongly"):
        resolve_backend("triton", CPU, "bf16")
    code = (
        "import stellar_fast\n"
        "stellar_fast.load('stellar-b8', weights='synthetic', device='cpu', backend='triton')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment
    )
    assert "needs a CUDA device, got cpu; set TRITON_INTERPRET=1" in done.stderr


def test_the_torch_backend_does_not_import_triton():
    code = (
        "import sys, stellar_fast\n"
        "from stellar_fast.engine import namespaces\n"
        "assert namespaces.ops_of('torch').linear\n"
        "print([m for m in sys.modules if m.startswith('stellar_fast.kernels')])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_amd_gpu_is_not_taken_for_an_h100(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    device = torch.device("cuda", 0)
    assert resolve_backend("auto", device, "bf16") == "torch"
    assert resolve_backend("torch", device, "bf16") == "torch"
    with pytest.raises(ValueError, match=r"is for NVIDIA GPUs: .*backend='torch'"):
        resolve_backend("triton", device, "bf16")


def test_openvino_is_not_taken_where_its_instructions_are_capped(monkeypatch):
    monkeypatch.setattr(backends, "has_openvino", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    for value, expected in (("ALL", "openvino"), ("AVX2", "torch")):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
        assert resolve_backend("auto", torch.device("cpu"), "fp32") == expected
    with pytest.raises(ValueError, match="where ONEDNN_MAX_CPU_ISA is set, as here to 'AVX2'"):
        resolve_backend("openvino", torch.device("cpu"), "fp32")
