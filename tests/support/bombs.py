"""Small files that cost much: each function makes one, of a format that is read (or was).

They are written by hand where a library would need the memory itself.
"""

import struct
import zlib

from pictures import png_chunk


def packed(length: int) -> bytes:
    """So many zero bytes in zlib's format, a thousandth of that."""
    packer, pieces = zlib.compressobj(1), []
    block = bytes(1 << 20)
    for _ in range(length >> 20):
        pieces.append(packer.compress(block))
    pieces.append(packer.compress(block[: length & ((1 << 20) - 1)]))
    return b"".join(pieces) + packer.flush()


def png(
    width: int,
    height: int,
    *,
    depth: int = 1,
    color: int = 0,
    interlace: int = 0,
    extra: bytes = b"",
    pixels: bytes | None = None,
) -> bytes:
    """A black PNG; `pixels` are its compressed lines, those of a whole picture if left out."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    if pixels is None:
        pixels = packed((1 + (width * depth * channels + 7) // 8) * height)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    chunks = png_chunk(b"IHDR", header) + extra
    if color == 3:
        chunks += png_chunk(b"PLTE", bytes(6)) + png_chunk(b"tRNS", b"\x80")
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def jpeg_segment(code: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, 2 + len(body)) + body


def jpeg(
    width: int, height: int, *, components: int = 3, progressive: bool = False, scans: int = 1
) -> bytes:
    """A grey JPEG without coded pixels: libjpeg takes those that lack as zeros.

    With `scans`, each is of the first component alone.
    """
    table = bytes((1, *[0] * 15))  # one code of one bit
    data = b"\xff\xd8" + jpeg_segment(0xDB, bytes((0, *[1] * 64)))
    data += jpeg_segment(0xC4, b"\0" + table + b"\0") + jpeg_segment(0xC4, b"\x10" + table + b"\0")
    frame = b"".join(bytes((number, 0x11, 0)) for number in range(1, components + 1))
    frame = struct.pack(">BHHB", 8, height, width, components) + frame
    data += jpeg_segment(0xC2 if progressive else 0xC0, frame)
    first, last = (0, 0) if progressive else (0, 63)
    in_scan = components if scans == 1 else 1
    scan = bytes((in_scan,)) + b"".join(bytes((n, 0)) for n in range(1, in_scan + 1))
    return data + (jpeg_segment(0xDA, scan + bytes((first, last, 0))) + b"\0") * scans + b"\xff\xd9"


def j2k(
    width: int,
    height: int,
    *,
    components: int = 3,
    tile: int | None = None,
    levels: int = 5,
    layers: int = 1,
    code_block: int = 64,
    precinct: int | None = None,
) -> bytes:
    """A JPEG 2000 codestream whose packets are empty: a grey picture.

    Args:
        tile: width and height of its tiles; all of the picture if left out.
        code_block, precinct: their width and height, powers of two.
    """

    def segment(code: int, body: bytes) -> bytes:
        return struct.pack(">HH", code, 2 + len(body)) + body

    sizes = (width, height, 0, 0, tile or width, tile or height, 0, 0, components)
    size = struct.pack(">H8IH", 0, *sizes) + bytes((7, 1, 1)) * components
    power = code_block.bit_length() - 3
    style = struct.pack(">BBHB5B", precinct is not None, 0, layers, 0, levels, power, power, 0, 1)
    if precinct is not None:
        style += bytes(((precinct.bit_length() - 1) * 0x11,)) * (levels + 1)
    data = b"\xff\x4f" + segment(0xFF51, size) + segment(0xFF52, style)
    data += segment(0xFF5C, b"\x40" + bytes((8 << 3,)) * (3 * levels + 1))
    packets = bytes(components * (levels + 1) * layers)
    start = segment(0xFF90, struct.pack(">HIBB", 0, 14 + len(packets), 0, 1))
    return data + start + b"\xff\x93" + packets + b"\xff\xd9"


def jp2(codestream: bytes, width: int, height: int, *, components: int = 3) -> bytes:
    """A JP2 file whose header says this size, whatever the codestream has, with a box between."""

    def box(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", 8 + len(body)) + kind + body

    header = box(b"ihdr", struct.pack(">IIHBBBB", height, width, components, 7, 7, 0, 0))
    header += box(b"colr", struct.pack(">BBBI", 1, 0, 0, 16))
    start = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return start + box(b"jp2h", header) + box(b"free", b"") + box(b"jp2c", codestream)


def webp(width: int, height: int, *, animated: bool = True) -> bytes:
    """A canvas of this size that holds nothing but a frame of one pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)

    def three(number: int) -> bytes:
        return struct.pack("<I", number)[:3]

    pixel = chunk(b"VP8L", bytes.fromhex("2f000000000788 88fe07 00".replace(" ", "")))
    canvas = three(width - 1) + three(height - 1)
    body = chunk(b"VP8X", bytes((0x12 if animated else 0x10, 0, 0, 0)) + canvas)
    if animated:
        body += chunk(b"ANIM", bytes(6))
        body += chunk(b"ANMF", three(0) * 4 + three(100) + b"\0" + pixel)
    else:
        body += pixel
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def gif(width: int, height: int, *, frames: int = 1, extensions: int = 0) -> bytes:
    """Frames of one pixel on a canvas of this size."""
    data = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"!\xf9\4\1\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0"
    return data + b"!\xfe\1a\0" * extensions + frame * frames + b";"


def bmp(width: int, height: int, *, rle: bool = True) -> bytes:
    """A black picture of 8 bits, whose coded pixels say nothing but that they end."""
    palette, pixels = bytes(1024), b"\0\1"
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, int(rle), len(pixels), 0, 0, 0, 0)
    head = struct.pack("<IHHI", 14 + 40 + len(palette) + 2, 0, 0, 14 + 40 + len(palette))
    return b"BM" + head + sizes + palette + pixels


def tiff(entries: dict[int, tuple[int, list[int]]], body: bytes, following: int = 0) -> bytes:
    """Tags (number -> type 3 or 4, values) and what STRIPOFFSETS or the like point to, from byte 8.

    Args:
        following: the place of the next directory.
    """
    data = b"II*\0" + struct.pack("<I", 8 + len(body) + (len(body) & 1))
    data += body + b"\0" * (len(body) & 1)
    at = len(data) + 2 + 12 * len(entries) + 4
    directory, values = struct.pack("<H", len(entries)), b""
    for tag, (kind, numbers) in sorted(entries.items()):
        value = struct.pack(f"<{len(numbers)}{'HI'[kind - 3]}", *numbers)
        directory += struct.pack("<HHI", tag, kind, len(numbers))
        if len(value) > 4:
            directory += struct.pack("<I", at + len(values))
            values += value + b"\0" * (len(value) & 1)
        else:
            directory += value.ljust(4, b"\0")
    return data + directory + struct.pack("<I", following) + values


def tiff_of(width: int, height: int, *, bits: int = 8, **tags: list[int]) -> bytes:
    """A grey TIFF of one deflated strip of zeros, or of a tile where `tile` gives its sides."""
    tile = tags.pop("tile", None)
    rows = tags.pop("rows", [height])
    covered = tile[0] * tile[1] if tile else width * height
    body = packed(covered * bits // 8)
    entries = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits]),
        259: (3, [8]),
        262: (3, [1]),
        277: (3, [1]),
    }
    if tile:
        entries |= {322: (4, tile[:1]), 323: (4, tile[1:]), 324: (4, [8]), 325: (4, [len(body)])}
    else:
        entries |= {273: (4, [8]), 278: (4, rows), 279: (4, [len(body)])}
    for number, values in tags.items():
        entries[int(number.removeprefix("tag"))] = (4, values)
    return tiff(entries, body)


def pnm(magic: bytes, width: int, height: int, *, comment: int = 0) -> bytes:
    """A header with a comment of so many bytes, and too few pixels."""
    return magic + b"\n#" + b"x" * comment + b"\n" + f"{width} {height}\n255\n".encode()
