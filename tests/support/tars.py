"""Tars by their bytes: honest ones, and ones whose headers lie."""

END = bytes(1024)


def header(
    name: bytes = b"a.jpg", size: bytes | int = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000"
) -> bytes:
    """One block, with a checksum that is right whatever else is not."""
    field = b"%011o\0" % size if isinstance(size, int) else size
    block = bytearray(512)
    for at, value in (
        *((0, name), (100, b"0000644\0"), (108, b"0000000\0"), (116, b"0000000\0"), (124, field)),
        *((136, b"00000000000\0"), (148, b" " * 8), (156, kind), (257, magic)),
    ):
        block[at : at + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base256(number: int) -> bytes:
    if number >= 0:
        return b"\x80" + number.to_bytes(11, "big")
    return b"\xff" + (256**11 + number).to_bytes(11, "big")


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def member(name: bytes, content: bytes, **fields) -> bytes:
    return header(name, len(content), **fields) + padded(content)


def records(**found: str | bytes) -> bytes:
    content = b""
    for key, value in found.items():
        value = value.encode() if isinstance(value, str) else value
        body = key.replace("__", ".").encode() + b"=" + value + b"\n"
        size = len(body) + 2
        while len(f"{size} ") + len(body) != size:
            size += 1
        content += f"{size} ".encode() + body
    return content


def pax(kind: bytes = b"x", **found: str | bytes) -> bytes:
    return member(b"pax", records(**found), kind=kind)


A = member(b"a.jpg", b"the first")

LIES = {
    "size -512": A + header(b"b.jpg", base256(-512)) + END,
    "size -1": A + header(b"b.txt", base256(-1)) + END,
    "size -2^90": A + header(b"b.jpg", base256(-(2**87))) + END,
    "a first size that is negative": header(b"b.jpg", base256(-512)) + END,
    "size 2^80": A + header(b"b.jpg", base256(2**80)) + END,
    "size 8 GiB": A + header(b"b.jpg", b"77777777777\0") + END,
    "size beyond the end": A + header(b"b.jpg", 5000) + END,
    "size beyond the end, no image": A + header(b"b.txt", 5000) + END,
    "size of an unknown kind": A + header(b"b.jpg", 5000, b"Q") + END,
    "size no number": A + header(b"b.jpg", b"hello world\0") + END,
    "size signed": A + header(b"b.jpg", b"-0000001000\0") + END,
    "long name of 8 GiB": A + header(b"x", b"77777777777\0", b"L") + A + END,
    "long name of -512": A + header(b"x", base256(-512), b"L") + A + END,
    "long link of 10 GB": A + header(b"x", base256(10**10), b"K") + A + END,
    "PAX of 8 GiB": A + header(b"x", b"77777777777\0", b"x") + A + END,
    "PAX of -1": A + header(b"x", base256(-1), b"x") + A + END,
    "global PAX of 2^60": A + header(b"x", base256(2**60), b"g") + A + END,
    "PAX size -512": A + pax(size="-512") + header(b"b.jpg") + END,
    "PAX size 10^30": A + pax(size="1" + "0" * 30) + header(b"b.jpg") + END,
    "PAX size 10^5000": A + pax(size="1" + "0" * 5000) + header(b"b.jpg") + END,
    "PAX size of words": A + pax(size="many") + header(b"b.jpg") + END,
    "PAX size of other digits": A + pax(size="\u0661\u0662") + header(b"b.jpg") + END,
    "PAX size beyond the end": A + pax(size="5000") + header(b"b.jpg") + END,
    "PAX size with a sign": A + pax(size="+512") + header(b"b.jpg") + END,
    "PAX record of no length": A + member(b"x", b"path=b.jpg\n", kind=b"x") + A + END,
    "PAX record of length 0": A + member(b"x", b"0 path=b.jpg\n", kind=b"x") + A + END,
    "PAX record too long": A + member(b"x", b"99 path=b.jpg\n", kind=b"x") + A + END,
    "PAX record of negative length": A + member(b"x", b"-9 path=b\n", kind=b"x") + A + END,
    "PAX record of huge length": A + member(b"x", b"9" * 400 + b" a=b\n", kind=b"x") + A + END,
    "PAX without a member": A + pax(path="b.jpg") + END,
    "PAX at the very end": A + pax(path="b.jpg"),
    "long name without a member": A + member(b"x", b"b.jpg\0", kind=b"L") + END,
    "sparse": A + header(b"b.jpg", 0, b"S", b"ustar  \0") + END,
    "sparse by PAX 1.0": A + pax(GNU__sparse__major="1", GNU__sparse__name="b.jpg") + A + END,
    "cut in a header": A + header(b"b.jpg")[:100],
    "cut after a member": A,
    "a damaged checksum": A + header(b"b.jpg").replace(b"b.jpg", b"c.jpg") + END,
    "an image twice": A + A + END,
    "an image twice by PAX": A + pax(path="a.jpg") + header(b"b.jpg") + END,
    "nothing": b"",
    "zeros": END,
    "text": b"hello" * 300,
}

GOOD = {
    "plain": A,
    "of version 7": member(b"b.jpg", b"xy", magic=b"") + A,
    "base 256": header(b"b.jpg", base256(700)) + padded(bytes(range(250)) * 2 + bytes(200)) + A,
    "a long name": member(b"x", b"d/" * 200 + b"b.jpg\0", kind=b"L") + member(b"cut", b"x"),
    "a long name and link": member(b"x", b"b.jpg\0", kind=b"L")
    + member(b"x", b"b" * 300 + b"\0", kind=b"K")
    + header(b"cut", 0, b"2")
    + A,
    "PAX path": pax(path="d/\u00e9.jpg", mtime="1.5") + member(b"cut", b"x"),
    "PAX size": pax(size="3") + header(b"b.jpg", 0) + padded(b"abc") + A,
    "PAX size and path, twice": pax(path="1.jpg") + pax(path="2.jpg") + member(b"c.jpg", b"x") + A,
    "global PAX": pax(b"g", comment="0123") + A + member(b"b.jpg", b"x"),
    "folders, links and devices": header(b"d/", 0, b"5")
    + header(b"l.jpg", 5000, b"1")
    + A
    + header(b"p.jpg", 0, b"6")
    + header(b"c.jpg", 0, b"3"),
    "an unknown kind with content": member(b"b.jpg", b"x" * 600, kind=b"Q") + A,
    "contiguous": member(b"b.jpg", b"x" * 600, kind=b"7") + A,
    "hidden": member(b"d/._b.jpg", b"x" * 600) + A,
    "names of bytes": member(b"\xe9.jpg", b"x") + A,
    "content that is headers": member(b"b.txt", A + END) + A,
}
