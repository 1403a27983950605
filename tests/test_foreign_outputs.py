"""Output folders of a stranger: what they may not make this machine do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from forged import change_json, outcome, read_all, sign
from outputs import made_up, write_output
from pyarrow import parquet

import stellar_fast
from stellar_fast.errors import StellarError
from stellar_fast.extract import foreign, opened

ROWS, FAILED = 8, (1, 6)  # partitions of 5 images: 4 rows and 4 rows
PART = "part-00001"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for format in foreign.FORMATS:
        write_output(folder / format, made_up(ROWS), failed=FAILED, format=format)
    return folder


@pytest.fixture
def npy(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "npy", tmp_path / "npy"))


@pytest.fixture
def packed(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "parquet", tmp_path / "parquet"))


def refused(folder: Path, *words: str) -> None:
    """Reading the folder is one error that has these words in it."""
    found = outcome(folder)
    assert isinstance(found, str), "it was read"
    for word in words:
        assert word in found


def put(content: dict, path: str, value: object) -> None:
    *above, last = path.split("/")
    for name in above:
        content = content[int(name) if isinstance(content, list) else name]
    if value is KeyError:
        del content[last]
    else:
        content[last] = value


# The plan


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("configuration", [], "not an object"),
        ("configuration/features", ["../../etc/passwd"], "not some of sparse"),
        ("configuration/features", ["cls", "sparse"], "in this order"),
        ("configuration/features", ["sparse", "sparse"], "not some of"),
        ("configuration/features", [], "not some of"),
        ("configuration/features", "sparse", "not some of"),
        ("configuration/features", [["sparse"]], "not some of"),
        ("configuration/dtype", "object", "not one of float32, float16"),
        ("configuration/dtype", ["float32"], "not one of"),
        ("configuration/format", "pickle", "not one of npy, parquet"),
        ("configuration/preset", None, "not text"),
        ("configuration/weights", 7, "not text"),
        ("configuration/column", {}, "not text or null"),
        ("configuration/batch_size", 0, "not an integer from 1"),
        ("configuration/partition_size", True, "not an integer"),
        ("configuration/partition_size", KeyError, "has no 'partition_size'"),
        ("configuration/model", {}, "has no 'backbone'"),
        ("configuration/model/backbone/patch_size", 0, "not an integer from 1"),
        ("facts", 3, "not an object"),
        ("images", 11, "'images' is 11, not 10"),
        ("images", 10.0, "'images' is 10.0, not 10"),
        ("partitions", {}, "not a list of 1 to"),
        ("partitions", [], "not a list of 1 to"),
        ("partitions", [7], "not an object"),
        ("partitions/0", {"images": 5}, "has no 'digest'"),
    ],
)
def test_every_field_of_the_plan_is_checked(npy, field, value, words):
    change_json(
        npy / "plan.json",
        lambda plan: (
            put(plan, field, value)
            if field != "partitions/0"
            else plan["partitions"].__setitem__(0, value)
        ),
    )
    sign(npy)
    refused(npy, "plan.json is no plan of an extraction", words)


@pytest.mark.parametrize("images", [0, -1, True, 2.0, "5", None, 1 << 18 | 1, 10**30])
def test_images_of_a_partition_are_bounded(npy, images):
    change_json(npy / "plan.json", lambda plan: plan["partitions"][1].update(images=images))
    refused(npy, "partition 1: 'images' is", "not an integer from 1 to 262144")


def test_plans_and_manifests_are_bounded_before_they_are_parsed(npy):
    plan = npy / "plan.json"
    content = plan.read_bytes()
    part = {"images": 1, "digest": "0" * 64}
    change_json(plan, lambda plan: plan.update(partitions=[part] * 100_001))
    refused(npy, "not a list of 1 to 100000 partitions")
    for deep in (b"[" * 1_000_000, b'{"a":' * 40 + b"1" + b"}" * 40):
        plan.write_bytes(deep)
        refused(npy, "plan.json: cannot be read: it is nested too deeply")
    plan.write_bytes(content)
    for path in (npy / PART / "manifest.json", plan):
        with path.open("r+b") as file:
            file.truncate(1 << 40)  # a hole: it takes no place on the disk
        refused(npy, path.name, "has more than 16777216 bytes")


def test_what_could_not_be_read_is_not_written():
    from stellar_fast.extract.layout import Partition, Plan

    with pytest.raises(ValueError, match=r"100001 partitions.*larger --partition-size"):
        Plan({}, (Partition(0, 1, ""),) * 100_001, {})
    with pytest.raises(ValueError, match=r"262145 images in one partition.*smaller"):
        Plan({}, (Partition(0, 262_145, ""),), {})


# Manifests


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rows", 6, "not an integer from 0 to 5"),
        ("rows", -1, "not an integer from 0 to 5"),
        ("rows", 4.0, "not an integer"),
        ("rows", True, "not an integer"),
        ("rows", KeyError, "has no 'rows'"),
        ("failed", 0, "'failed' is 0, not 1"),
        ("images", 6, "'images' is 6, not 5"),
        ("partition", 0, "'partition' is 0, not 1"),
        ("format", "parquet", "not 'npy'"),
        ("features", {}, "has no 'sparse'"),
        ("features/dense", {}, "'dense', which does not belong"),
        ("features/cls", [], "not an object"),
        ("features/cls/dtype", "float64", "not 'float32'"),
        ("features/cls/shape", [5, 1, 6], "not 4 rows of two axes"),
        ("features/cls/shape", [4, 1], "not 4 rows of two axes"),
        ("features/cls/shape", [4, 1, 6, 1], "not 4 rows of two axes"),
        ("features/cls/shape", [4, -1, -6], "not 4 rows of two axes"),
        ("features/cls/shape", [4, 1, 6.0], "not 4 rows of two axes"),
        ("features/cls/shape", [4, 1 << 20, 1 << 20], "at most 2147483647 bytes a row"),
        ("files", {}, "has no 'sparse.npy'"),
        ("files", {"sparse.npy": {}}, "has no 'cls.npy'"),
        ("files/..", {"bytes": 4096, "sha256": "0" * 64}, "'..', which does not belong"),
        ("files/cls.npy", {"sha256": "0" * 64}, "has no 'bytes'"),
        ("files/cls.npy/sha256", "0", "not the 64 hexadecimal digits"),
        ("files/cls.npy/bytes", 0, "not an integer from 1"),
    ],
)
def test_every_field_of_a_manifest_is_checked(npy, field, value, words):
    change_json(npy / PART / "manifest.json", lambda manifest: put(manifest, field, value))
    refused(npy, f"{PART}/manifest.json is no manifest of this partition", words)


def test_more_rows_than_the_file_has_are_never_read(npy, packed):
    """They would be whatever was in memory."""
    for folder, words in ((npy, "holds float32 [4, 4, 6]"), (packed, "has 4 rows")):

        def all_good(manifest):
            manifest.update(rows=5, failed=0)
            for facts in manifest["features"].values():
                facts["shape"][0] = 5

        change_json(folder / PART / "manifest.json", all_good)
        refused(folder, words)
        features = stellar_fast.open_features(folder)
        with pytest.raises(StellarError, match="cannot be read"):
            _ = features.ids
        with pytest.raises(StellarError):
            _ = features["cls"][-1]


def test_partitions_have_rows_of_one_shape(npy):
    path = npy / PART / "cls.npy"
    np.save(path, np.load(path).reshape(4, 6, 1))
    change_json(
        npy / PART / "manifest.json",
        lambda manifest: manifest["features"]["cls"].update(shape=[4, 6, 1]),
    )
    sign(npy)
    refused(npy, "one model makes rows of one shape")


# Links and what is no file


@pytest.mark.parametrize(
    "name", ["plan.json", PART, f"{PART}/manifest.json", f"{PART}/cls.npy", f"{PART}/index.parquet"]
)
def test_links_are_not_followed(npy, tmp_path, name):
    """Though what they lead to would do."""
    (npy / name).rename(tmp_path / "elsewhere")
    (npy / name).symlink_to(tmp_path / "elsewhere")
    if (npy / name).suffix in (".npy", ".parquet"):  # the manifest knows the link's own length
        change_json(
            npy / PART / "manifest.json",
            lambda manifest: manifest["files"][Path(name).name].update(
                bytes=os.lstat(npy / name).st_size
            ),
        )
    refused(npy, "is a link", "remove this")


READ = """
import sys
from forged import outcome
from pathlib import Path
print(outcome(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("name", ["plan.json", f"{PART}/manifest.json", f"{PART}/cls.npy"])
def test_nothing_waits_for_what_is_no_file(npy, name):
    """In a process of its own: the fault is to hang."""
    (npy / name).unlink()
    os.mkfifo(npy / name)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(npy)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "is no regular file" in done.stdout or "has 0 bytes" in done.stdout


def test_devices_are_not_read(npy):
    path = npy / PART / "cls.npy"
    path.unlink()
    path.symlink_to("/dev/zero")
    change_json(
        npy / PART / "manifest.json", lambda manifest: manifest["files"]["cls.npy"].update(bytes=9)
    )
    features = stellar_fast.open_features(npy)
    with pytest.raises(StellarError, match="is a link"):
        features.verify()
    with pytest.raises(StellarError, match="is a link"):
        _ = features["cls"][-1]


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
    wide = pyarrow.array([bytes(28)] * 4, pyarrow.binary(28))
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
            "has not the 4 rows",
        ),
    ],
)
def test_parquet_features(packed, change, options, words):
    rewrite(packed / PART / "features.parquet", change, **options)
    refused(packed, "features.parquet: cannot be read", words)


def test_a_dictionary_unpacks_to_no_more_than_the_file(packed):
    """A row that is stored once and repeated 200,000 times would take 19 GB."""
    row = pyarrow.array([bytes(96)] * 4, pyarrow.binary(96))
    rewrite(packed / PART / "features.parquet", with_column("sparse", row), use_dictionary=True)
    length = (packed / PART / "features.parquet").stat().st_size
    assert outcome(packed)  # this small, it may be read or not
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
    assert length
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
    monkeypatch.setattr(opened, "MOST_TEXT", 100_000)
    long = pyarrow.array(["x" * 40_000] * 5)

    def all_failed(table):
        table = with_column("row", pyarrow.nulls(5, pyarrow.int64()))(table)
        table = with_column("status", pyarrow.array(["failed"] * 5))(table)
        return with_column("reason", long)(table)

    rewrite(npy / PART / "index.parquet", all_failed, use_dictionary=True, compression="snappy")
    assert (npy / PART / "index.parquet").stat().st_size < 10_000
    refused(npy, "its text unpacks to 200", "and 100000 are the most")


def test_an_index_that_is_too_long_is_not_written_nor_read(npy, tmp_path, monkeypatch):
    from stellar_fast.extract import writer

    monkeypatch.setattr(writer, "MOST_TEXT", 1000)
    with pytest.raises(StellarError, match=r"bytes of ids and reasons.*smaller --partition-size"):
        writer.write_index(tmp_path, ["x" * 900] * 2, [None] * 2, [(1, 1)] * 2)
    monkeypatch.setattr(opened, "MOST_INDEX", 1000)
    refused(npy, "index.parquet: cannot be read: it has", "1000 are the most")
