"""Photographs, an engine, what an extraction of one by the other gives; made-up outputs."""

from pathlib import Path

import pytest
from engines import small_engine
from extracting import SMALL, contents
from forged import original
from loopback import LIMIT, serving
from outputs import FAILED, ROWS, made_up, write_output
from scenes import write_photographs

from stellar_fast.extract import make_job, run
from stellar_fast.extract.input import door
from stellar_fast.extract.output.formats import FORMATS


@pytest.fixture(scope="session")
def engine():
    return small_engine()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"), good=6, broken=2)


@pytest.fixture(scope="session")
def whole(photographs, engine, tmp_path_factory) -> dict[str, bytes]:
    """The contents of an output made in one go, with the options of SMALL."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(make_job(photographs, output, **SMALL), engine)
    return contents(output)


@pytest.fixture(scope="module", params=FORMATS)
def output(request, tmp_path_factory):
    """(folder, features as arrays, ids of all images), made without images."""
    folder = tmp_path_factory.mktemp("features") / request.param
    features = made_up(ROWS)
    ids = write_output(folder, features, failed=FAILED, format=request.param)
    return folder, features, ids


@pytest.fixture
def npy(tmp_path) -> Path:
    """What a stranger forges, as .npy files."""
    return original(tmp_path / "out", "npy")


@pytest.fixture
def packed(tmp_path) -> Path:
    """What a stranger forges, as Parquet."""
    return original(tmp_path / "packed", "parquet")


@pytest.fixture
def server(monkeypatch):
    """A web server, of whose files no more than LIMIT bytes are read."""
    monkeypatch.setattr(door, "MAX_BYTES", LIMIT)
    with serving({}) as found:
        yield found


@pytest.fixture
def one_decoding_process(monkeypatch):
    """Each takes a moment to start; what several change says so itself."""
    monkeypatch.setattr("stellar_fast.extract.job.cores", lambda: 1)


@pytest.fixture
def own_key(tmp_path_factory, monkeypatch):
    """Indexes of one test are another user's in the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
