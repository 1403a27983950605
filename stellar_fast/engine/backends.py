"""Where to compute, and which ops: the Triton kernels, OpenVINO, or PyTorch's own fused paths."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ..config import ModelConfig
from ..errors import MissingExtraError
from ..precision import check_precision, has_int8_units
from .namespaces import float_runner

if TYPE_CHECKING:
    from .openvino_graphs import OpenVINORunner

BACKENDS = ("auto", "triton", "openvino", "torch")
OPENVINO_FLOATS = {"fp32", "bf16"}
OLDEST_OPENVINO = "2025.0"  # the extra `cpu` asks for the same


def resolve_device(device: str | torch.device | None) -> torch.device:
    """`device`, or "cuda" where there is one, with its index.

    Raises:
        ValueError: no such device on this machine.
    """
    try:
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:  # a type that torch does not know, or no index
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from None
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = (
            wanted.index if wanted.index is not None or not count else torch.cuda.current_device()
        )
        if (index or 0) >= count:
            raise ValueError(
                f"device {str(wanted)!r} was asked for, but this machine has {count} usable "
                "CUDA devices"
            )
        return torch.device("cuda", index)
    if wanted.type != "cpu":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(wanted)!r}")
    return wanted


def choose(
    backend: str, precision: str, device: torch.device, config: ModelConfig
) -> tuple[str, str]:
    """The back end and the precision to compute a model in on `device`; "auto" is the fastest.

    On a GPU that is known: bf16 from sm_80, on the kernels. On a CPU a product of the model's own
    shape is tried in all that "auto" leaves open, once a process.

    Raises:
        ValueError: unknown, or what cannot compute there or so; the message says why.
        MissingExtraError: OpenVINO is asked for, or needed, and absent.
    """
    check_precision(precision)
    if device.type == "cuda":
        if precision == "auto":
            half = torch.cuda.get_device_capability(device) >= (8, 0)
            precision = "bf16" if half else "fp32"
        return resolve_backend(backend, device, precision), precision
    if backend == "triton":  # interpreted, for tests: exact in float32
        precision = "fp32" if precision == "auto" else precision
    precisions = ("fp32", "bf16") if precision == "auto" else (precision,)
    if backend != "auto":
        names = tuple(resolve_backend(backend, device, each) for each in precisions[:1])
    elif _runs_openvino() and set(precisions) <= OPENVINO_FLOATS:
        names = ("openvino", "torch")
    else:
        names = (resolve_backend(backend, device, precisions[0]),)
    if len(names) == len(precisions) == 1:
        return names[0], precisions[0]
    from .trial import fastest

    threads = torch.get_num_threads()
    return fastest(names, precisions, config.backbone, config.sequence_length, threads)


def resolve_backend(backend: str, device: torch.device, precision: str) -> str:
    """`backend`; for "auto" the kernels where they run on matrix units, OpenVINO on a CPU where it
    is installed, else PyTorch.

    The kernels run on a CUDA device from sm_80 in bf16, fp16 or fp8. In fp32 they keep to exact
    float32 products, without tensor cores, where PyTorch's are as good.

    Raises:
        ValueError: an unknown backend, or one that cannot compute there or so.
        MissingExtraError: OpenVINO is asked for, or needed, and absent.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if backend == "auto":
        half = precision in ("bf16", "fp16", "fp8")
        if precision == "int8":
            backend = "openvino"
        elif half and capability is not None and capability >= (8, 0) and _runs_kernels():
            backend = "triton"
        elif capability is None and precision in OPENVINO_FLOATS and _runs_openvino():
            backend = "openvino"
        else:
            backend = "torch"
    match backend:
        case "torch":
            _check_torch(device, precision, capability)
        case "openvino":
            _check_openvino(device, precision)
        case "triton":
            _check_triton(device, precision, capability)
    return backend


def _check_torch(device: torch.device, precision: str, capability: tuple[int, int] | None) -> None:
    if precision == "fp8":
        raise ValueError(
            "precision='fp8' is computed by the Triton kernels, on a CUDA device of compute "
            f"capability 8.9 or later; got {_described(device, capability)}"
        )
    if precision == "int8":
        raise ValueError("precision='int8' is computed by backend='openvino', got backend='torch'")


def _check_openvino(device: torch.device, precision: str) -> None:
    what = "precision='int8'" if precision == "int8" else "backend='openvino'"
    if device.type != "cpu":
        raise ValueError(f"{what} computes on CPUs, got {device}; on a GPU take fp8 or bf16")
    if precision not in OPENVINO_FLOATS | {"int8"}:
        raise ValueError(f"backend='openvino' computes fp32, bf16 and int8, got {precision!r}")
    if find_spec("openvino") is None:
        raise MissingExtraError(what, "cpu")
    if not has_openvino():
        raise ValueError(
            f"{what} needs OpenVINO {OLDEST_OPENVINO} or later, found "
            f"{metadata.version('openvino')}: pip install --upgrade openvino"
        )
    if (cap := _cap()) is not None:
        raise ValueError(
            f"{what} computes wrongly where {cap} is set, as here to {os.environ[cap]!r}: unset "
            "it, or load with backend='torch'"
        )
    if precision == "int8" and not has_int8_units():
        raise ValueError(
            "precision='int8' needs a processor that multiplies 8-bit integers (AVX512-VNNI, "
            f"AVX-VNNI, AMX; on ARM dot products), and this {platform.machine()} has none of "
            "them: there int8 is no faster than fp32"
        )


def _check_triton(device: torch.device, precision: str, capability: tuple[int, int] | None) -> None:
    if not has_triton():
        raise ValueError("backend='triton' needs the package triton, which is not installed")
    if precision == "int8":
        raise ValueError("precision='int8' is computed by backend='openvino', got backend='triton'")
    if device.type == "cuda" and torch.version.hip is not None:
        raise ValueError(
            "backend='triton' is for NVIDIA GPUs: its kernels have not been checked by "
            "Triton's AMD compiler; load with backend='torch'"
        )
    if capability is None:
        from ..kernels.launch import is_interpreted

        if not is_interpreted():
            raise ValueError(
                f"backend='triton' needs a CUDA device, got {device}; set TRITON_INTERPRET=1 "
                "before Python starts to interpret the kernels on the CPU, slowly"
            )
        if precision == "bf16":
            raise ValueError("Triton's interpreter computes bf16 wrongly; take fp32 or fp16")
    elif capability < (8, 0) or (precision == "fp8" and capability < (8, 9)):
        least = "8.9" if precision == "fp8" else "8.0"
        raise ValueError(
            f"backend='triton' with precision={precision!r} needs compute capability {least} or "
            f"later, got {_described(device, capability)}"
        )


def _described(device: torch.device, capability: tuple[int, int] | None) -> str:
    if capability is None:
        return str(device)
    return f"{device}, {torch.cuda.get_device_name(device)} with {capability[0]}.{capability[1]}"


def _runs_kernels() -> bool:
    """Whether Triton is there, for NVIDIA GPUs; an AMD one says it is of capability 9.4."""
    return has_triton() and torch.version.hip is None


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported to find out."""
    return find_spec("triton") is not None


def _runs_openvino() -> bool:
    """Whether OpenVINO is there, and not left behind in the parent of a forked process."""
    graphs = sys.modules.get(f"{__package__}.openvino_graphs")
    left_behind = graphs is not None and graphs.is_left_behind()
    return has_openvino() and not left_behind and _cap() is None


def _cap() -> str | None:
    """The variable that keeps oneDNN from instructions which this processor has, if there is one.

    OpenVINO has a oneDNN of its own, which obeys it in part: what it computes then is wrong, or it
    compiles nothing.
    """
    names = (f"{library}_MAX_CPU_ISA" for library in ("ONEDNN", "DNNL"))
    return next((name for name in names if os.environ.get(name, "ALL") != "ALL"), None)


def has_openvino() -> bool:
    """Whether OpenVINO is installed, and recent enough; it is not imported to find out."""
    if find_spec("openvino") is None:
        return False
    try:
        found = metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return False
    return tuple(map(int, found.split(".")[:2])) >= tuple(map(int, OLDEST_OPENVINO.split(".")))


def runner_of(backend: str, precision: str, config: ModelConfig) -> OpenVINORunner | None:
    """What runs the forwards of a backend whose ops make graphs.

    What of an int8 model is no product of a block, it computes in the faster float.
    """
    if backend == "openvino" and precision == "int8":
        precision = choose(backend, "auto", torch.device("cpu"), config)[1]
    return float_runner(backend, precision)
