"""The presets against their definitions: Pillow's resize, and kornia's evaluation transform."""

import zlib
from pathlib import Path

import kornia
import numpy as np
import pytest
import torch
from budgets import PRESET, PRESET_ROW
from checkpoints import golden
from kornia.augmentation.random_generator import ResizeGenerator
from pictures import photograph
from PIL import Image

from stellar_fast import images
from stellar_fast.errors import ImageError


def test_card_is_pillows_antialiased_bicubic():
    picture = photograph(500, 333)
    found = images.apply_preset(picture, "card")
    assert found.dtype == torch.uint8
    assert found.shape == (3, 224, 224)
    assert found.is_contiguous()
    expected = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC))
    assert (found.numpy() == expected.transpose(2, 0, 1)).all()
    checks = np.indices((448, 448)).sum(axis=0) % 2 * 255  # without antialiasing: 0 or 255
    board = Image.fromarray(checks.astype(np.uint8)).convert("RGB")
    assert (images.apply_preset(board, "card").int() - 128).abs().float().mean() < 10


@pytest.mark.numerical
@pytest.mark.parametrize(
    "size",
    [
        *((500, 333), (333, 500), (224, 224), (256, 256), (257, 256), (255, 256), (1, 90)),
        *((37, 1000), (1023, 769), (1, 1), (90, 1), (1600, 1200)),
    ],
)
def test_eval_is_the_published_transform(size):
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(noise)
    found = images.apply_preset(picture, "eval")
    assert found.dtype == torch.float32
    assert found.shape == (3, 224, 224)
    assert found.is_contiguous()
    image = torch.from_numpy(noise.copy()).permute(2, 0, 1)[None] / 255
    resize = kornia.augmentation.Resize(256, resample="bicubic")
    expected = kornia.augmentation.CenterCrop(224)(resize(image))[0]
    assert (found - expected.clamp(0, 1)).abs().max() < PRESET


@pytest.mark.numerical
@pytest.mark.parametrize("index", range(6))
def test_eval_golden(index):
    expected, meta = golden("preset-eval")
    entry = meta["images"][index]
    height, width = entry["height"], entry["width"]
    if entry["kind"] == "board":
        y, x, channel = np.indices((height, width, 3))
        cells = ((place + entry["phase"]) // entry["cell"] for place in (y, x))
        pixels = (255 * ((sum(cells) + channel) % 2)).astype(np.uint8)
    else:
        pixels = expected[f"{index}.input"].numpy()
    assert zlib.crc32(pixels.tobytes()) == entry["crc32"]
    found = images.apply_preset(Image.fromarray(pixels), "eval")
    stride = meta["pixel_stride"]
    assert (found[:, ::stride, ::stride] - expected[f"{index}.pixels"]).abs().max() < PRESET
    sums = found.double().sum(-1)
    assert (sums - expected[f"{index}.row_sums"]).abs().max() < PRESET_ROW
    assert found.min() >= 0 and found.max() <= 1
    assert entry["lowest_before_clamp"] < 0 and entry["highest_before_clamp"] > 1


def test_eval_sizes_are_kornias():
    rng = np.random.default_rng(0)
    sizes = [(1, 1), *rng.integers(1, 4000, (300, 2)).tolist()]
    sizes += [(side, side + extra) for side in range(190, 320) for extra in (-1, 0, 1)]
    for height, width in sizes:
        output = ResizeGenerator(256, side="short")(torch.Size((1, 3, height, width)))
        expected = tuple(output["output_size"][0].tolist())
        assert images.eval_size(height, width) == expected, (height, width)


def test_a_strip_at_the_limit_and_one_beyond(tmp_path):
    """What eval makes of it is bounded: 256 by 65536."""
    assert images.apply_preset(Image.new("RGB", (256, 1)), "eval").shape == (3, 224, 224)
    with pytest.raises(ImageError, match="257x1 is too long"):
        images.apply_preset(Image.new("RGB", (257, 1)), "eval")


@pytest.mark.parametrize("side", [(1, 60000), (3, 4000), (4000, 3)])
def test_eval_refuses_what_would_become_a_bomb(side, tmp_path):
    path = tmp_path / "strip.png"
    Image.new("RGB", side).save(path)
    with pytest.raises(ImageError, match=r"strip\.png: .*too long and narrow") as caught:
        images.load_image(path, "eval")
    assert caught.value.path == str(path)
    assert images.load_image(path, "card").shape == (3, 224, 224)


def test_load_batch(tmp_path):
    paths = []
    for index, size in enumerate([(300, 200), (90, 300)]):
        paths.append(tmp_path / f"{index}.png")
        photograph(*size, seed=index).save(paths[-1])
    for preset in images.PRESETS:
        batch = images.load_batch(paths, preset)
        assert batch.shape == (2, 3, 224, 224)
        for row, path in zip(batch, paths, strict=True):
            assert torch.equal(row, images.apply_preset(images.decode(path), preset))
    with pytest.raises(ImageError, match="no such file"):
        images.load_batch([*paths, Path("absent.jpg")], "card")
    with pytest.raises(ValueError, match="at least one"):
        images.load_batch([], "card")


def test_presets_and_modes_are_checked():
    with pytest.raises(ValueError, match="unknown preset 'square'; known: card, eval"):
        images.apply_preset(photograph(), "square")
    with pytest.raises(ValueError, match="unknown preset"):
        images.load_image("absent.jpg", "square")
    with pytest.raises(ValueError, match=r"RGB images, .*got L"):
        images.apply_preset(photograph().convert("L"), "card")
