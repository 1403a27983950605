"""The OpenVINO backend: the same features as published, on graphs that keep what an engine owes."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from budgets import assert_same_features as assert_same
from checkpoints import golden, images, write_checkpoint
from engine_budgets import (
    assert_draws_as_published,
    assert_encodes_within_budget,
    assert_reconstructs_as_published,
)
from engines import SMALL, SMALL_META, engine_of, image, small_engine
from goldens import (
    ENCODE,
    assert_encodes_as_published,
    slow,
)
from references import reference_of

import stellar_fast
from stellar_fast.engine import backends
from stellar_fast.engine.backends import resolve_backend
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.errors import ForkError, MissingExtraError

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(not backends.has_openvino(), reason="OpenVINO is not installed (extra cpu)"),
]
CPU = torch.device("cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def engine():
    return small_engine(backend="openvino")


@pytest.fixture(scope="module")
def decoding_engine():
    return small_engine(backend="openvino", purpose="reconstruct")


def graphs_of(engine):
    return {name: len(graphs) for name, graphs in engine._runner._graphs.items()}


# --- numbers


@pytest.mark.parametrize("name", ENCODE)
def test_encode_meets_the_published_outputs(name):
    expected, meta = golden(name)
    assert_encodes_as_published(engine_of(meta, backend="openvino").encode, expected, meta)


@pytest.mark.parametrize(
    "name", ["reconstruct-tiny16", *slow("reconstruct-tiny14", "reconstruct-b16")]
)
def test_reconstruct_meets_the_published_outputs(name):
    assert_reconstructs_as_published(name, backend="openvino")


def test_the_pixel_head_meets_the_published_output():
    assert_draws_as_published(backend="openvino")


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("name", ["encode-tiny16", "encode-tiny14-k8", *slow("encode-b16")])
def test_error_budget(name, precision):
    _, meta = golden(name)
    engine = engine_of(meta, precision=precision, backend="openvino")
    x = images(2, 224, 224, meta["image_seed"] + 1)
    assert_encodes_within_budget(engine, reference_of(meta), x, PRECISIONS[precision])


@pytest.mark.parametrize("size", [(16, 16), (16, 320), (100, 75), (320, 64)])
def test_one_graph_serves_every_size_and_batch(engine, size):
    expected = small_engine()
    for batch in (1, 3):
        assert_same(engine.encode(image(batch, *size)), expected.encode(image(batch, *size)))
    assert graphs_of(engine) == {"encode": 1}


@pytest.mark.parametrize(
    "outputs", [("cls",), ("sparse",), ("dense",), ("spatial",), ("lowrank",), ("sparse", "cls")]
)
def test_each_output_alone_is_the_same(engine, outputs):
    x = image(2, 96, 128)
    whole = small_engine().encode(x)
    assert_same(
        small_engine(backend="openvino").encode(x, outputs=outputs),
        {name: whole[name] for name in outputs},
    )


def test_only_the_wanted_rows_are_in_the_last_block():
    """By the graph: rows of what enters the second product of each MLP."""
    from stellar_fast.engine import encoder, openvino_ops
    from stellar_fast.engine.openvino_ops import Node
    from stellar_fast.engine.openvino_runtime import op, ov

    small = small_engine(backend="openvino")
    counts = {}
    for outputs in (("sparse", "cls"), OUTPUTS):
        pixels, table = op.parameter([1, 3, 96, 96]), op.parameter([37, 64])
        nodes = encoder.encode(
            openvino_ops, small._encoder, small.config, Node(pixels), Node(table), outputs,
            torch.float32,
        )  # fmt: skip
        assert [tuple(node.output.shape)[1] for node in nodes.values()] == [
            {"sparse": 8, "cls": 1}.get(name, 36) for name in nodes
        ]
        model = ov.Model([op.result(node.output) for node in nodes.values()], [pixels, table], "")
        counts[outputs] = [
            tuple(node.output(0).shape)[1]
            for node in model.get_ordered_ops()
            if node.get_type_name() == "Gelu"
        ]
    assert counts == {("sparse", "cls"): [45, 45, 9], OUTPUTS: [45, 45, 45]}


def test_a_model_of_one_block():
    meta = {**SMALL_META, "backbone": {**SMALL, "num_hidden_layers": 1}}
    x = image(2, 64, 96)
    assert_same(engine_of(meta, backend="openvino").encode(x), engine_of(meta).encode(x))


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_bytes_go_in_as_bytes(layout):
    x = (image(3, 64, 96) * 255).round().to(torch.uint8)
    given = x if layout == "channels first" else x.permute(0, 2, 3, 1).contiguous()
    small = small_engine(backend="openvino")
    assert_same(small.encode(given), small_engine().encode(x.float() / 255))
    (graph,) = small._runner._graphs["encode"].values()
    assert graph.compiled.inputs[0].element_type.get_type_name() == "u8"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(engine, dtype):
    x = image(2, 64, 64).to(dtype)
    assert_same(engine.encode(x), engine.encode(x.float()))
    out = small_engine(backend="openvino", output_dtype=dtype).encode(x)
    expected = engine.encode(x)
    for name, tensor in out.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype))


# --- what an engine owes


def test_outputs_are_written_into_memory_of_the_caller(engine):
    x = image(5, 64, 64)
    chunked = small_engine(backend="openvino", max_batch=2)
    first = chunked.encode(x)
    assert_same(first, small_engine().encode(x))
    kept = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in chunked.encode(image(5, 64, 64, seed=9)).values():
        tensor.zero_()
    for name, tensor in first.items():
        assert torch.equal(tensor, kept[name])


def test_an_empty_batch(decoding_engine):
    out = decoding_engine.encode(torch.zeros(0, 3, 224, 224))
    assert {name: len(tensor) for name, tensor in out.items()} == dict.fromkeys(OUTPUTS, 0)
    assert decoding_engine.reconstruct(out)["reconstruction"].shape == (0, 3, 224, 224)


def test_reconstruct_takes_each_form_of_features_and_any_grid(decoding_engine):
    expected = small_engine(purpose="reconstruct")
    for side in (32, 64):
        features = decoding_engine.encode(image(3, side, side))
        wanted = expected.reconstruct(features)
        assert_same(decoding_engine.reconstruct(features), wanted)
        parts = {name: features[name] for name in ("sparse", "spatial")}
        assert_same(decoding_engine.reconstruct(parts), wanted)


def test_many_threads_at_once(engine):
    batches = [image(1 + index % 3, 64, 64, seed=index) for index in range(12)]
    alone = [engine.encode(batch) for batch in batches]
    found: list = [None] * len(batches)

    def work(index):
        for _ in range(3):
            found[index] = engine.encode(batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, alone, strict=True):
        for name in OUTPUTS:
            assert torch.equal(one[name], other[name])


def test_one_kind_of_calls_has_one_graph_and_several_share_the_blocks():
    """Of several, that of the blocks is the one with the weights, and they give the same bits."""
    small = small_engine(backend="openvino")
    x = image(1, 32, 32)
    whole = small.encode(x)
    assert graphs_of(small) == {"encode": 1}
    small.encode((x * 255).round().to(torch.uint8))
    (blocks,) = small._runner._graphs["blocks"].values()
    sets = [("cls",), ("sparse",), ("dense",), ("cls", "dense"), ("cls",), ("spatial",), OUTPUTS]
    for names in sets:
        found = small.encode(x, outputs=names)
        assert_same(found, {name: whole[name] for name in names})
    assert all(torch.equal(found[name], whole[name]) for name in OUTPUTS)
    assert graphs_of(small) == {"embed": 2, "blocks": 1, "features": 4}
    assert list(small._runner._graphs["blocks"].values()) == [blocks]


def test_the_callers_memory_is_let_go(engine):
    x = np.full((1, 3, 32, 32), 0.5, np.float32)
    engine.encode(x)
    inside = weakref.ref(x)
    del x
    gc.collect()
    assert inside() is None


def test_weights_are_shared_with_the_graph_not_copied():
    from stellar_fast.engine.openvino_ops import _constant

    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(64, 64).to(dtype)
        node = _constant(weight)
        assert node.get_type_name() == "Constant"
        assert node.data.ctypes.data == weight.data_ptr()


def test_the_callers_switches_do_not_change_the_result():
    x = image(1, 64, 64)
    expected = small_engine(backend="openvino").encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        out = small_engine(backend="openvino").encode(x)
    assert not out["cls"].is_inference() and not out["cls"].requires_grad
    assert_same(out, expected)
    small = small_engine(backend="openvino")
    with torch.device("meta"):
        out = small.encode(x)
    assert_same(out, expected)


def test_threads_are_those_of_torch():
    small = small_engine(backend="openvino")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            small.encode(image(1, 32, 32))
            for graphs in small._runner._graphs.values():
                graph = list(graphs.values())[-1]
                assert graph.compiled.get_property("INFERENCE_NUM_THREADS") == threads
    finally:
        torch.set_num_threads(before)


def _encode_in_child(engine, pipe):
    try:
        engine.encode(torch.zeros(1, 3, 32, 32))
    except ForkError as error:
        pipe.send(str(error))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_gets_an_error_not_a_hang(engine):
    engine.encode(image(1, 32, 32))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_encode_in_child, args=(engine, theirs))
    child.start()
    assert ours.poll(30), "the child hangs"
    assert "spawn" in ours.recv()
    child.join()


def test_an_engine_made_after_a_fork_is_told_too(engine, monkeypatch):
    from stellar_fast.engine import openvino_graphs

    engine.encode(image(1, 32, 32))
    monkeypatch.setattr(openvino_graphs.os, "getpid", lambda: -1)
    with pytest.raises(ForkError, match="backend='torch'"):
        openvino_graphs.OpenVINORunner("fp32")


def test_under_torch_compile(engine):
    x = image(2, 32, 32)

    def pooled(x):
        return engine.encode(x, outputs=("sparse",))["sparse"].mean(1)

    found = torch.compile(pooled, backend="eager")(x)
    assert torch.equal(found, pooled(x))


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_saved_weights_come_back(tmp_path, precision):
    write_checkpoint(tmp_path / "source", "small", backbone=SMALL, num_sparse_tokens=8)
    first = stellar_fast.load(
        "small", repo=tmp_path / "source", device="cpu", precision=precision, backend="openvino"
    )
    x = image(2, 32, 32)
    expected = first.encode(x)
    first.save(tmp_path / "saved")
    again = stellar_fast.load("small", repo=tmp_path / "saved", device="cpu", backend="openvino")
    assert (again.precision, again.backend) == (precision, "openvino")
    for name, tensor in again.encode(x).items():
        assert torch.equal(tensor, expected[name])
    assert again.to("cpu") is again


# --- whether it is there


def test_the_package_is_imported_when_asked_for_alone():
    code = (
        "import sys, stellar_fast\n"
        "stellar_fast.load\n"
        "assert not any(m.partition('.')[0] == 'openvino' for m in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_leaves_no_file_and_sends_nothing(tmp_path):
    code = (
        "import socket, torch, stellar_fast\n"
        "def refuse(*_): raise AssertionError('a connection')\n"
        "socket.socket.connect = refuse\n"
        "engine = stellar_fast.load('small', repo='source', device='cpu', precision='fp32',\n"
        "                           backend='openvino')\n"
        "import sys\n"
        "assert 'openvino' in sys.modules and 'openvino_telemetry' not in sys.modules\n"
        "engine.encode(torch.zeros(1, 3, 32, 32))\n"
    )
    write_checkpoint(tmp_path / "source", "small", backbone=SMALL, num_sparse_tokens=8)
    before = set(tmp_path.rglob("*"))
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(tmp_path.rglob("*")) - before == set()


def test_absent_or_too_old(monkeypatch):
    monkeypatch.setattr(backends.metadata, "version", lambda _: "2024.6.0")
    with pytest.raises(ValueError, match=r"needs OpenVINO 2025\.0 or later, found 2024\.6\.0"):
        resolve_backend("openvino", CPU, "fp32")
    assert resolve_backend("auto", CPU, "fp32") == "torch"
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"backend='openvino'.*stellar-fast\[cpu\]"):
        resolve_backend("openvino", CPU, "fp32")
    assert resolve_backend("auto", CPU, "fp32") == "torch"


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        (torch.device("cuda", 0), "bf16", "computes on CPUs, got cuda:0"),
        (CPU, "fp16", "computes fp32, bf16 and int8, got 'fp16'"),
    ],
)
def test_what_cannot_be_computed_is_refused(monkeypatch, device, precision, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ValueError, match=message):
        resolve_backend("openvino", device, precision)
