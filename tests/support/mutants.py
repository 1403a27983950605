"""Damaged picture files: valid ones of every format that is read, and seeded ways to mutate them.

Half of the mutations know the format, where it is one of the six that photographs come in: they
change fields that a decoder trusts (dimensions, lengths, offsets, counts, tables) and put checksums
right again, as random bytes rarely do.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from pictures import photograph, png_chunk, saved
from PIL import Image, PngImagePlugin

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
RARE = ("MPO", "PPM", "JPEG2000", "AVIF")
WIDTH, HEIGHT = 64, 48
# Where decoders' arithmetic breaks: signs, powers of two and their neighbours, by width in bytes.
EDGES = {
    1: (0, 1, 2, 7, 8, 16, 127, 128, 254, 255),
    2: (0, 1, 255, 256, 4096, 32767, 32768, 65500, 65534, 65535),
    4: (0, 1, 255, 65535, 65536, 0x01000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF),
}
Mutate = Callable[[bytes, random.Random], bytes]


@cache
def originals(format: str) -> tuple[bytes, ...]:
    """Valid files of one format: its modes, compressions and metadata."""
    picture = photograph(WIDTH, HEIGHT)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a photograph"
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a photograph " * 20, zip=True)
    grey, cmyk, indexed = picture.convert("L"), picture.convert("CMYK"), picture.quantize(16)
    clear = picture.convert("RGBA")
    clear.putalpha(grey)
    frames = {"save_all": True, "append_images": [photograph(WIDTH, HEIGHT, seed=1)]}
    grey16 = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    variants: dict[str, list[tuple[Image.Image, dict]]] = {
        "JPEG": [
            (picture, {"quality": 90, "exif": exif}),
            (picture, {"progressive": True, "comment": b"a photograph"}),
            (grey, {"restart_marker_rows": 1}),
            (cmyk, {}),
        ],
        "PNG": [
            (picture, {"pnginfo": text, "exif": exif}),
            (indexed, {"transparency": 3}),
            (clear, {}),
            (grey16, {"transparency": 257}),
            (grey.convert("1"), {}),
            (picture, frames),
        ],
        "WEBP": [
            (picture, {"exif": exif}),
            (clear, {"lossless": True}),
            (clear, {}),
            (picture, frames),
        ],
        "GIF": [(indexed, {"transparency": 3}), (indexed, {"interlace": 0}), (picture, frames)],
        "TIFF": [
            (picture, {"exif": exif}),
            *[(picture, {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate")],
            *[(picture, {"compression": name}) for name in ("packbits", "jpeg")],
            (grey.convert("1"), {"compression": "group4"}),
            (grey16, {}),
            (clear, frames),
            (picture, {"big_tiff": True}),
        ],
        "BMP": [(picture, {}), (indexed, {}), (grey.convert("1"), {}), (clear, {})],
        "MPO": [(picture, frames)],
        "PPM": [(picture, {}), (grey, {}), (grey16, {})],
        "JPEG2000": [(picture, {}), (clear, {"tile_size": (32, 32)})],
        "AVIF": [(picture, {"exif": exif}), (clear, {})],
    }
    files = [saved(image, format, **options) for image, options in variants[format]]
    return (*files, _run_length_bmp()) if format == "BMP" else tuple(files)


def mutant(format: str, seed: int) -> bytes:
    """The damaged file of a format and a seed: the same bytes on every machine with this Pillow."""
    rng = random.Random(f"{format} {seed}")
    data = rng.choice(originals(format))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if len(data) < 64:  # cut to next to nothing
            break
        generic = rng.random() < 0.5 or format not in KNOWING
        data = rng.choice(GENERIC)(data, rng) if generic else KNOWING[format](data, rng)
    return data


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    end = rng.choice((min(64, len(data)), len(data)))
    for _ in range(rng.choice((1, 1, 4, 32))):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_edge(data: bytes, rng: random.Random) -> bytes:
    """One integer of 1, 2 or 4 bytes becomes one that arithmetic stumbles over."""
    width = rng.choice((1, 2, 4))
    at = rng.randrange(min(len(data), rng.choice((64, len(data)))))
    value = rng.choice(EDGES[width]).to_bytes(width, rng.choice(("little", "big")))
    return data[:at] + value + data[at + width :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A piece of this or of any other file put in, or over what was there."""
    other = rng.choice(originals(rng.choice(FORMATS))) if rng.random() < 0.5 else data
    piece = _piece(other, rng)
    at = rng.randrange(len(data))
    return data[:at] + piece + data[at + rng.choice((0, len(piece))) :]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    piece = _piece(data, rng)
    return data.replace(piece, rng.choice((b"", bytes(len(piece)))), 1)


def _piece(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[start : start + rng.choice((1, 4, 16, 64, 512))]


def rewrite_png(data: bytes, rng: random.Random) -> bytes:
    """Chunks changed, doubled, moved or dropped, with right checksums."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = min(int.from_bytes(data[at : at + 4], "big"), len(data))
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return data
    index = rng.randrange(len(chunks))
    kind, body = chunks[index]
    choice = rng.randrange(7)
    if choice == 0:
        chunks.insert(rng.randrange(len(chunks)), chunks[index])
    elif choice == 1:
        chunks.pop(index)
    elif choice == 2:
        rng.shuffle(chunks)
    elif choice == 3 and chunks[0][0] == b"IHDR" and len(chunks[0][1]) == 13:
        header = bytearray(chunks[0][1])
        if rng.random() < 0.5:
            header[(at := rng.choice((0, 4))) : at + 4] = rng.choice(_SIDES).to_bytes(4, "big")
        else:
            header[rng.randrange(8, 13)] = rng.randrange(9)
        chunks[0] = (b"IHDR", bytes(header))
    elif choice == 4:
        name = rng.choice((b"tRNS", b"PLTE", b"acTL", b"fcTL", b"eXIf", b"pHYs", b"iCCP", b"gAMA"))
        chunks.insert(rng.randrange(1, len(chunks) + 1), (name, rng.randbytes(rng.randrange(40))))
    elif choice == 5:  # text that unpacks to a thousand times its size
        bomb = b"key\0\0" + zlib.compress(bytes(4_000_000))
        chunks.insert(1, (rng.choice((b"zTXt", b"iCCP")), bomb))
    elif body:
        chunks[index] = (kind, flip_bits(body, rng))
    return data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def rewrite_jpeg(data: bytes, rng: random.Random) -> bytes:
    """Segments changed, doubled, moved or dropped; what follows the first scan stays."""
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        segments.append(bytearray(data[at:end]))
        at = end
    rest = data[at:]
    if not segments:
        return data
    index = rng.randrange(len(segments))
    frames = [segment for segment in segments if 0xC0 <= segment[1] <= 0xC2 and len(segment) > 9]
    choice = rng.randrange(7)
    if choice == 0:
        copies = rng.choice((1, 2, 400))
        segments[index:index] = [segments[index]] * copies
    elif choice == 1:
        segments.pop(index)
    elif choice == 2:
        rng.shuffle(segments)
    elif choice == 3 and frames:
        side = rng.choice((5, 7))
        frames[0][side : side + 2] = min(rng.choice(_SIDES), 65535).to_bytes(2, "big")
    elif choice == 4 and frames:  # components, precision, sampling
        frames[0][rng.choice((1, 4, *range(9, len(frames[0]))))] = rng.randrange(256)
    elif choice == 5:  # scans again: each is a pass over the picture
        rest = rest[:-2] + rest * rng.choice((1, 30))
    elif len(segments[index]) > 4:
        segments[index][4:] = flip_bits(bytes(segments[index][4:]), rng)
    return data[:2] + b"".join(segments) + rest


def rewrite_webp(data: bytes, rng: random.Random) -> bytes:
    """Chunks changed, doubled, moved or dropped, in a RIFF of the right length or not."""
    chunks, at = [], 12
    while at + 8 <= len(data):
        length = min(int.from_bytes(data[at + 4 : at + 8], "little"), len(data))
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    if not chunks:
        return data
    index = rng.randrange(len(chunks))
    kind, body = chunks[index]
    choice = rng.randrange(5)
    if choice == 0:
        chunks.insert(index, chunks[index])
    elif choice == 1:
        rng.shuffle(chunks)
    elif choice == 2:
        kinds = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
        chunks[index] = (rng.choice(kinds), body)
    elif choice == 3 and body:  # where the dimensions are
        changed = bytearray(body)
        changed[rng.randrange(min(len(body), 16))] = rng.randrange(256)
        chunks[index] = (kind, bytes(changed))
    elif body:
        chunks[index] = (kind, flip_bits(body, rng))
    packed = b"".join(
        kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for kind, body in chunks
    )
    length = len(packed) + 4 if rng.random() < 0.8 else rng.choice(EDGES[4])
    return b"RIFF" + struct.pack("<I", length) + b"WEBP" + packed


def rewrite_tiff(data: bytes, rng: random.Random) -> bytes:
    """One field of an entry of the first directory, or the link to the next directory."""
    if data[:4] != b"II*\0":
        return set_edge(data, rng)
    changed = bytearray(data)
    (start,) = struct.unpack_from("<I", data, 4)
    if start + 2 > len(data):
        return data
    (count,) = struct.unpack_from("<H", data, start)
    if not 0 < count < 100 or start + 6 + 12 * count > len(data):
        return data
    entry = start + 2 + 12 * rng.randrange(count)
    choice = rng.randrange(5)
    if choice == 0:
        struct.pack_into("<H", changed, entry, rng.choice(_TAGS))
    elif choice == 1:
        struct.pack_into("<H", changed, entry + 2, rng.randrange(20))
    elif choice == 2:
        struct.pack_into("<I", changed, entry + 4, rng.choice(EDGES[4]))
    elif choice == 3:
        values = (*_SIDES, *EDGES[4], *range(1, 9), 32773, 34712)
        struct.pack_into("<I", changed, entry + 8, rng.choice(values))
    else:  # a directory that follows itself
        struct.pack_into("<I", changed, start + 2 + 12 * count, rng.choice((start, 0, 8, 1 << 31)))
    return bytes(changed)


def rewrite_gif(data: bytes, rng: random.Random) -> bytes:
    """The screen, a frame's place and size, its code size, or a piece of it again."""
    changed = bytearray(data)
    frame = data.find(b",", 13)
    choice = rng.randrange(4)
    if choice == 0 or not 0 < frame < len(data) - 11:
        struct.pack_into("<H", changed, rng.choice((6, 8)), min(rng.choice(_SIDES), 65535))
    elif choice == 1:
        at = frame + rng.choice((1, 3, 5, 7))
        struct.pack_into("<H", changed, at, min(rng.choice(_SIDES), 65535))
    elif choice == 2:
        changed[frame + rng.choice((9, 10))] = rng.randrange(256)
    else:
        return data[:-1] + data[frame:] * rng.choice((1, 50))
    return bytes(changed)


def rewrite_bmp(data: bytes, rng: random.Random) -> bytes:
    """One field of the header."""
    changed = bytearray(data)
    kind, at = rng.choice(
        (("<I", 10), ("<I", 14), ("<i", 18), ("<i", 22), ("<H", 28), ("<I", 30), ("<I", 46))
    )
    if kind == "<i":
        side = rng.choice(_SIDES)
        struct.pack_into(kind, changed, at, rng.choice((side, -side, -HEIGHT)))
    elif kind == "<H":
        struct.pack_into(kind, changed, at, rng.choice((0, 1, 2, 4, 8, 16, 24, 32, 64)))
    else:
        struct.pack_into(kind, changed, at, rng.choice((*range(10), 40, 108, 124, *EDGES[4])))
    return bytes(changed)


def _run_length_bmp() -> bytes:
    """A BMP of run-length codes (compression 1), which Pillow reads but does not write."""
    lines = b"".join(bytes((WIDTH, row % 4)) + b"\0\0" for row in range(HEIGHT)) + b"\0\1"
    palette = b"".join(bytes((40 * entry, 90, 200 - 40 * entry, 0)) for entry in range(4))
    offset = 54 + len(palette)
    head = struct.pack("<2sIHHI", b"BM", offset + len(lines), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 8, 1, len(lines), 0, 0, 4, 0)
    return head + info + palette + lines


GENERIC: tuple[Mutate, ...] = (flip_bits, set_edge, truncate, splice, cut_out)
KNOWING: dict[str, Mutate] = {
    "JPEG": rewrite_jpeg,
    "MPO": rewrite_jpeg,
    "PNG": rewrite_png,
    "WEBP": rewrite_webp,
    "GIF": rewrite_gif,
    "TIFF": rewrite_tiff,
    "BMP": rewrite_bmp,
}
_SIDES = (0, 1, 2, 63, 65, 1000, 12_000, 13_377, 65_500, 65_535, 1 << 24, (1 << 31) - 1)
_TAGS = (254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324)
