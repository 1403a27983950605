"""Small pictures, and files of them that Pillow does not write itself."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image


def photograph(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    """A smooth RGB picture without symmetry, so that every transposition shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(seed: int = 0) -> bytes:
    """A small photograph as a file."""
    return saved(photograph(40, 30, seed), "PNG")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def distance(found: Image.Image, expected: Image.Image) -> int:
    assert found.mode == "RGB"
    assert found.size == expected.size
    return int(np.abs(pixels(found) - pixels(expected)).max())


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(color: int, samples: np.ndarray, extra: bytes = b"") -> bytes:
    """A 16-bit PNG of samples (H, W, channels)."""
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    body = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")
