"""CUDA graphs without a GPU: a recorder that replays by computing again, into the same memory.

What a graph gives is what the same forward on a batch of the graph's size gives, bit for bit.
"""

import contextlib
import threading
import time
import types

import pytest
import torch
from engines import image, small_engine
from threads import in_threads

from stellar_fast.engine import encoder
from stellar_fast.engine.engine import _is_out_of_memory
from stellar_fast.engine.graphs import GRAPHS_KEPT, CudaRecorder, GraphRunner, bucket

pytestmark = pytest.mark.numerical


class FakeRecorder:
    """Replays like a graph: reads the memory it was captured on, rewrites what it returned."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.captured = self.replayed = self.finished = self.forgotten = 0
        self.capturing = False
        self.error: RuntimeError | None = None
        self.order: list[str] = []

    def is_capturing(self) -> bool:
        return self.capturing

    def record(self, function):
        if self.error is not None:
            raise self.error
        self.captured += 1
        static = {name: tensor.clone() for name, tensor in function().items()}
        for tensor in static.values():
            tensor.fill_(float("nan"))  # nothing computes while a graph is captured

        def replay() -> None:
            assert self.order[-1] == "wait", "replayed before the replay before it was awaited"
            self.replayed += 1
            for name, tensor in function().items():
                static[name].copy_(tensor)

        return replay, static

    def wait(self) -> None:
        self.order.append("wait")

    def done(self) -> None:
        self.order.append("done")

    def finish(self) -> None:
        self.finished += 1

    def forget(self) -> None:
        self.forgotten += 1


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


@pytest.fixture
def recorder():
    return FakeRecorder()


MOST = 1 << 30


@pytest.fixture
def engine(recorder):
    engine = small_engine(max_batch=16)
    engine._graphs = GraphRunner(recorder, 16, torch.float32, out_of_memory, MOST)
    return engine


@pytest.fixture
def at_once(monkeypatch):
    """Batches are captured when they are first there."""
    monkeypatch.setattr(GraphRunner, "_seen_before", lambda *_: True)


def test_what_is_new_is_launched_and_what_comes_again_is_captured(engine, recorder):
    x = image(2, 64, 64)
    first = engine.encode(x)
    assert (recorder.captured, recorder.replayed) == (0, 0)
    engine.encode(image(3, 64, 64))
    assert recorder.captured == 0, "another batch"
    for replays in (1, 2):
        again = engine.encode(x)
        assert (recorder.captured, recorder.replayed) == (1, replays)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_warming_up_launches_and_captures_each_batch_and_size(engine, recorder):
    assert engine.warm_up((1, 9, 40), ((64, 64), (64, 80))) is engine
    assert (recorder.captured, recorder.replayed) == (6, 6), "40 are computed in chunks of 16"
    x = (image(9, 64, 80) * 255).byte()
    assert all(tensor.isfinite().all() for tensor in engine.encode(x).values())
    assert (recorder.captured, recorder.replayed) == (6, 7)
    for batches, sizes in (((0,), ((64, 64),)), ((1,), ((8, 64),))):
        with pytest.raises(ValueError, match="at least"):
            engine.warm_up(batches, sizes)


def test_an_engine_without_graphs_warms_up_too():
    engine = small_engine()
    assert engine.warm_up(dtype=torch.float32, outputs=("cls",)) is engine
    assert engine._tables.nbytes > 0


def test_buckets_hold_every_batch_and_waste_a_quarter_at_most():
    assert [bucket(n, 256) for n in range(1, 9)] == list(range(1, 9))
    for batch in range(1, 257):
        size = bucket(batch, 256)
        assert batch <= size <= 1.25 * batch
        assert bucket(size, 256) == size
    assert {bucket(n, 256) for n in (16, 32, 64, 128, 256)} == {16, 32, 64, 128, 256}
    assert bucket(97, 100) == 100
    assert len({bucket(n, 256) for n in range(1, 257)}) == 28


def computed(images: torch.Tensor, chunk: int = 16) -> dict[str, torch.Tensor]:
    """What an engine without graphs gives for chunks that were padded to their buckets."""
    plain = small_engine(max_batch=16)
    found = []
    for part in images.split(chunk):
        filled = torch.zeros(bucket(len(part), 16), *part.shape[1:])
        filled[: len(part)] = part
        out = plain.encode(filled)
        found.append({name: tensor[: len(part)] for name, tensor in out.items()})
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("batch", [1, 2, 9, 11, 16, 21])
def test_padded_batches_give_what_no_graph_gives(engine, recorder, batch):
    for seed in range(2):
        x = image(batch, 64, 64, seed)
        found, expected = engine.encode(x), computed(x)
        for name in expected:
            assert torch.equal(found[name], expected[name])
    chunks = -(-batch // 16)
    assert (recorder.captured, recorder.replayed) == (chunks, 2 * chunks)


@pytest.mark.usefixtures("at_once")
def test_outputs_survive_later_replays(engine):
    first = engine.encode(image(2, 64, 64, 1))
    kept = {name: tensor.clone() for name, tensor in first.items()}
    engine.encode(image(2, 64, 64, 2))
    for name, tensor in kept.items():
        assert torch.equal(first[name], tensor)


@pytest.mark.usefixtures("at_once")
def test_the_input_is_read_before_encode_returns_and_never_written(engine):
    x = image(3, 64, 64)
    kept = x.clone()
    expected = engine.encode(x)["cls"].clone()
    assert torch.equal(x, kept)
    assert torch.equal(engine.encode(kept)["cls"], expected)


@pytest.mark.usefixtures("at_once")
def test_a_graph_for_each_size_dtype_and_choice_of_outputs(engine, recorder):
    x = image(2, 64, 64)
    engine.encode(x)
    for other in (x.double(), x.expand(2, 3, 64, 64), x.flip(0)):
        engine.encode(other)
    assert recorder.captured == 1, "float64 is computed as float32"
    engine.encode(x, outputs=("cls",))
    engine.encode((x * 255).byte())
    engine.encode(x.half())
    engine.encode(image(2, 64, 80))
    engine.encode(image(3, 64, 64))
    assert recorder.captured == 6


@pytest.mark.usefixtures("at_once")
def test_uint8_images_of_either_layout_share_one_graph(engine, recorder):
    pixels = (image(2, 64, 64) * 255).byte()
    first = engine.encode(pixels)
    second = engine.encode(pixels.permute(0, 2, 3, 1).contiguous())
    assert recorder.captured == 1
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.usefixtures("at_once")
def test_a_capture_that_fails_is_tried_once_more_and_costs_no_other_batch(engine, recorder):
    recorder.error = RuntimeError("operation not permitted when stream is capturing")
    x = image(2, 64, 64)
    expected = small_engine().encode(x)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="batches of 2 go on without.*not permitted"):
            found = engine.encode(x)
        for name in expected:
            assert torch.equal(found[name], expected[name])
    recorder.error = None
    engine.encode(x)
    assert recorder.captured == 0
    engine.encode(image(3, 64, 64))
    assert recorder.captured == 1


@pytest.mark.usefixtures("at_once")
def test_out_of_memory_while_capturing_halves_the_batch(engine, recorder, monkeypatch):
    def record(function):
        images = next(
            cell.cell_contents
            for cell in function.__closure__
            if isinstance(cell.cell_contents, torch.Tensor)
        )
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(function)

    real = recorder.record
    monkeypatch.setattr(recorder, "record", record)
    x = image(11, 64, 64)
    found = engine.encode(x)
    expected = computed(x, chunk=2)
    for name in expected:
        assert torch.equal(found[name], expected[name])
    assert recorder.replayed == 6  # 11 halved to 5 and to 2: chunks of 2, 2, 2, 2, 2, 1


def test_a_caller_who_is_capturing_gets_no_graph_inside_his_own(engine, recorder):
    recorder.capturing = True
    engine.encode(image(2, 64, 64))
    assert (recorder.captured, recorder.replayed) == (0, 0)


@pytest.mark.parametrize(("most", "kept"), [(MOST, GRAPHS_KEPT), (100 * 4 * 3, None), (1, 1)])
def test_graphs_are_let_go_after_their_last_replay(recorder, most, kept):
    runner = GraphRunner(recorder, 4, torch.float32, out_of_memory, most)
    widths = range(1, GRAPHS_KEPT + 3)

    def forward(x):
        return {"x": x.sum((1, 2, 3))[:, None]}

    for width in widths:
        images = torch.ones(1, 3, 1, width)
        out = runner.run(images, ("x",), lambda: forward, at_once=True)
        assert out["x"].item() == 3 * width
        assert len(runner) == 1 or sum(graph.nbytes for graph in runner._graphs.values()) <= most
    if kept is not None:
        assert len(runner) == kept
    assert recorder.finished == len(widths) - len(runner)
    assert runner.clear() and not runner.clear() and len(runner) == 0
    assert recorder.forgotten == 1


@pytest.mark.usefixtures("at_once")
def test_replays_of_many_threads_do_not_mix(engine, recorder):
    plain = small_engine()
    batches = [image(2, 64, 64, seed) for seed in range(8)]
    expected = [plain.encode(x)["cls"] for x in batches]

    def work(x: torch.Tensor) -> torch.Tensor:
        return [engine.encode(x)["cls"] for _ in range(3)][-1]

    for a, b in zip(in_threads(work, batches), expected, strict=True):
        assert torch.equal(a, b)
    assert recorder.captured == 1
    assert recorder.order == ["wait", "wait", "done", *["wait", "done"] * 23]


@pytest.mark.usefixtures("at_once")
def test_graphs_go_before_chunks_are_halved(engine, recorder, monkeypatch):
    engine.encode(image(2, 64, 64))
    engine.encode(image(3, 64, 64))
    left = [1]
    real = recorder.record

    def record(function):
        if left.pop() if left else 0:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return real(function)

    engine._graphs._is_out_of_memory = _is_out_of_memory
    monkeypatch.setattr(recorder, "record", record)
    x = image(4, 64, 64)
    found = engine.encode(x)["cls"]
    assert (recorder.finished, recorder.forgotten, len(engine._graphs)) == (1, 1, 1)
    assert torch.equal(found, computed(x)["cls"]), "whole, by a graph"


@pytest.mark.parametrize(
    ("text", "is_it"),
    [
        ("CUDA error: out of memory", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA driver error: out of memory", True),
        ("out of resource: shared memory, Required: 262144", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_the_drivers_words_for_out_of_memory(text, is_it):
    assert _is_out_of_memory(RuntimeError(text)) == is_it


class FakeCuda:
    """As much of torch.cuda as capturing takes, and what it was asked for."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails, self.log, self.current = fails, [], "caller's"
        self.capturing = threading.Lock()

    def graph(self):
        cuda = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                assert cuda.capturing.acquire(blocking=False), "two captures at once"
                cuda.log.append(f"begin on {cuda.current}")

            def capture_end(self):
                if cuda.capturing.locked():
                    cuda.capturing.release()
                cuda.log.append("end")
                if cuda.fails == "end":
                    raise RuntimeError("capture was invalidated")

            def replay(self): ...

        return Graph()

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def fake_cuda(monkeypatch):
    def install(fails: str | None = None) -> FakeCuda:
        cuda = FakeCuda(fails)

        def stream(name):
            empty = lambda *_: None  # noqa: E731
            return types.SimpleNamespace(name=name, wait_stream=empty, synchronize=empty)

        for name, fake in {
            "graph_pool_handle": lambda: object(),
            "Stream": lambda device: stream("capture's"),
            "Event": lambda: None,
            "CUDAGraph": cuda.graph,
            "current_stream": lambda device: stream(cuda.current),
            "stream": cuda.stream,
            "empty_cache": lambda: cuda.log.append("emptied"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        ended = lambda index, pool: cuda.log.append(f"pool of {index} ended")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
        return cuda

    return install


DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("fails", ["forward", "end"])
def test_a_failed_capture_leaves_stream_and_memory_as_they_were(fake_cuda, fails):
    cuda = fake_cuda(fails)
    recorder = CudaRecorder(DEVICE)
    pool = recorder.pool

    def forward():
        if cuda.fails == "forward" and cuda.current == "capture's":
            raise RuntimeError("operation not permitted")
        return {}

    with pytest.raises(RuntimeError, match=r"not permitted|invalidated"):
        recorder.record(forward)
    assert cuda.current == "caller's" and not cuda.capturing.locked()
    assert "pool of 0 ended" in cuda.log and recorder.pool is not pool
    cuda.fails = None
    recorder.record(forward)
    assert cuda.log[-2:] == ["begin on capture's", "end"]


def test_engines_of_one_device_capture_one_after_another(fake_cuda):
    cuda = fake_cuda()
    recorders = [CudaRecorder(DEVICE) for _ in range(4)]

    def forward():
        if cuda.capturing.locked():
            time.sleep(0.02)
        return {}

    in_threads(lambda recorder: recorder.record(forward), recorders)
    assert cuda.log.count("end") == 4


def test_an_error_in_the_forward_is_the_callers_and_the_next_batch_works(engine, monkeypatch):
    real = encoder.encode

    def broken(*arguments):
        raise ValueError("broken")

    monkeypatch.setattr(encoder, "encode", broken)
    with pytest.raises(ValueError, match="broken"):
        engine.encode(image(1, 64, 64))
    monkeypatch.setattr(encoder, "encode", real)
    assert engine.encode(image(1, 64, 64))["cls"].isfinite().all()
