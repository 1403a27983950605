"""The recipes, on features of drawn photographs by a small engine of random weights."""

import sys
from pathlib import Path

import numpy as np
import pytest
from engines import small_engine
from matplotlib.figure import Figure
from outputs import write_output
from PIL import Image

import stellar_fast
from stellar_fast import photos
from stellar_fast.errors import ImageError, MissingExtraError
from stellar_fast.extract import make_job, run
from stellar_fast.recipes import probe, search, segment
from stellar_fast.viz.plots import token_colours

pytest.importorskip("faiss", reason="the extra 'recipes' is not installed")
pytest.importorskip("sklearn", reason="the extra 'recipes' is not installed")

EACH = 6


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder for each scene, with photographs that differ by their seed; and a broken file."""
    root = tmp_path_factory.mktemp("photographs")
    for scene in photos.SCENES:
        (root / scene).mkdir()
        for seed in range(EACH):
            photos.draw(scene, 160, 120, seed).save(root / scene / f"{seed}.jpg", quality=92)
    (root / scene / "broken.jpg").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def features(photographs, engine, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "out"
    job = make_job(photographs, output, features=["sparse", "cls", "spatial"], partition_size=7)
    run(job, engine)
    return stellar_fast.open_features(output)


# Search


def test_every_image_finds_itself(photographs, features, engine):
    index = search.build_index(features)
    ids = features.ids[::5]
    found = search.search(index, features, engine, [photographs / id for id in ids], k=3)
    assert [hits[0].id for hits in found] == ids
    assert [hits[0].row for hits in found] == list(range(0, len(features), 5))
    for hits in found:
        assert hits[0].score == pytest.approx(1, abs=1e-5)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_hits_are_those_of_plain_cosines(photographs, features, engine):
    query = photos.draw(next(iter(photos.SCENES)), 160, 120, seed=99)
    (hits,) = search.search(search.build_index(features), features, engine, [query], k=10)
    vectors = features["cls"].to_numpy()[:, 0].astype(np.float64)
    wanted = engine.encode([query], outputs=("cls",))["cls"][0, 0].double().numpy()
    cosines = vectors @ wanted / np.linalg.norm(vectors, axis=1) / np.linalg.norm(wanted)
    best = np.argsort(-cosines)[:10]
    assert [hit.row for hit in hits] == best.tolist()
    assert [hit.id for hit in hits] == [features.ids[row] for row in best]
    np.testing.assert_allclose([hit.score for hit in hits], cosines[best], atol=1e-5)


def test_an_index_that_learns(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((900, 1, 16)).astype(np.float32)
    write_output(tmp_path / "out", {"cls": vectors}, size=200)
    features = stellar_fast.open_features(tmp_path / "out")
    monkeypatch.setattr(search, "TRAINED_ON", 500)
    index = search.build_index(features, factory="IVF8,Flat")
    assert index.ntotal == 900
    index.nprobe = 8  # all of its cells, and so exact
    _, rows = index.search(search.unit(vectors[:50]), 1)
    assert rows[:, 0].tolist() == list(range(50))


def test_fewer_rows_than_asked_for(photographs, features, engine):
    index = search.build_index(features)
    (hits,) = search.search(index, features, engine, [photographs / features.ids[0]], k=1000)
    assert sorted(hit.row for hit in hits) == list(range(len(features)))


def test_what_does_not_belong_together_is_refused(photographs, features, engine, tmp_path):
    index = search.build_index(features)
    engine_of_others = small_engine()
    engine_of_others.weights = "others"
    with pytest.raises(ValueError, match="made with another engine: weights"):
        search.search(index, features, engine_of_others, [photographs / features.ids[0]])
    index.add(np.zeros((1, 64), np.float32))
    rows = len(features)
    with pytest.raises(ValueError, match=f"the index has {rows + 1} vectors, the features {rows}"):
        search.search(index, features, engine, [photographs / features.ids[0]])
    write_output(tmp_path / "out", {"sparse": np.zeros((3, 4, 8), np.float32)})
    with pytest.raises(KeyError, match="no feature 'cls'"):
        search.build_index(stellar_fast.open_features(tmp_path / "out"))


def test_unit_vectors():
    vectors = search.unit(np.array([[[3.0, 4.0]], [[0.0, 0.0]]], np.float16))
    np.testing.assert_array_equal(vectors, np.array([[0.6, 0.8], [0, 0]], np.float32))


# Probes


def test_pooling_is_the_mean_over_tokens(features):
    expected = features["sparse"].to_numpy().mean(axis=1)
    np.testing.assert_allclose(probe.pooled(features), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(probe.pooled(features, "cls"), features["cls"][:][:, 0])


def test_scenes_are_told_apart(features):
    """Even random weights tell drawings of a sea from those of a wood, or nothing is wired up."""
    vectors, labels = probe.pooled(features), np.array(probe.folder_labels(features))
    assert set(labels) == set(photos.SCENES)
    held_out = np.arange(len(vectors)) % EACH == 0
    chance = 1 / len(photos.SCENES)
    linear = probe.linear_probe(vectors[~held_out], labels[~held_out])
    assert linear.score(vectors[held_out], labels[held_out]) > 3 * chance
    nearest = probe.nearest_neighbours(vectors[~held_out], labels[~held_out], k=3)
    assert nearest.score(vectors[held_out], labels[held_out]) > 3 * chance
    shuffled = np.random.default_rng(0).permutation(labels[~held_out])
    by_luck = probe.linear_probe(vectors[~held_out], shuffled)
    assert by_luck.score(vectors[held_out], labels[held_out]) < 3 * chance


def test_neighbours_vote_by_their_similarity():
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((60, 5)).astype(np.float32)
    labels = rng.choice(["a", "b", "c"], 60)
    queries = rng.standard_normal((30, 5)).astype(np.float32)
    expected = []
    for query in queries.astype(np.float64):
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
        cosines = vectors @ query / lengths
        best = np.argsort(-cosines)[: probe.NEIGHBOURS]
        votes = dict.fromkeys("abc", 0.0)
        for row in best:
            votes[labels[row]] += np.exp(cosines[row] / probe.TEMPERATURE)
        expected.append(max(votes, key=votes.__getitem__))
    found = probe.nearest_neighbours(vectors, labels).predict(queries)
    assert found.tolist() == expected
    unweighted = [
        max("abc", key=list(labels[np.argsort(-(vectors @ q))[: probe.NEIGHBOURS]]).count)
        for q in queries
    ]
    assert expected != unweighted, "the votes' weights decide nothing here"


def test_probe_arguments(features, tmp_path):
    vectors = probe.pooled(features)
    with pytest.raises(ValueError, match="rows and 2 labels"):
        probe.nearest_neighbours(vectors, ["a", "b"])
    with pytest.raises(ValueError, match="class"):
        probe.linear_probe(vectors[:3], ["a", "a", "a"])
    write_output(tmp_path / "out", {"cls": np.zeros((2, 1, 4), np.float32)})
    assert set(probe.folder_labels(stellar_fast.open_features(tmp_path / "out"))) == {"folder"}


def test_an_image_in_no_folder(photographs, engine, tmp_path):
    (tmp_path / "in").mkdir()
    photos.draw(next(iter(photos.SCENES)), 60, 60, 0).save(tmp_path / "in" / "alone.jpg")
    run(make_job(tmp_path / "in", tmp_path / "out"), engine)
    with pytest.raises(ValueError, match=r"alone\.jpg: is in no folder"):
        probe.folder_labels(stellar_fast.open_features(tmp_path / "out"))


# Segments


def peaked(tokens: np.ndarray, count: int) -> np.ndarray:
    """(P, K) for a grid of the strongest token at each patch."""
    maps = np.full((tokens.size, count), 0.1 / (count - 1), np.float32)
    maps[np.arange(tokens.size), tokens.ravel()] = 0.9
    return maps


def test_regions_follow_the_strongest_token():
    tokens = np.array([[0, 0, 3], [2, 3, 3]])
    found = segment.segments(peaked(tokens, 4), (2, 3), (30, 20))
    assert found.shape == (20, 30)
    np.testing.assert_array_equal(found[5::10, 5::10], tokens)  # the middle of every patch
    assert set(np.unique(found)) == {0, 2, 3}
    np.testing.assert_array_equal(segment.segments(peaked(tokens, 4), (2, 3), (3, 2)), tokens)


def test_wrong_grids_are_refused():
    for spatial, grid in ((np.zeros((6, 4)), (2, 2)), (np.zeros((1, 6, 4)), (2, 3))):
        with pytest.raises(ValueError, match=r"spatial must be \(2 x"):
            segment.segments(spatial, grid, (10, 10))


@pytest.mark.parametrize("preset", ["card", "eval"])
def test_the_picture(preset, tmp_path):
    photograph = Image.new("RGB", (90, 60), (128, 128, 128))
    tokens = np.repeat([[1, 2]], 2, axis=0)
    path = tmp_path / "segments.png"
    regions = segment.save_segments(path, photograph, peaked(tokens, 3), (2, 2), preset)
    picture = np.asarray(Image.open(path)).astype(float) / 255
    size = (90, 60) if preset == "card" else (52, 52)
    assert picture.shape == (size[1], size[0], 3)
    assert regions.shape == picture.shape[:2]
    colours = token_colours(3)
    for column, token in ((2, 1), (-3, 2)):
        expected = 0.45 * 128 / 255 + 0.55 * colours[token]
        np.testing.assert_allclose(picture[10, column], expected, atol=0.01)
    (border,) = np.flatnonzero(np.diff(regions[10]))
    assert picture[10, border + 1].sum() < 0.5 * picture[10, border].sum()


@pytest.mark.parametrize(
    ("suffix", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_a_legend_tells_the_tokens(suffix, begins, tmp_path, monkeypatch):
    labels, colours = [], []

    def legend(figure, *given, **named):
        for axis in figure.axes:
            handles, found = axis.get_legend_handles_labels()
            labels.extend(found)
            colours.extend(handle.get_facecolor()[0, :3] for handle in handles)
        return plain(figure, *given, **named)

    plain = Figure.legend
    monkeypatch.setattr(Figure, "legend", legend)
    tokens = np.array([[1, 1, 1], [1, 2, 2]])
    path = tmp_path / f"segments.{suffix}"
    photograph = Image.new("RGB", (90, 60), (128, 128, 128))
    regions = segment.save_segments(path, photograph, peaked(tokens, 4), (2, 3), title="$a.jpg")
    assert path.read_bytes().startswith(begins)
    share = [float((regions == token).mean()) for token in (1, 2)]
    assert labels == [f"1: {share[0]:.1%}", f"2: {share[1]:.1%}"]
    np.testing.assert_allclose(colours, token_colours(4)[1:3])
    with pytest.raises(ValueError, match=r"OUT\.png or OUT\.pdf"):
        segment.save_segments(tmp_path / "a.gif", photograph, peaked(tokens, 4), (2, 3), title="")


def test_of_extracted_features(photographs, features, tmp_path):
    grid = segment.grid_of(features.configuration)
    assert grid == (14, 14)
    path, row = tmp_path / "segments.png", 3
    image = photographs / features.ids[row]
    regions = segment.save_segments(path, image, features["spatial"][row], grid)
    assert regions.shape == (120, 160)
    assert regions.max() < 8
    with pytest.raises(ImageError, match=r"absent\.jpg: no such file"):
        segment.save_segments(path, tmp_path / "absent.jpg", features["spatial"][row], grid)


@pytest.mark.parametrize("module", ["faiss", "sklearn"])
def test_without_the_extra(module, features, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"stellar-fast\[recipes\]"):
        if module == "faiss":
            search.build_index(features)
        else:
            probe.linear_probe(np.eye(2), ["a", "b"])
