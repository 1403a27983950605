"""Extraction's output folder: partitions whole or not there, and when it may be gone on with."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from extracting import SMALL, Wrapped, contents, parts, touch
from scenes import write_photographs

from stellar_fast import StellarError
from stellar_fast.extract import make_job, run
from stellar_fast.extract.job import decided, make_plan, todo
from stellar_fast.extract.output.folder import Locks
from stellar_fast.extract.output.layout import check_sums, complete, read_plan
from stellar_fast.extract.work.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("one_decoding_process")


def interrupted(engine, output: Path) -> Wrapped:
    """An engine that is interrupted when the first partition is there."""

    def encode(batch, **arguments):
        if (output / "plan.json").exists() and len(batch) == 1:
            while not parts(output):
                time.sleep(0.01)
            raise KeyboardInterrupt
        return engine.encode(batch, **arguments)

    return Wrapped(engine, encode)


# Going on


def test_a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    photographs, tmp_path, engine, whole
):
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(make_job(photographs, output, **SMALL), interrupted(engine, output))
    assert [path.name for path in parts(output)] == ["part-00000"]
    assert sorted(os.listdir(output)) == [
        *(".lock", "inputs.parquet", "part-00000", "plan.json", "stats.json")
    ]
    assert json.loads((output / "stats.json").read_text())["outcome"] == "interrupted"
    kept = (output / "part-00000" / "sparse.npy").stat().st_mtime_ns
    summary = run(make_job(photographs, output, **SMALL), engine)
    assert (summary.partitions, summary.earlier_images) == (2, 3)
    assert contents(output) == whole
    assert (output / "part-00000" / "sparse.npy").stat().st_mtime_ns == kept
    before = contents(output), (output / "stats.json").read_bytes()
    assert run(make_job(photographs, output, **SMALL), engine).images == 0
    assert (contents(output), (output / "stats.json").read_bytes()) == before


def test_batch_and_partition_sizes_are_the_plans_where_none_are_given(
    photographs, tmp_path, engine, whole
):
    run(make_job(photographs, tmp_path / "out", **SMALL), engine)
    shutil.rmtree(tmp_path / "out" / "part-00001")
    assert run(make_job(photographs, tmp_path / "out"), engine).partitions == 1
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": ("cls",)}, r'features \(\["sparse", "cls"\] -> \["cls"\]\)'),
        ({"dtype": "float16"}, r'dtype \("float32" -> "float16"\)'),
        ({"preset": "eval"}, r'preset \("card" -> "eval"\)'),
        ({"format": "parquet"}, r'format \("npy" -> "parquet"\)'),
        ({"partition_size": 4}, r"partition_size \(3 -> 4\)"),
    ],
)
def test_a_changed_configuration_is_refused_by_name(
    photographs, tmp_path, engine, changed, message
):
    job = make_job(photographs, tmp_path / "out", **SMALL)
    plan = make_plan(job, decided(job, engine))
    with pytest.raises(ValueError, match=rf"{message}; choose another output, or --overwrite"):
        make_job(photographs, tmp_path / "out", **SMALL | changed)
    assert read_plan(tmp_path / "out") == plan


def test_another_engine_or_batch_is_refused_by_name(photographs, tmp_path, engine):
    run(make_job(photographs, tmp_path / "out", **SMALL), engine)
    other = Wrapped(engine, engine.encode)
    other.precision = "bf16"
    with pytest.raises(ValueError, match=r'precision \("fp32" -> "bf16"\)'):
        run(make_job(photographs, tmp_path / "out", **SMALL), other)
    for changes, told in (
        ({"name": "other", "num_sparse_tokens": 99}, r'changed: model \("golden" -> "other"\);'),
        ({"num_sparse_tokens": 99}, r"changed: model\.num_sparse_tokens \(\d+ -> 99\);"),
    ):
        other = Wrapped(engine, engine.encode)
        other.config = replace(engine.config, **changes)
        with pytest.raises(ValueError, match=told):
            run(make_job(photographs, tmp_path / "out", **SMALL), other)
    other = Wrapped(engine, engine.encode)
    other.weights_sha256 = "d9298a10d1b07358"
    with pytest.raises(ValueError, match=r'weights \("recipe" -> "sha256:d9298a10d1b07358"\)'):
        run(make_job(photographs, tmp_path / "out", **SMALL), other)
    with pytest.raises(ValueError, match=r"batch_size \(2 -> 5\)"):
        run(make_job(photographs, tmp_path / "out", **SMALL | {"batch_size": 5}), engine)


def test_a_changed_input_is_refused_and_resume_keeps_to_the_plan(tmp_path, engine, whole):
    photos, output = tmp_path / "photos", tmp_path / "out"
    write_photographs(photos, good=6, broken=2)
    job = make_job(photos, output, **SMALL)
    make_plan(job, decided(job, engine))
    touch(photos, "summer/zz.jpg")
    with pytest.raises(ValueError, match=r"8 images then, 9 now.*part-00002; --resume"):
        make_job(photos, output, **SMALL)
    os.rename(photos, tmp_path / "away")
    with pytest.raises(ValueError, match="no such folder"):
        make_job(photos, output, **SMALL)
    os.rename(tmp_path / "away", photos)
    run(make_job(photos, output, resume=True), engine)
    found = contents(output)
    for name in ("plan.json", "inputs.parquet"):  # these name the folder
        found.pop(name)
    assert {name for name in whole if "manifest" not in name} - set(found) == {
        *("plan.json", "inputs.parquet")
    }
    assert all(whole[name] == found[name] for name in found if "manifest" not in name)


def test_an_input_that_vanishes_while_it_is_read_is_rows_with_a_reason(tmp_path, engine):
    photos, output = tmp_path / "photos", tmp_path / "out"
    write_photographs(photos, good=6, broken=0)
    job = make_job(photos, output, **SMALL)
    os.rename(photos, tmp_path / "away")
    assert run(job, engine).failed == 6
    with pytest.raises(ValueError, match="no such folder"):
        make_job(photos, output, **SMALL)
    os.rename(tmp_path / "away", photos)
    assert run(make_job(photos, output, retry_failed=True, **SMALL), engine).all_failed == 0


# What is refused, and what is overwritten


def test_an_output_is_overwritten_only_when_asked(photographs, tmp_path, engine, whole):
    output = tmp_path / "out"
    run(make_job(photographs, output, features=("spatial",)), engine)
    before = contents(output)
    with pytest.raises(ValueError, match="features"):
        make_job(photographs, output)
    job = make_job(photographs, output, overwrite=True, **SMALL)
    assert contents(output) == before
    run(job, engine)
    assert contents(output) == whole
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("names", [("thesis.tex",), ("plan.json", "thesis.tex"), ("a.npy",)])
def test_overwrite_removes_nothing_that_is_not_an_output(photographs, tmp_path, names):
    touch(tmp_path / "out", *names)
    with pytest.raises(ValueError, match="no part of an extraction"):
        make_job(photographs, tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names)


def test_a_folder_of_something_else_is_refused(photographs, tmp_path):
    touch(tmp_path / "out", "thesis.tex")
    with pytest.raises(ValueError, match=r"not empty, and it holds thesis\.tex"):
        make_job(photographs, tmp_path / "out")


def test_an_empty_folder_is_taken_and_parents_are_made(photographs, tmp_path, engine):
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").mkdir()
    for output in (tmp_path / "empty", tmp_path / "new" / "deep"):
        run(make_job(photographs, output), engine)
        assert (output / "part-00000").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_in_the_way_is_an_error(photographs, tmp_path):
    touch(tmp_path, "out")
    with pytest.raises(ValueError, match="there is a file of this name"):
        make_job(photographs, tmp_path / "out")
    with pytest.raises(ValueError, match="not a folder"):
        make_job(photographs, tmp_path / "out" / "below")


def test_damage_to_what_is_complete_is_an_error(photographs, tmp_path, engine):
    output = tmp_path / "out"
    run(make_job(photographs, output, **SMALL), engine)
    plan = read_plan(output)
    assert list(complete(output, plan)) == [0, 1, 2]
    path = output / "part-00001" / "cls.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    check_sums(output, plan, 0)
    with pytest.raises(StellarError, match=r"part-00001/cls\.npy has changed.*remove"):
        check_sums(output, plan, 1)
    path.write_bytes(content[:-1])
    with pytest.raises(StellarError, match=r"cls\.npy has \d+ bytes, not \d+; remove"):
        run(make_job(photographs, output, **SMALL), engine)
    path.unlink()
    with pytest.raises(StellarError, match=r"cls\.npy is missing; remove"):
        run(make_job(photographs, output, **SMALL), engine)
    shutil.rmtree(output / "part-00001")
    shutil.copytree(output / "part-00000", output / "part-00001")
    with pytest.raises(StellarError, match="part-00001 was made by another plan"):
        run(make_job(photographs, output, **SMALL), engine)
    (output / "plan.json").write_text("{")
    with pytest.raises(StellarError, match=r"plan\.json: cannot be read"):
        make_job(photographs, output, **SMALL)


def test_a_partition_without_a_manifest_is_made_again(photographs, tmp_path, engine, whole):
    output = tmp_path / "out"
    run(make_job(photographs, output, **SMALL), engine)
    (output / "part-00001" / "manifest.json").unlink()
    assert run(make_job(photographs, output, **SMALL), engine).partitions == 1
    assert contents(output) == whole


# Two runs


def test_a_partition_that_another_run_makes_is_left_to_it(photographs, tmp_path, engine, whole):
    output = tmp_path / "out"
    job = make_job(photographs, output, **SMALL)
    others = []

    def encode(images, **arguments):
        if len(images) and not others:
            others.append(run(job, engine))
            with pytest.raises(StellarError, match="another run is writing it"):
                run(make_job(photographs, output, overwrite=True), engine)
        return engine.encode(images, **arguments)

    first = run(job, Wrapped(engine, encode))
    (other,) = others
    # The first has a partition in work, and perhaps others that wait behind it.
    assert 1 <= other.elsewhere == 3 - other.partitions
    assert f"partitions that other runs are still at: {other.elsewhere}" in str(other)
    assert (first.partitions, first.elsewhere) == (3 - other.partitions, 0)
    assert first.images + first.earlier_images == 8
    assert contents(output) == whole


def test_a_partition_that_was_made_meanwhile_is_not_made_again(
    photographs, tmp_path, engine, whole
):
    output = tmp_path / "out"
    job = make_job(photographs, output, **SMALL)
    plan = make_plan(job, decided(job, engine))
    wanted, _ = todo(job, plan)
    run(job, engine)
    with Pipeline(job, plan, engine) as pipeline:
        assert list(pipeline.run(wanted)) == []
    assert contents(output) == whole
    assert list(output.glob(".part-*")) == []


def test_other_processes_see_the_locks(tmp_path):
    import subprocess
    import sys

    held = (
        "import sys; from pathlib import Path\n"
        "from stellar_fast.extract.output.folder import Locks\n"
        "from stellar_fast.extract.output.layout import Partition\n"
        f"locks = Locks(Path({str(tmp_path)!r})); locks.take(Partition(1, 0, ''))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    from stellar_fast.extract.output.layout import Partition

    with (
        subprocess.Popen(
            [sys.executable, "-P", "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other,
        Locks(tmp_path) as locks,
    ):
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StellarError, match="another run is writing part-00001"):
            locks.take(Partition(1, 0, ""))
        with pytest.raises(StellarError, match="another run is writing it"):
            locks.check_free()
        locks.take(Partition(2, 0, ""))
        other.kill()
        other.wait()
        locks.take(Partition(1, 0, ""))
        for number in (1, 2):
            locks.release(Partition(number, 0, ""))
        locks.check_free()
