"""The facts of a Parquet file that decide how much memory it takes, read before Arrow sees it.

Arrow's own view of them ends the process (`std::terminate`) where a footer is damaged, so a
stranger's file must not get there. A footer is a Thrift struct in the compact protocol; of it, the
row counts and codecs are kept and all else is stepped over.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pyarrow import parquet

MOST_FOOTER = 64 << 20  # bytes
MOST_DEPTH = 16  # a footer of Arrow's has 6
UNCOMPRESSED, SNAPPY = 0, 1  # parquet.thrift, CompressionCodec
PLAIN, RLE = 0, 3  # parquet.thrift, Encoding

# Of the compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
# Fields that are kept: struct by struct from `FileMetaData`, {field: fields of it}.
# Of ColumnMetaData: encodings, path, codec, sizes when unpacked and packed, where its data and its
# dictionary are, the length of its Bloom filter.
_COLUMN_FACTS = dict.fromkeys((2, 3, 4, 6, 7, 9, 11, 15))
# Of ColumnChunk: that, and the lengths of its indexes.
_COLUMN: dict[int, Any] = {3: _COLUMN_FACTS, 5: None, 7: None}
_FILE: dict[int, Any] = {3: None, 4: {1: _COLUMN, 3: None}}  # num_rows, row_groups


class Column(NamedTuple):
    """A column in a row group.

    Attributes:
        path: its name, with those of the structs and lists that it is in before it.
        codec, encodings: numbers of parquet.thrift.
        size: bytes of its pages when they are unpacked.
        start, packed: where its pages are in the file, and their bytes there.
        beside: bytes that the file has for it behind all pages: indexes and a Bloom filter.
    """

    path: tuple[bytes, ...]
    codec: int
    encodings: tuple[int, ...]
    size: int
    start: int
    packed: int
    beside: int


class Group(NamedTuple):
    """A row group."""

    rows: int
    columns: tuple[Column, ...]

    @property
    def codecs(self) -> tuple[int, ...]:
        return tuple(column.codec for column in self.columns)


def in_place(file: IO[bytes], **options: Any) -> parquet.ParquetFile:
    """Arrow's view of a file whose footer was read: by its descriptor, as its name may lead
    elsewhere by now."""
    import pyarrow
    from pyarrow import parquet

    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return parquet.ParquetFile(pyarrow.BufferReader(pyarrow.py_buffer(mapped)), **options)


def read_footer(file: IO[bytes]) -> list[Group]:
    """The row groups of a Parquet file, whose row counts are one with the file's own.

    Raises:
        ValueError: it is no Parquet file, or its footer is damaged or too long.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - 8))
    tail = file.read(8)
    if length < 12 or tail[4:] != b"PAR1":
        raise ValueError("it is no Parquet file")
    (size,) = struct.unpack("<I", tail[:4])
    if size > min(length - 8, MOST_FOOTER):
        raise ValueError(f"its footer has {size} bytes")
    file.seek(length - 8 - size)
    content = file.read(size)
    file.seek(0)
    try:
        found = _Reader(content).fields(_FILE, 0)
        groups = [Group(group[3], tuple(map(_column, group[1]))) for group in found[4]]
        rows = found[3]
        # Of another type than the format has, a field is None.
        if not all(isinstance(number, int) for number in (rows, *_numbers(groups))):
            raise TypeError
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("its footer is damaged") from error
    if any(group.rows < 0 for group in groups) or rows != sum(group.rows for group in groups):
        raise ValueError(f"its row groups have not the {rows} rows that it says")
    return groups


def unaccounted(file: IO[bytes], groups: list[Group]) -> int:
    """Bytes before the footer that no column of `groups` has: none in a file that is one and whole,
    but many where another Parquet file is before the one whose footer is read."""
    length = file.seek(0, os.SEEK_END)
    file.seek(length - 8)
    (size,) = struct.unpack("<I", file.read(4))
    file.seek(0)
    columns = [column for group in groups for column in group.columns]
    end = max((column.start + column.packed for column in columns), default=4)
    return length - 8 - size - end - sum(column.beside for column in columns)


def _numbers(groups: list[Group]) -> Iterator[int]:
    for group in groups:
        yield group.rows
        for column in group.columns:
            yield from (column.codec, column.size, *column.encodings)
            yield from (column.start, column.packed, column.beside)


def _column(found: dict[int, Any]) -> Column:
    facts = found[3]
    start = min(facts[9], facts.get(11) or facts[9])  # 0 stands for none
    beside = found.get(5, 0) + found.get(7, 0) + facts.get(15, 0)
    return Column(tuple(facts[3]), facts[4], tuple(facts[2]), facts[6], start, facts[7], beside)


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def fields(self, kept: dict[int, Any], depth: int) -> dict[int, Any]:
        """A struct: those of its fields that `kept` has."""
        if depth > MOST_DEPTH:
            raise ValueError("its footer is nested too deeply")
        found: dict[int, Any] = {}
        content, field = self._content, 0
        while head := content[self._at]:
            self._at += 1
            if head >> 4:
                field += head >> 4
            else:
                field = self._integer()
            if field in found:
                raise ValueError("its footer has a field twice")
            if field in kept:
                found[field] = self._value(head & 15, kept[field], depth)
            else:
                self._value(head & 15, {}, depth)
        self._at += 1
        return found

    def _value(self, kind: int, kept: Any, depth: int) -> Any:
        if _I16 <= kind <= _I64:
            return self._integer()
        if kind in (_TRUE, _FALSE):
            return None  # the type was the value
        if kind == _BINARY:
            length = self._varint()
            self._skip(length)
            return self._content[self._at - length : self._at]
        if kind == _STRUCT:
            return self.fields(kept or {}, depth + 1)
        if kind in (_LIST, _SET):
            return self._list(kept, depth + 1)
        if kind == _BYTE:
            self._skip(1)
        elif kind == _DOUBLE:
            self._skip(8)
        else:
            raise ValueError("its footer is damaged")  # Parquet has no maps
        return None

    def _list(self, kept: Any, depth: int) -> list[Any]:
        if depth > MOST_DEPTH:
            raise ValueError("its footer is nested too deeply")
        head = self._content[self._at]
        self._at += 1
        kind = head & 15
        count = head >> 4 if head >> 4 < 15 else self._varint()
        if count > len(self._content) - self._at:  # each takes a byte at least
            raise ValueError("its footer is damaged")
        if kind in (_TRUE, _FALSE):
            self._skip(count)
            return []
        return [self._value(kind, kept, depth) for _ in range(count)]

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._content):
            raise ValueError("its footer is damaged")

    def _varint(self) -> int:
        content, at = self._content, self._at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise ValueError("its footer is damaged")
        self._at = at
        return value

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
