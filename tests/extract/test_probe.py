"""`stellar-fast probe`: labels joined to rows, a split, an accuracy with its interval."""

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import invoke, refused
from outputs import write_output
from PIL import Image

import stellar_fast
from stellar_fast.recipes import labels, probe
from stellar_fast.viz import confusion

pytest.importorskip("sklearn", reason="the extra 'recipes' is not installed")
linear_model = pytest.importorskip("sklearn.linear_model")
preprocessing = pytest.importorskip("sklearn.preprocessing")

ROWS = 80
KINDS = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def truth() -> list[str]:
    return np.random.default_rng(1).choice(KINDS, ROWS, p=(0.5, 0.3, 0.2)).tolist()


@pytest.fixture(scope="module")
def output(tmp_path_factory, truth) -> Path:
    """Features that tell most of the labels; three images failed."""
    rng = np.random.default_rng(0)
    middle = {kind: rng.standard_normal(8) for kind in KINDS}
    sparse = np.stack([middle[kind] + rng.standard_normal((4, 8)) * 2.2 for kind in truth])
    folder = tmp_path_factory.mktemp("probe") / "out"
    features = {"sparse": sparse.astype(np.float32), "cls": sparse[:, :1].astype(np.float32)}
    write_output(folder, features, size=9, failed=[4, 30, 82])
    return folder


@pytest.fixture(scope="module")
def features(output):
    return stellar_fast.open_features(output)


def write_table(path: Path, rows: list, head: tuple = ("id", "kind")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return path


@pytest.fixture
def table(features, truth, tmp_path) -> Path:
    """In another order, with lines of failed and of no images; four rows have no label."""
    rows = list(zip(features.ids, truth, strict=True))
    rows = [*rows[:10], *rows[12:], *((failed.id, "cat") for failed in features.failed)]
    rows += [("folder/none.jpg", "dog"), ("folder/empty.jpg", "")]
    rows = [(id, "" if id in features.ids[20:22] else kind) for id, kind in rows]
    rows = [rows[at] for at in np.random.default_rng(2).permutation(len(rows))]
    return write_table(tmp_path / "labels.csv", rows)


def test_labels_are_joined_by_id(features, table, truth):
    found = labels.labels_of(features, "kind", table)
    expected = [None if row in (10, 11, 20, 21) else kind for row, kind in enumerate(truth)]
    assert found.values == expected
    assert sorted(found.failed) == sorted(failed.id for failed in features.failed)
    assert found.unknown == ["folder/none.jpg"]


def test_the_accuracy_is_that_of_a_join_by_hand(output, features, table, truth):
    result = invoke("probe", output, "--label", "kind", "--labels", table, "--seed", "5")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "80 images, 76 with a label; 3 labels of images that failed: "
        f"{', '.join(failed.id for failed in labels_in_order(table, features))}; "
        "1 labels of no image: folder/none.jpg"
    )
    with table.open(newline="") as file:
        given = {line["id"]: line["kind"] for line in csv.DictReader(file)}
    rows = [row for row, id in enumerate(features.ids) if given.get(id)]
    vectors = features["sparse"].to_numpy().mean(axis=1)[rows]
    named = np.array([given[features.ids[row]] for row in rows])
    tested = probe.split(named, 0.2, 5)
    scale = preprocessing.StandardScaler().fit(vectors[~tested])
    model = linear_model.LogisticRegression(max_iter=1000)
    model.fit(scale.transform(vectors[~tested]), named[~tested])
    right = int((model.predict(scale.transform(vectors[tested])) == named[tested]).sum())
    total = int(tested.sum())
    assert 0.4 * total < right < total, "the features tell all or nothing"
    low, high = probe.wilson(right, total)
    usual = (named[tested] == "cat").mean()
    assert lines[1:] == [
        f"sparse: 3 classes, trained on {76 - total}, tested on {total} (seed 5)",
        f"accuracy {right / total:.1%} ({right} of {total}), 95 % Wilson interval {low:.1%} to "
        f"{high:.1%}; always the most frequent class: {usual:.1%}",
    ]


def labels_in_order(table: Path, features) -> list:
    """The failed images in the order of a table."""
    with table.open(newline="") as file:
        order = [line["id"] for line in csv.DictReader(file)]
    return sorted(features.failed, key=lambda failed: order.index(failed.id))


def test_columns_of_the_features(features, truth, monkeypatch):
    monkeypatch.setattr(type(features), "columns", {"kind": np.array(truth)}, raising=False)
    assert labels.labels_of(features, "kind").values == truth
    numbers = [1, None, float("nan"), ""] + [2] * (ROWS - 4)
    monkeypatch.setattr(type(features), "columns", {"number": numbers})
    found = labels.labels_of(features, "number")
    assert found.values == ["1", None, None, None] + ["2"] * (ROWS - 4)
    with pytest.raises(ValueError, match="no column 'kind', their columns are number"):
        labels.labels_of(features, "kind")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no column 'id'; its columns are"),
        (b"path,kind\na,b\n", "has no column 'id'; its columns are path, kind"),
        (b"id,label\na,b\n", "has no column 'kind'; its columns are id, label"),
        (b"id,kind,kind\na,b,c\n", "has 2 column 'kind'"),
        (b"id,kind\na,b\nc\n", "line 3 has 1 columns, and the first line 2"),
        (b"id,kind\na,b\n\na,b\n", "line 4 names a again; an id has one label"),
        (b'id,kind\na,"b\n', "unexpected end of data"),
        (b"id,kind\n\xff,b\n", "is no UTF-8"),
        ("id,kind\na,b\n".encode("utf-16"), "is no UTF-8"),
        (b"id,kind\n" + b"a" * 200_000 + b",b\n", "field larger than field limit"),
    ],
)
def test_tables_that_cannot_be_read(output, tmp_path, content, said):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    result = invoke("probe", output, "--label", "kind", "--labels", path)
    refused(result, re.escape(said))
    assert "labels.csv: " in result.stderr


def test_with_the_mark_of_utf_8(features, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes(f"\ufeffkind,id\r\nkät,{features.ids[3]}\r\n".encode())
    assert labels.labels_of(features, "kind", path).values[3] == "kät"


def test_what_cannot_be_probed(output, features, table, tmp_path):
    ask = ("probe", output, "--label", "kind")
    refused(invoke(*ask), "no column 'kind', their columns are id, width, height")
    refused(invoke(*ask, "--labels", tmp_path / "none.csv"), "none.csv")
    both = (*ask, "--labels", table)
    refused(invoke(*both, "--by", "spatial"), "no spatial to probe; it has sparse, cls")
    refused(invoke(*both, "--plot", tmp_path / "a.gif"), r"OUT\.png or OUT\.pdf or OUT\.svg")
    one = write_table(tmp_path / "one.csv", [(id, "cat") for id in features.ids])
    few = write_table(tmp_path / "few.csv", list(zip(features.ids, "abc", strict=False)))
    for arguments, said in (
        ((*both, "--held-out", "1"), "between 0 and 1, got 1.0"),
        ((*ask, "--labels", one), "a probe tells classes apart, and there are 1"),
        ((*ask, "--labels", few), "every class has one image"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert re.match("80 images, [0-9]+ with a label[^\n]*\n$", result.stdout)
        assert said in result.stderr


# The split, the interval


def test_every_class_is_on_both_sides():
    named = np.array(["a"] * 50 + ["b"] * 10 + ["c"] * 2 + ["d"])
    tested = probe.split(named, 0.2, 0)
    for kind, count in (("a", 10), ("b", 2), ("c", 1), ("d", 0)):
        assert tested[named == kind].sum() == count
    assert probe.split(named, 0.99, 0)[named == "c"].sum() == 1
    np.testing.assert_array_equal(tested, probe.split(named, 0.2, 0))
    assert (tested != probe.split(named, 0.2, 1)).any()


def test_classes_of_one_image_are_told(output, features, truth, tmp_path):
    named = [*truth[:-1], "yak"]
    path = write_table(tmp_path / "l.csv", list(zip(features.ids, named, strict=True)))
    result = invoke("probe", output, "--label", "kind", "--labels", path)
    assert "\n1 classes have one image, which is trained on, not tested: yak\n" in result.stdout
    assert "4 classes" in result.stdout


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(right, total, low, high):
    assert probe.wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    mirrored = probe.wilson(total - right, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_training_that_did_not_end_is_told(output, table, monkeypatch, recwarn):
    monkeypatch.setattr(probe, "STEPS", 1)
    result = invoke("probe", output, "--label", "kind", "--labels", table)
    assert result.exit_code == 0
    assert "did not come to its end" in result.stderr
    assert not recwarn.list


# The picture


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_confusion_matrix_is_drawn(output, table, tmp_path, suffix):
    out = tmp_path / f"confusion.{suffix}"
    result = invoke("probe", output, "--label", "kind", "--labels", table, "--plot", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"{out}: 3 classes\n")
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    first = out.read_bytes()
    assert first.startswith(begins)
    invoke("probe", output, "--label", "kind", "--labels", table, "--plot", out)
    assert out.read_bytes() == first


def test_the_matrix_is_of_what_was_predicted():
    rng = np.random.default_rng(0)
    vectors = np.repeat(np.eye(3), 20, axis=0) + rng.standard_normal((60, 3)) * 0.01
    named = np.repeat(["a", "b", "c"], 20)
    named[45:] = "b"  # what looks like c is b, three times of four
    found = probe.probed(vectors, named.tolist(), held_out=0.4, seed=0)
    assert found.classes == ["a", "b", "c"]
    assert found.confusion.sum(axis=1).tolist() == [8, 14, 2]  # of the true classes
    assert found.confusion[2, 1] == 2
    assert found.right == found.confusion[0, 0] + found.confusion[1, 1] + found.confusion[2, 2]
    assert found.usual == 14


@pytest.mark.parametrize("count", [2, 21, 70])
def test_pictures_of_any_size(count, tmp_path):
    names = [f"$\\frac{{{at}}}$\u202e {'long ' * (at % 9)}" for at in range(count)]
    matrix = np.random.default_rng(0).integers(0, 50, (count, count))
    confusion.draw_confusion(tmp_path / "a.png", matrix, names, "$\\broken$\nsecond line")
    assert min(Image.open(tmp_path / "a.png").size) > 300


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_without_the_extra(output, table, tmp_path, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "matplotlib":
        monkeypatch.setattr("stellar_fast.viz.pictures.has_viz", lambda: False)
    plot = ("--plot", tmp_path / "a.png")
    result = invoke("probe", output, "--label", "kind", "--labels", table, *plot)
    assert result.exit_code == 1
    extra = "recipes" if module == "sklearn" else "viz"
    assert f"pip install 'stellar-fast[{extra}]'" in result.stderr
