"""The engine on compiled kernels under CUDA graphs: real geometries, streams, threads, memory."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budgets import assert_within_budget
from checkpoints import golden, images
from engine_budgets import assert_encodes_within_budget
from engines import engine_of, image, small_engine
from goldens import ENCODE, assert_encodes_as_published
from references import reference_of
from threads import in_threads

import stellar_fast
from stellar_fast.engine import encoder
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.precision import DTYPES
from stellar_fast.reference import ops as oracles

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32")]
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
fp8 = pytest.param("fp8", marks=pytest.mark.skipif(not HAS_FP8, reason="this GPU has no FP8"))


def engine_on(meta, **keywords):
    return engine_of(meta, backend="triton", device="cuda", cuda_graphs=True, **keywords)


def small(**keywords):
    return small_engine(backend="triton", device="cuda", cuda_graphs=True, **keywords)


@pytest.mark.parametrize("name", ENCODE)
def test_encode_meets_the_published_outputs(name):
    expected, meta = golden(name)
    assert_encodes_as_published(engine_on(meta).encode, expected, meta, "cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ENCODE)
def test_encode_error_budget(name, precision):
    _, meta = golden(name)
    x = images(4, 224, 224, meta["image_seed"] + 1).cuda()
    engine = engine_on(meta, precision=precision, output_dtype=torch.float64)
    assert_encodes_within_budget(engine, reference_of(meta).cuda(), x, DTYPES[precision])


@pytest.mark.skipif(not HAS_FP8, reason="this GPU has no FP8")
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", ["encode-b16", "encode-l16", "encode-h16"])
def test_fp8_error_budget(name, calibrated):
    """As far from float64 as plain PyTorch is with the same weights, twice at most."""
    _, meta = golden(name)
    x = images(4, 224, 224, 3).cuda()
    engine = engine_on(meta, precision="fp8", output_dtype=torch.float64)
    if calibrated:
        engine.calibrate(x)
    ours = engine.encode(x)
    with torch.no_grad():
        exact = reference_of(meta).cuda().encode(x.double())
    weights, grid = engine._encoder, engine.config.backbone.grid
    table = weights.table.table(grid, grid)
    plain = encoder.encode(oracles, weights, engine.config, x, table, OUTPUTS, torch.float32)
    for key in OUTPUTS:
        assert_within_budget(ours[key], plain[key], exact[key], DTYPES["fp8"], name=key)
    peak = (ours["spatial"] - exact["spatial"]).abs().max()
    assert peak <= 2 * (plain["spatial"].double() - exact["spatial"]).abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", fp8])
def test_an_image_does_not_see_its_batch(precision):
    """Bit for bit, whatever tiles the size of the batch takes."""
    _, meta = golden("encode-b16")
    engine = engine_on(meta, precision=precision, max_batch=256)
    x = images(256, 224, 224, 5).cuda()
    whole = engine.encode(x)
    for size in (1, 2, 7, 33, 100):
        part = engine.encode(x[50 : 50 + size])
        for name in whole:
            assert torch.equal(part[name], whole[name][50 : 50 + size]), (name, size)


@pytest.mark.parametrize("precision", ["bf16", fp8])
def test_graphs_give_what_launches_give(precision):
    eager = small_engine(backend="triton", device="cuda", precision=precision)
    graphs = small(precision=precision)
    for batch in (1, 5, 9, 16, 21):
        x = image(batch, 64, 80, batch)
        expected, found = eager.encode(x), graphs.encode(x)
        for name in expected:
            assert torch.equal(found[name], expected[name])


def test_a_thousand_batches_leave_memory_flat():
    engine = small(precision="bf16", max_batch=64)
    draw = random.Random(0)
    sizes = [*range(1, 65), *(draw.randint(1, 200) for _ in range(936))]
    pool = torch.rand(200, 3, 64, 64, device="cuda")
    peaks = []
    for i, size in enumerate(sizes):
        engine.encode(pool[:size], outputs=("sparse", "cls"))
        if i >= 200:
            peaks.append(torch.cuda.memory_reserved())
    assert peaks[-1] <= peaks[0]


def test_outputs_are_kept_across_replays():
    engine = small(precision="bf16")
    held = [(image(3, 64, 64, seed), None) for seed in range(20)]
    held = [(x, engine.encode(x)) for x, _ in held]
    again = small(precision="bf16")
    for x, features in held:
        for name, tensor in again.encode(x).items():
            assert torch.equal(features[name], tensor)


def test_eight_threads_on_streams_of_their_own():
    engine = small(precision="bf16")
    batches = [image(1 + i % 3, 64, 64, i).cuda() for i in range(8)]
    expected = [engine.encode(x)["sparse"].clone() for x in batches]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(50):
                found = engine.encode(batches[i])["sparse"]
                stream.synchronize()
                if not torch.equal(found, expected[i]):
                    wrong.append(i)
            stream.synchronize()

    in_threads(work, range(8))
    assert wrong == []


def test_work_is_ordered_on_the_callers_stream():
    engine = small(precision="bf16")
    x = image(4, 64, 64).cuda()
    expected = engine.encode(x)["dense"]
    side, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # the copy below is still to come when encode is called
        late.copy_(x)
        found = engine.encode(late, check_range=False)["dense"]
    side.synchronize()
    assert torch.equal(found, expected)


def test_a_caller_captures_encode_in_a_graph_of_his_own():
    engine = small(precision="bf16")
    x = image(2, 64, 64).cuda()
    expected = engine.encode(x, check_range=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = engine.encode(x, check_range=False)
    graph.replay()
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device")
    x = image(2, 64, 64)
    first = small(precision="bf16").encode(x)
    engine = small_engine(backend="triton", device="cuda:1", cuda_graphs=True, precision="bf16")
    assert torch.cuda.current_device() == 0
    second = engine.encode(x)
    for name in first:
        assert second[name].device == torch.device("cuda", 1)
        assert torch.equal(first[name].cpu(), second[name].cpu())


@pytest.mark.slow
def test_activations_beyond_two_to_the_31():
    """H/14 at batch 1,537: the MLP's activation has 1,537 x 273 x 5,120 elements."""
    _, meta = golden("encode-h16")
    assert 1537 * 273 * 5120 > 2**31
    engine = engine_of(meta, backend="triton", device="cuda", precision="bf16", max_batch=1537)
    x = (255 * torch.rand(1537, 3, 224, 224, device="cuda")).byte()
    out = engine.encode(x, outputs=("sparse", "cls"))
    for i in (0, 768, 1536):
        alone = engine.encode(x[i : i + 1], outputs=("sparse", "cls"))
        for name in out:
            assert torch.equal(out[name][i], alone[name][0]), (name, i)


@pytest.mark.slow
def test_compute_sanitizer_finds_nothing():
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    root = Path(__file__).parents[2]
    files = [f"tests/kernels/test_{name}.py" for name in ("norm", "reassemble", "patch_embed")]
    done = subprocess.run(
        [tool, "--error-exitcode", "9", sys.executable, "-P", "-m", "pytest", "-q", "-x", *files],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_auto_takes_the_kernels():
    engine = stellar_fast.load("stellar-b8", weights="synthetic")
    assert (engine.backend, engine.precision) == ("triton", "bf16")
    assert stellar_fast.load("stellar-b8", weights="synthetic", precision="fp32").backend == "torch"
