"""CUDA graphs of the forward pass, one for each batch bucket and kind of input.

A batch is copied into a graph's own input, the graph is replayed, and the results are copied out to
memory of the caller. Rows past the batch hold what an earlier batch left; no image sees another, so
they cost time and nothing else. All graphs of an engine share one memory pool: replays never
overlap, each waits for the one before it, and nothing is read from a graph after the next began.

Capturing costs several forwards, so it is for what comes again: what is new is launched kernel by
kernel, and captured when it is there a second time.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

GRAPHS_KEPT = 64
NAMES_KEPT = 4096  # of batches that were there once
TRIES = 2  # captures of a graph that may fail
# Of each device in this process: a capture fails where another thread waits for the whole device,
# as every capture does before it begins.
_CAPTURE: defaultdict[torch.device, threading.Lock] = defaultdict(threading.Lock)

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

    def forget(self) -> None:
        """Gives back the memory of all graphs, of which none is there any more."""


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
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE[self.device]:
            function()  # compiles what is not compiled yet: that cannot happen while capturing
            current.synchronize()
            # Not torch.cuda.graph: it leaves this thread on its stream where a capture fails.
            with torch.cuda.stream(self.stream):
                graph.capture_begin(self.pool, capture_error_mode="thread_local")
                try:
                    result = function()
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph)
                    raise
        current.wait_stream(self.stream)
        return graph.replay, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture that failed, and allocation from its pool."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        self.forget()

    def forget(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

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
    outputs: list[Tensor]
    forward: Forward  # holds what the graph reads and does not own, such as a position table
    views: dict[int, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    def rows(self, batch: int) -> tuple[Tensor, list[Tensor]]:
        """The first `batch` rows of the input and of each output, looked up after the first time:
        making views takes the host longer than copying them."""
        found = self.views.get(batch)
        if found is None:
            found = self.images[:batch], [tensor[:batch] for tensor in self.outputs]
            self.views[batch] = found
        return found

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + sum(tensor.nbytes for tensor in self.outputs)


class GraphRunner:
    """Runs forwards through graphs.

    Args:
        recorder: how to capture on this device.
        largest: images of the largest bucket.
        output_dtype: of what is handed to the caller.
        is_out_of_memory: tells errors that the caller answers by giving memory up.
        most_bytes: of the inputs and outputs of all graphs that are kept.
    """

    def __init__(
        self,
        recorder: Recorder,
        largest: int,
        output_dtype: torch.dtype,
        is_out_of_memory: Callable[[RuntimeError], bool],
        most_bytes: int,
    ) -> None:
        self._recorder = recorder
        self._largest = largest
        self._output_dtype = output_dtype
        self._is_out_of_memory = is_out_of_memory
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        self._failed: Counter[tuple] = Counter()

    def __len__(self) -> int:
        """How many graphs are kept."""
        return len(self._graphs)

    def run(
        self,
        images: Tensor,
        outputs: tuple[str, ...],
        prepare: Callable[[], Forward],
        out: Mapping[str, Tensor] | None = None,
        at_once: bool = False,
    ) -> Mapping[str, Tensor] | None:
        """A forward of `images` by a graph, in memory of the caller; None where none serves yet.

        Args:
            images: (B, 3, H, W), B at least 1 and at most `largest`, on the device.
            outputs: what is wanted of a forward; with the shape and dtype of `images` they name a
                graph.
            prepare: gives the forward, images on the device -> features, the same for every call
                with this name; called where it is captured, and not where it is replayed.
            out: (B, ...) for each of `outputs`, to be filled; new tensors by default.
            at_once: capture what was not there before.
        """
        if self._recorder.is_capturing():
            return None
        batch, _, height, width = images.shape
        dtype = torch.float32 if images.dtype == torch.float64 else images.dtype
        key = (bucket(batch, self._largest), (height, width), dtype, outputs)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None and (at_once or self._seen_before(key)):
                graph = self._capture(key, prepare())
            if graph is None:
                return None
            self._graphs.move_to_end(key)
            given, found = graph.rows(batch)
            self._recorder.wait()
            try:
                given.copy_(images)
                graph.replay()
                # The device is at work: what the host does from here on costs no time.
                if out is None:
                    dtype, layout = self._output_dtype, torch.contiguous_format
                    made = [torch.empty_like(t, dtype=dtype, memory_format=layout) for t in found]
                    out = dict(zip(outputs, made, strict=True))
                else:
                    made = [out[name] for name in outputs]
                torch._foreach_copy_(made, found)
            finally:
                self._recorder.done()
        return out

    def clear(self) -> bool:
        """Gives up every graph and its memory; whether there was one."""
        with self._lock:
            there = bool(self._graphs)
            if there:
                self._recorder.finish()
                self._graphs.clear()
                self._recorder.forget()
        return there

    def _seen_before(self, key: tuple) -> bool:
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > NAMES_KEPT:
            self._seen.popitem(last=False)
        return False

    def _capture(self, key: tuple, forward: Forward) -> _Graph | None:
        if self._failed[key] >= TRIES:
            return None
        size, (height, width), dtype, names = key
        self._recorder.wait()  # the pool's memory is in use until then
        images = torch.zeros((size, 3, height, width), dtype=dtype, device=self._recorder.device)
        try:
            replay, outputs = self._recorder.record(lambda: forward(images))
        except RuntimeError as error:
            if self._is_out_of_memory(error):
                raise
            self._failed[key] += 1
            warnings.warn(
                f"CUDA graph capture failed, so batches of {size} go on without a graph, at a "
                f"higher cost for small ones: {error}",
                RuntimeWarning,
                stacklevel=6,
            )
            return None
        graph = _Graph(images, replay, [outputs[name] for name in names], forward)
        self._graphs[key] = graph
        self._let_go()
        return graph

    def _let_go(self) -> None:
        """Gives up the graphs that were used longest ago, down to what may be kept."""
        kept = sum(graph.nbytes for graph in self._graphs.values())
        while len(self._graphs) > GRAPHS_KEPT or (len(self._graphs) > 1 < kept / self._most_bytes):
            self._recorder.finish()  # it may be running still
            _, graph = self._graphs.popitem(last=False)
            kept -= graph.nbytes
