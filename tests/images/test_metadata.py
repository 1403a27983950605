"""Metadata and Pillow's settings never decide whether a picture is read, nor what it shows."""

import io
import random
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from pictures import photograph
from PIL import Image, ImageCms, ImageFile, PngImagePlugin
from threads import in_threads

from stellar_fast import ImageError
from stellar_fast.images import decode, metadata

PICTURE = photograph(64, 48)
JUNK = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()


def saved(format: str, image: Image.Image = PICTURE, **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, format, **options)
        return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data))


def exif(orientation: int = 6) -> bytes:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'

# PNG


def chunk(kind: bytes, body: bytes, check: int | None = None) -> bytes:
    check = zlib.crc32(kind + body) if check is None else check
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def png_with(*chunks: bytes, behind: bool = False) -> bytes:
    data = saved("PNG")
    at = data.index(b"IEND") - 4 if behind else 33
    return data[:at] + b"".join(chunks) + data[at:]


TEXTS = {
    "itxt": chunk(b"iTXt", b"k\0\0\0\0\0" + b"x" * 2_000_000),
    "ztxt": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000))),
    "ztxt of another method": chunk(b"zTXt", b"k\0\1" + JUNK),
    "ztxt of junk": chunk(b"zTXt", b"k\0\0" + JUNK),
    "wrong sums": chunk(b"tEXt", b"k\0v", 0)
    + chunk(b"gAMA", bytes(4), 0)
    + chunk(b"eXIf", exif(), 0),
    "short": b"".join(chunk(kind, b"") for kind in (b"cHRM", b"gAMA", b"pHYs", b"sRGB", b"iCCP")),
    "short by one": b"".join(
        chunk(kind, bytes(size)) for kind, size in ((b"cHRM", 31), (b"gAMA", 3), (b"pHYs", 8))
    ),
    "profile of another method": chunk(b"iCCP", b"k\0\7" + JUNK),
    "profile of junk": chunk(b"iCCP", JUNK),
    "profile of much": chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2_000_000))),
    "exif of junk": chunk(b"eXIf", JUNK),
    "animation of junk": chunk(b"acTL", JUNK) + chunk(b"fcTL", JUNK),
    "names of Pillow's own": b"".join(
        chunk(b"tEXt", key + b"\0 1") for key in (b"interlace", b"transparency", b"bbox", b"exif")
    ),
    "names that are no text": chunk(b"tEXt", b"\xff\xfe\0")
    + chunk(b"iTXt", b"\xff\0\0\0\xff\0\xff\0\xff"),
    "unknown": chunk(b"zzZz", JUNK) + chunk(b"vpAg", b""),
    "exif of PNG's text": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\nxyz"),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("behind", [False, True])
def test_no_chunk_of_a_png_decides(name, behind):
    np.testing.assert_array_equal(pixels(png_with(TEXTS[name], behind=behind)), np.asarray(PICTURE))


@pytest.mark.parametrize(
    "note",
    [
        chunk(b"eXIf", exif()[6:]),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  36\n" + exif().hex().encode() + b"\n"),
        chunk(
            b"zTXt",
            b"Raw profile type exif\0\0"
            + zlib.compress(b"\nexif\n  36\n" + exif().hex().encode() + b"\n"),
        ),
    ],
    ids=["exif", "xmp", "packed xmp", "text", "packed text"],
)
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("broken", ["", "short", "ztxt"])
def test_the_orientation_of_a_png_is_found_beside_what_is_broken(note, behind, broken):
    data = png_with(TEXTS.get(broken, b""), note, behind=behind)
    np.testing.assert_array_equal(
        pixels(data), np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    )


def test_pngs_that_end_early_are_truncated():
    data = saved("PNG")
    end = data.index(b"IEND") - 4
    for length in (33, 40, 60, len(data) // 2, end - 30):
        with pytest.raises(ImageError):
            decode(data[:length])
    for length in (end - 4, end, end + 4):  # all pixels are there
        np.testing.assert_array_equal(pixels(data[:length]), np.asarray(PICTURE))


def test_pieces_are_bounded(monkeypatch):
    monkeypatch.setattr(metadata, "MAX_PIECES", 5)
    many = b"".join(chunk(b"PLTE", bytes(3)) + chunk(b"tEXt", b"k\0v") for _ in range(50))
    np.testing.assert_array_equal(pixels(png_with(many)), np.asarray(PICTURE))


def test_notes_that_unpack_to_much_are_bounded():
    """Each of thousands to a megabyte: together, a minute."""
    one = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(metadata.MAX_NOTE)))
    data = png_with(*[one] * 5000)
    began = time.process_time()
    np.testing.assert_array_equal(pixels(data), np.asarray(PICTURE))
    assert time.process_time() - began < 2


# JPEG


def segment(code: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body


def jpeg_with(*segments: bytes, **options) -> bytes:
    data = saved("JPEG", quality=90, **options)
    return data[:2] + b"".join(segments) + data[2:]


PARTS = {
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "shorter JFIF": segment(0xE0, b"JFIF"),
    "Adobe cut off": segment(0xEE, b"Adobe"),
    "Adobe nearly whole": segment(0xEE, b"Adobe\0\x64\0\0\0\0"),
    "Exif of junk": segment(0xE1, b"Exif\0\0" + JUNK),
    "Exif of nothing": segment(0xE1, b"Exif\0\0"),
    "much Exif": segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 40,
    "XMP of junk": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + JUNK),
    "profile of junk": segment(0xE2, b"ICC_PROFILE\0") + segment(0xE2, b"ICC_PROFILE\0\1"),
    "pages of junk": segment(0xE2, b"MPF\0" + JUNK) + segment(0xE2, b"MPF\0"),
    "Photoshop of junk": segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 9),
    "comments": segment(0xFE, JUNK) * 9,
    "padding": b"\xff\xff\xff" + segment(0xFE, b"x"),
}


@pytest.mark.parametrize("name", PARTS)
def test_no_segment_of_a_jpeg_decides(name):
    np.testing.assert_array_equal(pixels(jpeg_with(PARTS[name])), pixels(jpeg_with()))


@pytest.mark.parametrize("name", ["", "short JFIF", "pages of junk", "comments"])
@pytest.mark.parametrize(
    "note", [segment(0xE1, exif()), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)]
)
def test_the_orientation_of_a_jpeg_is_found_beside_what_is_broken(name, note):
    expected = np.rot90(pixels(jpeg_with()), -1)
    np.testing.assert_array_equal(pixels(jpeg_with(PARTS.get(name, b""), note)), expected)


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_is_read_if_it_is_whole(options, subsampling, mode):
    image = PICTURE.convert(mode)
    data = saved("JPEG", image, subsampling=subsampling, **options)
    whole = pixels(data)
    for missing in (2, 1):
        np.testing.assert_array_equal(pixels(data[:-missing]), whole)
    start = data.index(b"\xff\xda")
    ends = [*range(start + 14, len(data) - 8, 37), *range(len(data) - 40, len(data) - 8)]
    ends += [
        at
        for at in range(start, len(data) - 4)
        if data[at] == 0xFF and data[at + 1] in range(0xD0, 0xD8)
    ]
    for end in ends:
        # What is read without its last bytes shows the same all the same.
        try:
            found = pixels(data[:end])
        except ImageError:
            continue
        np.testing.assert_array_equal(found, whole)


def test_the_end_of_an_upright_jpeg():
    data = jpeg_with(segment(0xE1, exif()))
    np.testing.assert_array_equal(pixels(data[:-2]), pixels(data))


def test_progressive_jpegs_need_their_end():
    data = saved("JPEG", progressive=True)
    with pytest.raises(ImageError, match="truncated"):
        decode(data[:-2])


# Others

OTHERS = {
    "WEBP": [{"exif": JUNK}, {"xmp": JUNK}, {"icc_profile": JUNK}],
    "TIFF": [{"icc_profile": JUNK}, {"tiffinfo": {270: "x" * 2_000_000, 305: "\xff"}}],
    "AVIF": [{"xmp": JUNK}],
    "GIF": [{"comment": JUNK}],
    "JPEG2000": [{"comment": "x" * 60_000}],
}


@pytest.mark.parametrize(
    ("format", "options"),
    [(format, options) for format, many in OTHERS.items() for options in many],
    ids=repr,
)
def test_no_metadata_of_other_formats_decide(format, options):
    plain = {"lossless": True} if format == "WEBP" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pixels(saved(format, **plain, **options))
    np.testing.assert_array_equal(found, pixels(saved(format, **plain)))


def test_exif_of_an_avif_that_is_junk():
    body = b"MM\0*" + struct.pack(">IHHHI4sI", 8, 1, 0x0131, 2, 4, b"abc\0", 0)  # a program
    data = saved("AVIF", exif=b"Exif\0\0" + body)
    assert body in data
    for junk in (b"\xff" * len(body), bytes(len(body)), b"MM\0*" + b"\xff" * (len(body) - 4)):
        np.testing.assert_array_equal(pixels(data.replace(body, junk)), pixels(data))


def test_a_webp_that_is_cut_off_in_its_metadata():
    data = saved("WEBP", lossless=True, exif=exif(1) + bytes(2000))
    expected = pixels(data)
    for missing in (1, 500, 1999):
        np.testing.assert_array_equal(pixels(data[:-missing]), expected)
    with pytest.raises(ImageError):
        decode(data[: data.index(b"VP8L") + 50])


@pytest.mark.parametrize("packed", ["raw", "tiff_lzw", "jpeg"])
@pytest.mark.parametrize("big", [False, True])
def test_tags_of_a_tiff_that_make_no_pixels(packed, big):
    data = bytearray(
        saved("TIFF", compression=packed, big_tiff=big, dpi=(72, 72), software="x" * 9)
    )
    expected = pixels(bytes(data))
    if data[2] == 43:  # libtiff's, of what is packed, are not
        (first,), count, size = struct.unpack_from("<Q", data, 8), "<Q", 20
    else:
        (first,), count, size = struct.unpack_from("<I", data, 4), "<H", 12
    (number,) = struct.unpack_from(count, data, first)
    start = first + struct.calcsize(count)
    for at in range(start, start + number * size, size):
        (tag,) = struct.unpack_from("<H", data, at)
        if tag in (282, 283, 296, 305):  # resolutions and the program
            struct.pack_into("<H", data, at + 2, 12)  # of another type
            data[at + 4 : at + size] = b"\xff" * (size - 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(pixels(bytes(data)), expected)


def test_a_resolution_of_jpeg_2000_that_is_none():
    data = saved("JPEG2000")
    expected = pixels(data)
    box = struct.pack(">I4s", 8 + 10, b"res ") + struct.pack(">I4s", 10, b"resc") + b"\0\0"
    at = data.index(b"jp2h") - 4
    (size,) = struct.unpack_from(">I", data, at)
    broken = data[:at] + struct.pack(">I", size + len(box)) + data[at + 4 : at + size] + box
    np.testing.assert_array_equal(pixels(broken + data[at + size :]), expected)


# Pillow's settings


@pytest.fixture
def settings():
    earlier = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    yield
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = earlier


HALVES = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "TIFF": {},
    "BMP": {},
    "PPM": {},
    "JPEG2000": {},
    "AVIF": {},
}


@pytest.mark.parametrize("format", HALVES)
def test_half_a_picture_is_an_error_whatever_the_callers_flag(format, settings):
    data = saved(format)
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    half = data[: len(data) * 2 // 3]
    for source in (half, io.BytesIO(half)):
        with pytest.raises(ImageError):
            decode(source)
    np.testing.assert_array_equal(
        pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )
    assert ImageFile.LOAD_TRUNCATED_IMAGES and ImageFile.LOAD_TRUNCATED_IMAGES == True  # noqa: E712


def test_the_caller_keeps_its_flag_meanwhile(settings):
    """In other threads, and in this one after the picture."""
    half = saved("JPEG")
    half = half[: len(half) * 2 // 3]
    ImageFile.LOAD_TRUNCATED_IMAGES = True

    def by_pillow() -> None:
        Image.open(io.BytesIO(half)).load()

    def often(function) -> None:
        for _ in range(50):
            function()

    def by_decode() -> None:
        with pytest.raises(ImageError):
            decode(half)

    in_threads(often, (by_pillow, by_decode) * 4)
    by_pillow()
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with pytest.raises(OSError, match="truncated"):
        by_pillow()


@pytest.mark.parametrize("format", HALVES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_callers_limit_of_pixels_plays_no_part(format, mode, settings):
    if mode == "RGBA" and format in ("JPEG", "BMP", "PPM"):
        return
    data = saved(format, PICTURE.convert(mode))
    expected = pixels(data)
    for limit in (10, None):
        Image.MAX_IMAGE_PIXELS = limit
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(pixels(data), expected)
            decode(PICTURE.convert(mode))
    Image.MAX_IMAGE_PIXELS = 10
    decode(data)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    with pytest.raises(ImageError, match="more than the limit of 20 pixels"):
        decode(data, max_pixels=20)


def test_the_callers_limit_of_text_plays_no_part(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 10)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 10)
    np.testing.assert_array_equal(pixels(png_with(TEXTS["ztxt"])), np.asarray(PICTURE))


# Damages, drawn


def _with_all_metadata(format: str) -> tuple[bytes, list[tuple[int, int]]]:
    """A picture, and where its metadata are in the file."""
    notes = Image.Exif()
    notes[0x0131], notes[0x010E] = "a program" * 9, "a description" * 9
    notes.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">' + b'<a b="c"/>' * 30 + b"</x:xmpmeta>"
    options = {"exif": notes.tobytes(), "icc_profile": profile, "xmp": xmp}
    if format == "GIF":
        data = saved("GIF", comment=b"c" * 200)
        bodies = [b"c" * 200]
    elif format == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", "hello" * 40)
        data = saved("PNG", exif=options["exif"], icc_profile=profile, pnginfo=text)
        bodies = [options["exif"][6:], b"hello" * 40]
    elif format.startswith("TIFF"):
        packed = "tiff_lzw" if format == "TIFF LZW" else None
        facts = {"exif": notes, "icc_profile": profile, "dpi": (72, 72), "software": "x" * 50}
        data = saved("TIFF", compression=packed, **facts)
        (first,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, first)
        places = range(first + 2, first + 2 + 12 * count, 12)
        others = (270, 282, 283, 296, 305, 306, 700, 34665, 34675)
        return data, [
            (at + 2, at + 12) for at in places if struct.unpack_from("<H", data, at)[0] in others
        ]
    else:
        lossless = {"lossless": True} if format == "WEBP" else {}
        data = saved(format, **options, **lossless)
        bodies = [options["exif"][6:], profile, xmp]
    return data, [(data.index(body), data.index(body) + len(body)) for body in bodies]


def _damages(format: str, seeds: range) -> None:
    data, spans = _with_all_metadata(format)
    expected = pixels(data)
    for seed in seeds:
        chosen = random.Random(seed)
        low, high = chosen.choice(spans)
        damaged = bytearray(data)
        for _ in range(chosen.randrange(1, 12)):
            damaged[chosen.randrange(low, high)] = chosen.choice([0, 255, chosen.randrange(256)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(pixels(bytes(damaged)), expected, f"seed {seed}")


DAMAGED = ["JPEG", "PNG", "WEBP", "TIFF", "TIFF LZW", "AVIF", "GIF"]


@pytest.mark.parametrize("format", DAMAGED)
def test_damaged_metadata_change_nothing(format):
    _damages(format, range(60))


@pytest.mark.soak
@pytest.mark.parametrize("format", DAMAGED)
def test_much_damaged_metadata_change_nothing(format):
    _damages(format, range(1000, 4000))


def test_the_orientation_in_the_xmp_of_a_tiff():
    expected = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(pixels(saved("TIFF", tiffinfo={700: XMP})), expected)
    np.testing.assert_array_equal(pixels(saved("TIFF", exif=exif())), expected)
