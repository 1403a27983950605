"""Lists from elsewhere: of any length, of other encodings, of tables that unpack to gigabytes."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from engines import small_engine
from extracting import index
from loopback import Server, head, serving
from pictures import photograph
from pyarrow import parquet

from stellar_fast.extract import make_job, run
from stellar_fast.extract.input import addresses, discover, door, lists, parquet_column
from stellar_fast.extract.input.door import expand


def refused(source: Path | str, message: str, most: int = 32 << 20) -> None:
    """One clear error, in bounded memory of Python and of Arrow."""
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    with pytest.raises((ValueError, OSError), match=message):
        discover(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most
    assert pool.bytes_allocated() - before < most


# Lengths


def test_lists_of_any_length_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "MAX_LIST_BYTES", 10_000)
    for name in ("a.txt", "a.csv", "a.tsv"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(10_001)
        refused(tmp_path / name, rf"{name}: 10001 bytes are more than the limit of 10000")
    names = [f"{n:0100}.jpg" for n in range(200)]
    parquet.write_table(pyarrow.table({"path": names}), tmp_path / "a.parquet", compression="none")
    refused(tmp_path / "a.parquet", r"a\.parquet: \d+ bytes are more than the limit of 10000")
    with serving({}) as server:
        for length in ({}, {"Content_Length": 1 << 40}):
            endless(server, **length)
            refused(server.url("a.txt"), "more .*the limit of 10000")


def endless(server: Server, **headers: int) -> None:
    def answer(request):
        yield head(**headers)
        while True:
            yield b"a.jpg\n" * 1000

    server.answers["/a.txt"] = answer


def test_lines_of_any_length_are_bounded(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.write(b"a.jpg\n")
        file.seek(1 << 29)
        file.write(b"\n")
    refused(tmp_path / "a.txt", "line 2 has more than 65536 bytes", 4 << 20)
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(
            f"path{separator}n\na.jpg{separator}1\n{'b' * 70_000}{separator}2\n"
        )
        refused(tmp_path / name, "line 3 has more than 65536|cannot be read as a table")
        (tmp_path / name).write_text("path\n" + "b" * (4 << 20) + "\n")
        refused(tmp_path / name, "more than 65536|cannot be read as a table", 64 << 20)
    parquet.write_table(pyarrow.table({"path": ["a", "b" * 70_000]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "line 2 has more than 65536")


def test_the_number_of_lines_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "MAX_LINES", 100)
    names = [f"{n}.jpg" for n in range(101)]
    (tmp_path / "a.txt").write_text("\n".join(names))
    (tmp_path / "a.csv").write_text("path\n" + "\n".join(names))
    parquet.write_table(pyarrow.table({"path": names}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.csv", "a.parquet"):
        refused(tmp_path / name, "limits? of 100")


# Parquet


@pytest.mark.parametrize("value", ["a.jpg", "x" * 60_000, None])
def test_repeated_rows_of_a_small_table_take_no_memory(value, tmp_path):
    """Four million rows in kilobytes: with text of 60 kB each, 240 GB."""
    dictionary = pyarrow.array([value or "a.jpg"])
    codes = pyarrow.array(np.zeros(4_000_000, np.int32), mask=np.full(4_000_000, value is None))
    table = pyarrow.table({"path": pyarrow.DictionaryArray.from_arrays(codes, dictionary)})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    del table, codes
    message = "line 1 has no path" if value is None else "line 1 and .*line 2 name the same file"
    refused(tmp_path / "a.parquet", message)


@pytest.mark.parametrize("code", [-1, 2])
def test_a_damaged_index_names_no_other_path(code):
    words, codes = pyarrow.array(["a.jpg", "b.jpg"]), pyarrow.array([0, code], pyarrow.int32())
    array = pyarrow.DictionaryArray.from_arrays(codes, words, safe=False)
    with pytest.raises(pyarrow.ArrowInvalid):
        parquet_column._values(array)


def test_a_table_that_says_that_it_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_column, "MAX_TABLE", 10_000)
    table = pyarrow.table({"path": [f"{n:0100}.jpg" for n in range(1000)], "n": range(1000)})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    refused(tmp_path / "a.parquet", "1000 rows with .* bytes of text are more")
    parquet.write_table(table.select(["n"]).rename_columns(["path"]), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "holds int64, not paths")


@pytest.mark.slow
def test_paths_that_share_their_beginning_take_little_memory(tmp_path):
    """Stored as what differs from the row before: a hundred thousand of 60 kB in a few MB."""
    names = pyarrow.array([f"{'x' * 60_000}{n}" for n in range(2000)])
    parquet.write_table(
        pyarrow.table({"path": names}),
        tmp_path / "a.parquet",
        use_dictionary=False,
        column_encoding={"path": "DELTA_BYTE_ARRAY"},
        compression="none",
    )
    del names
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    items = discover(tmp_path / "a.parquet")
    assert len(items) == 2000 and items[-1].id.endswith("x1999")
    # In a process of its own, where nothing that was freed is there to be taken again.
    probe = (
        "import resource, sys; from stellar_fast.extract import input as i\n"
        "from pyarrow import parquet; limit = resource.getrlimit(resource.RLIMIT_AS)\n"
        "i.parquet_column.MEMORY = 16 << 20\n"
        "try: i.discover(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "assert resource.getrlimit(resource.RLIMIT_AS) == limit"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", probe, str(tmp_path / "a.parquet")],
        capture_output=True,
        text=True,
    )
    assert "its rows unpack to more than 16777216 bytes at once" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["dictionary", "large", "plain"])
def test_honest_tables_are_read_whatever_their_strings(kind, tmp_path):
    names = pyarrow.array([f"{n}.jpg" for n in range(5000)])
    if kind == "dictionary":
        names = names.dictionary_encode()
    elif kind == "large":
        names = names.cast(pyarrow.large_string())
    parquet.write_table(pyarrow.table({"url": names}), tmp_path / "a.parquet", row_group_size=700)
    assert [item.id for item in discover(tmp_path / "a.parquet")] == [
        f"{n}.jpg" for n in range(5000)
    ]


def test_a_column_that_is_there_twice_is_no_choice(tmp_path):
    (tmp_path / "a.csv").write_text("path,path\na,b\n")
    with pytest.raises(ValueError, match="has 2 columns 'path'"):
        discover(tmp_path / "a.csv", "path")


def test_a_table_whose_columns_are_known_late(tmp_path):
    """Nothing but numbers in another column at first, and words after the first block."""
    rows = [f"{n}.jpg,{n}" for n in range(100_000)] + ["last.jpg,none"]
    (tmp_path / "a.csv").write_text("path,n\n" + "\n".join(rows))
    items = discover(tmp_path / "a.csv")
    assert [item.id for item in items] == [f"{n}.jpg" for n in range(100_000)] + ["last.jpg"]
    (tmp_path / "a.csv").write_text("path\n" + "12\n" * 10)
    with pytest.raises(ValueError, match="'path' holds numbers"):
        discover(tmp_path / "a.csv")


@pytest.mark.parametrize("start", ["\ufeff", "\n\r\n", "\ufeff\r\n"])
def test_a_table_may_begin_with_a_mark_or_empty_lines(start, tmp_path):
    (tmp_path / "a.csv").write_bytes(f'{start}"pa""th","x,y"\r\na.jpg,1\r\n'.encode())
    assert discover(tmp_path / "a.csv", 'pa"th')[0].id == "a.jpg"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff,b\na,b\n", b"x" * 70_000, b'"a'])
def test_tables_without_names(content, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.csv: "):
        discover(tmp_path / "a.csv")


# Text


def test_lines_that_are_no_utf8_are_read_and_indexed(tmp_path):
    engine = small_engine()
    photograph(30, 30).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xe9.png")
    lines = (
        b"\xe9.png\nhttps://\xe9.invalid/a.png\nhttp://127.0.0.1:1/\xe9.png\n\x1b]0;x\x07.png\n"
        b"zip://\xe9::/\xe9.zip\nfile:///\xe9\n"
    )
    (tmp_path / "list.txt").write_bytes(lines)
    (tmp_path / "\x1b]0;x\x07.png").write_bytes(b"no picture \xff\x1b[2J")
    run(make_job(tmp_path / "list.txt", tmp_path / "out"), engine)
    table = index(tmp_path / "out")
    assert table["status"] == ["ok"] + ["failed"] * 5
    assert table["id"][:2] == ["\\xe9.png", "https://\\xe9.invalid/a.png"]
    assert table["id"][3] == "\\x1b]0;x\\x07.png"
    for text in (*table["id"], *filter(None, table["reason"])):
        assert text.isprintable()
        text.encode()


def test_messages_about_lines_are_printable(tmp_path):
    for line in (b"ftp://\xe9\x1b[2J/x", b"reference://\xe9", b"\xe9\x1b[2J\n\xe9\x1b[2J"):
        (tmp_path / "list.txt").write_bytes(line)
        with pytest.raises(ValueError) as caught:
            discover(tmp_path / "list.txt")
        assert str(caught.value).isprintable()
    (tmp_path / "a.csv").write_bytes(b"\x1b[2J,b\na\n\xff,\xfe\n")
    with pytest.raises(ValueError) as caught:
        discover(tmp_path / "a.csv", "\x1b[2J")
    assert "\x1b" not in str(caught.value).replace("'\x1b[2J'", "")


# Patterns


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..9}" * 20 + ".tar",
        "{a,b}" * 64 + ".txt",
        "{0..999999999999999999}.tar",
        "{1..1000001}.tar",
        "{1..1001}{1..1000}.tar",
        "https://host/" + "{0..9}" * 20 + ".tar",
        "s3://bucket/{" + "," * 1_000_001 + "}.tar",
    ],
    ids=lambda pattern: pattern[:24],
)
def test_patterns_do_not_stand_for_more_names_than_there_are(pattern):
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"more than the limit of 1000000|more than .* 1000000 names"
    ):
        discover(pattern)
    assert tracemalloc.get_traced_memory()[1] < 128 << 20
    tracemalloc.stop()


def test_a_range_of_too_many_digits_is_none():
    with pytest.raises(ValueError, match="neither a range"):
        discover("{0.." + "9" * 5000 + "}.tar")
    assert len(addresses.expand_braces("{000001..1000000}.tar")) == 1_000_000
    assert expand("https://h/{08..10}{a,b}.tar?x={1,2}#y")[1][0] == "https://h/08a.tar?x=1#y"
