"""The files of a stranger's partitions: arrays, Parquet and indices that are not what they say."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from forged import PART, change_json, read_all, refused, sign
from outputs import SHAPES
from pyarrow import parquet

import stellar_fast
from stellar_fast.errors import StellarError
from stellar_fast.extract.output import index, text
from stellar_fast.extract.output.folder import Locks
from stellar_fast.extract.output.layout import read_plan
from stellar_fast.extract.output.partition import Work
from stellar_fast.extract.records import Item

# Arrays


def header(version: tuple[int, int], text: bytes, length: int | None = None) -> bytes:
    size = len(text) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes(version)
        + size.to_bytes(2 if version == (1, 0) else 4, "little")
        + text
    )


GOOD = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 1, 6), }\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header((1, 0), GOOD.replace(b"(4,", b"(4000000000000,")) + bytes(96), "holds float32"),
        (header((1, 0), GOOD.replace(b"(4,", b"(-4,")) + bytes(96), "cls.npy"),
        (header((1, 0), GOOD.replace(b"False", b"True")) + bytes(96), "in Fortran order"),
        (header((1, 0), GOOD.replace(b"<f4", b"|O")) + bytes(96), "holds object"),
        (header((1, 0), GOOD.replace(b"<f4", b">f4")) + bytes(96), "cls.npy"),
        (header((1, 0), GOOD.replace(b"<f4", b"<f8")) + bytes(192), "holds float64"),
        (header((1, 0), b"(" * 9000) + bytes(96), "cannot be read"),
        (header((1, 0), b"{'a':" + b"[" * 60_000) + bytes(96), "cannot be read"),
        (header((2, 0), GOOD) + bytes(96), "version (2, 0)"),
        (header((2, 0), GOOD, 0xFFFFFFFF) + bytes(96), "version (2, 0)"),
        (header((3, 0), GOOD) + bytes(96), "version (3, 0)"),
        (header((1, 0), GOOD) + bytes(95), "and its rows take"),
        (header((1, 0), GOOD) + bytes(97), "and its rows take"),
        (b"\x80\x04cos\nsystem\n", "cannot be read"),
    ],
)
def test_array_headers(npy, content, words):
    (npy / PART / "cls.npy").write_bytes(content)
    sign(npy)
    refused(npy, "cls.npy", words)


def test_an_array_is_read_from_a_header_of_any_length(npy):
    """The attacks above fail by what they say, not by how the file was made."""
    path = npy / PART / "cls.npy"
    rows = np.load(path)
    path.write_bytes(header((1, 0), GOOD) + rows.tobytes())
    sign(npy)
    np.testing.assert_array_equal(read_all(npy)["cls"][4:], rows)


# Parquet


def rewrite(path: Path, change, **options) -> None:
    table = parquet.read_table(path)
    options = {"compression": "none", "use_dictionary": False, **options}
    parquet.write_table(change(table), path, **options)
    sign(path.parent.parent)


def with_column(name: str, values) -> object:
    def change(table):
        at = table.schema.get_field_index(name)
        column = values(table[name]) if callable(values) else values
        return table.set_column(at, name, column)

    return change


def wider(table):
    wide = pyarrow.array([[0.0] * 7] * 4, pyarrow.list_(pyarrow.float32(), 7))
    return with_column("cls", wide)(table)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (wider, {}, "its columns are not those"),
        (lambda table: table.drop_columns(["cls"]), {}, "its columns are not those"),
        (lambda table: table.append_column("x", table["id"]), {}, "its columns are not those"),
        (lambda table: table.replace_schema_metadata({}), {}, "its columns are not those"),
        (
            lambda table: table.replace_schema_metadata({b"stellar_fast": b"[" * 100_000}),
            {},
            "cannot be read",
        ),
        (lambda table: table.slice(1), {}, "it has 3 rows"),
        (lambda table: pyarrow.concat_tables([table, table]), {}, "it has 8 rows"),
        (lambda table: table, {"compression": "zstd"}, "compressed"),
        (lambda table: table, {"compression": "snappy"}, "compressed"),
        (
            with_column(
                "cls", lambda rows: pyarrow.array([None, *rows.to_pylist()[1:]], rows.type)
            ),
            {},
            "its columns are not those",
        ),
        (lambda table: table, {"use_dictionary": True}, "repeats values by a dictionary"),
        (
            lambda table: table,
            {"column_encoding": {"cls.list.element": "BYTE_STREAM_SPLIT"}},
            "or in another way",
        ),
    ],
)
def test_parquet_features(packed, change, options, words):
    rewrite(packed / PART / "features.parquet", change, **options)
    refused(packed, "features.parquet: cannot be read", words)


def test_a_dictionary_unpacks_to_no_more_than_the_file(packed):
    """A row that is stored once and repeated 200,000 times would take 19 GB."""
    big = 60_000

    def many(plan):
        plan["partitions"][1]["images"] = big
        plan["images"] = big + 5

    change_json(packed / "plan.json", many)

    def rows(manifest):
        manifest.update(images=big, rows=big, failed=0)
        for facts in manifest["features"].values():
            facts["shape"][0] = big

    change_json(packed / PART / "manifest.json", rows)
    table = parquet.read_table(packed / PART / "features.parquet")
    columns = {
        name: pyarrow.concat_arrays([table[name].combine_chunks()[:1]] * big)
        for name in table.column_names
    }
    table = pyarrow.table(columns, schema=table.schema)
    parquet.write_table(
        table, packed / PART / "features.parquet", compression="none", use_dictionary=True
    )
    assert (packed / PART / "features.parquet").stat().st_size < big * 120
    sign(packed)
    features = stellar_fast.open_features(packed)
    with pytest.raises(StellarError, match="fewer than its rows take"):
        _ = features["sparse"][-1]


def test_row_groups_without_rows(packed):
    path = packed / PART / "features.parquet"
    table = parquet.read_table(path)
    with parquet.ParquetWriter(path, table.schema, compression="none") as writer:
        for _ in range(5):
            writer.write_table(table.slice(0, 0))
        writer.write_table(table)
    sign(packed)
    refused(packed, "row groups for 4 rows")


# The index


def nullified(*places: int):
    return lambda column: pyarrow.array(
        [None if at in places else value for at, value in enumerate(column.to_pylist())],
        column.type,
    )


def replaced(at: int, value):
    return lambda column: pyarrow.array(
        [value if place == at else old for place, old in enumerate(column.to_pylist())], column.type
    )


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (with_column("row", replaced(0, 7)), {}, "its rows are not 0 to 4 - 1 in order"),
        (with_column("row", replaced(0, -1)), {}, "its rows are not"),
        (with_column("row", replaced(1, 9)), {}, "its rows are not"),
        (with_column("row", nullified(4)), {}, "its rows are not"),
        (with_column("status", replaced(0, "failed")), {}, "the status of its row"),
        (with_column("status", replaced(0, "x" * 10)), {}, "the status of its row"),
        (with_column("status", nullified(0)), {}, "the status of its row"),
        (with_column("reason", replaced(0, "why")), {}, "a reason where it failed"),
        (with_column("reason", nullified(1)), {}, "a reason where it failed"),
        (with_column("id", nullified(0)), {}, "an id"),
        (with_column("id", lambda ids: ids.cast("binary")), {}, "its columns are not"),
        (with_column("row", lambda rows: rows.cast("int32")), {}, "its columns are not"),
        (lambda table: table.drop_columns(["width"]), {}, "its columns are not"),
        (lambda table: table.slice(0, 4), {}, "it has 4 lines"),
        (lambda table: pyarrow.concat_tables([table] * 2), {}, "it has 10 lines"),
        (lambda table: table, {"row_group_size": 2}, "it has 5 lines"),
        (lambda table: table, {"compression": "zstd"}, "packed otherwise"),
        (lambda table: table, {"compression": "gzip"}, "packed otherwise"),
    ],
)
def test_the_lines_of_the_index(npy, change, options, words):
    assert json.loads((npy / PART / "manifest.json").read_text())["images"] == 5
    rewrite(npy / PART / "index.parquet", change, **options)
    refused(npy, "index.parquet: cannot be read", words)


def test_ids_are_utf8(npy):
    def broken(ids):
        content = [id.encode() for id in ids.to_pylist()]
        content[0] = b"\xff\xfe"
        array = pyarrow.array(content, pyarrow.binary())
        return pyarrow.StringArray.from_buffers(5, *array.buffers()[1:])

    rewrite(npy / PART / "index.parquet", with_column("id", broken))
    refused(npy, "index.parquet: cannot be read")


def test_text_that_repeats_is_measured_before_it_is_unpacked(npy, monkeypatch):
    """One reason of 64 kB for every image: a small file, and 16 GB for a partition of the most."""
    monkeypatch.setattr(text, "MOST_TEXT", 100_000)
    long = pyarrow.array(["x" * 40_000] * 5)

    def all_failed(table):
        table = with_column("row", pyarrow.nulls(5, pyarrow.int64()))(table)
        table = with_column("status", pyarrow.array(["failed"] * 5))(table)
        return with_column("reason", long)(table)

    rewrite(npy / PART / "index.parquet", all_failed, use_dictionary=True, compression="snappy")
    assert (npy / PART / "index.parquet").stat().st_size < 10_000
    refused(npy, "its text unpacks to 200", "and 100000 are the most")


def test_an_index_that_is_too_long_is_not_written_nor_read(npy, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MOST_TEXT", 1000)
    with pytest.raises(StellarError, match=r"bytes of ids, reasons.*smaller --partition-size"):
        index.write_index(tmp_path, ["x" * 900] * 2, [None] * 2, [(1, 1)] * 2, {}, [()] * 2)
    monkeypatch.setattr(index, "MOST_INDEX", 1000)
    refused(npy, "index.parquet: cannot be read: it has", "1000 are the most")


# Going on with a stranger's folder


def test_retrying_takes_only_rows_of_these_images_and_shapes(npy):
    """Or rows of others would be stored under the ids of these."""
    plan = read_plan(npy)
    items = [Item(f"folder/{at:04d}.jpg", f"/nowhere/{at}") for at in range(5, 10)]
    with Locks(npy) as locks:
        work = Work(npy, plan, 1, items, SHAPES, locks)
        assert [item.id for item in work.items] == ["folder/0006.jpg"]
        work.drop()
        for shapes in ({**SHAPES, "cls": (1, 7)}, {"sparse": (4, 6)}):
            with pytest.raises(StellarError, match="other images, or features of other shapes"):
                Work(npy, plan, 1, items, shapes, locks)
        rewrite(npy / PART / "index.parquet", with_column("id", replaced(0, "folder/0000.jpg")))
        with pytest.raises(StellarError, match="other images, or features of other shapes"):
            Work(npy, plan, 1, items, SHAPES, locks)
    assert sorted(path.name for path in npy.glob("*part*")) == ["part-00000", PART]
