"""Search: what is found, and the index that is kept."""

import os

import numpy as np
import pytest
from commands import invoke, refused
from outputs import made_up, write_output

import stellar_fast
from stellar_fast import photos
from stellar_fast.extract import make_job, run
from stellar_fast.extract.input.door import NOTHING_MORE
from stellar_fast.recipes import kept, queries, search

faiss = pytest.importorskip("faiss", reason="the extra 'recipes' is not installed")

pytestmark = pytest.mark.usefixtures("own_key")
BYS = ("cls", "sparse", "token")


@pytest.fixture
def features(tmp_path):
    write_output(tmp_path / "out", made_up(60), size=7, failed=[3, 20])
    return stellar_fast.open_features(tmp_path / "out")


def cosines(features, by: str, query: np.ndarray) -> np.ndarray:
    """Of every row to one vector, in float64; of its best token."""
    block = features[search.BY[by]].to_numpy().astype(np.float64)
    if by == "sparse":
        block = block.mean(axis=1, keepdims=True)
    block /= np.linalg.norm(block, axis=2, keepdims=True)
    return (block @ (query / np.linalg.norm(query))).max(axis=1)


# What is found


@pytest.mark.parametrize("by", BYS)
def test_hits_are_those_of_plain_cosines(features, by):
    index = search.build_index(features, by=by)
    rng = np.random.default_rng(1)
    wanted = rng.standard_normal((3, 6)).astype(np.float32)
    found = search.nearest(index, features, search.unit(wanted), 9, by=by)
    for query, hits in zip(wanted.astype(np.float64), found, strict=True):
        expected = cosines(features, by, query)
        best = np.argsort(-expected)[:9]
        assert [hit.row for hit in hits] == best.tolist()
        assert [hit.id for hit in hits] == [features.ids[row] for row in best]
        # Vectors of 6 numbers: a mean, two lengths and a product of them are some 30 roundings.
        rounded = 30 * np.finfo(np.float32).eps
        np.testing.assert_allclose(
            [hit.score for hit in hits], expected[best], atol=rounded, rtol=0
        )


def test_the_token_that_matched_is_told(features):
    index = search.build_index(features, by="token")
    sparse = features["sparse"].to_numpy()
    wanted = search.unit(sparse[[5, 17], [2, 3]])
    found = search.nearest(index, features, wanted, 1, by="token")
    assert [(hits[0].row, hits[0].token) for hits in found] == [(5, 2), (17, 3)]


@pytest.mark.parametrize("by", BYS)
def test_every_row_once_and_never_the_query_itself(features, by):
    index = search.build_index(features, by=by)
    (query,) = queries.read_queries(features, ["12"], by, pytest.fail, NOTHING_MORE)
    for found in queries.ask(index, features, query, 1000, by=by):
        assert sorted(hit.row for hit in found.hits) == [row for row in range(60) if row != 12]


def test_an_image_whose_tokens_are_all_near_hides_no_other(tmp_path):
    sparse = made_up(20)["sparse"]
    sparse[5] = sparse[5, 0] + sparse[6] * 1e-3
    write_output(tmp_path / "out", {"sparse": sparse})
    features = stellar_fast.open_features(tmp_path / "out")
    index = search.build_index(features, by="token")
    (hits,) = search.nearest(index, features, search.unit(sparse[5, :1]), 3, by="token")
    assert len({hit.row for hit in hits}) == 3
    assert hits[0].row == 5


def test_what_is_nearest_to_a_hit(features):
    index = search.build_index(features, by="token")
    (query,) = queries.read_queries(features, ["0"], "token", pytest.fail, NOTHING_MORE)
    (found,) = queries.ask(index, features, query, 3, by="token", token=1, near=2)
    for hit, near in zip(found.hits, found.near, strict=True):
        expected = cosines(features, "token", features["sparse"][hit.row][hit.token])
        expected[hit.row] = -2
        assert [other.row for other in near] == np.argsort(-expected)[:2].tolist()


# The index that is kept


def opened(features, *arguments, **named) -> tuple[object, str]:
    lines: list[str] = []
    index = kept.open_index(features, *arguments, **named, say=lines.append)
    (line,) = lines
    return index, line


@pytest.mark.parametrize("by", BYS)
def test_an_index_is_reused(features, by, monkeypatch):
    built, line = opened(features, by)
    path = features.folder / f"search-{by}.faiss"
    assert line == f"index: built, since there was none; kept in {path}"
    monkeypatch.setattr(kept, "build_index", None)
    again, line = opened(features, by)
    assert line == f"index: {path}"
    query = search.vectors(features[search.BY[by]][:1], by)
    for first, second in zip(built.search(query, 20), again.search(query, 20), strict=True):
        np.testing.assert_array_equal(first, second)


def test_an_index_of_other_features_is_replaced(features, tmp_path):
    opened(features)
    write_output(tmp_path / "other", made_up(60, seed=1), size=7, failed=[3, 20])
    os.rename(features.folder / "search-cls.faiss", tmp_path / "other" / "search-cls.faiss")
    other = stellar_fast.open_features(tmp_path / "other")
    index, line = opened(other)
    assert "since the one there is of other features" in line
    query = search.vectors(other["cls"][11:12], "cls")
    assert search.nearest(index, other, query, 1)[0][0].row == 11
    assert opened(other)[1] == f"index: {other.folder}/search-cls.faiss"


def test_a_row_that_came_later_is_found(engine, tmp_path):
    """An image that could not be read is tried again: the same folder, with one row more."""
    for seed in range(3):
        photos.draw("sea", 60, 60, seed).save(tmp_path / f"{seed}.jpg")
    good = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(b"broken")
    run(make_job(tmp_path, tmp_path / "out"), engine)
    before = stellar_fast.open_features(tmp_path / "out")
    assert opened(before)[0].ntotal == 2
    (tmp_path / "1.jpg").write_bytes(good)
    run(make_job(tmp_path, tmp_path / "out", retry_failed=True), engine)
    after = stellar_fast.open_features(tmp_path / "out")
    index, line = opened(after)
    assert index.ntotal == 3
    assert "of other features" in line


def test_another_kind_is_built_anew(features):
    opened(features)
    index, line = opened(features, factory="IVF4,Flat")
    assert "of another kind" in line
    assert index.nprobe == 1
    assert opened(features, factory="IVF4,Flat")[1].startswith("index: /")
    path = features.folder / "here.faiss"
    opened(features, "cls", path=path)
    assert "of other vectors" in opened(features, "token", path=path)[1]
    with pytest.raises(ValueError, match="faiss makes no index 'Flatt'"):
        opened(features, factory="Flatt")


@pytest.mark.parametrize("factory", ["IVF61,Flat", "PQ4"])
def test_a_kind_that_does_not_fit_is_refused(features, factory):
    """61 cells of 60 vectors; 6 numbers in 4 equal parts."""
    with pytest.raises(ValueError, match=f"faiss makes no index '{factory}' of these vectors: "):
        opened(features, factory=factory)
    assert not (features.folder / "search-cls.faiss").exists()


def test_features_without_rows(tmp_path):
    write_output(tmp_path / "out", made_up(0), failed=[0, 1])
    empty = stellar_fast.open_features(tmp_path / "out")
    for by in BYS:
        index, _ = opened(empty, by)
        query = search.unit(np.ones((2, 6), np.float32))
        assert search.nearest(index, empty, query, by=by) == [[], []]
    refused(invoke("search", tmp_path / "out", "0"), "there are 0 rows")


def test_cells_are_looked_into(features):
    index, _ = opened(features, factory="IVF40,Flat")
    assert index.nprobe == 2


@pytest.mark.parametrize("damage", ["key", "byte", "shorter", "longer", "code"])
def test_faiss_reads_only_what_this_user_wrote(features, damage, tmp_path, monkeypatch):
    """Reading a foreign index can overrun memory: it is not even opened by faiss."""
    opened(features)
    path = features.folder / "search-cls.faiss"
    content = path.read_bytes()
    if damage == "key":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    elif damage == "byte":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "shorter":
        path.write_bytes(content[200:])
    elif damage == "longer":
        path.write_bytes(b"x" + content)
    else:
        code = len(content) - len(kept.MARK) - 1
        path.write_bytes(content[:code] + bytes([content[code] ^ 1]) + content[code + 1 :])
    with monkeypatch.context() as patched:
        patched.setattr(faiss, "read_index", pytest.fail)
        index, line = opened(features)
    assert "since the one there was not built by this user, or is damaged; kept in" in line
    assert index.ntotal == 60
    assert opened(features)[1] == f"index: {path}"


@pytest.mark.parametrize("what", ["text", "short", "link", "folder"])
def test_another_file_in_its_place(features, what, tmp_path):
    """In the features' folder it is replaced; where the user named it, it is left alone."""
    path = features.folder / "search-cls.faiss"
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious " * 100)
    named = tmp_path / "named"
    for place in (path, named):
        if what == "text":
            place.write_bytes(precious.read_bytes())
        elif what == "short":
            place.write_bytes(b"x")
        elif what == "link":
            place.symlink_to(precious)
        else:
            place.mkdir()
    before = named.read_bytes() if what != "folder" else None
    with pytest.raises(ValueError, match="which is no search index; keep the index under another"):
        opened(features, path=named)
    assert named.is_dir() if before is None else named.read_bytes() == before
    index, line = opened(features)
    assert index.ntotal == 60
    assert ("not kept" if what == "folder" else "kept in") in line
    assert precious.read_bytes() == b"precious " * 100


def test_without_a_place_for_the_key_nothing_is_kept(features, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    index, line = opened(features)
    assert index.ntotal == 60
    assert "not kept: " in line
    assert "cannot be written" in line
    assert not list(features.folder.glob("*search*"))
    with pytest.raises(stellar_fast.StellarError, match="cannot be written"):
        opened(features, path=tmp_path / "named")


def test_a_key_that_others_may_read_is_none(features, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opened(features)
    key = tmp_path / "stellar-fast" / "index.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in key.parent.iterdir()] == ["index.key"]
    key.chmod(0o644)
    assert "is no key of this user's alone; remove it" in opened(features)[1]


def test_overwriting_removes_the_index(photographs, engine, tmp_path):
    run(make_job(photographs, tmp_path / "out"), engine)
    opened(stellar_fast.open_features(tmp_path / "out"))
    run(make_job(photographs, tmp_path / "out", overwrite=True), engine)
    assert not (tmp_path / "out" / "search-cls.faiss").exists()
