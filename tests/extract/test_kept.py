"""Labels and captions that are carried along, from every kind of input into the index."""

import json
import math
import pickle
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from extracting import contents
from forged import sign
from parquets import cells, jpeg, write
from pictures import png
from pyarrow import parquet

import stellar_fast
from stellar_fast import StellarError
from stellar_fast.extract import make_job, run
from stellar_fast.extract.input import discover, kept
from stellar_fast.extract.input.sieve import Sieve
from stellar_fast.extract.output.layout import read_items, read_plan
from stellar_fast.recipes.labels import named_labels

OPTIONS = {"partition_size": 3, "batch_size": 2, "workers": 1}


@pytest.fixture
def images(tmp_path):
    """Five good files and a broken one."""
    (tmp_path / "cat").mkdir()
    for number in range(5):
        (tmp_path / "cat" / f"{number}.png").write_bytes(png(number))
    (tmp_path / "cat" / "5.png").write_bytes(b"broken")
    return tmp_path


PATHS = [f"cat/{number}.png" for number in range(6)]
TABLE = {
    "path": PATHS,
    "label": [3, 1, None, 5, -9, 2],
    "score": [0.5, 1.0, 2.25, -1e-3, None, 1e300],
    "caption": ["a, b", 'c "d"', "e\tf", "", "\u00e9\u4e2d\U0001f600", "007"],
    "flag": [True, False, None, True, True, False],
}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


def kept_of(source, *keep, **options) -> tuple[dict[str, list], dict[str, str]]:
    items, types = kept.settled(discover(source, keep=keep, **options), keep)
    columns = zip(*(item.kept for item in items), strict=True)
    return dict(zip(keep, map(list, columns), strict=True)), types


def same(found: list, expected: list) -> None:
    assert [(type(value), value) for value in found] == [(type(value), value) for value in expected]


# Tables


@pytest.mark.parametrize("kind", ["paths", "images"])
def test_columns_of_parquet_keep_their_types(images, kind):
    columns = dict(TABLE)
    if kind == "images":
        columns["image"] = cells([jpeg(number) for number in range(6)])
    path = write(images / "a.parquet", **columns)
    options = {"column": "path"} if kind == "paths" else {}
    found, types = kept_of(path, "label", "score", "caption", "flag", **options)
    for name in found:
        same(found[name], TABLE[name])
    assert types == {
        "label": "int64",
        "score": "float64",
        "caption": "string",
        "flag": "bool",
    }


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (pyarrow.uint8(), [1, 255], [1, 255]),
        (pyarrow.float16(), [1.5, None], [1.5, None]),
        (pyarrow.float32(), [0.1, 1.0], [float(np.float32(0.1)), 1.0]),
        (pyarrow.large_string(), ["a", "b"], ["a", "b"]),
        (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["a", None], ["a", None]),
    ],
)
def test_other_types_of_arrow_are_widened(images, kind, values, expected):
    column = pyarrow.array(
        np.array(values, np.float16)
        if kind == pyarrow.float16() and None not in values
        else values,
        kind if kind != pyarrow.float16() else None,
    )
    if kind == pyarrow.float16():
        column = column.cast(kind)
    path = write(images / "a.parquet", path=PATHS[:2], x=column)
    same(kept_of(path, "x")[0]["x"], expected)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([[1], [2]]),
        pyarrow.array([{"a": 1}, {"a": 2}]),
        pyarrow.array([b"a", b"b"]),
        pyarrow.array([1, 2], pyarrow.timestamp("s")),
        pyarrow.array([1, 2]).cast(pyarrow.decimal128(38, 2)),
    ],
)
def test_other_columns_are_one_error(images, column):
    path = write(images / "a.parquet", path=PATHS[:2], x=column)
    with pytest.raises(ValueError, match=r"'x' holds .*; integers, floats, booleans and text are"):
        kept_of(path, "x")


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv", "\t")])
def test_text_tables_have_numbers_where_all_are(images, suffix, mark):
    rows = [
        ("path", "label", "score", "zip", "caption", "none"),
        ("cat/0.png", "3", "0.5", "007", '"c ""d"""', ""),
        ("cat/1.png", "-12", "1e3", "8", "e", ""),
        ("cat/2.png", "", "2", "9", "", ""),
    ]
    path = images / f"a{suffix}"
    path.write_text("".join(f"{mark.join(row)}\n" for row in rows))
    found, types = kept_of(path, "label", "score", "zip", "caption")
    same(found["label"], [3, -12, None])
    same(found["score"], [0.5, 1000.0, 2.0])
    same(found["zip"], ["007", "8", "9"])
    same(found["caption"], ['c "d"', "e", None])
    assert types == {"label": "int64", "score": "float64", "zip": "string", "caption": "string"}
    with pytest.raises(ValueError, match="no image has a value of 'none'"):
        kept_of(path, "none")
    with pytest.raises(ValueError, match="no column 'lable' to keep; it has path, label"):
        kept_of(path, "lable")
    path.write_text(f"path{mark}x\ncat/0.png{mark}9223372036854775807\n")
    same(kept_of(path, "x")[0]["x"], [9223372036854775807])
    path.write_text(f"path{mark}x\ncat/0.png{mark}9223372036854775808\n")
    assert kept_of(path, "x")[1] == {"x": "float64"}


# Folders and tars


def test_the_name_of_the_folder(images):
    same(kept_of(images, "folder")[0]["folder"], ["cat"] * 6)
    (images / "7").mkdir()
    (images / "a.csv").write_text("path,folder_\ncat/0.png,1\n7/1.png,2\n")
    same(kept_of(images / "a.csv", "folder")[0]["folder"], ["cat", "7"])
    (images / "b.csv").write_text("path,folder\ncat/0.png,1\n7/1.png,2\n")
    same(kept_of(images / "b.csv", "folder")[0]["folder"], ["1", "2"])
    (images / "a.txt").write_text("cat/0.png\n")
    same(kept_of(images / "a.txt", "folder")[0]["folder"], ["cat"])
    for source in (images, images / "a.txt"):
        with pytest.raises(ValueError, match="has no columns: no column 'label' to keep"):
            kept_of(source, "label")
    with pytest.raises(ValueError, match="no image has a value of 'folder'"):
        kept_of(images / "cat", "folder")
    path = write(images / "a.parquet", image=[png(0)])
    with pytest.raises(ValueError, match="no column 'folder' to keep, and rows are in no folder"):
        kept_of(path, "folder")


MEMBERS = {
    "x/0.json": json.dumps({"caption": "zero", "meta": {"id": 7}, "s": 1, "label": 4}).encode(),
    "x/0.jpg": png(0),
    "x/0.cls": b"3",
    "x/0.txt": "z\u00e9ro\n".encode(),
    "x/1.png": png(1),
    "x/1.seg.png": png(2),
    "x/1.cls": b" 5\n",
    "x/1.json": json.dumps({"caption": None, "s": 0.5, "meta": 1}).encode(),
    "x/2.jpg": png(3),
    "x/2.cls": b"",
}


def test_what_is_beside_an_image_in_a_tar(tmp_path):
    members = {name: content for name, content in MEMBERS.items() if name != "x/2.cls"}
    path = write_tar(tmp_path / "a.tar", members)
    keep = ("caption", "cls", "folder", "json.label", "meta.id", "s", "txt")
    found, types = kept_of(path, *keep)
    ids = [item.id for item in discover(path, keep=keep)]
    assert ids == [f"a.tar::x/{name}" for name in ("0.jpg", "1.png", "1.seg.png", "2.jpg")]
    same(found["cls"], [3, 5, 5, None])
    same(found["caption"], ["zero", None, None, None])
    same(found["txt"], ["z\u00e9ro\n", None, None, None])
    same(found["meta.id"], [7, None, None, None])
    same(found["json.label"], [4, None, None, None])
    same(found["s"], [1.0, 0.5, 0.5, None])
    same(found["folder"], ["x"] * 4)
    assert types["s"] == "float64"


def test_members_that_are_wanted_are_not_told_as_left_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", {name: MEMBERS[name] for name in ("x/0.jpg", "x/0.cls")})
    for keep, left in (((), {".cls files": 1}), (("cls",), {})):
        sieve = Sieve()
        discover(path, sieve=sieve, keep=keep)
        assert dict(sieve.skipped) == left


@pytest.mark.parametrize(
    ("keep", "members", "message"),
    [
        (
            "meta",
            {"0.json": b'{"meta": {"a": 1}}'},
            "a.tar: 0.json: meta is an object; .*with a dot",
        ),
        ("meta", {"0.json": b'{"meta": [1]}'}, "meta is a list"),
        ("meta", {"0.json": b'{"meta": '}, "0.json is no JSON"),
        ("meta", {"0.json": b"[" * 100_000}, "0.json is no JSON"),
        ("meta", {"0.json": b'{"meta": %s}' % (b"9" * 5000)}, "0.json is no JSON"),
        ("meta", {"0.json": b'{"meta": 9223372036854775808}'}, "'meta' is 92.*08, beyond 64 bits"),
        ("meta", {"0.json": b'{"meta": "\\ud800"}'}, "'meta' is no text of UTF-8"),
        ("txt", {"0.txt": b"\xff"}, "0.txt is no UTF-8"),
        ("txt", {"0.txt": b"x" * 70_000}, "0.txt: 70000 characters to keep are more than"),
        ("txt", {"0.txt": b"x" * ((1 << 20) + 1)}, "0.txt: 1048577 bytes are more than the limit"),
        ("txt", {"0.txt": b"x", "0.TXT": b"y"}, "0.TXT is there twice"),
        (
            "cls",
            {"0.cls": b"1", "1.cls": b"cat", "1.jpg": b"x"},
            "of one type: 1 of .* and 'cat' of",
        ),
        ("cls", {"0.txt": b"1"}, "no image has a value of 'cls'"),
    ],
)
def test_members_that_cannot_be_kept_are_one_error(tmp_path, keep, members, message):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", **members})
    with pytest.raises(ValueError, match=message):
        kept_of(path, keep)


def test_names_that_are_kept_are_checked(images):
    for keep, message in (
        (["width"], "the index has a column 'width' of its own"),
        ("label", r"a list of names, got 'label'"),
        (["a\nb"], "cannot be the name of a column"),
        ([""], "cannot be the name"),
        ([f"c{number}" for number in range(65)], "65 columns to keep, and 64 are the most"),
    ):
        with pytest.raises(ValueError, match=message):
            make_job(images, images.parent / "out", keep=keep)


def test_repeated_text_is_bounded(images, monkeypatch):
    monkeypatch.setattr(kept, "MOST_TEXT", 1000)
    path = write(images / "a.parquet", path=PATHS, x=["y" * 200] * 6)
    with pytest.raises(ValueError, match="line 6: more than 1000 characters to keep"):
        kept_of(path, "x")


# Into the output, and out of it


def test_an_extraction_carries_them_into_the_index(images, engine):
    source = write(images / "a.parquet", **TABLE)
    out = images / "out"
    keep = ["score", "label", "flag", "caption"]
    run(make_job(source, out, keep=keep, **OPTIONS), engine)
    features = stellar_fast.open_features(out)
    assert features.ids == PATHS[:5]
    assert list(features.columns) == [*("id", "width", "height"), *sorted(keep)]
    same(features.columns["label"].tolist(), TABLE["label"][:5])
    same(features.columns["caption"].tolist(), TABLE["caption"][:5])
    same(features.columns["flag"].tolist(), TABLE["flag"][:5])
    assert features.columns["width"].dtype == np.int32
    assert features.row("cat/3.png") == 3
    with pytest.raises(KeyError, match=r"'cat/5.png' has no row: not an image"):
        features.row("cat/5.png")
    with pytest.raises(KeyError, match=r"no image 'cat/6\.png'"):
        features.row("cat/6.png")
    frame = features.to_pandas(["cls"])
    assert frame["label"].tolist()[:2] == [3, 1] and str(frame["label"].dtype) == "Int64"
    assert frame["score"].isna().tolist() == [False] * 4 + [True]
    np.testing.assert_array_equal(np.stack(frame["cls"]), features["cls"].to_numpy())
    assert features.index["label"].to_pylist() == TABLE["label"]
    assert list(pickle.loads(pickle.dumps(features)).columns) == list(features.columns)
    # A run that goes on keeps them, by the plan; others are refused by name.
    whole = contents(out)
    (out / "part-00001" / "manifest.json").unlink()
    run(make_job(source, out, keep=keep[::-1], resume=True, **OPTIONS), engine)
    assert contents(out) == whole
    with pytest.raises(ValueError, match=r"keep.flag \(\"bool\" -> null\)"):
        make_job(source, out, keep=keep[:2], **OPTIONS)
    with pytest.raises(ValueError, match=r"keep\.x \(null -> \"new\"\)"):
        make_job(source, out, keep=[*keep, "x"], resume=True, **OPTIONS)
    write(source, **{**TABLE, "label": [3, 1, None, 5, -9, 1]})
    with pytest.raises(ValueError, match="the input has changed"):
        make_job(source, out, keep=keep, **OPTIONS)


def test_what_failed_and_is_tried_again_keeps_its_label(images, engine):
    source = write(images / "a.parquet", **TABLE)
    out = images / "out"
    run(make_job(source, out, keep=["caption"], **OPTIONS), engine)
    (images / "cat" / "5.png").write_bytes(png(5))
    run(make_job(source, out, keep=["caption"], retry_failed=True, **OPTIONS), engine)
    features = stellar_fast.open_features(out)
    assert features.columns["caption"].tolist() == TABLE["caption"]


def test_floats_survive_to_the_bit(images, engine):
    values = [math.nan, math.inf, -0.0, 5e-324, 0.1, 1 / 3]
    source = write(images / "a.parquet", path=PATHS, x=values)
    out = images / "out"
    run(make_job(source, out, keep=["x"], **OPTIONS), engine)
    plan = read_plan(out)
    keep = plan.configuration["keep"]
    found = [item.kept[0] for part in plan.partitions for item in read_items(out, part, keep)]
    assert np.array(found).tobytes() == np.array(values).tobytes()
    column = stellar_fast.open_features(out).columns["x"]
    assert column.tobytes() == np.array(values[:5]).tobytes()


def test_labels_by_name(images, engine):
    source = write(images / "a.parquet", path=PATHS, label=[0, 1, 0, 1, 0, 1], x=TABLE["label"])
    run(make_job(source, images / "out", keep=["label", "x"], **OPTIONS), engine)
    features = stellar_fast.open_features(images / "out")
    assert named_labels(features, "label").tolist() == [0, 1, 0, 1, 0]
    assert named_labels(features, "folder").tolist() == ["cat"] * 5
    with pytest.raises(KeyError, match="no column 'lable'; here are id, width, height, label, x"):
        named_labels(features, "lable")
    with pytest.raises(ValueError, match=r"1 of 5 rows have no 'x', the first is cat/2.png"):
        named_labels(features, "x")


def test_an_index_of_a_stranger_is_held_to_the_plan(images, engine):
    source = write(images / "a.parquet", **TABLE)
    out = images / "out"
    run(make_job(source, out, keep=["caption", "label"], **OPTIONS), engine)
    index = out / "part-00000" / "index.parquet"
    table = parquet.read_table(index)
    for changed in (
        table.drop_columns(["label"]),
        table.append_column("more", table["label"]),
        table.set_column(6, "caption", table["label"]),
    ):
        parquet.write_table(changed, index)
        sign(out)
        with pytest.raises(StellarError, match="its columns are not those of an index"):
            stellar_fast.open_features(out).columns  # noqa: B018
    bomb = pyarrow.array(["x" * (60 << 20)] * 3)
    parquet.write_table(table.set_column(6, "caption", bomb), index)
    sign(out)
    with pytest.raises(StellarError, match=r"its text unpacks to .* are the most"):
        stellar_fast.open_features(out).columns  # noqa: B018


@pytest.mark.parametrize(
    "keep",
    [
        [],
        {"width": "int64"},
        {"x": "binary"},
        {"x": ["int64"]},
        {"": "int64"},
        {f"c{number}": "int64" for number in range(65)},
    ],
)
def test_a_plan_of_a_stranger_keeps_what_there_may_be(images, engine, keep):
    run(make_job(images / "cat", images / "out", **OPTIONS), engine)
    plan = json.loads((images / "out" / "plan.json").read_text())
    plan["configuration"]["keep"] = keep
    (images / "out" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(StellarError, match=r"'keep' is .*, not at most 64 names of columns"):
        stellar_fast.open_features(images / "out")
