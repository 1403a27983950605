"""Pictures of every format, mode, depth, alpha and orientation, against a second decoder.

TIFFs are written and read by tifffile, others by OpenCV, or by hand where neither can; what is
expected is computed from the numbers that were written.
"""

import io
import itertools
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from stellar_fast import ImageError
from stellar_fast.images import decode

HEIGHT, WIDTH = 9, 14
ORIENTATIONS = range(1, 9)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data)).astype(int)


def drawn(
    bits: int, channels: int, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> np.ndarray:
    """Numbers of so many bits, both ends among them."""
    top = (1 << bits) - 1
    rng = np.random.default_rng((bits, channels, seed))
    numbers = rng.integers(0, top + 1, (*size, channels), np.uint32)
    numbers[0, 0], numbers[0, 1] = 0, top
    return numbers.astype(np.uint8 if bits <= 8 else np.uint16)


def eight(numbers: np.ndarray, bits: int) -> np.ndarray:
    """The 8 high bits; of fewer, the whole range on the whole range."""
    if bits >= 8:
        return (numbers.astype(np.uint32) >> (bits - 8)).astype(np.uint8)
    return (numbers.astype(np.uint32) * 255 // ((1 << bits) - 1)).astype(np.uint8)


def rgb_of(grey_or_rgb: np.ndarray) -> np.ndarray:
    return np.broadcast_to(grey_or_rgb, (*grey_or_rgb.shape[:2], 3))


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Exact, to be met within one step of rounding."""
    share = alpha.astype(np.float64) / 255
    return colour * share + 255 * (1 - share)


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Upright, as Exif has it."""
    operations = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x[::-1].swapaxes(0, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: x[:, ::-1].swapaxes(0, 1),
    }
    return operations[orientation](array)


# PNG, by hand: of every depth, colour type, interlacing and key


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def png(numbers: np.ndarray, bits: int, colour: int, *chunks: bytes, after: bytes = b"") -> bytes:
    """A PNG of `numbers` (H, W, C); `chunks` come before the pixels."""
    rows = []
    for row in numbers.reshape(len(numbers), -1):
        if bits == 16:
            content = row.astype(">u2").tobytes()
        elif bits == 8:
            content = row.astype(np.uint8).tobytes()
        else:
            digits = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
            content = np.packbits(digits.ravel()).tobytes()
        rows.append(b"\0" + content)
    height, width = numbers.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + b"".join(chunks)
        + png_chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + after
        + png_chunk(b"IEND", b"")
    )


def key_of(values: np.ndarray) -> bytes:
    return png_chunk(b"tRNS", values.astype(">u2").tobytes())


GREY = [1, 2, 4, 8, 16]


@pytest.mark.parametrize("bits", GREY)
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("dirty", [False, True])
def test_png_grey(bits, keyed, dirty):
    """A key counts by its low bits alone, as many as the file's depth."""
    numbers = drawn(bits, 1)
    key = numbers[3, 5]
    extra = 1 << bits if dirty and bits < 16 else 0
    data = png(numbers, bits, 0, *([key_of(key.astype(np.uint32) + extra)] if keyed else []))
    expected = rgb_of(eight(numbers, bits)).copy()
    if keyed and not (bits == 1 and dirty):  # Pillow has made 1 of any key but 0 by then
        expected[(numbers == key).all(-1)] = 255
    if not (keyed and bits == 1 and dirty):
        np.testing.assert_array_equal(pixels(data), expected)


@pytest.mark.parametrize("bits", GREY)
def test_png_grey_that_the_caller_has_loaded(bits):
    numbers = drawn(bits, 1)
    for key in (0, 1, (1 << bits) - 1):
        numbers[3, 5] = key
        data = png(numbers, bits, 0, key_of(np.array([key])))
        with Image.open(io.BytesIO(data)) as image:
            lazy = np.asarray(decode(image))
            np.testing.assert_array_equal(np.asarray(decode(image)), lazy)  # loaded by now
        np.testing.assert_array_equal(lazy, pixels(data))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("keyed", [False, True])
def test_png_rgb(bits, keyed):
    numbers = drawn(bits, 3)
    key = numbers[3, 5].copy()
    numbers[4, 4] = key
    numbers[4, 5] = key ^ 1  # with the same high bytes, and not transparent
    data = png(numbers, bits, 2, *([key_of(key)] if keyed else []))
    expected = eight(numbers, bits)
    if keyed:
        expected[(numbers == key).all(-1)] = 255
    np.testing.assert_array_equal(pixels(data), expected)
    if keyed and bits == 8:
        dirty = png(numbers, bits, 2, key_of(key.astype(np.uint16) + 256))
        np.testing.assert_array_equal(pixels(dirty), expected)
    if keyed:
        with Image.open(io.BytesIO(data)) as lazy:  # not read by this package alone
            found = np.asarray(decode(lazy))
        assert (found[3, 5] == 255).all() and (found[4, 4] == 255).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("alpha", [None, "one", "many"])
def test_png_palette(bits, alpha):
    numbers = drawn(bits, 1)
    palette = np.random.default_rng(bits).integers(0, 256, (1 << bits, 3), np.uint8)
    chunks = [png_chunk(b"PLTE", palette.tobytes())]
    shares = np.full(1 << bits, 255, np.uint8)
    if alpha == "one":
        shares[1] = 0
    elif alpha == "many":
        shares[:2] = 64, 200
    if alpha is not None:
        chunks.append(png_chunk(b"tRNS", shares[:2].tobytes()))
    found = pixels(png(numbers, bits, 3, *chunks))
    index = numbers[..., 0]
    expected = over_white(palette[index], shares[index][..., None])
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [2, 4])
def test_png_alpha_is_opencvs(bits, channels):
    numbers = drawn(bits, channels)
    data = png(numbers, bits, {2: 4, 4: 6}[channels])
    read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    read = read[..., [2, 1, 0, 3]] if read.shape[-1] == 4 else read
    colour, alpha = eight(read, bits)[..., :-1], eight(read, bits)[..., -1:]
    expected = over_white(rgb_of(colour), alpha)
    assert np.abs(pixels(data) - expected).max() <= 1


# TIFF, by tifffile


def tiff(numbers: np.ndarray, bits: int, **options) -> bytes:
    with io.BytesIO() as file:
        grey = numbers.shape[-1] == 1
        tifffile.imwrite(
            file,
            numbers[..., 0] if grey else numbers,
            photometric=options.pop("photometric", "minisblack" if grey else "rgb"),
            bitspersample=bits if bits not in (8, 16) else None,
            **options,
        )
        return file.getvalue()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [None, "zlib"])
def test_tiff_grey(bits, white, order, packed):
    """All that is read is read right; what is not is an error."""
    numbers = drawn(bits, 1)
    if bits in (8, 16):
        name = "miniswhite" if white else "minisblack"
        data = tiff(numbers, bits, photometric=name, byteorder=order, compression=packed)
    else:
        data = tiff_by_hand(numbers, bits, order, 0 if white else 1, packed)
    expected = eight(numbers, bits)
    expected = rgb_of(255 - expected if white else expected)
    try:
        found = pixels(data)
    except ImageError as error:
        assert "kind, depth or order" in error.reason
        assert bits == 12 and order == ">"
        return
    np.testing.assert_array_equal(found, expected)


def test_tiffs_that_are_read():
    """Depths and polarities that must not become errors."""
    for bits, order, photometric in (
        *((12, "<", 0), (12, "<", 1), (16, "<", 0), (16, "<", 1), (16, ">", 0), (16, ">", 1)),
        *((bits, order, p) for bits in (1, 2, 4, 8) for order in "<>" for p in (0, 1)),
    ):
        for packed in (None, "zlib"):
            if bits == 12 and packed is not None:
                continue
            numbers = drawn(bits, 1)
            expected = eight(numbers, bits)
            expected = rgb_of(expected if photometric else 255 - expected)
            data = tiff_by_hand(numbers, bits, order, photometric, packed)
            np.testing.assert_array_equal(pixels(data), expected, f"{bits} {order} {photometric}")


def tiff_by_hand(
    numbers: np.ndarray, bits: int, order: str, photometric: int, packed: str | None, **tags
) -> bytes:
    """Greyscale of any depth, most significant bits first."""
    rows = []
    for row in numbers[..., 0]:
        if bits == 16:
            rows.append(row.astype(f"{order}u2").tobytes())
            continue
        digits = np.unpackbits(row.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)
        rows.append(np.packbits(digits[:, 16 - bits :].ravel()).tobytes())
    strip = b"".join(rows)
    if packed is not None:
        strip = zlib.compress(strip)
    entries = [
        *((256, 3, WIDTH), (257, 3, HEIGHT), (258, 3, bits), (259, 3, 1 if packed is None else 8)),
        *((262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 3, HEIGHT), (279, 4, len(strip))),
    ]
    mark = b"II*\0" if order == "<" else b"MM\0*"
    body = strip + b"\0" * (len(strip) % 2)
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, value in entries:
        field = struct.pack(f"{order}H2x" if kind == 3 else f"{order}I", value)
        directory += struct.pack(f"{order}HHI", tag, kind, 1) + field
    return mark + struct.pack(f"{order}I", 8 + len(body)) + body + directory + bytes(4)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("alpha", [None, "unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("packed", [None, "zlib"])
def test_tiff_rgb(bits, order, planar, alpha, packed):
    """Of alpha that the colours were multiplied by, the last bit of dark ones is lost."""
    numbers = drawn(bits, 3 if alpha is None else 4)
    if alpha == "assocalpha":
        top = (1 << bits) - 1
        numbers[..., :3] = numbers[..., :3].astype(np.uint64) * numbers[..., 3:] // top
    stored = numbers.transpose(2, 0, 1) if planar == "separate" else numbers
    data = tiff(
        stored,
        bits,
        byteorder=order,
        planarconfig=planar,
        compression=packed,
        extrasamples=[] if alpha is None else [alpha],
    )
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        read = file.asarray()
    read = read.transpose(1, 2, 0) if planar == "separate" else read
    parts = eight(read, bits).astype(int)
    colour = parts[..., :3]
    if alpha == "unassalpha":
        expected = over_white(colour, parts[..., 3:])
    elif alpha == "assocalpha":
        expected = colour + 255 - parts[..., 3:]
    else:
        expected = colour
    try:
        found = pixels(data)
    except ImageError as error:
        assert (planar == "separate" and packed is not None) or alpha is not None, error.reason
        return
    limit = 2 if alpha == "assocalpha" else 1
    assert np.abs(found - np.clip(expected, 0, 255)).max() <= limit


@pytest.mark.parametrize("wide", [True, False])
def test_tiff_palette_of_16_bits_or_8(wide):
    """Some programs write 8 bits where the format has 16."""
    numbers = drawn(8, 1)
    palette = np.random.default_rng(0).integers(0, 256, (3, 256), np.uint16)
    data = tiff(numbers, 8, photometric="palette", colormap=palette * 257 if wide else palette)
    np.testing.assert_array_equal(pixels(data), palette.T[numbers[..., 0]])


def test_signed_and_other_numbers_are_errors():
    signed = drawn(8, 1).astype(np.int8)
    for numbers in (signed, drawn(16, 1).astype(np.int16) - 5, drawn(8, 1).astype(np.float32)):
        with io.BytesIO() as file:
            tifffile.imwrite(file, numbers[..., 0], photometric="minisblack")
            with pytest.raises(ImageError, match=r"negative|outside|float|kind, depth or order"):
                decode(file.getvalue())
    with io.BytesIO() as file:
        tifffile.imwrite(file, np.abs(signed[..., 0] // 2), photometric="minisblack")
        np.testing.assert_array_equal(pixels(file.getvalue())[..., 0], np.abs(signed[..., 0] // 2))


def test_a_fourth_channel_of_a_tiff_that_is_not_explained():
    """All 0, it is none; otherwise it is alpha, as Pillow has it."""
    numbers = drawn(8, 4)
    for alpha, expected in (
        (0, numbers[..., :3]),
        (None, over_white(numbers[..., :3], numbers[..., 3:])),
    ):
        written = numbers.copy()
        if alpha is not None:
            written[..., 3] = alpha
        data = bytearray(tiff(written, 8, extrasamples=["unassalpha"], metadata=None))
        at = data.index(struct.pack("<HHI", 338, 3, 1))
        struct.pack_into("<H", data, at, 65000)  # a private tag in its place
        assert np.abs(pixels(bytes(data)) - expected).max() <= 1


@pytest.mark.parametrize("top", [1, 3, 15, 100, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", [b"P5", b"P6"])
def test_pnm_of_any_depth(kind, top):
    channels = 1 if kind == b"P5" else 3
    numbers = np.random.default_rng(top).integers(0, top + 1, (HEIGHT, WIDTH, channels))
    numbers[0, 0], numbers[0, 1] = 0, top
    body = numbers.astype(">u2" if top > 255 else np.uint8).tobytes()
    found = pixels(kind + f" {WIDTH} {HEIGHT} {top}\n".encode() + body)
    assert np.abs(found - rgb_of(numbers * 255 / top)).max() <= 1
    assert (found[0, 0] == 0).all() and (found[0, 1] == 255).all()


# BMP, by hand


def bmp(numbers: np.ndarray, masks: tuple[int, ...], size: int) -> bytes:
    """32 bits a pixel, by masks, bottom row first; `size` is the header's."""
    values = numbers.astype(np.uint32) @ (np.uint32(1) << np.array([16, 8, 0, 24], np.uint32))
    body = values[::-1].astype("<u4").tobytes()
    header = struct.pack("<IiiHHIIiiII", size, WIDTH, HEIGHT, 1, 32, 3, len(body), 0, 0, 0, 0)
    header += struct.pack(f"<{len(masks)}I", *masks)
    header += bytes(max(0, size - len(header)))
    start = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + body


MASKS = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)


@pytest.mark.parametrize("size", [56, 108, 124])
@pytest.mark.parametrize("alpha", ["none", "opaque", "drawn", "almost none"])
def test_bmp_of_32_bits(size, alpha):
    numbers = drawn(8, 4)
    if alpha != "drawn":
        numbers[..., 3] = {"none": 0, "opaque": 255, "almost none": 0}[alpha]
    if alpha == "almost none":
        numbers[2, 3, 3] = 1
    found = pixels(bmp(numbers, MASKS, size))
    shares = np.full_like(numbers[..., 3:], 255) if alpha == "none" else numbers[..., 3:]
    assert np.abs(found - over_white(numbers[..., :3], shares)).max() <= 1


# What OpenCV writes


@pytest.mark.parametrize(
    ("suffix", "bits", "channels"),
    [
        *itertools.product([".png", ".tiff", ".jp2"], [8, 16], [1, 3]),
        *itertools.product([".pgm", ".ppm"], [8, 16], [None]),
        *((".bmp", 8, 1), (".bmp", 8, 3), (".bmp", 8, 4), (".png", 8, 4), (".tiff", 8, 4)),
        *((".webp", 8, 3), (".webp", 8, 4), (".png", 16, 4), (".tiff", 16, 4)),
    ],
)
def test_what_opencv_writes(suffix, bits, channels):
    channels = channels or {".pgm": 1, ".ppm": 3}[suffix]
    numbers = drawn(bits, channels, size=(64, 80))
    swapped = numbers[..., {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]]
    options = {
        ".webp": [cv2.IMWRITE_WEBP_QUALITY, 101],
        ".jp2": [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000],
    }
    done, data = cv2.imencode(suffix, swapped, options.get(suffix, []))
    assert done
    parts = eight(numbers, bits)
    expected = rgb_of(parts) if channels != 4 else over_white(parts[..., :3], parts[..., 3:])
    found = pixels(data.tobytes())
    # JPEG 2000 of OpenCV rounds, and an alpha of 16 bits is composited by its high byte.
    assert np.abs(found - expected).max() <= 1


# Orientation


def exif_of(orientation: int) -> bytes:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16", "P", "1", "CMYK"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_of_every_mode(format, mode, orientation):
    modes = {
        "PNG": {"RGB", "RGBA", "L", "LA", "I;16", "P", "1"},
        "JPEG": {"RGB", "L", "CMYK"},
        "WEBP": {"RGB", "RGBA"},
        "TIFF": {"RGB", "RGBA", "L", "LA", "I;16", "P", "1", "CMYK"},
        "AVIF": {"RGB", "RGBA"},
    }
    if mode not in modes[format]:
        return
    if mode == "I;16":
        image = Image.fromarray(drawn(16, 1)[..., 0])
    else:
        image = (
            Image.fromarray(drawn(8, 3)).resize((48, 32)).convert(mode if mode != "CMYK" else "RGB")
        )
        image = image.convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(Image.fromarray(drawn(8, 1, 1)[..., 0]).resize((48, 32)))
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}

    def saved(orientation: int) -> bytes:
        with io.BytesIO() as file:
            image.save(file, format, exif=exif_of(orientation), **options.get(format, {}))
            return file.getvalue()

    np.testing.assert_array_equal(pixels(saved(orientation)), turned(pixels(saved(1)), orientation))
