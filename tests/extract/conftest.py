"""Photographs, an engine, and what an extraction of one by the other gives."""

from pathlib import Path

import pytest
from engines import small_engine
from extracting import SMALL, contents
from scenes import write_photographs

from stellar_fast.extract import make_job, run


@pytest.fixture(scope="session")
def engine():
    return small_engine()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root, good=6, broken=2)
    return root


@pytest.fixture(scope="session")
def whole(photographs, engine, tmp_path_factory) -> dict[str, bytes]:
    """The contents of an output made in one go, with the options of SMALL."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(make_job(photographs, output, **SMALL), engine)
    return contents(output)


@pytest.fixture
def one_decoding_process(monkeypatch):
    """Each takes a moment to start; what several change says so itself."""
    monkeypatch.setattr("stellar_fast.extract.job.cores", lambda: 1)
