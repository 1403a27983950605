"""What an engine promises beside its numbers: ownership, chunks, memory, threads, processes."""

import multiprocessing

import numpy as np
import pytest
import torch
from budgets import TENSOR
from budgets import assert_same_features as assert_same
from checkpoints import relative_error
from engines import image, small_engine
from threads import in_threads

from stellar_fast.engine import encoder, torch_ops
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.engine.engine import Engine
from stellar_fast.errors import ForkError, ImageError, MissingExtraError, StellarError

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def engine() -> Engine:
    return small_engine()


@pytest.fixture(scope="module")
def decoding_engine() -> Engine:
    return small_engine(purpose="reconstruct")


def test_shapes_and_dtypes(engine):
    out = engine.encode(image(2, 96, 160))
    shapes = {name: tuple(tensor.shape) for name, tensor in out.items()}
    assert shapes == {
        "sparse": (2, 8, 64),
        "spatial": (2, 60, 8),
        "dense": (2, 60, 64),
        "lowrank": (2, 60, 64),
        "cls": (2, 1, 64),
    }
    assert {tensor.dtype for tensor in out.values()} == {torch.float32}
    sums = out["spatial"].sum(-1)  # of eight numbers, each rounded
    assert (sums - 1).abs().max() <= 8 * torch.finfo(torch.float32).eps
    assert relative_error(out["lowrank"], out["spatial"] @ out["sparse"]) < TENSOR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_dtype(dtype):
    out = small_engine(output_dtype=dtype).encode(image(1, 64, 64))
    assert {tensor.dtype for tensor in out.values()} == {dtype}


def test_ragged_edges_are_dropped(engine):
    x = image(1, 100, 75)
    assert_same(engine.encode(x), engine.encode(x[:, :, :96, :64]))


@pytest.mark.parametrize("size", [(16, 16), (16, 320), (320, 64)])
def test_any_size_of_at_least_one_patch(engine, size):
    out = engine.encode(image(1, *size))
    assert out["dense"].shape[1] == size[0] * size[1] // 256
    assert all(tensor.isfinite().all() for tensor in out.values())


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images_are_finite(engine, value):
    out = engine.encode(torch.full((1, 3, 224, 224), value))
    assert all(tensor.isfinite().all() for tensor in out.values())


def test_empty_batch_gives_empty_outputs(decoding_engine):
    for batch in (torch.zeros(0, 3, 224, 224), torch.zeros(0, 224, 224, 3, dtype=torch.uint8), []):
        out = decoding_engine.encode(batch)
        assert {name: len(tensor) for name, tensor in out.items()} == dict.fromkeys(OUTPUTS, 0)
        assert out["spatial"].shape == (0, 196, 8)
        assert decoding_engine.reconstruct(out)["reconstruction"].shape == (0, 3, 224, 224)


def test_rows_do_not_depend_on_the_batch(engine):
    x = image(7, 96, 96)
    whole = engine.encode(x)
    for index in range(7):
        alone = engine.encode(x[index : index + 1])
        assert_same(alone, {name: tensor[index : index + 1] for name, tensor in whole.items()})


@pytest.mark.parametrize("subset", [("cls",), ("sparse",), ("dense",), ("spatial",), ("lowrank",)])
def test_each_output_alone_is_the_same(engine, subset):
    x = image(2, 96, 128)
    whole = engine.encode(x)
    assert_same(engine.encode(x, outputs=subset), {name: whole[name] for name in subset})


@pytest.mark.parametrize(
    ("outputs", "rows"),
    [
        (("cls",), 1),
        (("sparse", "cls"), 9),
        (("sparse",), 8),
        (("dense",), 36),
        (("spatial",), 44),
        (OUTPUTS, 45),
    ],
)
def test_the_last_block_runs_on_the_wanted_rows_alone(outputs, rows, monkeypatch):
    calls = []

    def counted(function):
        def linear(x, weight, bias, *arguments, **keywords):
            calls.append((x.shape[1], len(bias)))
            return function(x, weight, bias, *arguments, **keywords)

        return linear

    for name in ("linear", "linear_residual"):
        monkeypatch.setattr(torch_ops, name, counted(getattr(torch_ops, name)))
    small_engine().encode(image(1, 96, 96), outputs=outputs)
    whole_block = [(45, 192), (45, 64), (45, 256), (45, 64)]
    last_block = [(45, 128), (rows, 64), (rows, 64), (rows, 256), (rows, 64)]
    mapped = bool({"spatial", "lowrank"} & set(outputs))
    projections = [(36, 64), (8, 64)] if mapped else []
    assert calls == 2 * whole_block + last_block + projections


def test_wanted_rows_are_in_the_sequence_order():
    assert list(encoder.wanted_rows(("sparse", "cls"), 36, 8)) == ["cls", "sparse"]
    assert list(encoder.wanted_rows(("lowrank",), 36, 8)) == ["dense", "sparse"]


def test_outputs_belong_to_the_caller(engine):
    x = image(1, 96, 96)
    first = engine.encode(x)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    memory = [tensor.untyped_storage().data_ptr() for tensor in (*first.values(), x)]
    assert len(set(memory)) == len(memory)
    for tensor in engine.encode(image(1, 96, 96, seed=9)).values():
        tensor.zero_()
    assert_same(first, kept)
    assert_same(engine.encode(x), kept)


def test_the_input_is_left_alone(engine):
    x = image(2, 64, 64)
    before = x.clone()
    engine.encode(x)
    assert torch.equal(x, before)


def test_outputs_can_be_trained_on_even_from_inference_mode(engine):
    with torch.inference_mode():
        features = engine.encode(image(2, 64, 64).requires_grad_())["cls"]
    assert not features.is_inference()
    assert not features.requires_grad
    probe = torch.nn.Linear(64, 3)
    probe(features).sum().backward()
    assert probe.weight.grad.abs().sum() > 0


def test_the_callers_switches_do_not_change_the_result(engine):
    x = image(1, 64, 64)
    expected = engine.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(engine.encode(x), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(engine.encode(x), expected)
        assert_same(small_engine().encode(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 8])
def test_chunks_lose_and_reorder_nothing(engine, max_batch):
    x = image(5, 64, 64)
    assert_same(small_engine(max_batch=max_batch).encode(x), engine.encode(x))


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1), (1, 2)])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_chunk_and_goes_on(engine, monkeypatch, failing, error):
    x = image(9, 64, 64)
    expected = engine.encode(x)
    real, sizes = encoder.encode, []

    def encode(ops, weights, config, images, *arguments):
        sizes.append(len(images))
        if len(sizes) - 1 in failing:
            raise error
        return real(ops, weights, config, images, *arguments)

    monkeypatch.setattr(encoder, "encode", encode)
    assert_same(small_engine(max_batch=4).encode(x), expected)
    succeeded = [size for call, size in enumerate(sizes) if call not in failing]
    assert sum(succeeded) == 9
    assert len(sizes) == len(succeeded) + len(failing)


def test_too_little_memory_for_one_image_is_an_error(engine, monkeypatch):
    def encode(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(encoder, "encode", encode)
    with pytest.raises(StellarError, match="not enough memory on cpu for one image"):
        engine.encode(image(4, 64, 64))


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(engine, monkeypatch):
    calls = []

    def encode(*_):
        calls.append(1)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(encoder, "encode", encode)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.encode(image(4, 64, 64))
    assert len(calls) == 1


def test_eight_threads(engine):
    batches = [image(1 + seed % 3, 64, 64 + 16 * (seed % 4), seed) for seed in range(16)]
    expected = [engine.encode(x) for x in batches]

    def work(offset: int) -> None:
        for step in range(16):
            index = (step + offset) % 16
            assert_same(engine.encode(batches[index]), expected[index])

    in_threads(work, range(8))


def _encode_in_child(engine: Engine, pipe) -> None:
    try:
        engine.encode(image(1, 64, 64))
    except ForkError as error:
        pipe.send(str(error))
    else:
        pipe.send("no error")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_gets_an_error_not_a_hang(engine):
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(
        target=_encode_in_child, args=(engine, theirs)
    )
    child.start()
    assert ours.poll(30), "the child hangs"
    assert "spawn" in ours.recv()
    child.join()


def test_reconstruct_takes_each_form_of_features(decoding_engine):
    features = decoding_engine.encode(image(3, 64, 64))
    expected = decoding_engine.reconstruct(features)
    assert expected["reconstruction"].shape == (3, 3, 64, 64)
    assert expected["tokens"].dtype == torch.int64
    assert 0 <= expected["reconstruction"].min() <= expected["reconstruction"].max() <= 1
    sparse, spatial = features["sparse"], features["spatial"]
    assert_same(decoding_engine.reconstruct(sparse, spatial), expected)
    assert_same(decoding_engine.reconstruct({"sparse": sparse, "spatial": spatial}), expected)
    chunked = small_engine(purpose="reconstruct", max_batch=2)
    assert_same(chunked.reconstruct({"lowrank": features["lowrank"]}), expected)


@pytest.mark.parametrize(
    ("features", "spatial", "message"),
    [
        ({}, None, "needs 'lowrank'"),
        ({"sparse": torch.zeros(1, 8, 64)}, None, "needs 'lowrank'"),
        (torch.zeros(1, 8, 64), None, "spatial is missing"),
        (torch.zeros(1, 8, 32), torch.zeros(1, 196, 8), r"sparse must be .*\(1, 8, 32\)"),
        (torch.zeros(1, 7, 64), torch.zeros(1, 196, 8), r"sparse must be .*\(1, 7, 64\)"),
        (torch.zeros(2, 8, 64), torch.zeros(1, 196, 8), "sparse must be"),
        ({"lowrank": torch.zeros(1, 200, 64)}, None, "square grid .* 200 patches"),
        ({"lowrank": torch.zeros(1, 196, 64, dtype=torch.int64)}, None, "int64"),
    ],
)
def test_bad_features_are_one_clear_error(decoding_engine, features, spatial, message):
    with pytest.raises(ValueError, match=message):
        decoding_engine.reconstruct(features, spatial)


def test_features_that_are_no_tensors_or_given_twice(decoding_engine):
    array = np.zeros((1, 196, 64), np.float32)
    with pytest.raises(TypeError, match="lowrank must be a tensor, got ndarray"):
        decoding_engine.reconstruct({"lowrank": array})
    with pytest.raises(TypeError, match="takes a features dict or tensors, got ndarray"):
        decoding_engine.reconstruct(array)
    with pytest.raises(ValueError, match="has its own"):
        decoding_engine.reconstruct({"lowrank": torch.zeros(1, 196, 64)}, torch.zeros(1, 196, 8))


def test_errors_survive_the_way_between_processes():
    import pickle

    for error in (MissingExtraError("a picture", "viz"), ImageError("a.jpg", "empty file")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_reconstruct_without_the_decoder_says_how_to_load_it(engine):
    with pytest.raises(ValueError, match="purpose='reconstruct'"):
        engine.reconstruct(engine.encode(image(1, 64, 64)))


def test_to_is_a_modules_to(monkeypatch):
    engine = small_engine(purpose="reconstruct")
    features = engine.encode(image(1, 64, 64))
    expected = engine.reconstruct(features)
    assert engine.to("cpu") is engine.to(torch.device("cpu")) is engine
    with pytest.raises(ValueError, match="usable CUDA devices"):
        engine.to("cuda:99")
    # A move without a second device: what is done on the way must give the weights back.
    engine.device = torch.device("meta")
    assert engine.to("cpu") is engine
    assert engine.device == torch.device("cpu")
    assert_same(engine.encode(image(1, 64, 64)), features)
    assert_same(engine.reconstruct(features), expected)


def test_an_engine_is_not_pickled_by_accident(engine):
    import pickle

    with pytest.raises(TypeError, match=r"load one in each process"):
        pickle.dumps(engine)
