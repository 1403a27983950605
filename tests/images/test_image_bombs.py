"""Small files that would cost much: an error before the cost, or the pixels for a bounded one."""

import os
import pickle
import struct
import time
from io import BytesIO

import bombs
import numpy as np
import pytest
from pictures import distance, photograph, png_chunk, saved
from PIL import Image

from stellar_fast import images
from stellar_fast.errors import ImageError
from stellar_fast.extract.work.sandbox import BYTES_A_PIXEL
from stellar_fast.images import jpeg2000

SIDE = 1000
FULL = SIDE * SIDE
# What a process may take besides: the file, the tables of decoders and of resizing, allocators.
SLACK = 40 << 20
SECONDS = 20  # of the processor; each bomb would take more, or takes a hundredth


def peak() -> int:
    """Most memory that this process had, in bytes."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def cost(data: bytes, preset: str = "card", **options) -> tuple[str | tuple, int, float]:
    """Of decoding and resizing in a process of its own: the reason or the size; bytes; seconds."""
    images.preset_pixels(images.decode(bombs.png(9, 9)), preset)  # imports are no picture's cost
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak is counted from here
            before, began = peak(), time.process_time()
            try:
                image = images.decode(data, **options)
                images.preset_pixels(image, preset)
                found: str | tuple = image.size
            except ImageError as error:
                found = error.reason
            answer = found, peak() - before, time.process_time() - began
            os.write(write, pickle.dumps(answer))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return pickle.loads(content)


def segments(count: int, code: int, body: bytes) -> bytes:
    """A JPEG with so many segments of metadata."""
    data = bombs.jpeg(9, 9)
    return data[:2] + bombs.jpeg_segment(code, body) * count + data[2:]


# A frame of 4 billion pixels, to be replaced by the background: Pillow fills it when it opens.
GIF_FRAME = (
    b"GIF89a\x09\0\x09\0\xf0\0\0"
    + bytes(6)
    + b"!\xf9\4\x08\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;"
)


# Refused by the limit that the reason names, at a cost that has nothing to do with the pixels.
REFUSED = {
    "png of many pixels": (bombs.png(60_000, 60_000, pixels=b""), "60000x60000 is more than"),
    "png too wide": (bombs.png(20_000_000, 2), "20000000x2 has a side of more than 1048576"),
    "png too tall": (bombs.png(1, 20_000_000), "1x20000000 has a side of more than 1048576"),
    "jpeg of many pixels": (bombs.jpeg(65_500, 65_500), "65500x65500 is more than"),
    "jpeg of many scans": (bombs.jpeg(7000, 7000, scans=30_000), "JPEG of more than 100 scans"),
    "progressive jpeg of many scans": (
        bombs.jpeg(7000, 7000, progressive=True, scans=30_000),
        "JPEG of more than 100 scans",
    ),
    "webp canvas": (bombs.webp(16_384, 16_384), "16384x16384 is more than"),
    "webp canvas of one frame": (bombs.webp(16_384, 16_384, animated=False), "is more than"),
    "gif canvas": (bombs.gif(65_535, 65_535), "65535x65535 is more than"),
    "gif frame": (GIF_FRAME, "exceeds limit of 50000000 pixels"),
    "bmp": (bombs.bmp(60_000, 60_000), "60000x60000 is more than"),
    "tiff": (bombs.tiff_of(30_000, 30_000), "30000x30000 is more than"),
    "tiff tile": (bombs.tiff_of(9, 9, tile=[16_384, 16_384]), "tiles of 16384x16384 are more than"),
    "ppm": (bombs.pnm(b"P6", 60_000, 60_000), "60000x60000 is more than"),
    "pgm of comments": (bombs.pnm(b"P5", 9, 9, comment=50_000_000), "only P4, P5 and P6 .* 64 KiB"),
    "plain ppm": (b"P3 100 100 255\n" + b"#\n" * 3_000_000, "of PNM only P4, P5 and P6"),
    "j2k of many pixels": (bombs.j2k(60_000, 60_000), "60000x60000 is more than"),
    "j2k tiles": (bombs.j2k(2000, 2000, tile=8), "cut into 62500 tiles"),
    "jp2 tiles": (bombs.jp2(bombs.j2k(2000, 2000, tile=8), 2000, 2000), "cut into 62500 tiles"),
    "j2k precincts": (bombs.j2k(2000, 2000, precinct=2), "cut into 5330424 code blocks"),
    "j2k code blocks": (bombs.j2k(5000, 5000, code_block=4), "cut into .* code blocks"),
    "jp2 components": (
        bombs.jp2(bombs.j2k(255, 255, components=16_384, tile=1), 255, 255),
        "of 16384 components",
    ),
}


def test_a_caller_without_a_limit_of_pixels_is_protected_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="exceeds limit of 50000000 pixels"):
        images.decode(GIF_FRAME)


@pytest.mark.parametrize("name", REFUSED)
def test_what_costs_too_much_is_refused_before_it_does(name):
    data, reason = REFUSED[name]
    with pytest.raises(ImageError, match=reason):
        images.decode(data)
    found, memory, seconds = cost(data)
    assert isinstance(found, str)
    assert memory < SLACK + 2 * len(data)
    assert seconds < SECONDS


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (b"iCCP", b"k\0\0"),
        (b"zTXt", b"k\0\0"),
        (b"zTXt", b"Raw profile type exif\0\0"),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"),
    ],
)
def test_metadata_that_unpack_to_much_cost_nothing(kind, head):
    data = bombs.png(9, 9, extra=png_chunk(kind, head + bombs.packed(1 << 28)))
    assert images.decode(data).size == (9, 9)
    _, memory, seconds = cost(data)
    assert memory < SLACK + 2 * len(data) and seconds < SECONDS


TURNED = Image.Exif()
TURNED[0x0112] = 6
CLEAR = Image.new("RGBA", (SIDE, SIDE), (10, 20, 30, 40))

# Decoded, at no more than `BYTES_A_PIXEL` of the picture.
DECODED = {
    "png": bombs.png(SIDE, SIDE),
    "png of 64 bits, turned, clear": saved(CLEAR, "PNG", exif=TURNED),
    "png palette, clear": bombs.png(SIDE, SIDE, color=3),
    "png wide": bombs.png(1 << 20, 1),
    "png tall": bombs.png(1, 1 << 20),
    "jpeg": bombs.jpeg(SIDE, SIDE),
    "jpeg without its end": saved(Image.new("RGB", (SIDE, SIDE)), "JPEG")[:-2],
    "progressive jpeg of four": bombs.jpeg(SIDE, SIDE, progressive=True, components=4),
    "jpeg of 100 scans": bombs.jpeg(SIDE, SIDE, scans=100),
    "webp clear": saved(CLEAR, "WEBP", exif=TURNED, method=0),
    "webp lossless": saved(CLEAR, "WEBP", exif=TURNED, lossless=True, method=0),
    "avif clear": saved(CLEAR, "AVIF", exif=TURNED, speed=10, subsampling="4:4:4"),
    "gif": bombs.gif(SIDE, SIDE),
    "gif of many frames": bombs.gif(SIDE, SIDE, frames=300_000),
    "gif of many comments": bombs.gif(9, 9, extensions=100_000),
    "tiff turned": bombs.tiff_of(SIDE, SIDE, tag274=[6]),
    "tiff of 32 bits": bombs.tiff_of(SIDE, SIDE, bits=32),
    "tiff of 16 bits": bombs.tiff_of(SIDE, SIDE, bits=16),
    "tiff tile": bombs.tiff_of(9, 9, tile=[1024, 1024]),
    "j2k": bombs.j2k(SIDE, SIDE, components=4),
    "j2k tiles": bombs.j2k(SIDE, SIDE, components=4, tile=64),
    "j2k code blocks": bombs.j2k(SIDE, SIDE, components=4, code_block=16),
    "j2k precincts": bombs.j2k(SIDE, SIDE, components=4, precinct=64),
    "j2k layers": bombs.j2k(SIDE, SIDE, layers=65_535),
    "j2k levels": bombs.j2k(SIDE, SIDE, levels=32),
    "jpeg of many segments": segments(50_000, 0xE5, b""),
    "jpeg of long exif": segments(20, 0xE1, b"Exif\0\0" + bytes(65_000)),
}


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_decoded_costs_no_more_than_its_pixels(name):
    data = DECODED[name]
    size, memory, seconds = cost(data, max_pixels=1 << 20)
    assert isinstance(size, tuple), size
    assert memory < BYTES_A_PIXEL * (1 << 20) + SLACK + 2 * len(data)
    assert seconds < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("preset", images.PRESETS)
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("WEBP", {"lossless": True, "method": 0}),
        ("AVIF", {"speed": 10, "subsampling": "4:4:4"}),
        ("PNG", {"compress_level": 1}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("JPEG2000", {}),
    ],
)
def test_bytes_a_pixel_of_pictures_of_16_megapixels(format, options, preset):
    """What `--worker-memory` is by default: for large pictures too, whose fixed costs vanish."""
    exif = {} if format == "JPEG2000" else {"exif": TURNED}
    data = saved(CLEAR.resize((4000, 4000)), format, **exif, **options)
    size, memory, _ = cost(data, preset)
    assert size == (4000, 4000)
    assert memory < BYTES_A_PIXEL * 16_000_000 + 2 * len(data)


def test_directories_of_a_tiff_that_lead_back_are_read_once():
    data = bombs.tiff_of(5, 4)
    first = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, first)[0]
    link = first + 2 + 12 * entries
    data = data[:link] + struct.pack("<I", first) + data[link + 4 :]
    assert images.decode(data).size == (5, 4)


def test_a_panorama_of_the_longest_side_is_resized_as_any_other():
    """The same columns as a picture of a sixteenth, each 16 times."""
    wide = np.zeros((2, 1 << 16, 3), np.uint8)
    wide[:] = np.linspace(0, 255, 1 << 16, dtype=np.uint8)[:, None]
    found = images.preset_pixels(images.decode(saved(Image.fromarray(wide), "PNG")), "card")
    wider = Image.fromarray(wide.repeat(16, axis=1))
    again = images.preset_pixels(images.decode(saved(wider, "PNG", compress_level=1)), "card")
    assert np.abs(found.astype(int) - again).max() <= 1


@pytest.mark.parametrize("comment", [b"", b" a comment # and more", b"x" * 60_000])
@pytest.mark.parametrize("magic", [b"P4", b"P5", b"P6"])
def test_binary_pnm_with_comments_is_read(magic, comment):
    pixels = {b"P4": b"\x80\0", b"P5": b"\0\xff\xff\xff", b"P6": bytes(3) + b"\xff" * 9}[magic]
    depth = b"\n" if magic == b"P4" else b" #of depth\r 255\n"
    data = magic + b"\n#" + comment + b"\n#\n 2#of the width\n\t2" + depth + pixels
    expected = Image.new("RGB", (2, 2), "white")
    expected.putpixel((0, 0), (0, 0, 0))
    assert distance(images.decode(data), expected) == 0


@pytest.mark.parametrize("magic", [b"P1", b"P2", b"P3"])
def test_plain_pnm_is_not_read(magic):
    depth = b"" if magic == b"P1" else b"1\n"
    with pytest.raises(ImageError, match="of PNM only P4, P5 and P6 are read"):
        images.decode(magic + b"\n1 1\n" + depth + b"1 1 1\n")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"no_jp2": True},
        {"tile_size": (128, 128)},
        {"tile_size": (64, 64), "num_resolutions": 3, "progression": "RPCL"},
        {"codeblock_size": (32, 32), "precinct_size": (128, 128)},
        {"codeblock_size": (16, 16), "precinct_size": (64, 64)},
        {"quality_layers": [40, 20, 0], "quality_mode": "rates", "irreversible": False},
        {"offset": (7, 5), "tile_offset": (3, 2), "tile_size": (100, 90)},
        {"num_resolutions": 1},
    ],
)
def test_jpeg_2000_as_encoders_cut_it_is_read(options):
    picture = photograph(600, 400)
    found = images.decode(saved(picture, "JPEG2000", **options))
    assert found.size == (600, 400)
    assert distance(found, picture) <= (0 if "quality_layers" not in options else 1)


def test_small_jpeg_2000_may_be_cut_in_any_way():
    for options in ({"code_block": 4}, {"precinct": 4}, {"tile": 4}):
        assert images.decode(bombs.j2k(100, 100, **options)).size == (100, 100)


@pytest.mark.parametrize("where", ["main header", "tile header", "component"])
def test_cuts_are_found_wherever_the_codestream_tells_of_them(where):
    data = bombs.j2k(2000, 2000)
    at = data.index(b"\xff\x52")
    length = int.from_bytes(data[at + 2 : at + 4], "big") + 2
    style = bytearray(data[at : at + length])
    style[10:12] = b"\0\0"  # code blocks of 4x4
    if where == "component":
        style = b"\xff\x53" + struct.pack(">HBB", 9, 1, 0) + style[9:14]
    if where == "main header":
        changed = data[:at] + style + data[at + length :]
    else:
        tile = data.index(b"\xff\x90") + 12
        part = struct.unpack_from(">I", data, tile - 6)[0] + len(style)
        changed = data[: tile - 6] + struct.pack(">I", part) + data[tile - 2 : tile] + style
        changed += data[tile:]
    with pytest.raises(ImageError, match=r"cut into .* code blocks"):
        images.decode(changed)


class Counted(BytesIO):
    """A file that ends the test when it is read from too often, rather than never."""

    left = 4 * jpeg2000.MAX_SEGMENTS

    def read(self, size=-1):
        self.left -= 1
        assert self.left, "read again and again"
        return super().read(size)


@pytest.mark.parametrize("psot", [0, 1, 13, 14, 40])
def test_headers_that_lead_back_are_followed_once(psot):
    """Data that begin before any tile does, and tiles that end before their data do."""
    data = bombs.j2k(100, 100)
    tile = data.index(b"\xff\x90")
    early = data[:tile] + b"\xff\x93" + data[tile:]
    part = data[tile : tile + 6] + struct.pack(">I", psot) + data[tile + 10 : tile + 12]
    long = b"\xff\x64" + struct.pack(">H", 60) + bytes(58)  # a comment in the tile's header
    back = data[:tile] + part + long + data[tile + 12 :]
    for content in (early, back, bombs.jp2(early, 100, 100), bombs.jp2(back, 100, 100)):
        jpeg2000.check(Counted(content))
        try:
            images.decode(Counted(content))
        except ImageError as error:
            assert "broken data stream" in error.reason


def test_boxes_and_segments_are_counted():
    data = bombs.j2k(100, 100)
    tile = data.index(b"\xff\x90")
    comment = b"\xff\x64\0\2"
    many = data[:tile] + comment * (jpeg2000.MAX_SEGMENTS + 1) + data[tile:]
    with pytest.raises(ImageError, match="more than 262144 segments of markers"):
        jpeg2000.check(Counted(many))
    free = struct.pack(">I", 8) + b"free"
    whole = bombs.jp2(data, 100, 100)
    at = whole.index(b"free") - 4
    for count in (1000, jpeg2000.MAX_BOXES):
        boxed = Counted(whole[:at] + free * count + whole[at:])
        if count == 1000:
            jpeg2000.check(boxed)
            continue
        with pytest.raises(ImageError, match="more than 4096 boxes"):
            jpeg2000.check(boxed)


def test_scans_of_a_file_that_is_not_progressive_count_where_they_are_read():
    """An ordinary JPEG has one, and what follows it (a film, another picture) is not read."""
    data = saved(photograph(60, 40), "JPEG")
    scan = data[data.index(b"\xff\xda") : -2]
    assert images.decode(data + scan * 200).size == (60, 40)
    with pytest.raises(ImageError, match="broken data stream"):  # libjpeg's answer
        images.decode(data[:-2] + scan * 200 + data[-2:])
    assert images.decode(bombs.jpeg(60, 40, scans=100)).size == (60, 40)
    with pytest.raises(ImageError, match="JPEG of more than 100 scans"):
        images.decode(bombs.jpeg(60, 40, scans=101))
