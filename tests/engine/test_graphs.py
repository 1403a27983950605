"""CUDA graphs without a GPU: a recorder that replays by computing again, into the same memory.

What a graph gives is what the same forward on a batch of the graph's size gives, bit for bit.
"""

import threading

import pytest
import torch
from engines import image, small_engine

from stellar_fast.engine import encoder
from stellar_fast.engine.graphs import GRAPHS_KEPT, GraphRunner, bucket

pytestmark = pytest.mark.numerical


class FakeRecorder:
    """Replays like a graph: reads the memory it was captured on, rewrites what it returned."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.captured = self.replayed = self.finished = 0
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


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


@pytest.fixture
def recorder():
    return FakeRecorder()


@pytest.fixture
def engine(recorder):
    engine = small_engine(max_batch=16)
    engine._graphs = GraphRunner(recorder, 16, out_of_memory)
    return engine


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


@pytest.mark.parametrize("batch", [1, 2, 9, 11, 16, 21])
def test_padded_batches_give_what_no_graph_gives(engine, recorder, batch):
    for seed in range(2):
        x = image(batch, 64, 64, seed)
        found, expected = engine.encode(x), computed(x)
        for name in expected:
            assert torch.equal(found[name], expected[name])
    chunks = -(-batch // 16)
    assert (recorder.captured, recorder.replayed) == (chunks, 2 * chunks)


def test_outputs_survive_later_replays(engine):
    first = engine.encode(image(2, 64, 64, 1))
    kept = {name: tensor.clone() for name, tensor in first.items()}
    engine.encode(image(2, 64, 64, 2))
    for name, tensor in kept.items():
        assert torch.equal(first[name], tensor)


def test_the_input_is_read_before_encode_returns_and_never_written(engine):
    x = image(3, 64, 64)
    kept = x.clone()
    expected = engine.encode(x)["cls"].clone()
    assert torch.equal(x, kept)
    assert torch.equal(engine.encode(kept)["cls"], expected)


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


def test_uint8_images_of_either_layout_share_one_graph(engine, recorder):
    pixels = (image(2, 64, 64) * 255).byte()
    first = engine.encode(pixels)
    second = engine.encode(pixels.permute(0, 2, 3, 1).contiguous())
    assert recorder.captured == 1
    for name in first:
        assert torch.equal(first[name], second[name])


def test_a_failed_capture_warns_once_and_goes_on_without_graphs(engine, recorder):
    recorder.error = RuntimeError("operation not permitted when stream is capturing")
    x = image(2, 64, 64)
    with pytest.warns(RuntimeWarning, match="goes on without graphs.*not permitted"):
        found = engine.encode(x)
    expected = small_engine().encode(x)
    for name in expected:
        assert torch.equal(found[name], expected[name])
    recorder.error = None
    engine.encode(x)
    assert recorder.captured == 0


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


def test_graphs_are_let_go_after_their_last_replay(recorder):
    runner = GraphRunner(recorder, 4, out_of_memory)
    out = {"x": torch.empty(1, 1)}
    for width in range(1, GRAPHS_KEPT + 3):
        images = torch.ones(1, 3, 1, width)
        assert runner.run(images, ("x",), lambda x: {"x": x.sum((1, 2, 3))[:, None]}, out)
        assert out["x"].item() == 3 * width
    assert len(runner._graphs) == GRAPHS_KEPT
    assert recorder.finished == 2


def test_replays_of_many_threads_do_not_mix(engine, recorder):
    plain = small_engine()
    batches = [image(2, 64, 64, seed) for seed in range(8)]
    expected = [plain.encode(x)["cls"] for x in batches]
    found: list = [None] * 8

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = engine.encode(batches[i])["cls"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert recorder.captured == 1
    assert recorder.order == ["wait", "done"] * 24


def test_an_error_in_the_forward_is_the_callers_and_the_next_batch_works(engine, monkeypatch):
    real = encoder.encode

    def broken(*arguments):
        raise ValueError("broken")

    monkeypatch.setattr(encoder, "encode", broken)
    with pytest.raises(ValueError, match="broken"):
        engine.encode(image(1, 64, 64))
    monkeypatch.setattr(encoder, "encode", real)
    assert engine.encode(image(1, 64, 64))["cls"].isfinite().all()
