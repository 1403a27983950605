"""JPEGs decoded at a half, a quarter or an eighth, where that is asked for."""

from io import BytesIO

import numpy as np
import pytest
from pictures import distance, photograph, saved
from PIL import Image

from stellar_fast import images
from stellar_fast.errors import ImageError
from stellar_fast.images.presets import least_side

ORIENTATION = 274  # EXIF


def blocks(width: int, height: int, mode: str = "L") -> Image.Image:
    """A picture of solid squares of 8x8 pixels, as those that JPEG transforms: at every scale it is
    the same picture, but for the rounding of its one coefficient."""
    shape = (height // 8, width // 8, *((3,) if mode == "RGB" else ()))
    coarse = np.random.default_rng(0).integers(16, 240, shape, np.uint8)
    return Image.fromarray(coarse.repeat(8, 0).repeat(8, 1))


def jpeg(image: Image.Image, **options) -> bytes:
    return saved(image, "JPEG", quality=100, subsampling=0, **options)


def oriented(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return jpeg(image, exif=exif)


@pytest.mark.parametrize(
    ("size", "least", "scale"),
    [
        ((96, 64), 33, 1),
        ((96, 64), 32, 2),
        ((96, 64), 17, 2),
        ((96, 64), 16, 4),
        ((64, 96), 16, 4),
        ((96, 64), 8, 8),
        ((96, 64), 1, 8),
        ((100, 60), 8, 4),
        ((97, 65), 16, 4),
    ],
)
def test_the_smallest_scale_that_keeps_both_sides(size, least, scale):
    found = images.decode(jpeg(photograph(*size)), least_side=least)
    assert found.size == tuple(-(-side // scale) for side in size)
    assert min(found.size) >= min(least, *size)
    assert found.info == ({} if scale == 1 else {"size_in_file": size})


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_every_block_is_where_and_what_it_was(scale, mode):
    picture = blocks(96, 64, mode)
    whole = images.decode(jpeg(picture))
    found = images.decode(jpeg(picture), least_side=64 // scale)
    expected = whole.resize((96 // scale, 64 // scale), Image.Resampling.NEAREST)
    # One step: a coefficient stands for eight levels of brightness, and is rounded at every scale.
    assert distance(found, expected) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_and_told(orientation):
    file = oriented(blocks(96, 64), orientation)
    whole, found = images.decode(file), images.decode(file, least_side=16)
    assert found.info == {"size_in_file": whole.size}
    expected = whole.resize((whole.width // 4, whole.height // 4), Image.Resampling.NEAREST)
    assert distance(found, expected) <= 1


def test_the_size_in_full_is_told_where_the_scaled_picture_is_square():
    """997x1000 becomes 125x125: its sides then do not say whether it was turned."""
    file = oriented(photograph(997, 1000), 6)
    found = images.decode(file, least_side=120)
    assert found.size == (125, 125)
    assert found.info == {"size_in_file": (1000, 997)}


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000"])
def test_other_formats_are_read_in_full(format):
    file = saved(photograph(96, 64), format)
    found = images.decode(file, least_side=8)
    assert distance(found, images.decode(file)) == 0
    assert found.info == {}


@pytest.mark.parametrize(
    "file",
    [
        jpeg(blocks(96, 64), progressive=True),
        jpeg(blocks(96, 64, "RGB").convert("CMYK")),
        saved(blocks(96, 64), "MPO", quality=100, save_all=True, append_images=[blocks(96, 64)]),
    ],
    ids=["progressive", "cmyk", "mpo"],
)
def test_every_kind_of_jpeg(file):
    whole, found = images.decode(file), images.decode(file, least_side=16)
    assert found.size == (24, 16)
    assert distance(found, whole.resize((24, 16), Image.Resampling.NEAREST)) <= 2  # CMYK: a product


def test_a_file_a_path_and_bytes_are_the_same(tmp_path):
    file = jpeg(photograph(96, 64))
    (tmp_path / "a.jpg").write_bytes(file)
    expected = images.decode(file, least_side=16)
    assert distance(images.decode(tmp_path / "a.jpg", least_side=16), expected) == 0
    assert distance(images.decode(BytesIO(file), least_side=16), expected) == 0


def test_what_is_refused_in_full_is_refused_scaled():
    file = jpeg(photograph(96, 64))
    with pytest.raises(ImageError, match="96x64 is more than the limit of 6143 pixels"):
        images.decode(file, least_side=8, max_pixels=96 * 64 - 1)
    for cut in (len(file) // 2, len(file) - 40):
        with pytest.raises(ImageError):
            images.decode(file[:cut], least_side=8)


def test_a_file_that_lacks_its_end_is_read_in_full():
    """Whether all of its pixels are there shows in full alone."""
    file = jpeg(photograph(96, 64))
    found = images.decode(file[:-2], least_side=8)
    assert distance(found, images.decode(file)) == 0


def test_presets():
    assert least_side("card", True) == 448
    assert least_side("card", False) is least_side("eval", False) is None
    with pytest.raises(ValueError, match="'eval' reads single pixels of a picture in full"):
        least_side("eval", True)
    with pytest.raises(ValueError, match="unknown preset 'crop'"):
        least_side("crop", True)
    with pytest.raises(ValueError, match="least_side must be positive, got 0"):
        images.decode(jpeg(photograph()), least_side=0)


def test_load_image_resizes_the_scaled_picture():
    picture = blocks(1856, 1024)  # a half: 1024 / 448 is 2.3
    file = jpeg(picture)
    expected = images.apply_preset(images.decode(file, least_side=512), "card")
    found = images.load_image(file, "card", scaled_decode=True)
    assert found.equal(expected)
    assert not found.equal(images.load_image(file, "card"))  # or nothing was scaled
    assert found.equal(images.load_batch([file], "card", scaled_decode=True)[0])
