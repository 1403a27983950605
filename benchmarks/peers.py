"""What a STELLAR model can be run with on a CPU: ours, plain PyTorch, and others' runtimes.

Every function gives an `Entrant`, or raises `Absent` with the reason where a package is missing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import footprint
import harness
import torch
from contest import BASELINE, Encode, Entrant
from stellar_fast.reference.model import STELLARModel
from torch import Tensor, nn

import stellar_fast
from stellar_fast.config import ModelConfig
from stellar_fast.encoder import OUTPUTS
from stellar_fast.loading import SYNTHETIC_SEED
from stellar_fast.names import encode_shapes
from stellar_fast.synthetic import synthetic_state

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


class Absent(Exception):
    """A peer cannot take part here; the message says why."""


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed (extra `peers`): {error}") from error


@contextlib.contextmanager
def _without_root() -> Iterator[None]:
    """Without this repository's root in the path, whose `kernels/` transformers would take for the
    package of that name."""
    before = sys.path[:]
    sys.path[:] = [entry for entry in before if Path(entry).resolve() != harness.ROOT]
    try:
        yield
    finally:
        sys.path[:] = before


class Subject:
    """One model with seeded random weights, and the implementations that are always there.

    Args:
        config: its geometry, published or not.
        folder: where `config.json` for the engine's loader is put.
    """

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        footprint.write_config(config, folder)
        self.reference = functools.cache(self._reference)

    def _reference(self, precision: str) -> STELLARModel:
        model = STELLARModel(
            num_sparse_tokens=self.config.num_sparse_tokens,
            spatial_temp=self.config.spatial_temp,
            vit_pretrained=self.config.backbone,
            do_recon=False,
            do_clustering=False,
        )
        state = synthetic_state(encode_shapes(self.config), SYNTHETIC_SEED)
        model.load_state_dict(state, strict=False)
        return model.to(DTYPES[precision]).eval().requires_grad_(False)

    def eager(self, precision: str) -> Encode:
        model = self.reference(precision)

        def encode(images: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                return model.encode(images)

        return encode

    def plain(self, precision: str) -> Entrant:
        name = BASELINE if precision == "fp32" else f"reference {precision} eager"
        return Entrant(name, precision, self.eager(precision))

    def engine(self, precision: str) -> Entrant:
        """Ours, with the loader's defaults."""
        engine = stellar_fast.load(
            self.config.name,
            repo=self.folder,
            device="cpu",
            precision=precision,
            weights="synthetic",
        )
        return Entrant(f"engine {precision}", precision, engine.encode)

    def tuple_module(self) -> nn.Module:
        return _Tuple(self.reference("fp32")).eval()


class _Tuple(nn.Module):
    """The reference with its outputs as a tuple, which model converters want."""

    def __init__(self, model: STELLARModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out = self.model.encode(images)
        return tuple(out[name] for name in OUTPUTS)


def compiled(subject: Subject, example: Tensor) -> Entrant:
    """torch.compile in its slowest and best mode, for the shape of `example`."""
    torch._dynamo.reset()
    model = torch.compile(subject.tuple_module(), mode="max-autotune", dynamic=False)

    def encode(images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(OUTPUTS, model(images), strict=True))

    start = time.perf_counter()
    encode(example)
    # Without caches: what a machine pays that compiles this for the first time.
    facts = {"prepare_seconds": time.perf_counter() - start}
    return Entrant("reference fp32 torch.compile max-autotune", "fp32", encode, facts=facts)


def openvino(subject: Subject, example: Tensor, precision: str) -> Entrant:
    """OpenVINO at the shape of `example`, told to keep to `precision` and to aim for latency."""
    package = _package("openvino")
    start = time.perf_counter()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's, about sizes that it takes for constant
        model = package.convert_model(
            subject.tuple_module(), example_input=example, input=list(example.shape)
        )
    hints = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision),
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled_model = package.Core().compile_model(model, "CPU", hints)
    facts = {"prepare_seconds": time.perf_counter() - start}

    def encode(images: Tensor) -> dict[str, Tensor]:
        found = compiled_model(images.numpy())
        return {name: torch.from_numpy(found[index]) for index, name in enumerate(OUTPUTS)}

    return Entrant(f"OpenVINO {precision}", precision, encode, facts=facts)


def onnxruntime(subject: Subject, example: Tensor, folder: Path) -> Entrant:
    """ONNX Runtime with all of its graph optimisations, at the shape of `example`."""
    package = _package("onnxruntime")
    for needed in ("onnx", "onnxscript"):
        _package(needed)
    path = folder / f"batch-{len(example)}.onnx"
    start = time.perf_counter()
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
    options = package.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = package.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = package.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    facts = {"prepare_seconds": time.perf_counter() - start}

    def encode(images: Tensor) -> dict[str, Tensor]:
        found = session.run(list(OUTPUTS), {"images": images.numpy()})
        return {name: torch.from_numpy(a) for name, a in zip(OUTPUTS, found, strict=True)}

    return Entrant("ONNX Runtime fp32", "fp32", encode, facts=facts)


def transformers_vit(subject: Subject) -> Entrant:
    """Hugging Face's ViTModel at the same width, depth and patches: the backbone alone.

    It has neither the sparse tokens in its sequence nor the spatial map, so it does less. Its
    outputs are held against its own in float64.
    """
    with _without_root():
        package = _package("transformers")
        vit_config, vit_model = package.ViTConfig, package.ViTModel  # imported when asked for
    backbone = subject.config.backbone
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
    exact = vit_model(config, add_pooling_layer=False).eval()
    exact.load_state_dict(model.state_dict())

    def run(model: nn.Module, dtype: torch.dtype) -> Encode:
        model = model.to(dtype)

        def encode(images: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"last_hidden_state": model(images.to(dtype)).last_hidden_state}

        return encode

    facts = {"attention": config._attn_implementation, "backbone_only": True}
    return Entrant(
        "transformers ViTModel fp32 (backbone only)",
        "fp32",
        run(model, torch.float32),
        run(exact, torch.float64),
        facts,
    )


def present(
    makers: dict[str, Callable[[], Entrant]],
) -> tuple[list[Entrant], dict[str, str]]:
    """The entrants that are there, and for the others the reason why not."""
    entrants, absent = [], {}
    for name, make in makers.items():
        try:
            entrants.append(make())
        except Absent as reason:
            absent[name] = str(reason)
    return entrants, absent
