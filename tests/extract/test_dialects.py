"""Lists as programs write them: all their paths, or one clear error, and never fewer in silence."""

import csv
import itertools
import random
from collections import Counter
from pathlib import Path

import pandas
import pyarrow
import pytest
from extracting import touch
from pyarrow import parquet

from stellar_fast.extract.input import discover

PATHS = [f"pics/{number}.jpg" for number in range(5)]


def ids(path: Path, column: str | None = None) -> list[str]:
    return [item.id for item in discover(path, column)]


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Quotes


def test_a_quote_begins_nothing_in_a_tsv(tmp_path):
    rows = [('"I love it', "a.jpg"), ("plain", "b.jpg"), ('yes" he said', "c.jpg"), ("x", " e.jpg")]
    text = "caption\tpath\n" + "".join(f"{caption}\t{path}\n" for caption, path in rows)
    assert ids(put(tmp_path / "a.tsv", text)) == ["a.jpg", "b.jpg", "c.jpg", " e.jpg"]
    # A reader with quotes would take these two for one row.
    two = 'path\tcaption\na.jpg\t"first\nb.jpg\tlast"\n'
    assert ids(put(tmp_path / "a.tsv", two)) == ["a.jpg", "b.jpg"]


def test_fields_of_a_tsv_that_are_wholly_quoted(tmp_path):
    text = '"path"\t"caption"\n"a ""b"".jpg"\t"x"\n"c.jpg"\t"""y"""\n"\t"\n'
    assert ids(put(tmp_path / "a.tsv", text), "path") == ['a "b".jpg', "c.jpg", '"']


def test_a_quoted_tab_or_line_end_in_a_tsv_is_an_error(tmp_path):
    for caption in ("one\ttwo", "one\ntwo"):
        text = f'path\tcaption\na.jpg\t"{caption}"\nb.jpg\tx\n'
        with pytest.raises(ValueError, match=r"line [23] has [13] columns, .* a .tsv has no such"):
            ids(put(tmp_path / "a.tsv", text))


# Names of columns


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    "first",
    [
        "a.jpg",
        "a.JPEG",
        "https://host/a",
        "sub/a",
        "image_001",
        "there",
        "/data/a",
        "hf://datasets/b/c/a",
    ],
)
def test_a_first_line_that_is_a_path_is_an_image(first, suffix, tmp_path):
    touch(tmp_path, "there")
    paths = [first, "image_002", "other"]
    assert ids(put(tmp_path / f"a{suffix}", "\n".join(paths))) == paths


@pytest.mark.parametrize("name", ["path", "image", "Image Path", "0", "file.name", "a;b", "x_1"])
def test_a_name_of_the_only_column_is_no_image(name, tmp_path):
    touch(tmp_path, "path", "image/a.jpg")  # a folder of such a name, as there often is
    assert ids(put(tmp_path / "a.csv", f"{name}\na.jpg\nb.jpg\n")) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("column", [None, "a.jpg", "cat"])
def test_rows_without_names_of_columns_are_an_error(column, tmp_path):
    with pytest.raises(ValueError, match=r"the first line has a\.jpg, a path, .* line of names"):
        ids(put(tmp_path / "a.csv", "a.jpg,cat\nb.jpg,dog\n"), column)


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ";"), (".csv", "\t"), (".tsv", ",")])
def test_columns_that_are_separated_otherwise_are_an_error(suffix, mark, tmp_path):
    text = f"path{mark}caption\na.jpg{mark}x\n"
    with pytest.raises(ValueError, match="columns are separated by"):
        ids(put(tmp_path / f"a{suffix}", text))


# Encodings and line ends


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv"])
def test_encodings(suffix, tmp_path):
    head = "" if suffix == ".txt" else "path\n"
    text = head + "é.jpg\nb.jpg\n"
    for encoding in ("utf-8", "utf-8-sig"):
        assert ids(put(tmp_path / f"a{suffix}", text.encode(encoding))) == ["é.jpg", "b.jpg"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        with pytest.raises(ValueError, match="save it as UTF-8"):
            ids(put(tmp_path / f"a{suffix}", text.encode(encoding)))
    latin = put(tmp_path / f"a{suffix}", text.encode("latin-1"))
    if suffix == ".txt":  # names of files may be any bytes
        assert ids(latin) == ["\\xe9.jpg", "b.jpg"]
        return
    with pytest.raises(ValueError, match="line 2 is no UTF-8; save it as UTF-8"):
        ids(latin)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv"])
def test_line_ends(suffix, tmp_path):
    lines = [*([] if suffix == ".txt" else ["path"]), "a.jpg", "b.jpg"]
    for end, last in itertools.product(("\n", "\r\n"), (True, False)):
        text = end.join(lines) + (end if last else "")
        assert ids(put(tmp_path / f"a{suffix}", text)) == ["a.jpg", "b.jpg"]
    with pytest.raises(ValueError, match=r"carriage return|new-line"):
        ids(put(tmp_path / f"a{suffix}", "\r".join(lines)))


# Against other readers

CAPTIONS = ["plain", 'he said "hi"', '"quoted"', "a, b", "line\nend", '"', "", " x ", "é", "a\tb"]
QUOTING = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)


@pytest.mark.parametrize(
    ("quoting", "end", "bom", "last"),
    list(itertools.product(QUOTING, ("\n", "\r\n"), ("", "\ufeff"), (True, False))),
)
def test_a_csv_is_what_python_and_pandas_read(quoting, end, bom, last, tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(bom)
        writer = csv.writer(file, quoting=quoting, lineterminator=end)
        order = (
            (lambda path, caption: (caption, path))
            if last
            else lambda path, caption: (path, caption)
        )
        writer.writerow(order("path", "caption"))
        for number, caption in enumerate(CAPTIONS):
            writer.writerow(order(f'{number} "x", y.jpg', caption))
    with path.open(newline="", encoding="utf-8-sig") as file:
        expected = [row["path"] for row in csv.DictReader(file)]
    frame = pandas.read_csv(path, dtype=str, encoding="utf-8-sig")
    assert ids(path) == expected == list(frame["path"])
    assert len(expected) == len(CAPTIONS)


@pytest.mark.parametrize("quoting", [csv.QUOTE_NONE, *QUOTING])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_tsv_is_what_python_reads_without_quotes(quoting, end, tmp_path):
    path = tmp_path / "a.tsv"
    captions = [text for text in CAPTIONS if "\n" not in text and "\t" not in text]
    with path.open("w", newline="", encoding="utf-8") as file:
        quotechar = None if quoting == csv.QUOTE_NONE else '"'
        writer = csv.writer(
            file, delimiter="\t", quoting=quoting, quotechar=quotechar, lineterminator=end
        )
        writer.writerow(("caption", "path"))
        writer.writerows((caption, f"{number}.jpg") for number, caption in enumerate(captions))
    assert ids(path) == [f"{number}.jpg" for number in range(len(captions))]


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_what_pandas_writes(suffix, index, tmp_path):
    path = tmp_path / f"a{suffix}"
    frame = pandas.DataFrame({"path": PATHS, "caption": CAPTIONS[:5], "n": range(5)})
    if suffix == ".parquet":
        frame.to_parquet(path, index=index)
    else:
        frame["caption"] = "plain"
        frame.to_csv(path, index=index, sep="," if suffix == ".csv" else "\t")
    assert ids(path) == PATHS
    if suffix != ".parquet":
        pandas.Series(PATHS).to_csv(path, index=False)  # a column whose name is 0
        assert ids(path) == PATHS
        pandas.Series(PATHS).to_csv(path, index=False, header=False)
        assert ids(path) == PATHS


# Types of Parquet

TEXT = [
    *(pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()),
    *(pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()),
    *(pyarrow.dictionary(pyarrow.int32(), kind) for kind in (pyarrow.string(), pyarrow.binary())),
    pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
]


@pytest.mark.parametrize("kind", TEXT, ids=str)
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("dictionary", [True, False])
def test_all_types_of_text_are_paths(kind, stored, dictionary, tmp_path):
    values = pyarrow.array(PATHS)
    if pyarrow.types.is_dictionary(kind):
        values = values.cast(kind.value_type).dictionary_encode().cast(kind)
    else:
        values = values.cast(kind)
    table = pyarrow.table({"n": range(5), "path": values})
    parquet.write_table(
        table, tmp_path / "a.parquet", store_schema=stored, use_dictionary=dictionary
    )
    assert ids(tmp_path / "a.parquet") == PATHS


@pytest.mark.parametrize(
    "values",
    [[1, 2], [1.5, 2.5], [True, False], [["a"], ["b"]], [{"a": 1}], [None, None]],
    ids=str,
)
def test_what_is_no_text_says_what_to_do(values, tmp_path):
    parquet.write_table(pyarrow.table({"path": values}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="not paths; name another by --column"):
        ids(tmp_path / "a.parquet")


def test_names_that_are_no_utf8_are_read_from_bytes(tmp_path):
    table = pyarrow.table({"path": pyarrow.array([b"\xe9.jpg", b"b.jpg"])})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [Path(item.file).name for item in discover(tmp_path / "a.parquet")] == [
        "\udce9.jpg",
        "b.jpg",
    ]


def test_tables_behind_one_another_are_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    contents = []
    for letter in "ab":
        parquet.write_table(pyarrow.table({"path": [f"{letter}{n}.jpg" for n in range(5)]}), path)
        contents.append(path.read_bytes())
    path.write_bytes(b"".join(contents))
    with pytest.raises(ValueError, match="several such files follow each other"):
        ids(path)


# Damaged


def damaged(content: bytes, seed: int) -> bytes:
    """The list with some bytes changed to those that mean something in lists."""
    chosen = random.Random(seed)
    result = bytearray(content)
    for _ in range(chosen.randrange(1, 4)):
        at = chosen.randrange(len(result))
        what = chosen.choice([b'"', b"\n", b"\r", b",", b"\t", b"\0", b"\xff", b";", b"", b'""'])
        result[at : at + chosen.randrange(2)] = what
    return bytes(result)


def fuzzed(tmp_path: Path, seeds: range) -> Counter[str]:
    """Lists with damages: as many paths as another reader finds lines with one, or one error."""
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        suffix = (".txt", ".csv", ".tsv")[seed % 3]
        mark = {".txt": "", ".csv": ",", ".tsv": "\t"}[suffix]
        rows = [f"{n}.jpg{mark}{mark and CAPTIONS[n % 4]}" for n in range(8)]
        if suffix == ".csv":
            rows = [f'{n}.jpg,"a ""b"", {n}"' for n in range(8)]
        head = [] if suffix == ".txt" else [f"path{mark}caption"]
        whole = ("\n".join([*head, *rows]) + "\n").encode()
        content = damaged(whole, seed)
        path = put(tmp_path / f"a{suffix}", content)
        try:
            found = len(ids(path))
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 1000
            outcomes["errors"] += 1
            continue
        # A line is a path; but that a quote may join two in a .csv, which Python's reader decides.
        blank = None if suffix == ".txt" else b"\r"
        lines = [line for line in content.split(b"\n") if line.strip(blank)]
        if suffix == ".csv":
            lines = list(filter(None, csv.reader(content.decode().splitlines(keepends=True))))
        assert found == len(lines) - len(head), (seed, content)
        outcomes["lists"] += 1
    return outcomes


def fuzzed_tables(tmp_path: Path, seeds: range) -> Counter[str]:
    """Parquet with bytes changed: all rows, or one error."""
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        chosen = random.Random(seed)
        path = tmp_path / "a.parquet"
        table = pyarrow.table({"path": [f"{n}.jpg" for n in range(8)], "n": range(8)})
        parquet.write_table(
            table,
            path,
            compression=chosen.choice(["none", "snappy", "zstd"]),
            use_dictionary=chosen.choice([True, False]),
            row_group_size=chosen.choice([3, 8]),
        )
        content = bytearray(path.read_bytes())
        for _ in range(chosen.randrange(1, 4)):
            content[chosen.randrange(len(content))] = chosen.randrange(256)
        try:
            found = len(ids(put(path, bytes(content))))
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 1000
            outcomes["errors"] += 1
            continue
        assert found == 8, (seed, bytes(content))
        outcomes["lists"] += 1
    return outcomes


def test_damaged_lists_give_all_paths_or_an_error(tmp_path):
    for outcomes in (fuzzed(tmp_path, range(600)), fuzzed_tables(tmp_path, range(1300, 1500))):
        assert outcomes["errors"] > 20 and outcomes["lists"] > 20


@pytest.mark.soak
def test_twenty_thousand_damaged_lists(tmp_path):
    assert fuzzed(tmp_path, range(1000, 16_000)).total() == 15_000
    assert fuzzed_tables(tmp_path, range(1000, 6000)).total() == 5000
