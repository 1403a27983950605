"""SIGKILL at the moments that matter: no output that looks finished and is not, and a rerun that
works."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engines import small_engine
from scenes import write_photographs

from stellar_fast.extract import plan, run

TESTS = Path(__file__).parent
UNFINISHED = ("staged", "encoded", "indexed")
FILES = ["cls.npy", "index.parquet", "sparse.npy"]


@pytest.fixture(scope="module")
def engine():
    return small_engine()


def features(output: Path) -> dict[str, bytes]:
    """The files that do not hold times."""
    return {name: (output / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root, good=10, broken=2)
    return root


@pytest.fixture(scope="module")
def expected(photographs, engine, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "out"
    run(plan(photographs, output, batch_size=3), engine)
    return features(output)


@pytest.fixture(scope="module")
def killed(photographs, engine, tmp_path_factory) -> dict[tuple[str, bool], Path]:
    """(moment, whether there was an earlier output) -> the output of a run killed there."""
    outputs = {}
    processes = {}
    for moment, earlier in [(m, False) for m in UNFINISHED] + [
        ("indexed", True),
        ("published", True),
    ]:
        output = tmp_path_factory.mktemp(moment) / "out"
        if earlier:
            run(plan(photographs, output, features=("spatial",)), engine)
        outputs[moment, earlier] = output
        processes[moment, earlier] = subprocess.Popen(
            [sys.executable, "-P", str(TESTS / "extract_driver.py"), photographs, output, moment],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "golden")])},
            stdout=subprocess.PIPE,
            text=True,
        )
    for (moment, _), process in processes.items():
        with process:
            reached = process.stdout.readline().strip()
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)
        assert reached == moment
        assert process.returncode == -signal.SIGKILL
    return outputs


@pytest.mark.parametrize("moment", UNFINISHED)
def test_a_killed_run_leaves_no_output_and_a_rerun_works(
    killed, photographs, engine, expected, moment
):
    output = killed[moment, False]
    assert not output.exists()
    (leftover,) = os.listdir(output.parent)
    assert leftover.startswith(".out.partial-")
    run(plan(photographs, output, batch_size=3), engine)
    assert features(output) == expected
    assert os.listdir(output.parent) == ["out"]


def test_a_killed_overwrite_leaves_the_earlier_output(killed, photographs, engine, expected):
    output = killed["indexed", True]
    assert sorted(os.listdir(output)) == ["index.parquet", "run.json", "spatial.npy"]
    run(plan(photographs, output, batch_size=3, overwrite=True), engine)
    assert features(output) == expected
    assert os.listdir(output.parent) == ["out"]


def test_killed_after_the_exchange_the_new_output_is_whole(killed, photographs, engine, expected):
    output = killed["published", True]
    assert features(output) == expected
    run(plan(photographs, output, batch_size=3, overwrite=True), engine)
    assert os.listdir(output.parent) == ["out"]
