"""What a STELLAR model can be run with on a CPU: ours, plain PyTorch, and others' runtimes.

To add one, write a function that makes it and name it in IMPLEMENTATIONS. It gets a figure where
its outputs keep the error budget of its precision.

Each runs in a process of its own (`Remote`). Within one process they are not independent: eager
PyTorch took 1.26 s a batch alone, and 1.43 s after OpenVINO had been loaded beside it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness import workloads
from harness.budgets import Encode, Outputs
from harness.results import BASELINES, ROOT
from peers.footprint import WEIGHTS, plain_model, synthetic
from torch import Tensor, nn

import stellar_fast
from stellar_fast.config import ModelConfig
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.loading import SYNTHETIC_SEED
from stellar_fast.reference import STELLARModel
from stellar_fast.weights.manifest import write_config

BASELINE = BASELINES["encode"]
FEW = ("sparse", "cls")
CALIBRATION = 32  # images
DTYPES = {"fp64": torch.float64, **workloads.DTYPES}


class Absent(Exception):
    """A peer cannot take part here; the message says why."""


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed (extra `peers`)") from error


@contextlib.contextmanager
def _without_root() -> Iterator[None]:
    """Without this repository's root in the path, whose `kernels/` transformers would take for the
    package of that name."""
    before = sys.path[:]
    sys.path[:] = [entry for entry in before if Path(entry).resolve() != ROOT]
    try:
        yield
    finally:
        sys.path[:] = before


class Subject:
    """One model with seeded random weights.

    Args:
        config: its geometry, published or not.
        folder: for `config.json`, which the engine's loader reads, and for exported graphs.
    """

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        write_config(folder, config, WEIGHTS)
        self.reference = functools.cache(self._reference)
        self.engine = functools.cache(self._engine)
        self.openvino_graph = functools.cache(self._openvino_graph)
        self.nncf_graph = functools.cache(self._nncf_graph)
        self.vit = functools.cache(self._vit)

    def _reference(self, precision: str) -> STELLARModel:
        return plain_model(self.config, synthetic(self.config)).to(DTYPES[precision])

    def eager(self, precision: str) -> Encode:
        """The model in plain PyTorch."""
        model = self.reference(precision)

        @torch.no_grad()
        def encode(images: Tensor) -> dict[str, Tensor]:
            found = model.encode(images)
            return {name: found[name] for name in OUTPUTS}

        return encode

    def tuple_module(self) -> nn.Module:
        return _Tuple(self.reference("fp32")).eval()

    def _engine(self, precision: str) -> stellar_fast.Engine:
        engine = stellar_fast.load(
            self.config.name,
            repo=self.folder,
            device="cpu",
            precision=precision,
            weights="synthetic",
        )
        return engine if engine.calibrated else engine.calibrate(self.calibration())

    def calibration(self) -> Tensor:
        """What everyone's int8 scales come from; nobody is timed or judged on these images."""
        return workloads.pictures(CALIBRATION, self.config.backbone.image_size, seed=7)

    def _nncf_graph(self) -> Any:
        package = _package("nncf")
        images = [image[None].numpy() for image in self.calibration()]
        return package.quantize(
            self.openvino_graph(),
            package.Dataset(images),
            model_type=package.ModelType.TRANSFORMER,
            subset_size=len(images),
        )

    def _openvino_graph(self) -> Any:
        package = _package("openvino")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's, about sizes it takes for constant
            side = self.config.backbone.image_size
            example = torch.zeros(2, 3, side, side)
            return package.convert_model(self.tuple_module(), example_input=example)

    def _vit(self, precision: str) -> nn.Module:
        with _without_root():
            package = _package("transformers")
            vit_config, vit_model = package.ViTConfig, package.ViTModel  # imported when asked for
        backbone = self.config.backbone
        config = vit_config(
            hidden_size=backbone.hidden_size,
            num_hidden_layers=backbone.num_hidden_layers,
            num_attention_heads=backbone.num_attention_heads,
            intermediate_size=backbone.intermediate_size,
            patch_size=backbone.patch_size,
            image_size=backbone.image_size,
        )
        torch.manual_seed(SYNTHETIC_SEED)
        model = vit_model(config, add_pooling_layer=False).eval()
        return model.to(DTYPES[precision]).requires_grad_(False)


class _Tuple(nn.Module):
    """The reference with its outputs as a tuple, which model converters want."""

    def __init__(self, model: STELLARModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out = self.model.encode(images)
        return tuple(out[name] for name in OUTPUTS)


def _eager(subject: Subject, example: Tensor, precision: str) -> Encode:
    return subject.eager(precision)


def _engine(subject: Subject, example: Tensor, precision: str) -> Encode:
    """Ours, with the loader's defaults; int8 calibrated."""
    return subject.engine(precision).encode


def _engine_few(subject: Subject, example: Tensor, precision: str) -> Encode:
    """Ours as a search index uses it: bytes in, sparse tokens and CLS out."""
    engine = subject.engine(precision)
    return lambda images: engine.encode(images, outputs=FEW)


def _compiled(subject: Subject, example: Tensor, precision: str) -> Encode:
    """torch.compile in its slowest and best mode, for the shape of `example`."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise Absent("torch.compile needs a C++ compiler, and there is none")
    torch._dynamo.reset()
    model = torch.compile(subject.tuple_module(), mode="max-autotune", dynamic=False)

    def encode(images: Tensor) -> Outputs:
        with torch.no_grad():
            return dict(zip(OUTPUTS, model(images), strict=True))

    return encode


def _openvino(subject: Subject, example: Tensor, precision: str) -> Encode:
    """OpenVINO at the shape of `example`, told to keep to `precision` and to aim for latency; int8
    is NNCF's quantization, whose remaining floats are the runtime's to choose."""
    package = _package("openvino")
    graph = subject.nncf_graph() if precision == "int8" else subject.openvino_graph()
    graph.reshape(list(example.shape))
    hints: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    if precision != "int8":
        hints["INFERENCE_PRECISION_HINT"] = {"fp32": "f32"}.get(precision, precision)
    model = package.Core().compile_model(graph, "CPU", hints)

    def encode(images: Tensor) -> Outputs:
        found = model(images.numpy())
        return {name: torch.from_numpy(found[index]) for index, name in enumerate(OUTPUTS)}

    return encode


def _onnxruntime(subject: Subject, example: Tensor, precision: str) -> Encode:
    """ONNX Runtime with all of its graph optimisations, at the shape of `example`; int8 is its
    dynamic quantization, weights by channel, faster and closer here than its static one."""
    package = _package("onnxruntime")
    for needed in ("onnx", "onnxscript"):
        _package(needed)
    path = subject.folder / f"batch-{len(example)}.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            subject.tuple_module(),
            (example,),
            path,
            dynamo=True,
            input_names=["images"],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    if precision == "int8":
        exported, path = path, path.with_suffix(".int8.onnx")
        quantization = _package("onnxruntime.quantization")
        quantization.quantize_dynamic(
            exported, path, per_channel=True, weight_type=quantization.QuantType.QInt8
        )
    options = package.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = package.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = package.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def encode(images: Tensor) -> Outputs:
        found = session.run(list(OUTPUTS), {"images": images.numpy()})
        return {name: torch.from_numpy(a) for name, a in zip(OUTPUTS, found, strict=True)}

    return encode


def _vit(subject: Subject, example: Tensor, precision: str) -> Encode:
    """Hugging Face's ViTModel at the same width, depth and patches: the backbone alone.

    It has neither the sparse tokens in its sequence nor the spatial map, so it does less. Its
    outputs are held against its own in float64.
    """
    model = subject.vit(precision)

    def encode(images: Tensor) -> Outputs:
        with torch.no_grad():
            return {"last_hidden_state": model(images.to(DTYPES[precision])).last_hidden_state}

    return encode


Maker = Callable[[Subject, Tensor, str], Encode]
VIT = "transformers ViTModel fp32 (backbone only)"
BYTES = "engine bf16, sparse and cls of bytes"
INT8, NNCF = "engine int8", "OpenVINO int8 (NNCF)"
IMPLEMENTATIONS: dict[str, tuple[Maker, str]] = {
    BASELINE: (_eager, "fp32"),
    "reference bf16 eager": (_eager, "bf16"),
    "engine fp32": (_engine, "fp32"),
    "engine bf16": (_engine, "bf16"),
    BYTES: (_engine_few, "bf16"),
    INT8: (_engine, "int8"),
    "torch.compile max-autotune fp32": (_compiled, "fp32"),
    VIT: (_vit, "fp32"),
    "OpenVINO fp32": (_openvino, "fp32"),
    "OpenVINO bf16": (_openvino, "bf16"),
    NNCF: (_openvino, "int8"),
    "ONNX Runtime fp32": (_onnxruntime, "fp32"),
    "ONNX Runtime int8 (dynamic)": (_onnxruntime, "int8"),
}


def outputs_of(name: str) -> tuple[str, ...]:
    """What an implementation gives."""
    return FEW if name == BYTES else OUTPUTS


@dataclass
class Local:
    """An entrant in this process."""

    name: str
    precision: str
    encode: Encode
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def outputs(self) -> tuple[str, ...]:
        return outputs_of(self.name)

    def load(self, images: Tensor) -> None:
        self._images = (images * 255).round().to(torch.uint8) if self.name == BYTES else images

    def run(self) -> float:
        start = time.perf_counter()
        self._found = self.encode(self._images)
        return time.perf_counter() - start

    def fetch(self) -> Outputs:
        return self._found

    def exact(self, images: Tensor) -> None:
        return None


def local(subject: Subject, name: str, example: Tensor) -> Local:
    """An implementation in this process, made for the shape of `example`."""
    make, precision = IMPLEMENTATIONS[name]
    return Local(name, precision, make(subject, example, precision))


class Remote:
    """An implementation in a process of its own, for one shape at a time.

    Raises:
        Absent: by `prepare`, where its package is missing.
        RuntimeError: by any method, with the error of the other process.
    """

    def __init__(self, name: str, config: ModelConfig, folder: Path, threads: int) -> None:
        self.name, self.precision = name, IMPLEMENTATIONS[name][1]
        self.outputs = outputs_of(name)
        self.facts: dict[str, object] = {}
        start = (name, config, folder, threads)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _Worker.start, start)

    def _ask(self, method: Callable[..., Any], *images: Tensor) -> Any:
        try:
            return self._pool.submit(method, *(tensor.numpy() for tensor in images)).result()
        except Absent:
            raise
        except Exception as error:
            raise RuntimeError(f"{self.name}: {type(error).__name__}: {error}") from error

    def prepare(self, example: Tensor) -> None:
        """Makes it for the shape of `example`; `prepare_seconds` lasts to its first result."""
        self.facts = {"prepare_seconds": self._ask(_Worker.prepare, example)}

    def load(self, images: Tensor) -> None:
        self._ask(_Worker.load, images)

    def run(self) -> float:
        return self._ask(_Worker.run)

    def fetch(self) -> Outputs:
        return {name: torch.from_numpy(a) for name, a in self._ask(_Worker.fetch).items()}

    def exact(self, images: Tensor) -> Outputs | None:
        if self.name != VIT:
            return None
        return {name: torch.from_numpy(a) for name, a in self._ask(_Worker.exact, images).items()}

    def close(self) -> None:
        self._pool.shutdown()


class _Worker:
    """What `Remote` asks for, in the other process; arrays travel as NumPy's."""

    name: str
    subject: Subject
    local: Local

    @classmethod
    def start(cls, name: str, config: ModelConfig, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        folder.mkdir(exist_ok=True)
        # An empty cache: what a machine pays that compiles this for the first time.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        cls.name, cls.subject = name, Subject(config, folder)

    @classmethod
    def prepare(cls, example: Any) -> float:
        if hasattr(cls, "local"):
            del cls.local  # of another shape, before there are two
        start = time.perf_counter()
        cls.local = local(cls.subject, cls.name, torch.from_numpy(example))
        cls.load(example)
        cls.run()
        return time.perf_counter() - start

    @classmethod
    def load(cls, images: Any) -> None:
        cls.local.load(torch.from_numpy(images))

    @classmethod
    def run(cls) -> float:
        return cls.local.run()

    @classmethod
    def fetch(cls) -> dict[str, Any]:
        found = cls.local.fetch()
        return {name: value.detach().float().numpy() for name, value in found.items()}

    @classmethod
    def exact(cls, images: Any) -> dict[str, Any]:
        example = torch.from_numpy(images)
        found = _vit(cls.subject, example, "fp64")(example)
        return {name: value.numpy() for name, value in found.items()}
