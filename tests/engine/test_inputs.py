"""Every form of a batch that `encode` takes gives the same features; any other, one clear error."""

import numpy as np
import pytest
import torch
from budgets import assert_same_features
from engines import image, small_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.engine.engine import Engine

pytestmark = pytest.mark.numerical
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return small_engine()


def stride_views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """`x` (B, 3, H, W) again, laid out otherwise in memory."""
    wide = torch.full((len(x) * 2, 3, x.shape[2] + 3, x.shape[3] * 2), 0.5).to(x.dtype)
    wide[::2, :, 3:, ::2] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": wide[::2, :, 3:, ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "flipped": x.flip(0).flip(0),
    }


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_float_dtype_stride_size_and_subset(engine, data):
    batch = data.draw(st.integers(1, 4), "batch")
    height, width = (data.draw(st.integers(16, 90), side) for side in ("height", "width"))
    dtype = data.draw(st.sampled_from(FLOATS), "dtype")
    layout = data.draw(st.sampled_from(list(stride_views(torch.zeros(1, 3, 16, 16)))), "layout")
    outputs = data.draw(st.sets(st.sampled_from(OUTPUTS), min_size=1), "outputs")
    as_numpy = dtype != torch.bfloat16 and data.draw(st.booleans(), "numpy")

    plain = image(batch, height, width, data.draw(st.integers(0, 99), "seed")).to(dtype)
    expected = engine.encode(plain.float())
    given_batch = stride_views(plain)[layout]
    out = engine.encode(given_batch.numpy() if as_numpy else given_batch, outputs=outputs)
    assert set(out) == outputs
    assert_same_features(out, {name: expected[name] for name in out})


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_uint8_in_either_layout(engine, data):
    batch, height, width = (data.draw(st.integers(*r)) for r in ((1, 3), (16, 80), (16, 80)))
    pixels = (image(batch, height, width, data.draw(st.integers(0, 99))) * 255).round().byte()
    expected = engine.encode(pixels.float() / 255)
    layout = data.draw(st.sampled_from(["nchw", "nhwc", "nhwc strided", "numpy", "numpy flipped"]))
    last = pixels.permute(0, 2, 3, 1)
    forms = {
        "nchw": pixels,
        "nhwc": last.contiguous(),
        "nhwc strided": last,
        "numpy": last.numpy(),
        "numpy flipped": np.ascontiguousarray(last.numpy()[:, :, :, ::-1])[:, :, :, ::-1],
    }
    out = engine.encode(forms[layout])
    assert_same_features(out, expected)


def test_float8_and_foreign_byte_order(engine):
    x = image(1, 64, 64)
    rounded = x.to(torch.float8_e4m3fn)
    assert_same_features(engine.encode(rounded), engine.encode(rounded.float()))
    assert_same_features(engine.encode(x.numpy().astype(">f4")), engine.encode(x))


def test_read_only_arrays_are_taken_without_a_warning(engine, recwarn):
    array = image(1, 64, 64).numpy()
    array.flags.writeable = False
    engine.encode(array)
    assert [str(warning.message) for warning in recwarn] == []


def test_paths_and_pil_images_are_resized_by_the_preset(engine, tmp_path):
    pixels = (image(1, 300, 260)[0] * 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    from stellar_fast.images.presets import apply_preset

    for preset in ("card", "eval"):
        expected = engine.encode(apply_preset(picture, preset)[None])
        for form in ([picture], [tmp_path / "a.png"], (str(tmp_path / "a.png"),)):
            out = engine.encode(form, preset=preset)
            assert_same_features(out, expected)
    assert out["dense"].shape == (1, 196, 64)


NAN = torch.full((1, 3, 32, 32), 0.5)
NAN[0, 1, 3, 4] = float("nan")
SPIKE = torch.full((1, 3, 32, 32), 0.5)
SPIKE[0, 2, 31, 31] = 1.51


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 32, 32), ValueError, r"got one image \(3, 32, 32\)"),
        (torch.rand(32, 32), ValueError, r"got \(32, 32\)"),
        (torch.rand(1, 4, 32, 32), ValueError, r"3 channels .*\(1, 4, 32, 32\)"),
        (torch.rand(1, 1, 32, 32), ValueError, "3 channels"),
        (torch.rand(1, 32, 32, 3), ValueError, r"permute\(0, 3, 1, 2\)"),
        (torch.rand(1, 3, 15, 32), ValueError, "16x16 pixels, got 15x32"),
        (torch.zeros(1, 3, 32, 0), ValueError, "got 32x0"),
        (torch.zeros(0, 3, 8, 8), ValueError, "got 8x8"),
        (torch.rand(1, 3, 32, 32) * 255, ValueError, r"values from .* 0\.\.255 go in as uint8"),
        (torch.rand(1, 3, 32, 32) * 4 - 2, ValueError, "normalisation by mean and std is inside"),
        (SPIKE, ValueError, r"to 1\.51"),
        (NAN, ValueError, "found NaN"),
        (torch.full((1, 3, 32, 32), float("inf")), ValueError, "to inf"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), ValueError, "int64"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.bool), ValueError, "bool"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.complex64), ValueError, "complex64"),
        (torch.zeros(1, 3, 32, 32).to_sparse(), ValueError, "dense tensor"),
        (np.zeros((1, 3, 32, 32), np.int32), ValueError, "int32"),
        (np.zeros((1, 3, 32, 32), np.uint16), ValueError, "uint16"),
        (np.array(["a"]), ValueError, "dtype <U1"),
        ("photo.jpg", TypeError, r"encode\(\[image\]\)"),
        (Image.new("RGB", (32, 32)), TypeError, "put it into a list"),
        (b"bytes", TypeError, "put it into a list"),
        (None, TypeError, "NoneType"),
        ({"image": 1}, TypeError, "int"),
        ({"photo": 1}, ValueError, "this one holds photo"),
        ([torch.rand(3, 32, 32)], TypeError, "item 0 is a Tensor"),
        ([None], TypeError, "item 0 is a NoneType"),
    ],
)
def test_bad_batches_are_one_clear_error(engine, images, error, message):
    with pytest.raises(error, match=message):
        engine.encode(images)


def test_the_overshoot_of_a_resize_is_taken_as_it_is(engine):
    x = image(1, 32, 32) * 2 - 0.5
    assert x.min() < -0.4 and x.max() > 1.4
    assert_same_features(engine.encode(x), engine.encode(x, check_range=False))
    with pytest.raises(ValueError, match="normalisation by mean and std is inside"):
        engine.encode(x - 0.1)


def test_a_mapping_gives_its_image(engine):
    x = image(2, 48, 32)
    expected = engine.encode(x)
    for mapping in ({"image": x}, {"labels": None, "image": x.numpy()}):
        found = engine.encode(mapping)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("outputs", [("concat",), ("peak_dist",), ("concat", "peak_dist", "cls")])
def test_derived_features_are_given_where_asked_for(engine, outputs):
    x = image(2, 48, 64)
    everything = engine.encode(x)
    wanted = {
        "concat": torch.cat([everything["sparse"], everything["spatial"].transpose(1, 2)], dim=2),
        "peak_dist": everything["spatial"].amax(1),
        "cls": everything["cls"],
    }
    found = engine.encode(x, outputs=outputs)
    assert found.keys() == set(outputs)
    assert_same_features(found, {name: wanted[name] for name in outputs})
    assert (
        engine.encode(x[:0], outputs=outputs)[outputs[0]].shape[1:] == wanted[outputs[0]].shape[1:]
    )


def test_the_range_check_can_be_switched_off(engine):
    assert engine.encode(SPIKE, check_range=False)["cls"].isfinite().all()


@pytest.mark.parametrize(
    ("outputs", "message"), [(("tokens",), "got tokens"), ((), "got none"), (("cls", 3), "got 3")]
)
def test_unknown_outputs_are_named(engine, outputs, message):
    with pytest.raises(ValueError, match=message):
        engine.encode(image(1, 32, 32), outputs=outputs)


def test_unknown_presets_are_named(engine):
    with pytest.raises(ValueError, match=r"'square'.*card, eval"):
        engine.encode([Image.new("RGB", (32, 32))], preset="square")
