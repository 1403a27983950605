"""Drawn photographs: the same from the same seed, and as full of detail as photographs are."""

import numpy as np
import pytest
from PIL import Image

from stellar_fast import images, photos


@pytest.mark.parametrize("scene", photos.SCENES)
def test_a_scene_depends_on_its_seed_alone(scene):
    first, again, other = (photos.draw(scene, 200, 150, seed) for seed in (3, 3, 4))
    assert (first.mode, first.size) == ("RGB", (200, 150))
    assert first.tobytes() == again.tobytes()
    difference = np.abs(np.asarray(first).astype(int) - np.asarray(other).astype(int))
    assert difference.mean() > 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scene", photos.SCENES)
@pytest.mark.parametrize("size", [(320, 240), (240, 320), (64, 48), (300, 60)])
def test_scenes_have_contrast_colour_and_detail(scene, size):
    pixels = np.asarray(photos.draw(scene, *size, seed=1)).astype(float)
    assert pixels.shape == (size[1], size[0], 3)
    assert np.isfinite(pixels).all()
    assert pixels.std() > 15, "flat"
    assert np.ptp(pixels.mean(axis=(0, 1))) > 1, "grey"
    assert (np.abs(np.diff(pixels, axis=0)) > 0).mean() > 0.5, "no detail"


def test_unknown_scenes_are_named():
    with pytest.raises(ValueError, match=r"'zoo'; known: mountains"):
        photos.draw("zoo", 10, 10, 0)


def test_write(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "SIZES", ((96, 64), (64, 96)))
    paths = photos.write(tmp_path / "deep" / "folder", 8)
    assert len(set(paths)) == 8
    assert {path.parent for path in paths} == {tmp_path / "deep" / "folder"}
    contents = set()
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "JPEG"
        contents.add(images.decode(path).tobytes())
    assert len(contents) == 8
    assert {images.decode(path).size for path in paths} == {(96, 64), (64, 96)}
