"""Damaged tars and lists: each is one clear error or right, and opens nothing else.

`PYTHONPATH=tests/support python tests/extract/test_input_fuzz.py FIRST LAST` prints what became of
those seeds.
"""

import io
import random
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pyarrow
import pytest
from memory import peak
from pyarrow import parquet
from tars import GOOD, LIES, header

from stellar_fast import ImageError, StellarError
from stellar_fast.extract.input import discover, door, web
from stellar_fast.extract.input.addresses import LOCAL, Allowed, check, is_address, parse
from stellar_fast.extract.records import Item
from stellar_fast.printable import printable

HONEST, LYING = list(GOOD.values()), list(LIES.values())
LINES = [
    *("a.jpg", "b/c.png", "../d.jpg", "/etc/hostname", "./x y.jpg", "\u00e9.jpg", "a" * 300),
    *("https://host/a.jpg", "http://u:p@host:80/a?b=c#d", "s3://bucket/a.jpg", "zip://a::b.zip"),
    *("zip://a.jpg::https://host/a.zip", "reference://x::http://host/y", "file:///etc/hostname"),
    *("local:///dev/zero", "FILE:/x", "ftp://host/x", "tar://a::zip://b::c", "http://[::1]/x"),
    *("memory://x", "data:,x", "simplecache::https://host/x", "https://host\\@x/", "::", "://"),
]
KINDS = ("tar", "txt", "csv", "tsv", "parquet")


def mutant(seed: int) -> tuple[str, bytes]:
    """The suffix and the content."""
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    content = bytearray(_tar(rng) if kind == "tar" else _list(rng, kind))
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        _damage(rng, content)
    if kind == "tar" and rng.random() < 0.8:
        _repair(content)
    return kind, bytes(content)


def _tar(rng: random.Random) -> bytes:
    parts = [
        rng.choice(HONEST if rng.random() < 0.8 else LYING).replace(b"a.jpg", b"%d.jpg" % number)
        for number in range(rng.choice((1, 1, 2, 3)))
    ]
    if rng.random() < 0.3:  # a size of any kind, under a header that is right otherwise
        size = rng.choice((b"\x80", b"\xff", b"", b"-", b" ")) + rng.randbytes(rng.randint(0, 11))
        parts.insert(
            rng.randrange(len(parts) + 1),
            header(b"z.jpg", size, rng.choice(b"0LKxgS57").to_bytes()),
        )
    return b"".join(parts) + bytes(1024)


def _list(rng: random.Random, kind: str) -> bytes:
    lines = [
        rng.choice(LINES if rng.random() < 0.1 else LINES[:10]) for _ in range(rng.randint(1, 6))
    ]
    if rng.random() < 0.7:
        lines = list(dict.fromkeys(lines))
    if kind == "parquet":
        column = pyarrow.array(lines)
        if rng.random() < 0.5:
            column = column.dictionary_encode()
        options = {"compression": rng.choice(("none", "snappy", "zstd", "gzip"))}
        if rng.random() < 0.3 and not pyarrow.types.is_dictionary(column.type):
            encoding = rng.choice(("DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"))
            options |= {"use_dictionary": False, "column_encoding": {"path": encoding}}
        parquet.write_table(pyarrow.table({"path": column}), file := io.BytesIO(), **options)
        return file.getvalue()
    separator = {"csv": ",", "tsv": "\t"}.get(kind)
    if separator is not None:
        lines = [f"path{separator}n", *(f'"{line}"{separator}1' for line in lines)]
    return rng.choice(("\n", "\r\n")).join(lines).encode()


def _damage(rng: random.Random, content: bytearray) -> None:
    if not content:
        return
    at = rng.randrange(len(content))
    how = rng.randrange(6)
    if how == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        content[at : at + rng.randint(1, 12)] = rng.randbytes(rng.randint(0, 12))
    elif how == 2:
        del content[at:]
    elif how == 3:
        start = at // 512 * 512
        content[start:start] = content[start : start + 512 * rng.randint(1, 3)]
    elif how == 4:
        content[at:at] = rng.choice((b"\0", b"\n", b"\x1b[2J", b"\xff\xfe", b"::", b"://", b'"'))
    else:
        del content[at : at + rng.choice((1, 7, 512))]


def _repair(content: bytearray) -> None:
    """Gives what could be headers their checksums, or a mutant would get no further."""
    for at in range(0, len(content) - 511, 512):
        block = content[at : at + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(block)


def fuzz(folder: Path, seeds: range) -> Counter:
    """What became of mutants, by kind; raises AssertionError where that is neither of the two."""
    outcomes: Counter = Counter()

    def opened(*arguments):
        raise AssertionError(f"was opened: {arguments}")

    with (
        patch.object(door, "_filesystem", opened),
        patch.object(web, "_dial", opened),
        patch.object(web, "read", lambda *arguments: content),
    ):
        for seed in seeds:
            kind, content = mutant(seed)
            path = folder / f"{seed}.{kind}"
            path.write_bytes(content)
            began = time.process_time()
            sources = [str(path)] if kind == "tar" else [str(path), f"http://host/{path.name}"]
            for source in sources:
                try:
                    items = discover(source)
                except (ValueError, StellarError, OSError) as error:
                    text = str(error)
                    assert printable(text) == text and path.name in text, (seed, text)
                    assert len(text) < 2000, (seed, text)
                    outcomes[kind, "error"] += 1
                    continue
                outcomes[kind, "items"] += 1
                assert items and len({item.id for item in items}) == len(items), seed
                for item in items:
                    assert printable(item.id) == item.id, (seed, item)
                    check_item(item, content if kind == "tar" else None, source, seed)
            # Work, not waiting: others may use the machine.
            assert time.process_time() - began < 10, seed
            path.unlink()
    return outcomes


def check_item(item: Item, tar: bytes | None, source: str, seed: int) -> None:
    if tar is None:
        assert check(item.file, Allowed()) == item.file, (seed, item)
        local = not is_address(item.file) or parse(item.file).base.protocol in LOCAL
        assert not (local and is_address(source)), (seed, item)
        return
    assert item.file == source and item.offset % 512 == 0 and item.offset >= 512, (seed, item)
    assert 0 <= item.size <= len(tar) - item.offset, (seed, item)
    content = tar[item.offset : item.offset + item.size]
    if content:
        assert door.read_item(item) == content, (seed, item)
    else:
        with pytest.raises(ImageError, match="empty file"):
            door.read_item(item)


def test_mutants_are_errors_or_right(tmp_path):
    fuzz(tmp_path, range(50))  # what imports and pools take is no mutant's
    before = peak()
    found = fuzz(tmp_path, range(50, 750))
    assert peak() - before < 256 << 20
    for kind in KINDS:
        assert found[kind, "error"] > 20 and found[kind, "items"] > 10, found


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_mutants_are_errors_or_right(tmp_path):
    fuzz(tmp_path, range(50))
    before = peak()
    found = fuzz(tmp_path, range(1_000_000, 1_010_000))
    assert peak() - before < 256 << 20
    assert sum(found.values()) >= 10_000


if __name__ == "__main__":
    import tempfile

    began = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        fuzz(Path(name), range(50))
        start = peak()
        print(fuzz(Path(name), range(int(sys.argv[1]), int(sys.argv[2]))))
    print(f"{time.process_time() - began:.1f} s of work, {(peak() - start) / 2**20:.0f} MiB more")
