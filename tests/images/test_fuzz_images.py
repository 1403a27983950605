"""Damaged files of every format: a picture or an ImageError with a reason, soon, in few bytes."""

import struct
import time
from io import BytesIO

import fuzzing
import pytest
from mutants import FORMATS, RARE, mutant, originals
from pictures import photograph, saved
from PIL import Image

from stellar_fast import images
from stellar_fast.errors import ImageError
from stellar_fast.images.jpeg import count_scans

# At most three pictures in Pillow's 4 bytes a pixel: as the decoder holds it, as RGB, and turned
# upright. "eval" takes RGB and one channel as bytes, an array and float32; allocators keep some.
BYTES_A_PIXEL = 16
SLACK = 96 << 20  # bytes: files, decoders' tables, and what an allocator keeps


def check(cases: list[fuzzing.Case], max_pixels: int, limit: float, preset: str) -> fuzzing.Outcome:
    outcome = fuzzing.run(cases, limit=limit, max_pixels=max_pixels, preset=preset)
    assert outcome.bad == []
    assert outcome.pictures.total() + outcome.errors.total() == len(cases)
    assert outcome.peak - outcome.start <= BYTES_A_PIXEL * max_pixels + SLACK
    for name in {name for name, _ in cases}:  # or the mutations are too weak, or too strong
        assert outcome.pictures[name] > 0, name
        assert outcome.errors[name] > 0, name
    return outcome


def test_a_few_mutants():
    cases = [(name, seed) for name in FORMATS for seed in range(20)]
    cases += [(name, seed) for name in RARE for seed in range(15)]
    check(cases, max_pixels=20_000_000, limit=120, preset="card")


@pytest.mark.slow
@pytest.mark.parametrize("preset", images.PRESETS)
def test_a_thousand_mutants(preset):
    first = 100_000 * (1 + images.PRESETS.index(preset))
    cases = [(name, first + seed) for name in FORMATS for seed in range(140)]
    cases += [(name, first + seed) for name in RARE for seed in range(40)]
    check(cases, max_pixels=20_000_000, limit=120, preset=preset)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("preset", images.PRESETS)
def test_ten_thousand_mutants(preset):
    first = 10_000_000 * (1 + images.PRESETS.index(preset))
    cases = [(name, first + seed) for name in FORMATS for seed in range(850)]
    cases += [(name, first + seed) for name in RARE for seed in range(150)]
    check(cases, max_pixels=images.MAX_PIXELS, limit=300, preset=preset)


@pytest.mark.parametrize("name", (*FORMATS, *RARE))
def test_the_originals_are_whole(name):
    for data in originals(name):
        with Image.open(BytesIO(data)) as image:
            assert image.format == name
        assert sorted(images.decode(data).size) == [48, 64]
    assert mutant(name, 1) == mutant(name, 1) != mutant(name, 2)


def test_the_fuzzer_notices_what_it_looks_for(monkeypatch):
    """A decoder that dies, hangs or raises something else is reported, and the rest goes on."""
    play = {1: b"EXIT", 3: b"HANG", 5: b"RAISE"}
    monkeypatch.setattr(fuzzing, "mutant", lambda name, seed: play.get(seed) or originals(name)[0])
    monkeypatch.setattr(fuzzing, "LOAD", "fuzzing:misbehave")
    found = fuzzing.run([("PNG", seed) for seed in range(7)], limit=5, max_pixels=10_000)
    expected = ("exit code 7", "no answer in 5 s", "KeyError")
    for (case, said), seed, part in zip(found.bad, play, expected, strict=True):
        assert case == ("PNG", seed)
        assert part in said
    assert found.pictures["PNG"] == 4


def scan_bomb(side: int, scans: int) -> bytes:
    """A grey progressive JPEG whose scans, a few bytes each, pass over all of its blocks."""

    def table(kind: int, symbol: int) -> bytes:  # one code, "0", of one bit
        return b"\xff\xc4" + struct.pack(">HB", 20, kind << 4) + bytes((1, *[0] * 15, symbol))

    def scan(first: int, last: int, body: bytes) -> bytes:
        return b"\xff\xda" + struct.pack(">H", 8) + bytes((1, 1, 0, first, last, 0)) + body

    blocks = ((side + 7) // 8) ** 2
    head = b"\xff\xd8\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1] * 64)
    head += b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side, side, 1) + bytes((1, 0x11, 0))
    end_of_bands = 0xE0  # the next 2 ** 14 blocks or more hold nothing
    runs = bytes(blocks // (1 << 14) * 15 // 8 + 2)
    head += table(0, 0) + table(1, end_of_bands) + scan(0, 0, bytes(blocks // 8 + 1))
    return head + scan(1, 63, runs) * scans + b"\xff\xd9"


def test_jpegs_of_many_scans_are_refused():
    assert images.decode(scan_bomb(200, images.MAX_SCANS - 1)).size == (200, 200)
    began = time.process_time()
    with pytest.raises(ImageError, match="more than 100 scans"):
        images.decode(scan_bomb(7000, 20_000))  # to decode it takes hours
    assert time.process_time() - began < 10
    with pytest.raises(ImageError, match="more than 100 scans"):
        images.decode(Image.open(BytesIO(scan_bomb(200, images.MAX_SCANS))))


def test_only_the_pictures_own_scans_count(tmp_path):
    """Not those of a thumbnail in its metadata, nor of what a telephone appends to it."""
    progressive = saved(photograph(120, 80), "JPEG", progressive=True, quality=97)
    assert count_scans(BytesIO(progressive), 0, 3, 100) == 10
    other = b"\xff\xda\0\2" * 500
    with_others = progressive[:2] + b"\xff\xe5" + struct.pack(">H", 2 + len(other)) + other
    with_others += progressive[2:] + other
    assert count_scans(BytesIO(with_others), 0, 3, 100) == 10
    path = tmp_path / "telephone.jpg"
    path.write_bytes(with_others)
    assert images.decode(path).size == (120, 80)
    assert count_scans(BytesIO(b"before" + with_others), 6, 3, 100) == 10
    assert count_scans(BytesIO(progressive[:-2]), 0, 3, 100) == 10
    assert count_scans(BytesIO(b"\xff\xd8"), 0, 3, 100) == 0


def test_scans_are_found_across_blocks():
    """Pixels of any length before the next marker, so that it lies over a border of blocks."""
    for length in range((1 << 16) - 12, (1 << 16) + 4):
        data = b"\xff\xd8\xff\xda\0\2" + bytes(length) + b"\xff\xda\0\2" + b"\xff\0" * 9
        assert count_scans(BytesIO(data + b"\xff\xd9\xff\xda\0\2"), 0, 3, 100) == 2
