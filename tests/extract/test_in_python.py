"""Extraction by one call: from scripts, guarded or not, from pipes and notebooks; and its Parquet
as other libraries read it."""

import subprocess
import sys

import numpy as np
import pytest
from commands import invoke, small, write_models
from extracting import contents
from outputs import write_output
from pictures import png

import stellar_fast
from stellar_fast.extract import make_job, run

OPTIONS = {"partition_size": 4, "batch_size": 2, "workers": 1}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("repo"))


@pytest.fixture
def images(tmp_path):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    for number in range(5):
        (tmp_path / "in" / "cat" / f"{number}.png").write_bytes(png(number))
    (tmp_path / "in" / "broken.png").write_bytes(b"broken")
    return tmp_path / "in"


def test_it_does_what_the_command_does(images, repo, tmp_path):
    told = {"repo": str(repo), "precision": "fp32", "devices": "cpu"}
    features = stellar_fast.extract_features(
        images, tmp_path / "call", "small", keep=["folder"], **told, **OPTIONS
    )
    flags = ["--keep", "folder", "--partition-size", "4", "--batch-size", "2", "--workers", "1"]
    result = invoke("extract", images, tmp_path / "command", *small(repo), *flags)
    assert result.exit_code == 3, result.output
    assert contents(tmp_path / "call") == contents(tmp_path / "command")
    assert len(features) == 5
    assert features.columns["folder"].tolist() == ["cat"] * 5
    assert [one.id for one in features.failed] == ["broken.png"]
    assert features.row("cat/4.png") == 4
    # Again, and there is nothing to do.
    before = (tmp_path / "call" / "part-00000" / "manifest.json").stat().st_mtime_ns
    again = stellar_fast.extract_features(
        str(images), str(tmp_path / "call"), "small", keep=["folder"], **told, **OPTIONS
    )
    assert again.ids == features.ids
    assert (tmp_path / "call" / "part-00000" / "manifest.json").stat().st_mtime_ns == before


def test_an_engine_may_be_given(images, engine, tmp_path):
    features = stellar_fast.extract_features(images, tmp_path / "call", engine, **OPTIONS)
    run(make_job(images, tmp_path / "run", **OPTIONS), engine)
    assert contents(tmp_path / "call") == contents(tmp_path / "run")
    share = stellar_fast.extract_features(
        images, tmp_path / "share", engine, partitions="1/2", **OPTIONS
    )
    assert share.missing == ["part-00001"] and len(features) == 5
    with pytest.raises(ValueError, match="an engine has its weights"):
        stellar_fast.extract_features(images, tmp_path / "x", engine, precision="fp32")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"featuers": ["cls"]}, TypeError, "featuers"),
        ({"dummy_writer": True}, ValueError, "leaves no features"),
        ({"weights": "none"}, ValueError, "none"),
        ({"devices": "toaster"}, ValueError, "toaster"),
        ({"format": "hdf5"}, ValueError, "unknown format 'hdf5'"),
    ],
)
def test_wrong_arguments_are_one_error(images, tmp_path, repo, options, error, message):
    told = {"repo": str(repo), **options}
    with pytest.raises(error, match=message):
        stellar_fast.extract_features(images, tmp_path / "out", "small", **told)
    assert not (tmp_path / "out").exists()


# Where it is called from

CALL = """
import stellar_fast
features = stellar_fast.extract_features(
    {images!r}, {output!r}, "small", repo={repo!r}, precision="fp32", devices={devices!r},
    partition_size=4, batch_size=2, workers=1,
)
print("rows", len(features))
"""
# As a notebook runs its cells: in a module that is no file.
NOTEBOOK = """
import sys, types
cell = {call!r}
main = types.ModuleType("__main__")
sys.modules["__main__"] = main
del main.__dict__["__spec__"]
main.__spec__ = None
exec(compile(cell, "<ipython-input-1>", "exec"), main.__dict__)
"""


@pytest.mark.parametrize(
    ("where", "devices"),
    [("script", "cpu,cpu"), ("pipe", "cpu"), ("argument", "cpu"), ("notebook", "cpu")],
)
def test_no_guard_is_needed(where, devices, images, repo, tmp_path):
    call = CALL.format(
        images=str(images), output=str(tmp_path / "out"), repo=str(repo), devices=devices
    )
    command, given = [sys.executable, "-P"], None
    if where == "script":
        (tmp_path / "script.py").write_text(call)
        command.append(str(tmp_path / "script.py"))
    elif where == "pipe":
        command, given = [*command, "-"], call
    else:
        command += ["-c", call if where == "argument" else NOTEBOOK.format(call=call)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "rows 5\n", done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_script_defines_is_imported_where_a_process_needs_it(images, repo, tmp_path):
    """`run_devices` takes any function that loads an engine."""
    guard = 'if __name__ == "__main__":'
    script = f"""
import stellar_fast
from stellar_fast.extract import make_job, run_devices

def load(device):
    return stellar_fast.load("small", repo={str(repo)!r}, device=device, precision="fp32")

{guard}
    job = make_job({str(images)!r}, {str(tmp_path / "out")!r}, partition_size=4, workers=1)
    print(run_devices(job, load, ["cpu"]).rows)
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-P", str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "5\n", done.stderr
    (tmp_path / "script.py").write_text(script.replace(guard, "if True:"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    advice = "the script must extract under `if __name__ == '__main__':`"
    assert done.stderr.rstrip().endswith(advice)


# Parquet, elsewhere


@pytest.fixture(params=["float32", "float16"])
def vectors(request, tmp_path):
    rng = np.random.default_rng(0)
    made = {
        "sparse": rng.standard_normal((7, 4, 6)).astype(request.param),
        "cls": rng.standard_normal((7, 1, 6)).astype(request.param),
    }
    write_output(tmp_path / "out", made, size=7, format="parquet", batch=3)
    return tmp_path / "out" / "part-00000" / "features.parquet", made


def test_pandas_reads_vectors(vectors):
    import pandas

    path, made = vectors
    frame = pandas.read_parquet(path)
    for name, rows in made.items():
        np.testing.assert_array_equal(np.stack(frame[name]), rows.reshape(7, -1))


def test_datasets_reads_vectors(vectors, tmp_path, monkeypatch):
    import datasets

    path, made = vectors
    found = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert found.features["sparse"].length == 24
    for name, rows in made.items():
        column = np.array(found.with_format("numpy")[:][name])
        np.testing.assert_array_equal(column, rows.reshape(7, -1))


def test_polars_reads_vectors(vectors):
    import polars

    path, made = vectors
    frame = polars.read_parquet(path)
    for name, rows in made.items():
        assert frame.schema[name].shape == (rows[0].size,)
        np.testing.assert_array_equal(frame[name].to_numpy(), rows.reshape(7, -1))


def test_duckdb_reads_vectors(vectors):
    import duckdb

    path, made = vectors
    (first,), *_ = duckdb.sql(f"select cls from '{path}' order by id").fetchall()
    np.testing.assert_array_equal(np.array(first, made["cls"].dtype), made["cls"][0, 0])


def test_the_shape_is_in_the_schema(vectors):
    import json

    from pyarrow import parquet

    path, made = vectors
    schema = parquet.read_schema(path)
    facts = json.loads(schema.metadata[b"stellar_fast"])
    assert {name: tuple(one["shape"]) for name, one in facts.items()} == {
        "sparse": (4, 6),
        "cls": (1, 6),
    }
    kind = "float" if made["cls"].dtype == np.float32 else "halffloat"
    assert str(schema.field("sparse").type) == f"fixed_size_list<element: {kind} not null>[24]"
