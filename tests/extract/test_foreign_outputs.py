"""Output folders of a stranger: what they may not make this machine do."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from extracting import SUPPORT
from forged import PART, change_json, refused, sign

import stellar_fast
from stellar_fast.errors import StellarError


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
    from stellar_fast.extract.output.layout import Partition, Plan

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
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
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
