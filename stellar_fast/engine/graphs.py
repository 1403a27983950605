"""CUDA graphs of the forward pass, one for each batch bucket and kind of input.

A batch is copied into a graph's own input, the graph is replayed, and the results are copied out to
memory of the caller. Rows past the batch hold what an earlier batch left; no image sees another, so
they cost time and nothing else. All graphs of an engine share one memory pool: replays never
overlap, each waits for the one before it, and nothing is read from a graph after the next began.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

GRAPHS_KEPT = 64

Forward = Callable[[Tensor], dict[str, Tensor]]


def bucket(batch: int, largest: int) -> int:
    """The batch size of the graph that serves `batch`: 1 to 8, then four steps an octave."""
    quantum = 1 << max(0, (batch - 1).bit_length() - 3)
    return min(-(-batch // quantum) * quantum, largest)


class Recorder(Protocol):
    """What capturing needs of a device."""

    device: torch.device

    def is_capturing(self) -> bool:
        """Whether the caller is capturing a graph of its own on the current stream."""

    def record(self, function: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], Any]:
        """Captures `function`: how to replay it, and what it returned, rewritten by each replay."""

    def wait(self) -> None:
        """Makes the current stream wait for the last `done`."""

    def done(self) -> None:
        """Marks that what the current stream has been given ends the use of the graphs."""

    def finish(self) -> None:
        """Waits until the last `done` has come to pass."""


class CudaRecorder:
    """Captures on a stream of its own, thread-locally, into one pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.event = torch.cuda.Event()

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def record(self, function: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], Any]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()  # compiles what is not compiled yet: that cannot happen while capturing
            function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            result = function()
        current.wait_stream(self.stream)
        return graph.replay, result

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def done(self) -> None:
        self.event.record(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        self.event.synchronize()


@dataclass
class _Graph:
    images: Tensor
    replay: Callable[[], None]
    outputs: dict[str, Tensor]
    forward: Forward  # holds what the graph reads and does not own, such as a position table


class GraphRunner:
    """Runs forwards through graphs.

    Args:
        recorder: how to capture on this device.
        largest: images of the largest bucket.
        is_out_of_memory: tells errors that the caller answers with smaller batches.
    """

    def __init__(
        self,
        recorder: Recorder,
        largest: int,
        is_out_of_memory: Callable[[RuntimeError], bool],
    ) -> None:
        self._recorder = recorder
        self._largest = largest
        self._is_out_of_memory = is_out_of_memory
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._failed = False

    def run(
        self, images: Tensor, outputs: tuple[str, ...], forward: Forward, out: Mapping[str, Tensor]
    ) -> bool:
        """Fills `out` from `forward(images)`; False, and nothing done, where no graph can serve.

        Args:
            images: (B, 3, H, W), B at least 1 and at most `largest`, on any device.
            outputs: what `forward` returns; with the shape and dtype of `images` it names a graph.
            forward: images on the device -> features, the same for every call with this name.
            out: (B, ...) for each of `outputs`.
        """
        if self._failed or self._recorder.is_capturing():
            return False
        size = bucket(len(images), self._largest)
        dtype = torch.float32 if images.dtype == torch.float64 else images.dtype
        key = (size, tuple(images.shape[2:]), dtype, outputs)
        with self._lock:
            self._recorder.wait()
            try:
                graph = self._graphs.get(key) or self._capture(key, forward)
                if graph is None:
                    return False
                self._graphs.move_to_end(key)
                graph.images[: len(images)].copy_(images)
                graph.replay()
                for name, tensor in out.items():
                    tensor.copy_(graph.outputs[name][: len(images)])
            finally:
                self._recorder.done()
        return True

    def _capture(self, key: tuple, forward: Forward) -> _Graph | None:
        size, (height, width), dtype, _ = key
        images = torch.zeros((size, 3, height, width), dtype=dtype, device=self._recorder.device)
        try:
            replay, outputs = self._recorder.record(lambda: forward(images))
        except RuntimeError as error:
            if self._is_out_of_memory(error):
                raise
            self._failed = True
            warnings.warn(
                f"CUDA graph capture failed, so this engine goes on without graphs, at a higher "
                f"cost for small batches: {error}",
                RuntimeWarning,
                stacklevel=6,
            )
            return None
        graph = _Graph(images, replay, outputs, forward)
        self._graphs[key] = graph
        if len(self._graphs) > GRAPHS_KEPT:
            self._recorder.finish()  # it may be running still
            self._graphs.popitem(last=False)
        return graph
