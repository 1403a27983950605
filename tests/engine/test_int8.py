"""int8 on CPUs: what calibration brings, what is on integers, and what is refused."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from checkpoints import relative_error, synthetic, write_checkpoint
from engines import SMALL, SMALL_META, config_of, image

import stellar_fast
from stellar_fast import precision as precisions
from stellar_fast.engine import backends, encoder, torch_ops
from stellar_fast.engine.backends import resolve_backend
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.errors import CheckpointError
from stellar_fast.weights import int8, names, saving
from stellar_fast.weights.pack import pack_encoder
from stellar_fast.weights.packed import Int8Block, Int8Linear, Linear

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(
        not backends.has_openvino() or not precisions.has_int8_units(),
        reason="int8 needs OpenVINO (extra cpu) and a processor with 8-bit products",
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_checkpoint(
        folder, "small", backbone=SMALL, num_sparse_tokens=8, num_decoder_layers=1, seed=1
    )


@pytest.fixture
def raw(source):
    return stellar_fast.load("small", repo=source, device="cpu", precision="int8", max_batch=4)


@pytest.fixture(scope="module")
def engine(source):
    engine = stellar_fast.load("small", repo=source, device="cpu", precision="int8", max_batch=4)
    return engine.calibrate(image(12, 96, 96, seed=5))


def rounded(x: torch.Tensor, steps: int, dim: int | None) -> torch.Tensor:
    """x in `steps` + 1 values over its whole range, or over that of each row."""
    low, high = (x.amin(), x.amax()) if dim is None else x.aminmax(dim=dim, keepdim=True)
    if dim is not None:
        high = torch.maximum(-low, high)
        low = -high
    step = (high - low) / steps
    return ((x - low) / step).round() * step + low


def plainly(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The features with every product of a block rounded to 8 bits, by plain least and largest
    numbers, of this very batch; all else in float64."""

    def linear(x, weight, bias, *, norm_eps=None, sums=None, gelu=False):
        x = x if norm_eps is None else F.layer_norm(x, x.shape[-1:], None, None, norm_eps)
        y = F.linear(rounded(x, 255, None), rounded(weight, 254, 1), bias)
        return F.gelu(y) if gelu else y

    ops = SimpleNamespace(**vars(torch_ops))
    ops.linear = linear
    ops.linear_residual = lambda x, w, b, residual: (linear(x, w, b) + residual, None)
    return features_of(ops, x)


def features_of(ops, x):
    config = config_of(SMALL_META)
    state = synthetic(names.encode_shapes(config), SMALL_META["weights_seed"])
    weights = pack_encoder(state, config, torch.float64, CPU)
    table = weights.table.table(x.shape[2] // 16, x.shape[3] // 16)
    return encoder.encode(ops, weights, config, x.double(), table, OUTPUTS, torch.float64)


@pytest.mark.parametrize("kind", ["floats", "bytes"])
@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
def test_errors_are_at_most_twice_those_of_plain_rounding(engine, kind, size):
    """Which has the ranges of this very batch, and float64 for all but the blocks' products."""
    pixels = (image(4, *size, seed=9) * 255).round()
    x = pixels / 255
    exact, plain = features_of(torch_ops, x), plainly(x)
    ours = engine.encode(x if kind == "floats" else pixels.to(torch.uint8))
    for name in OUTPUTS:
        error, bound = (relative_error(f[name], exact[name]) for f in (ours, plain))
        assert error <= 2 * bound, f"{name}: {error:.3g}, plain rounding {bound:.3g}"


def test_the_blocks_products_run_on_integers(engine):
    engine.encode(image(1, 64, 64))
    graphs = [list(graphs.values())[-1] for graphs in engine._runner._graphs.values()]
    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for graph in graphs
        for node in graph.compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    ]
    # Queries, keys and values apart, then proj, fc1 and fc2.
    assert sum(kind in ("i8", "u8") for kind in kinds) == 6 * SMALL["num_hidden_layers"]


def test_outlying_channels_move_into_the_weights():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 64, generator=generator)
    rows[:, 3] *= 100
    layer = Linear(torch.randn(48, 64, generator=generator) / 8, torch.zeros(48))
    layer.weight[:, 3] /= 100
    seen = int8.Inputs([rows], rows.amin(0), rows.amax(0))
    found = int8.quantized(layer, seen)
    assert found.weight.dtype == torch.int8 and found.weight.abs().max() == int8.LARGEST
    exact = rows @ layer.weight.T

    def error(x, weight):
        return relative_error(x @ weight.T, exact)

    scaled = int8._values(rows * found.scales.channels, found.scales.reach)
    ours = error(scaled, found.weight * found.scales.step[:, None])
    assert ours < 0.2 * error(rounded(rows, 255, None), rounded(layer.weight, 254, 1))


def test_a_rare_number_is_cut_off():
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([-40.0, 40.0])
    low, high = int8._reach(x, whole, torch.ones(64)).tolist()
    assert -20 < low < x.min() and x.max() < high < 20


def test_attention_takes_the_factors_of_its_projection():
    generator = torch.Generator().manual_seed(0)

    def layer(out, depth):
        draw = torch.randn(out, depth, generator=generator)
        seen = int8.Inputs([torch.randn(64, depth, generator=generator)], *([None] * 2))
        seen.low, seen.high = seen.rows[0].aminmax(dim=0)
        return int8.quantized(Linear(draw, torch.randn(out, generator=generator)), seen)

    layers = layer(192, 64), layer(64, 64), layer(128, 64), layer(64, 128)
    block = Int8Block(*layers, score_reach=torch.ones(2))
    channels = torch.rand(64, generator=generator) + 0.5
    moved = int8._unscaled_attention(block, channels)

    def made(qkv: Int8Linear) -> torch.Tensor:
        return (qkv.weight * qkv.scales.step[:, None]).sum(1) + qkv.bias

    factors = torch.cat([channels, 1 / channels, block.proj.scales.channels])
    assert moved.proj.scales.channels is None
    torch.testing.assert_close(made(moved.qkv), made(block.qkv) * factors)


def test_scores_are_balanced_and_rare_numbers_cut_off():
    """Channel by channel queries and keys reach as far, and each product is what it was."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.logspace(-1, 1, 64)
    q, k = (torch.randn(512, 64, generator=generator) for _ in range(2))
    q, k = q * wide, k / wide
    k[0, 0] = 40 * k[:, 0].std()
    found = [int8.Inputs([x], *x.aminmax(dim=0)) for x in (q, k)]
    channels, reach = int8.scores(*found)
    # A quotient, its root, and a product or quotient on each side.
    roundings = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        (q * channels).abs().amax(0), (k / channels).abs().amax(0), rtol=roundings, atol=0
    )
    assert reach[1] < (k / channels).abs().max()

    def rounded(x: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
        step = reach / 128
        return (x / step).round().clamp(-128, 127) * step

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        exact = q.double() @ k.double().T
        return ((a.double() @ b.double().T - exact).norm() / exact.norm()).item()

    ours = error(rounded(q * channels, reach[0]), rounded(k / channels, reach[1]))
    assert ours < 0.5 * error(rounded(q, q.abs().max()), rounded(k, k.abs().max()))


def test_before_and_after_calibration(raw, tmp_path):
    for call in (lambda: raw.encode(image(1, 64, 64)), lambda: raw.save(tmp_path / "saved")):
        with pytest.raises(ValueError, match=r"call engine\.calibrate\(images\)"):
            call()
    with pytest.raises(ValueError, match="at least one image"):
        raw.calibrate(torch.zeros(0, 3, 64, 64))
    assert not raw.calibrated
    assert raw.calibrate(image(2, 64, 64)) is raw and raw.calibrated
    with pytest.raises(ValueError, match="calibrated already; load it anew"):
        raw.calibrate(image(2, 64, 64))


def test_a_saved_engine_has_its_scales(engine, tmp_path):
    engine.save(tmp_path / "saved")
    again = stellar_fast.load("small", repo=tmp_path / "saved", device="cpu")
    assert (again.precision, again.backend, again.calibrated) == ("int8", "openvino", True)
    x = image(3, 64, 64)
    expected = engine.encode(x)
    for name, tensor in again.encode(x).items():
        assert torch.equal(tensor, expected[name])
    with pytest.raises(ValueError, match="packed for precision='int8', got precision='bf16'"):
        stellar_fast.load("small", repo=tmp_path / "saved", device="cpu", precision="bf16")


def test_scales_that_are_none_are_damage(engine, tmp_path):
    whole = engine._encoder.last
    scales = whole.fc1.scales
    damaged = {
        name: dataclasses.replace(
            whole, fc1=dataclasses.replace(whole.fc1, scales=dataclasses.replace(scales, **bad))
        )
        for name, bad in (
            ("step", {"step": -scales.step}),
            ("channels", {"channels": 0 * scales.channels}),
        )
    }
    damaged["reach"] = dataclasses.replace(whole, score_reach=whole.score_reach * 0)
    for name, last in damaged.items():
        encoder = dataclasses.replace(engine._encoder, last=last)
        saving.save(tmp_path / name, engine.config, "int8", encoder, None)
        with pytest.raises(CheckpointError, match="scales that are not positive"):
            stellar_fast.load("small", repo=tmp_path / name, device="cpu")


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("torch", CPU, "computed by backend='openvino', got backend='torch'"),
        ("auto", torch.device("cuda", 0), "precision='int8' computes on CPUs, got cuda:0"),
    ],
)
def test_where_it_is_refused(monkeypatch, backend, device, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ValueError, match=message):
        resolve_backend(backend, device, "int8")


def test_a_processor_without_such_products_is_told(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx_vnni": False})
    with pytest.raises(ValueError, match="needs a processor that multiplies 8-bit integers"):
        resolve_backend("auto", CPU, "int8")


def test_other_precisions_have_no_int8_scales(source):
    with pytest.raises(ValueError, match="only fp8 and int8 engines have static scales"):
        stellar_fast.load("small", repo=source, device="cpu", precision="fp32").calibrate(
            image(1, 64, 64)
        )
