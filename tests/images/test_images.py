"""Decoding by the rules that `stellar_fast.images.decode` writes down, over a zoo of files."""

import struct
import warnings
from io import BytesIO

import numpy as np
import pytest
from pictures import distance, photograph, pixels, png_chunk, png_of, saved
from PIL import Image, ImageCms

from stellar_fast import images
from stellar_fast.errors import ImageError
from stellar_fast.images import conversion

FAR = 8  # what JPEG's rounding may change, of 255


@pytest.mark.parametrize(
    ("format", "far"),
    [
        ("PNG", 0),
        ("BMP", 0),
        ("TIFF", 0),
        ("PPM", 0),
        ("WEBP", 0),
        ("JPEG", FAR),
        ("JPEG2000", 0),
    ],
)
def test_every_source_of_every_format(format, far, tmp_path):
    picture = photograph()
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    data = saved(picture, format, **options.get(format, {}))
    path = tmp_path / "picture.misnamed"  # content counts, not the suffix
    path.write_bytes(data)
    with path.open("rb") as file:
        sources = [path, str(path), data, bytearray(data), memoryview(data), BytesIO(data), file]
        for source in sources:
            assert distance(images.decode(source), picture) <= far
    with Image.open(path) as lazy:
        assert distance(images.decode(lazy), picture) <= far


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(format, orientation, tmp_path):
    stored = photograph()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, format, exif=exif, quality=95)
    rows = pixels(stored)
    upright = {
        1: rows,
        2: rows[:, ::-1],
        3: rows[::-1, ::-1],
        4: rows[::-1],
        5: rows.transpose(1, 0, 2),
        6: rows[::-1].transpose(1, 0, 2),
        7: rows[::-1, ::-1].transpose(1, 0, 2),
        8: rows.transpose(1, 0, 2)[::-1],
    }[orientation]
    found = images.decode(data)
    assert np.abs(pixels(found) - upright).max() <= 25  # WebP and JPEG lose colour resolution
    assert distance(images.decode(found), found) == 0, "decoding what was decoded turned it again"
    with Image.open(BytesIO(data)) as lazy:
        assert distance(images.decode(lazy), found) == 0


def test_a_given_image_is_not_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(BytesIO(saved(photograph(), "PNG", exif=exif)))
    before, size = image.getexif().tobytes(), image.size
    images.decode(image).putpixel((0, 0), (1, 2, 3))
    assert (image.getexif().tobytes(), image.size) == (before, size)
    plain = photograph()
    images.decode(plain).putpixel((0, 0), (1, 2, 3))
    assert distance(plain, photograph()) == 0


def test_unreadable_exif_counts_as_upright():
    picture = photograph()
    for exif in (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0garbage", b"Exif\0\0"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (
                distance(images.decode(saved(picture, "JPEG", exif=exif, quality=95)), picture) < 30
            )


def test_cmyk_jpeg_is_taken_as_inverted():
    picture = photograph()
    data = saved(picture.convert("CMYK"), "JPEG", quality=98, subsampling=0)
    assert distance(images.decode(data), picture) <= FAR


def test_ycck_jpeg():
    picture = photograph()
    cyan, magenta, yellow, black = picture.convert("CMYK").split()
    # The file holds luma and chroma of the inks. Pillow inverts what it writes, and writes an Adobe
    # marker that says CMYK (0); 2 says YCCK.
    inks = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr")
    inverted = [channel.point(lambda value: 255 - value) for channel in inks.split()]
    data = saved(Image.merge("CMYK", (*inverted, black)), "JPEG", quality=98, subsampling=0)
    marker = data.index(b"Adobe") + 11
    assert data[marker] == 0
    data = data[:marker] + b"\x02" + data[marker + 1 :]
    assert distance(images.decode(data), picture) <= FAR


def test_cmyk_tiff_is_taken_as_it_is():
    picture = photograph()
    assert distance(images.decode(saved(picture.convert("CMYK"), "TIFF")), picture) <= 1


def test_palette():
    picture = photograph().quantize(32)
    assert distance(images.decode(saved(picture, "PNG")), picture.convert("RGB")) == 0
    assert distance(images.decode(saved(picture, "GIF")), picture.convert("RGB")) == 0


@pytest.mark.parametrize("transparency", [3, bytes([255, 255, 255, 0])])
def test_transparent_palette_entries_are_white(transparency):
    picture = photograph().quantize(32)
    expected = pixels(picture.convert("RGB"))
    expected[np.asarray(picture) == 3] = 255
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of transparency lost in a plain conversion
        found = images.decode(saved(picture, "PNG", transparency=transparency))
    assert (pixels(found) == expected).all()
    assert (expected == 255).all(axis=2).any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_alpha_is_composited_over_white(mode):
    picture = photograph()
    grey = mode in ("LA", "La")
    base = picture.convert("L").convert("RGB") if grey else picture
    if mode == "PA":
        base = picture.quantize(32).convert("RGB")
    alpha = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (24, 1))
    image = base.convert("RGBA")
    image.putalpha(Image.fromarray(alpha))
    if mode == "PA":
        image = picture.quantize(32).convert("PA")
        image.putalpha(Image.fromarray(alpha))
    elif mode == "La":
        image = image.convert("LA").convert("La")
    else:
        image = image.convert(mode)
    assert image.mode == mode
    weight = alpha[:, :, None] / 255
    expected = pixels(base) * weight + 255 * (1 - weight)
    assert np.abs(pixels(images.decode(image)) - expected).max() <= 2
    if mode in ("RGBA", "LA"):
        for format in ("PNG", "TIFF"):
            found = images.decode(saved(image, format))
            assert np.abs(pixels(found) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["palette", "colour", "alpha"])
def test_transparency_is_the_same_in_strips(kind, monkeypatch):
    """A large picture is composited strip by strip."""
    picture = photograph(30, 50)
    options = {}
    if kind == "palette":
        picture, options = picture.quantize(16), {"transparency": 3}
    elif kind == "colour":
        options = {"transparency": picture.getpixel((7, 40))}
    else:
        picture.putalpha(picture.getchannel("R"))
    data = saved(picture, "PNG", **options)
    expected = images.decode(data)
    for strip in (1, 30 * 7, 30 * 50):
        monkeypatch.setattr(conversion, "STRIP", strip)
        assert distance(images.decode(data), expected) == 0


def test_a_transparent_colour_is_white():
    picture = Image.new("RGB", (4, 4), (10, 20, 30))
    picture.putpixel((1, 1), (200, 0, 0))
    found = images.decode(saved(picture, "PNG", transparency=(10, 20, 30)))
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((1, 1)) == (200, 0, 0)


def test_greyscale_and_bilevel():
    grey = photograph().convert("L")
    found = pixels(images.decode(saved(grey, "PNG")))
    assert (found == pixels(grey)[:, :, None]).all()
    bilevel = photograph().convert("1")
    found = pixels(images.decode(saved(bilevel, "PNG")))
    assert set(np.unique(found)) == {0, 255}
    assert (found == pixels(bilevel.convert("L"))[:, :, None]).all()


RAMP = np.linspace(0, 65535, 40 * 24).astype(np.uint16).reshape(24, 40)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_images_keep_the_high_byte(mode):
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (40, 24), RAMP.astype(order).tobytes())
    assert (pixels(images.decode(image)) == (RAMP >> 8)[:, :, None]).all()


def tiff_of(order: str, sample: int, bits: int, data: bytes, photometric: int = 1) -> bytes:
    """An uncompressed 40x24 TIFF; `order` is "<" or ">", `sample` 1 unsigned, 2 signed, 3 float."""
    tags = [(256, 40), (257, 24), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, 24), (279, len(data)), (339, sample)]
    directory = struct.pack(order + "H", len(tags))
    for tag, value in tags:
        directory += struct.pack(order + "HHI", tag, 4, 1) + struct.pack(order + "I", value)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    header = magic + struct.pack(order + "I", 8 + len(data))
    return header + data + directory + b"\0\0\0\0"


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(RAMP), "PNG"),
        saved(Image.fromarray(RAMP), "TIFF"),
        tiff_of("<", 1, 16, RAMP.astype("<u2").tobytes()),
        tiff_of(">", 1, 16, RAMP.astype(">u2").tobytes()),
        b"P5 40 24 65535\n" + RAMP.astype(">u2").tobytes(),
        saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    ],
    ids=["png", "tiff", "tiff little", "tiff big", "pgm", "tiff 32-bit"],
)
def test_16_bit_files_keep_the_high_byte(data):
    assert (pixels(images.decode(data)) == (RAMP >> 8)[:, :, None]).all()


def test_16_bit_png_of_every_colour_type():
    rgb = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
    opaque = np.full_like(RAMP, 65535)
    assert (pixels(images.decode(png_of(2, rgb))) == rgb >> 8).all()
    with_alpha = np.dstack([rgb, opaque])
    assert (pixels(images.decode(png_of(6, with_alpha))) == rgb >> 8).all()
    grey_alpha = np.dstack([RAMP, opaque])
    assert (pixels(images.decode(png_of(4, grey_alpha))) == (RAMP >> 8)[:, :, None]).all()
    invisible = np.dstack([rgb, 0 * opaque])
    assert (pixels(images.decode(png_of(6, invisible))) == 255).all()


def test_a_transparent_grey_of_16_bits_is_white():
    key = int(RAMP[3, 5])
    data = png_of(0, RAMP[:, :, None], png_chunk(b"tRNS", struct.pack(">H", key)))
    expected = (RAMP >> 8).astype(int)
    expected[key == RAMP] = 255
    assert (pixels(images.decode(data)) == expected[:, :, None]).all()


@pytest.mark.parametrize("values", [(-1, 10), (0, 65536), (-5, 1 << 30)])
def test_32_bit_integers_beyond_16_bits_are_refused(values):
    image = Image.fromarray(np.array([values], np.int32))
    with pytest.raises(ImageError, match=f"from {values[0]} to {values[1]}"):
        images.decode(saved(image, "TIFF"))


def test_floats_are_refused():
    data = saved(Image.fromarray(np.ones((3, 4), np.float32)), "TIFF")
    with pytest.raises(ImageError, match="float pixels have no agreed range"):
        images.decode(data)


def test_other_colour_spaces():
    picture = photograph()
    for mode, far in (("YCbCr", 3), ("HSV", 8)):
        assert distance(images.decode(picture.convert(mode)), picture) <= far
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    soft = Image.blend(picture, Image.new("RGB", picture.size, (128, 128, 128)), 0.5)
    lab = ImageCms.profileToProfile(soft, *profiles, outputMode="LAB")
    assert distance(images.decode(saved(lab, "TIFF")), soft) <= 12


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_many(format):
    frames = [Image.new("RGB", (40, 24), color) for color in ("red", "green", "blue")]
    frames[0].putpixel((0, 0), (0, 0, 0))
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **lossless)
    with Image.open(BytesIO(data)) as image:
        assert image.n_frames == 3
    assert distance(images.decode(data), frames[0]) == 0
