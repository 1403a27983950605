"""Outputs in a store: the files of a local output, whole or not there, whatever fails."""

import json
import os
import shutil
from pathlib import Path

import pytest
import shelf
from extracting import SMALL, SMALL_PARTS, contents, parts
from killing import Driver
from scenes import write_photographs

from stellar_fast import StellarError
from stellar_fast.extract import make_job, run
from stellar_fast.extract.features import open_features
from stellar_fast.extract.output.layout import MANIFEST, PLAN

ALLOW = {"allow_protocol": ["shelf"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, one_decoding_process):
    """A machine of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shelf.Shelf, "before", staticmethod(lambda name: None))
    monkeypatch.setattr(shelf.Shelf, "puts", [])
    return tmp_path / "cache"


@pytest.fixture
def there(tmp_path) -> Path:
    return tmp_path / "bucket" / "features"


def extract(source, there, engine, **options):
    job = make_job(source, f"shelf://{there}", **SMALL | options, **ALLOW)
    return job, run(job, engine)


def assert_no_half(there: Path, whole) -> None:
    """A partition that has a manifest is the whole of it."""
    for part in parts(there):
        if (part / MANIFEST).exists():
            for name, content in whole.items():
                if name.startswith(f"{part.name}/") and not name.endswith(MANIFEST):
                    assert (there / name).read_bytes() == content


def test_the_store_has_the_files_of_a_local_output(photographs, there, engine, whole):
    job, summary = extract(photographs, there, engine)
    assert contents(there) == whole
    assert (there / "stats.json").is_file()
    assert summary.images == len(open_features(there).index)
    for part in parts(job.output):
        assert sorted(path.name for path in part.iterdir()) == ["index.parquet", MANIFEST]
    assert job.output.stat().st_mode & 0o777 == 0o700
    # Of a partition, the manifest is put last; of all, the partitions behind the plan.
    names = [Path(name).relative_to(there).as_posix() for name in shelf.Shelf.puts]
    assert names[:2] == ["inputs.parquet", PLAN]
    for part in parts(there):
        (*_, last) = [name for name in names if name.startswith(part.name)]
        assert last == f"{part.name}/{MANIFEST}"


def test_a_finished_output_is_left_alone_and_another_configuration_refused(
    photographs, there, engine, cache
):
    extract(photographs, there, engine)
    for machine in ("this", "another"):
        if machine == "another":
            shutil.rmtree(cache)
        shelf.Shelf.puts.clear()
        _, summary = extract(photographs, there, engine)
        assert summary.images == 0 and summary.earlier_images == 8
        assert shelf.Shelf.puts == []
    with pytest.raises(ValueError, match="was begun with another configuration"):
        extract(photographs, there, engine, features=["cls"])


# Of the images; of the plan; of a partition's first file; of its manifest; of the next one's first.
@pytest.mark.parametrize("number", [1, 2, 3, 6, 7])
def test_a_put_that_fails_loses_nothing(
    number, photographs, there, engine, whole, cache, monkeypatch
):
    left = number

    def fail(name):
        nonlocal left
        left -= 1
        if not left:
            raise OSError("Reduce your request rate: https://user:secret@store/x?token=secret")

    monkeypatch.setattr(shelf.Shelf, "before", staticmethod(fail))
    with pytest.raises(StellarError, match="the same command goes on from there") as caught:
        extract(photographs, there, engine)
    assert "secret" not in str(caught.value)
    assert_no_half(there, whole)
    if number % 2:  # another machine goes on
        shutil.rmtree(cache)
    extract(photographs, there, engine)
    assert contents(there) == whole


@pytest.mark.slow
def test_killed_at_every_step_it_goes_on_to_the_same_files(tmp_path, cache, engine):
    write_photographs(tmp_path / "in", good=20, broken=2)
    run(make_job(tmp_path / "in", tmp_path / "whole", **SMALL_PARTS), engine)
    whole = contents(tmp_path / "whole")
    driver = Driver(tmp_path / "in", SMALL_PARTS | ALLOW)
    there = tmp_path / "bucket"
    try:
        for step in range(1, 40):
            if driver.extract(f"shelf://{there}", step=step) == 0:
                break
            assert_no_half(there, whole)
            if step % 3 == 0:
                shutil.rmtree(cache, ignore_errors=True)
        else:
            assert driver.extract(f"shelf://{there}") == 0
    finally:
        driver.close()
    assert contents(there) == whole


def test_killed_between_its_files_and_its_manifest_a_partition_is_made_again(
    photographs, there, engine, whole
):
    extract(photographs, there, engine)
    os.remove(there / "part-00001" / MANIFEST)
    (there / "part-00001" / "cls.npy").write_bytes(b"half")
    _, summary = extract(photographs, there, engine)
    assert summary.images == 3
    assert contents(there) == whole


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_partition_that_is_not_whole_there_is_made_again(
    damage, photographs, there, engine, whole
):
    extract(photographs, there, engine)
    file = there / "part-00000" / "sparse.npy"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    _, summary = extract(photographs, there, engine)
    assert summary.images == 3
    assert contents(there) == whole


def test_failed_images_are_retried(tmp_path, there, engine, cache):
    source = tmp_path / "in"
    write_photographs(source, good=6, broken=2)
    broken = [path for path in sorted(source.rglob("*")) if path.is_file()]
    local = tmp_path / "local"
    first = run(make_job(source, local, **SMALL), engine)
    extract(source, there, engine)
    assert first.all_failed
    good = next(path for path in broken if path.suffix == ".png" and path.stat().st_size > 500)
    failed = {line.id for line in open_features(local).failed}
    for name in failed:
        shutil.copyfile(good, source / name)
    shutil.rmtree(cache)
    _, summary = extract(source, there, engine, retry_failed=True)
    again = run(make_job(source, local, retry_failed=True, **SMALL), engine)
    assert summary.all_failed == again.all_failed < first.all_failed
    assert contents(there) == contents(local)
    open_features(there).verify()


def test_machines_make_shares_of_their_own(
    photographs, there, engine, whole, tmp_path, monkeypatch
):
    make = [make_job(photographs, f"shelf://{there}", partitions="1/2", **SMALL, **ALLOW)]
    run(make[0], engine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-cache"))
    extract(photographs, there, engine, partitions="2/2")
    assert contents(there) == whole


def test_overwriting_removes_what_was_there(photographs, there, engine, whole):
    extract(photographs, there, engine, features=["cls", "dense"])
    extract(photographs, there, engine, overwrite=True)
    assert contents(there) == whole


def test_a_folder_of_something_else_is_not_touched(photographs, there, engine):
    there.mkdir(parents=True)
    (there / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"it holds thesis\.tex, which is no part"):
            extract(photographs, there, engine, overwrite=overwrite)
    assert os.listdir(there) == ["thesis.tex"]


def test_what_the_store_no_longer_has_is_forgotten_here(photographs, there, engine, whole):
    extract(photographs, there, engine)
    shutil.rmtree(there)
    _, summary = extract(photographs, there, engine)
    assert summary.images == 8
    shutil.rmtree(there / "part-00002")
    _, summary = extract(photographs, there, engine)
    assert summary.images == 2
    assert contents(there) == whole


def test_no_name_in_a_store_leads_out_of_the_folder_here(
    photographs, there, engine, tmp_path, monkeypatch
):
    extract(photographs, there, engine)
    find = shelf.Shelf.find

    def lying(self, path, **arguments):
        found = find(self, path, **arguments)
        if arguments.get("detail"):
            name = f"{path}/engine/../../../../planted"
            found[name] = {"size": 5, "name": name, "type": "file"}
        return found

    monkeypatch.setattr(shelf.Shelf, "find", lying)
    brought = []
    monkeypatch.setattr(shelf.Shelf, "get_file", lambda self, name, *rest: brought.append(name))
    extract(photographs, there, engine)
    assert brought == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 99}, "'rows' is 99"),
        ({"digest": "0" * 64}, "is of another plan"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "files"),
    ],
)
def test_a_manifest_that_lies_is_an_error(change, message, photographs, there, engine, cache):
    extract(photographs, there, engine)
    path = there / "part-00000" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    shutil.rmtree(cache)
    with pytest.raises(StellarError, match=message):
        extract(photographs, there, engine)


def test_an_index_that_is_not_what_its_manifest_says_is_an_error(photographs, there, engine, cache):
    extract(photographs, there, engine)
    path = there / "part-00000" / "index.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    shutil.rmtree(cache)
    with pytest.raises(StellarError, match=r"part-00000/index\.parquet is not what its manifest"):
        extract(photographs, there, engine)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("https://host/features", "an output is a folder of this machine, or one in a store"),
        ("zip://features::/tmp/a.zip", "an output is a folder of this machine, or one in a store"),
        ("shelf:///x/*", r"has none of \* \? \[ \]"),
        ("ftp://host/features", "an output is a folder of this machine, or one in a store"),
    ],
)
def test_addresses_that_are_no_output(output, message, photographs):
    with pytest.raises(ValueError, match=message):
        make_job(photographs, output, **SMALL, **ALLOW)


def test_a_store_whose_package_is_missing_is_named(photographs, monkeypatch):
    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ValueError, match="s3://bucket/features: Install s3fs"):
        make_job(photographs, "s3://bucket/features", **SMALL)


def missing(*arguments):
    raise ImportError("Install s3fs to access S3")


def test_a_store_holds_no_input_of_its_own_output(there):
    with pytest.raises(ValueError, match="the output folder holds the input"):
        make_job(f"shelf://{there}/images", f"shelf://{there}", **SMALL, **ALLOW)


def test_ray_shares_no_store(photographs, there):
    from stellar_fast.extract import ray_runner

    job = make_job(photographs, f"shelf://{there}", **SMALL, **ALLOW)
    with pytest.raises(ValueError, match="which a store has not"):
        ray_runner.run(job, None, address="local")


def test_a_local_address_is_a_local_folder(photographs, tmp_path, engine, whole):
    job = make_job(photographs, f"file://{tmp_path}/out", **SMALL)
    run(job, engine)
    assert job.store is None and contents(tmp_path / "out") == whole
