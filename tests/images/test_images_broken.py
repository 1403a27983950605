"""Whatever is wrong with a picture is one `ImageError`, and nothing else in the process changes."""

import os
import pickle
import random
import re
import struct
import time
import warnings
import zlib
from io import BytesIO

import numpy as np
import psutil
import pytest
from pictures import distance, photograph, png_of, saved
from PIL import Image, ImageFile
from threads import in_threads

from stellar_fast import images
from stellar_fast.errors import ImageError


def broken_files() -> dict[str, tuple[bytes, str]]:
    """Name -> (content, a piece of the reason)."""
    jpeg = saved(photograph(200, 120), "JPEG", quality=95)
    png = saved(photograph(200, 120), "PNG")
    huge = png_of(2, np.zeros((1, 1, 3), np.uint16))
    huge = huge[:16] + struct.pack(">II", 60000, 60000) + huge[24:29]
    huge += struct.pack(">I", zlib.crc32(huge[12:29])) + png[33:]
    return {
        "empty": (b"", "empty file"),
        "text": (
            b"<html>404 not found</html>" * 10,
            "not an image in a format that is read .*JPEG",
        ),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not an image"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated png": (png[: len(png) // 2], "truncated|broken|unrecognized"),
        "header of jpeg": (jpeg[:20], "damaged JPEG file"),
        "header of png": (png[:30], "damaged PNG file"),
        "bomb": (huge, "60000x60000 is more than the limit of 50000000 pixels"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_image_errors(name, tmp_path):
    data, reason = broken_files()[name]
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError, match=reason) as caught:
            images.decode(source)
        assert "\n" not in str(caught.value)
        assert caught.value.reason
        assert not re.search(r"\b0x", caught.value.reason), "an address, never twice the same"
    assert caught.value.path == f"<{len(data)} bytes>"
    with pytest.raises(ImageError) as caught:
        images.load_image(path, "card")
    assert caught.value.path == str(path)


@pytest.mark.parametrize("sixteenth", range(16))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_no_cut_file_is_decoded(format, sixteenth):
    data = saved(photograph(120, 90), format)
    with pytest.raises(ImageError):
        images.decode(data[: len(data) * sixteenth // 16])


def test_missing_folders_pipes_and_locked_files(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        images.decode(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        images.decode(tmp_path)
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    with pytest.raises(ImageError, match="not a regular file"):
        images.decode(pipe)
    with pytest.raises(ImageError, match="null"):
        images.decode("a\0b.jpg")
    with pytest.raises(ImageError, match="name too long"):
        images.decode("a" * 5000)


def test_unreadable_permission(tmp_path, monkeypatch):
    path = tmp_path / "locked.png"
    path.write_bytes(saved(photograph(), "PNG"))
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: the system's answer is played
        import builtins

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ImageError, match=r"locked\.png: permission denied"):
        images.decode(path)


def test_the_pixel_limit_is_checked_before_decoding(monkeypatch):
    data = saved(photograph(100, 50), "PNG")
    assert images.decode(data, max_pixels=5000).size == (100, 50)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="100x50 is more than the limit of 4999 pixels"):
        images.decode(data, max_pixels=4999)
    with pytest.raises(ValueError, match="max_pixels"):
        images.decode(data, max_pixels=0)


def test_the_limit_holds_for_a_header_that_lies(monkeypatch):
    """A format may learn its size only while it decodes."""
    data = saved(photograph(100, 50), "PNG")
    real = ImageFile.ImageFile.load

    def load(self):
        self._size = (100, 50)
        return real(self)

    with Image.open(BytesIO(data)) as image:
        image._size = (1, 1)
        monkeypatch.setattr(type(image), "load", load)
        with pytest.raises(ImageError, match="100x50 is more than"):
            images.decode(image, max_pixels=10)


def test_images_without_pixels():
    with pytest.raises(ImageError, match=r"no pixels \(0x5\)"):
        images.decode(Image.new("RGB", (0, 5)))


def test_memory_errors_are_image_errors(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError, match="out of memory"):
        images.decode(saved(photograph(), "PNG"))


@pytest.mark.parametrize("source", [3, None, ["a.jpg"]])
def test_what_is_no_source_is_a_type_error(source):
    with pytest.raises(TypeError, match=type(source).__name__):
        images.decode(source)


def test_max_pixels_alone_decides(monkeypatch):
    """Neither Pillow's warning nor its error at open, whatever its limit is set to."""
    data = saved(photograph(), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit in (700, 100):  # the picture has 960: Pillow warns at 700, refuses at 100
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            assert distance(images.decode(data, max_pixels=960), photograph()) == 0


EXACT = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}


def with_damaged_exif(format: str) -> bytes:
    """A file of orientation 6 (a quarter turn) of whose metadata the last entry is cut off."""
    entries = struct.pack("<HHHII", 2, 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x010E, 2, 99, 9999)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries
    return saved(photograph(), format, exif=exif, **EXACT[format])


@pytest.mark.parametrize("format", EXACT)  # JPEG reads its metadata at open, the others later
def test_warnings_never_decide(format):
    data = with_damaged_exif(format)
    upright = photograph().transpose(Image.Transpose.ROTATE_270)
    with pytest.warns(UserWarning):  # or this test shows nothing
        assert distance(images.decode(data), upright) < 30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = Image.open(BytesIO(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        for source in (data, BytesIO(data), lazy):
            assert distance(images.decode(source), upright) < 30
        assert list(warnings.filters) == before
        with pytest.raises(ImageError):
            images.decode(data[: len(data) // 2])


def test_files_are_closed(tmp_path):
    process = psutil.Process()
    path = tmp_path / "picture"
    whole = saved(photograph(120, 90), "TIFF")
    before = process.num_fds()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        kept = []  # an exception's traceback keeps what it saw alive: closed, not collected
        for data in (whole, whole[: len(whole) // 2], b"text", saved(photograph(), "PNG")[:60]):
            path.write_bytes(data)
            try:
                kept.append(images.decode(path))
            except ImageError as error:
                kept.append(error)
        assert process.num_fds() == before
    assert [type(result) for result in kept] == [Image.Image, ImageError, ImageError, ImageError]


def test_a_given_file_is_read_from_its_start_and_stays_open():
    file = BytesIO(saved(photograph(), "PNG"))
    file.seek(7)
    for _ in range(2):
        assert distance(images.decode(file), photograph()) == 0
    assert not file.closed


def test_a_file_that_cannot_seek():
    read, write = os.pipe()
    with os.fdopen(write, "wb") as sender:
        sender.write(saved(photograph(), "PNG"))
    with os.fdopen(read, "rb") as pipe:
        assert distance(images.decode(pipe), photograph()) == 0


def test_a_format_that_this_pillow_lacks(monkeypatch):
    opener = Image.OPEN["WEBP"][0]
    monkeypatch.setitem(Image.OPEN, "WEBP", (opener, lambda start: "WEBP support not installed"))
    with pytest.raises(ImageError, match="WEBP support not installed"):
        images.decode(saved(photograph(), "WEBP"))


def test_pillow_state_is_left_alone():
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    for data, _ in broken_files().values():
        with pytest.raises(ImageError):
            images.decode(data)
    after = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    assert before == after


def test_errors_survive_a_process_boundary(tmp_path):
    with pytest.raises(ImageError) as caught:
        images.decode(tmp_path / "absent.jpg")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, again.reason) == (caught.value.path, caught.value.reason)
    assert str(again) == str(caught.value)


def test_many_threads(tmp_path):
    paths = []
    for index in range(12):
        paths.append(tmp_path / f"{index}.png")
        photograph(seed=index).save(paths[-1])
    failures = []

    def work(offset):
        for round in range(20):
            index = (offset + round) % len(paths)
            if distance(images.decode(paths[index]), photograph(seed=index)):
                failures.append(index)

    in_threads(work, range(8))
    assert failures == []


MUTATIONS = 40  # of each format; test_fuzz_images.py has more


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_mutated_files_are_an_image_or_an_image_error(format):
    rng = random.Random(format)
    picture = photograph(64, 48).quantize(16) if format == "GIF" else photograph(64, 48)
    options = {"compression": "tiff_lzw"} if format == "TIFF" else {}
    original = saved(picture, format, **options)
    outcomes = {"image": 0, "error": 0}
    for _ in range(MUTATIONS):
        data = bytearray(original)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), rng.choice((64, len(data)))))] = rng.randrange(256)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        began = time.process_time()
        try:
            image = images.decode(bytes(data), max_pixels=4_000_000)
        except ImageError as error:
            assert error.reason
            outcomes["error"] += 1
        else:
            assert image.mode == "RGB"
            assert image.width * image.height <= 4_000_000
            assert images.apply_preset(image, "card").shape == (3, 224, 224)
            outcomes["image"] += 1
        assert time.process_time() - began < 10
    assert min(outcomes.values()) > 0, outcomes
