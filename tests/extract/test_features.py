"""`stellar_fast.open_features`: what is read of an output folder, and what is never loaded."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from outputs import FAILED, ROWS, made_up, write_output

import stellar_fast
from stellar_fast.errors import StellarError
from stellar_fast.extract.features import Failed
from stellar_fast.extract.output import opened
from stellar_fast.extract.output.formats import FORMATS


def test_a_view_of_all_partitions(output):
    folder, expected, ids = output
    features = stellar_fast.open_features(folder)
    good = [id for place, id in enumerate(ids) if place not in FAILED]
    assert (len(features), features.images, features.missing) == (ROWS, len(ids), [])
    assert list(features) == ["sparse", "cls"]
    assert features.ids == good
    assert features.failed == [Failed(ids[place], "was made to fail") for place in FAILED]
    assert features.ids_of([-1, 0, 7, 7]) == [good[-1], good[0], good[7], good[7]]
    for name, array in expected.items():
        feature = features[name]
        assert name in features
        assert (feature.shape, feature.dtype, len(feature)) == (array.shape, array.dtype, ROWS)
        assert feature.nbytes == array.nbytes
        np.testing.assert_array_equal(feature.to_numpy(), array)
        np.testing.assert_array_equal(np.asarray(feature, dtype="float64"), array)
    feature.to_numpy()[:] = 0  # the caller's own


def test_the_index_has_every_image_and_rows_of_the_whole(output):
    folder, _, ids = output
    table = stellar_fast.open_features(folder).index.to_pydict()
    assert table["id"] == ids
    rows = iter(range(ROWS))
    assert table["row"] == [None if at in FAILED else next(rows) for at in range(len(ids))]
    assert {name for name, at in zip(table["status"], range(99), strict=False) if at in FAILED} == {
        "failed"
    }
    assert table["width"][1] == 640


CHOICES = {
    "first": 0,
    "last": -1,
    "NumPy's integer": np.int32(7),
    "all": slice(None),
    "within one": slice(4, 6),
    "across": slice(2, 19),
    "to the end": slice(-3, None),
    "empty": slice(5, 5),
    "backwards": slice(20, 3, -3),
    "sequence": [3, 22, 0, 3, -1],
    "array": np.array([9, 8, 7], np.uint16),
    "nothing": [],
    "mask": np.arange(ROWS) % 3 == 0,
    "tensor": torch.tensor([1, 12]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_chosen_as_in_numpy(output, name):
    folder, expected, _ = output
    rows = CHOICES[name]
    found = stellar_fast.open_features(folder)["sparse"][rows]
    assert type(found) is np.ndarray
    wanted = expected["sparse"][np.asarray(rows, int) if name == "nothing" else rows]
    np.testing.assert_array_equal(found, wanted, strict=True)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (ROWS, "row 23 is out of range: there are 23 rows"),
        (-ROWS - 1, "row -24 is out of range"),
        ([0, 99], "row 99 is out of range"),
        (1.0, "float64"),
        ("sparse", "integer, a slice"),
        ([[1]], r"shape \(1, 1\)"),
        ([1, 2, 3.5], "float64"),
        ((1, 2), "one index chooses rows"),
        (np.ones(4, bool), "23 booleans"),
        (True, "23 booleans"),
        (None, "object"),
    ],
)
def test_what_chooses_no_rows_is_an_index_error(output, rows, what):
    with pytest.raises(IndexError, match=what):
        _ = stellar_fast.open_features(output[0])["cls"][rows]


def test_iteration_and_blocks(output):
    folder, expected, _ = output
    feature = stellar_fast.open_features(folder)["cls"]
    np.testing.assert_array_equal(np.stack(list(feature)), expected["cls"])
    blocks = list(feature.blocks(3))
    assert max(map(len, blocks)) == 3
    np.testing.assert_array_equal(np.concatenate(blocks), expected["cls"])
    with pytest.raises(ValueError, match="at least 1 row"):
        next(feature.blocks(0))
    with pytest.raises(ValueError, match="always a copy"):
        np.array(feature, copy=False)


def test_unknown_names_are_told(output):
    features = stellar_fast.open_features(output[0])
    with pytest.raises(KeyError, match="no feature 'dense'; here are: sparse, cls"):
        _ = features["dense"]
    with pytest.raises(KeyError, match="dense"):
        features.dataset(["cls", "dense"])
    assert "dense" not in features
    assert "23 rows of sparse float32 [4, 6]" in repr(features)
    assert repr(features["cls"]) == "<Feature cls: float32 (23, 1, 6)>"


def test_npy_rows_are_views_of_the_file_and_read_only(tmp_path):
    write_output(tmp_path / "out", made_up(10))
    feature = stellar_fast.open_features(tmp_path / "out")["sparse"]
    for view in (feature[3], feature[1:4]):
        assert not view.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            view[:] = 0
    assert feature[[1, 2]].flags.owndata


PROBE = """
import resource, sys, stellar_fast
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
features = stellar_fast.open_features(sys.argv[1])
rows = [0, len(features) // 2, -1]
features["cls"][rows], features["sparse"][1]  # imports, and Arrow's own pools
start = peak()
features["sparse"][rows]
print(peak() - start, round(features["sparse"].nbytes / 2**20), "torch" in sys.modules)
"""


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_loaded_but_the_rows(format, tmp_path):
    sparse = np.broadcast_to(np.float32(1.5), (480, 64, 1024))
    write_output(
        tmp_path / "out",
        {"sparse": sparse, "cls": sparse[:, :1, :4]},
        size=240,
        format=format,
        batch=16,
    )
    command = [sys.executable, "-c", PROBE, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, size, torch_imported = done.stdout.split()
    assert int(size) == 120
    assert int(grown) < 40
    assert torch_imported == "False"


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    features = made_up(60)
    write_output(tmp_path / "out", features, size=1)
    found = stellar_fast.open_features(tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(opened, "OPEN", 8)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 30, hard))
    try:
        for _ in range(2):
            for name, array in features.items():
                np.testing.assert_array_equal(found[name][np.arange(60)[::-1]], array[::-1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_half_precision(tmp_path):
    for format in FORMATS:
        features = made_up(7, "float16")
        write_output(tmp_path / format, features, format=format)
        found = stellar_fast.open_features(tmp_path / format)["sparse"]
        np.testing.assert_array_equal(found[1:6], features["sparse"][1:6], strict=True)


# Incomplete and damaged folders


def test_missing_partitions_are_named(tmp_path):
    features = made_up(40)
    write_output(tmp_path / "out", features, leave_out=[1, 2, 3, 4, 6, 7])
    with pytest.raises(StellarError) as caught:
        stellar_fast.open_features(tmp_path / "out")
    message = str(caught.value)
    assert "6 of 8 partitions are missing" in message
    assert "part-00001, part-00002, part-00003, part-00004, part-00006 and 1 more" in message
    assert "allow_incomplete=True" in message
    found = stellar_fast.open_features(tmp_path / "out", allow_incomplete=True)
    assert len(found) == 10
    assert found.missing == [f"part-{at:05d}" for at in (1, 2, 3, 4, 6, 7)]
    assert "6 partitions missing" in repr(found)
    expected = np.concatenate([features["sparse"][:5], features["sparse"][25:30]])
    np.testing.assert_array_equal(found["sparse"].to_numpy(), expected)
    assert found.ids == [f"folder/{at:04d}.jpg" for at in (*range(5), *range(25, 30))]


def test_before_the_first_partition(tmp_path):
    write_output(tmp_path / "out", made_up(4), leave_out=[0])
    found = stellar_fast.open_features(tmp_path / "out", allow_incomplete=True)
    assert len(found) == 0
    assert found.missing == ["part-00000"]
    repr(found)
    for read in (lambda: found["cls"].shape, lambda: found.ids, lambda: found["cls"].to_numpy()):
        with pytest.raises(StellarError, match="no partition is complete yet"):
            read()


@pytest.mark.parametrize("format", FORMATS)
def test_only_failed_images(format, tmp_path):
    write_output(tmp_path / "out", made_up(0), failed=range(7), format=format)
    found = stellar_fast.open_features(tmp_path / "out")
    assert found["sparse"].to_numpy().shape == (0, 4, 6)
    assert (found.ids, len(found.failed), list(found["cls"].blocks())) == ([], 7, [])
    assert found["sparse"][:].shape == (0, 4, 6)
    found.verify()


def test_folders_that_are_no_output(tmp_path):
    with pytest.raises(StellarError, match="no such folder"):
        stellar_fast.open_features(tmp_path / "absent")
    with pytest.raises(StellarError, match=r"plan\.json"):
        stellar_fast.open_features(tmp_path)


def test_checksums(output, tmp_path):
    stellar_fast.open_features(output[0]).verify()
    for format, name in (("npy", "cls.npy"), ("parquet", "features.parquet")):
        folder = tmp_path / format
        write_output(folder, made_up(ROWS), format=format)
        for part in ("part-00001", "part-00003"):
            path = folder / part / name
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        found = stellar_fast.open_features(folder)
        with pytest.raises(StellarError) as caught:
            found.verify()
        assert "2 of 5 partitions are damaged: part-00001, part-00003" in str(caught.value)
        assert name in str(caught.value)


def test_a_file_of_another_size_is_told_at_once(tmp_path):
    write_output(tmp_path / "out", made_up(ROWS))
    path = tmp_path / "out" / "part-00002" / "sparse.npy"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StellarError, match=r"part-00002/sparse\.npy has \d+ bytes"):
        stellar_fast.open_features(tmp_path / "out")


def test_a_file_that_is_not_what_the_manifest_says(tmp_path):
    """Of the right size, so that only reading it shows."""
    for format, name in (("npy", "sparse.npy"), ("parquet", "features.parquet")):
        write_output(tmp_path / format, made_up(ROWS), format=format)
        path = tmp_path / format / "part-00001" / name
        path.write_bytes(bytes(path.stat().st_size))
        found = stellar_fast.open_features(tmp_path / format)
        with pytest.raises(StellarError, match=f"{name}: cannot be read"):
            _ = found["sparse"][:]
    folder = tmp_path / "npy" / "part-00000"
    np.save(folder / "sparse.npy", np.zeros((5, 6, 4), np.float32))
    with pytest.raises(StellarError, match=r"holds float32 \[5, 6, 4\]"):
        _ = stellar_fast.open_features(tmp_path / "npy")["sparse"][0]
    (folder / "index.parquet").write_bytes(bytes((folder / "index.parquet").stat().st_size))
    with pytest.raises(StellarError, match=r"index\.parquet: cannot be read"):
        _ = stellar_fast.open_features(tmp_path / "npy").ids


def test_it_is_at_hand_and_imports_no_torch():
    probe = (
        "import sys, stellar_fast; 'pyarrow' in sys.modules and sys.exit(1);"
        "stellar_fast.open_features; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert "open_features" in dir(stellar_fast)


def test_configuration_is_that_of_the_plan(output):
    folder, _, _ = output
    plan = json.loads((folder / "plan.json").read_text())
    assert stellar_fast.open_features(folder).configuration == plan["configuration"]
