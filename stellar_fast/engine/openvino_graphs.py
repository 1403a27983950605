"""Forwards as OpenVINO graphs: traced once over nodes, compiled, and run on the caller's memory."""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ForkError
from ..weights.packed import map_nodes
from ..weights.residency import let_go, trim
from .openvino_ops import Node
from .openvino_runtime import op, ov

# Compiled graphs of one forward: its inputs may be of two dtypes, or number two or three.
GRAPHS_KEPT = 2
HINTS = {"fp32": "f32", "bf16": "bf16"}
_TYPES = {torch.uint8: ov.Type.u8, torch.float32: ov.Type.f32}

Forward = Callable[..., Mapping[str, Any]]


@functools.cache
def _started() -> tuple[ov.Core, int]:
    return ov.Core(), os.getpid()


def is_left_behind() -> bool:
    """Whether the runtime was started before this process was forked."""
    return _started.cache_info().currsize > 0 and _started()[1] != os.getpid()


def _core() -> ov.Core:
    """The runtime of this process.

    Raises:
        ForkError: it was started before the process was forked, and its threads are not here.
    """
    if is_left_behind():
        raise ForkError(
            "OpenVINO was in use before this process was forked, and would wait here for threads "
            "that only the parent has: start workers with 'spawn' or 'forkserver', or load with "
            "backend='torch'"
        )
    return _started()[0]


def _contiguous(tensor: Tensor) -> Tensor:
    """As a graph takes it: uint8 as it is, all else in float32."""
    tensor = tensor.detach().cpu()
    return (tensor if tensor.dtype == torch.uint8 else tensor.float()).contiguous()


def _shared(tensor: Tensor) -> ov.Tensor:
    return ov.Tensor(tensor.numpy(), shared_memory=True)


class _Graph:
    """A compiled graph, for any number of calls at a time, each by a request of its own.

    One request is kept with its memory for what the graph computes in between, which the next call
    finds mapped. Of inputs and outputs it has the addresses alone, until each call sets its own.
    """

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self.compiled = compiled
        self._kept: ov.InferRequest | None = None
        self._lock = threading.Lock()

    def infer(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        with self._lock:
            request, self._kept = self._kept, None
        if request is None:
            request = self.compiled.create_infer_request()
        for index, tensor in enumerate(inputs):
            request.set_input_tensor(index, _shared(tensor))
        for index, tensor in enumerate(outputs):
            request.set_output_tensor(index, _shared(tensor))
        request.infer()
        # Not behind an error, when nobody knows in which state it is.
        self._kept = request


class OpenVINORunner:
    """Runs forwards over `openvino_ops` for any number of threads, each call by a request of its
    own on as many threads as torch has.

    Args:
        precision: "fp32" or "bf16", of what the graphs do not say is on integers.

    Raises:
        ForkError: OpenVINO was in use before this process was forked.
    """

    def __init__(self, precision: str) -> None:
        _core()
        self.precision = precision
        self._lock = threading.Lock()
        self._graphs: dict[str, OrderedDict[Hashable, _Graph]] = {}
        self._kinds: dict[str, Hashable] = {}

    def is_sole(self, name: str, kind: Hashable) -> bool:
        """Whether all calls of a forward were of this kind; its graphs go where they are not."""
        with self._lock:
            if self._kinds.setdefault(name, kind) == kind:
                return True
            self._kinds[name] = None
            self._graphs.pop(name, None)
            return False

    def run(
        self,
        name: str,
        forward: Forward,
        inputs: Sequence[tuple[Tensor, tuple[int, ...]]],
        out: Mapping[str, Tensor],
        weights: Any = None,
        kept: int = GRAPHS_KEPT,
    ) -> None:
        """Fills `out` by `forward` of the inputs.

        Args:
            name: of the forward: the same for every call with the same one.
            forward: nodes, one for each input, -> the nodes of `out`'s names.
            inputs: tensors, each with the shape that `forward` is for, -1 where any will do.
            out: contiguous tensors of the results' shapes, of any float dtype, or int64.
            weights: dataclasses of those that `forward` reads; the graph keeps copies, as the
                processor's products read them, and those in files are let go.
            kept: graphs of this forward.
        """
        tensors = [_contiguous(tensor) for tensor, _ in inputs]
        shapes = [shape for _, shape in inputs]
        kinds = [tensor.dtype for tensor in tensors]
        key = (tuple(out), tuple(kinds), torch.get_num_threads())
        with self._lock:
            graphs = self._graphs.setdefault(name, OrderedDict())
            new = key not in graphs
            if new and len(graphs) == kept:
                graphs.popitem(last=False)  # first: two at a time take twice the memory
            graph = graphs.get(key) or self._compile(forward, shapes, kinds, tuple(out))
            graphs[key] = graph
            graphs.move_to_end(key)
        rounded: dict[str, Tensor] = {}
        constants: list[Tensor] = []
        for output, result in out.items():
            if result.dtype not in (torch.float32, torch.int64):
                rounded[output] = torch.empty_like(result, dtype=torch.float32)
        graph.infer(tensors, [rounded.get(output, result) for output, result in out.items()])
        if new:  # packed as they are first read
            map_nodes(weights, Tensor, constants.append)
            let_go(constants)
            trim()
        for output, wide in rounded.items():
            out[output].copy_(wide)

    def _compile(
        self,
        forward: Forward,
        shapes: Sequence[tuple[int, ...]],
        kinds: Sequence[torch.dtype],
        outputs: tuple[str, ...],
    ) -> _Graph:
        inputs = [
            op.parameter(list(shape), _TYPES[kind])
            for shape, kind in zip(shapes, kinds, strict=True)
        ]
        nodes = (Node(node, kind) for node, kind in zip(inputs, kinds, strict=True))
        found = forward(*nodes)
        results = [op.result(found[name].output) for name in outputs]
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            # A thread that is bound to a core waits for whoever else is busy there.
            "ENABLE_CPU_PINNING": False,
        }
        model = ov.Model(results, inputs, "stellar")
        return _Graph(_core().compile_model(model, "CPU", settings))
