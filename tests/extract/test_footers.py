"""Footers of Parquet with a byte changed: facts of the right types, or one error."""

import io
import struct

import pyarrow
from pyarrow import parquet

from stellar_fast.extract.footer import read_footer


def test_a_field_of_another_type_is_an_error():
    with io.BytesIO() as file:
        parquet.write_table(pyarrow.table({"path": ["a.jpg", "b.jpg"]}), file, store_schema=False)
        whole = file.getvalue()
    (size,) = struct.unpack("<I", whole[-8:-4])
    outcomes = {"read": 0, "refused": 0}
    for at in range(len(whole) - 8 - size, len(whole) - 8):
        # The low half of a field's first byte is its type.
        for value in {whole[at] & 0xF0 | kind for kind in range(16)} - {whole[at]}:
            try:
                groups = read_footer(io.BytesIO(whole[:at] + bytes([value]) + whole[at + 1 :]))
            except ValueError:
                outcomes["refused"] += 1
                continue
            for group in groups:
                for column in group.columns:
                    facts = (group.rows, column.codec, column.size, *column.encodings)
                    assert all(type(number) is int for number in facts), (at, value)
            outcomes["read"] += 1
    assert min(outcomes.values()) > 100
