"""FP8 weights and their static scales, computed with the oracles."""

import pytest
import torch
from budgets import FLOAT64, rounding
from checkpoints import images, relative_error, synthetic
from engines import SMALL, config_of

from stellar_fast.engine import encoder
from stellar_fast.reference import ops
from stellar_fast.weights import names
from stellar_fast.weights import pack as weights
from stellar_fast.weights.packed import Fp8Block, Linear
from stellar_fast.weights.quantize import FP8_MAX, HEADROOM, calibrated, quantize_block

pytestmark = pytest.mark.numerical
CPU = torch.device("cpu")
STEP = torch.finfo(torch.float32).eps
PARTS = {"sparse", "dense", "cls"}
META = {
    "backbone": SMALL | {"num_hidden_layers": 5},
    "num_sparse_tokens": 8,
    "spatial_temp": 0.06,
}


@pytest.fixture(scope="module")
def config():
    return config_of(META)


@pytest.fixture(scope="module")
def state(config):
    return synthetic(names.encode_shapes(config), 3)


@pytest.fixture(scope="module")
def packed(state, config):
    return weights.pack_encoder(state, config, torch.float32, CPU, quantize=quantize_block)


def encode(packed, config, x, operations=ops):
    table = packed.table.table(x.shape[2] // 16, x.shape[3] // 16)
    return encoder.encode(operations, packed, config, x, table, encoder.OUTPUTS, torch.float32)


def test_the_first_and_the_last_block_stay_as_they_are(packed, config):
    kinds = [type(block).__name__ for block in packed.blocks]
    assert kinds == ["Block", "Fp8Block", "Fp8Block", "Fp8Block"]
    assert packed.last.query.weight.dtype == torch.float32


def test_weights_are_rounded_once_channel_by_channel(state, config, packed):
    exact = weights.pack_encoder(state, config, torch.float64, CPU)
    for block, original in zip(packed.blocks[1:], exact.blocks[1:], strict=True):
        static = {"proj": block.attended_scale, "fc2": block.hidden_scale}
        for name in ("qkv", "proj", "fc1", "fc2"):
            layer, wanted = getattr(block, name), getattr(original, name)
            assert layer.weight.dtype == torch.float8_e4m3fn
            assert (layer.weight.float().abs().amax(1) == FP8_MAX).all()
            scale = layer.scale.double()[:, None] / static.get(name, 1.0)
            error = (layer.weight.double() * scale - wanted.weight).abs()
            # Half a step of 3 bits, or of the smallest number there is.
            # The scale is float32.
            rounded = torch.finfo(torch.float32).eps / 2 * wanted.weight.abs()
            assert (error <= wanted.weight.abs() / 16 + 2**-10 * scale + rounded).all()
            assert relative_error(layer.bias, wanted.bias) < torch.finfo(torch.float32).eps / 2


def test_a_channel_of_zeros_has_a_finite_scale():
    zero = Linear(torch.zeros(6, 2, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    square = Linear(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    block = quantize_block(weights.Block(zero, square, zero, square), torch.float16)
    assert block.attended_scale == block.hidden_scale == 1.0
    assert (block.qkv.scale == 1.0).all()
    assert not block.qkv.weight.float().any()


def watched_peaks(packed, config, x) -> list[tuple[str, float, float]]:
    """What entered each static quantization at most, and its scale."""
    peaks = []

    class Watched:
        def __getattr__(self, name):
            function = getattr(ops, name)

            def op(*arguments, **keywords):
                scale = keywords.pop("out_scale", None)
                y = function(*arguments, **keywords)
                if scale is None:
                    return y
                peaks.append((name, float(y.abs().max()), scale))
                return function(*arguments, **keywords, out_scale=scale)

            return op

    encode(packed, config, x, Watched())
    return peaks


def test_nothing_passes_the_bounds(packed, config):
    extremes = torch.stack(
        [torch.zeros(3, 96, 96), torch.ones(3, 96, 96), images(1, 96, 96, 1)[0].round()]
    )
    peaks = watched_peaks(packed, config, extremes)
    assert len(peaks) == 6
    for _, peak, scale in peaks:
        assert 0 < peak <= scale * FP8_MAX


def test_the_bounds_are_met_by_the_worst_row():
    """A row along the heaviest channel reaches the MLP's bound: it is not looser than it says."""
    torch.manual_seed(0)
    width = 16
    make = lambda rows: Linear(torch.randn(rows, width).double(), torch.rand(rows).double())  # noqa: E731
    block = weights.Block(make(48), make(16), make(64), make(16))
    quantized = quantize_block(block, torch.float64)
    norms = torch.linalg.vector_norm(block.fc1.weight, dim=1) * width**0.5 + block.fc1.bias
    heaviest = block.fc1.weight[norms.argmax()]
    row = heaviest / heaviest.square().mean().sqrt()
    largest = (block.fc1.weight @ row + block.fc1.bias).max()
    assert largest / FP8_MAX == pytest.approx(quantized.hidden_scale, rel=FLOAT64)


def test_calibration_takes_the_peaks_it_saw(packed, config):
    x = images(4, 96, 96, 5)

    def run(operations, current):
        for part in x.split(3):  # rounds of several batches count together
            encode(current, config, part, operations)

    tight = calibrated(ops, packed, run)
    blocks = [block for block in tight.blocks if isinstance(block, Fp8Block)]
    # Of the same batches: in others float32 rounds otherwise, and then FP8 by a whole step.
    parts = [watched_peaks(packed, config, part) for part in x.split(3)]
    peaks = [max(peak for _, peak, _ in each) for each in zip(*parts, strict=True)]
    for i, block in enumerate(blocks):
        attended, hidden = peaks[2 * i : 2 * i + 2]
        assert block.attended_scale == pytest.approx(HEADROOM * attended / FP8_MAX, rel=STEP)
        assert block.hidden_scale == pytest.approx(HEADROOM * hidden / FP8_MAX, rel=STEP)
        loose = packed.blocks[1 + i]
        assert block.attended_scale < loose.attended_scale
        # What the products stand for is unchanged.
        for name, old, new in (
            ("proj", loose.attended_scale, block.attended_scale),
            ("fc2", loose.hidden_scale, block.hidden_scale),
        ):
            before, after = getattr(loose, name), getattr(block, name)
            was, now = before.scale.double() / old, after.scale.double() / new
            assert ((now - was).abs() <= 2 * STEP * was).all()
            assert after.weight is before.weight
    assert tight.blocks[0] is packed.blocks[0]


def test_fp8_features_stay_near_and_calibration_does_not_hurt(state, config, packed):
    x = images(4, 96, 96, 6)
    exact = weights.pack_encoder(state, config, torch.float64, CPU)
    table = exact.table.table(6, 6)
    wanted = encoder.encode(ops, exact, config, x.double(), table, encoder.OUTPUTS, torch.float64)
    tight = calibrated(ops, packed, lambda operations, w: encode(w, config, x, operations))
    errors = [
        {name: relative_error(encode(w, config, x)[name], wanted[name]) for name in wanted}
        for w in (packed, tight)
    ]
    for found in errors:
        # Twice what rounding both of its factors to e4m3 makes of one product.
        assert all(found[name] < 2 * 2**0.5 * rounding(ops.FP8) for name in wanted.keys() & PARTS)
    assert errors[1]["dense"] < 1.05 * errors[0]["dense"]


def test_what_is_no_fp8_is_left_alone(state, config):
    plain = weights.pack_encoder(state, config, torch.float32, CPU)
    x = images(1, 96, 96, 1)
    assert calibrated(ops, plain, lambda operations, w: encode(w, config, x, operations)) is plain


def test_published_widths_keep_their_range():
    """At D = 1280 the bounds are looser, yet typical activations stay normal e4m3 numbers."""
    torch.manual_seed(0)
    width, hidden = 1280, 5120
    layers = {
        name: Linear(0.02 * torch.randn(rows, columns), 0.02 * torch.randn(rows))
        for name, rows, columns in (
            ("qkv", 3 * width, width),
            ("proj", width, width),
            ("fc1", hidden, width),
            ("fc2", width, hidden),
        )
    }
    block = quantize_block(weights.Block(**layers), torch.float32)
    row = torch.randn(width)
    h = torch.nn.functional.gelu(layers["fc1"].weight @ row)
    smallest_normal = 2.0**-6
    share = (h.abs() / block.hidden_scale >= smallest_normal).float().mean()
    assert share > 0.97
