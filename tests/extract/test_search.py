"""`stellar-fast search`: what is found, the index that is kept, and queries of every kind."""

import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from commands import invoke, refused, small, write_models
from extracting import deadly_pictures
from outputs import write_output
from parquets import cells, write
from PIL import Image

import stellar_fast
from stellar_fast import photos
from stellar_fast.extract import make_job, run
from stellar_fast.extract.input.door import NOTHING_MORE
from stellar_fast.extract.originals import Original, originals_of, pictures_of
from stellar_fast.extract.records import Item
from stellar_fast.extract.work.sandbox import Limits
from stellar_fast.recipes import kept, queries, search
from stellar_fast.viz import sheet

faiss = pytest.importorskip("faiss", reason="the extra 'recipes' is not installed")

EACH = 4
BYS = ("cls", "sparse", "token")


@pytest.fixture(autouse=True)
def own_key(tmp_path_factory, monkeypatch):
    """Indexes of one test are another user's in the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def made_up(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sparse": rng.standard_normal((rows, 4, 8)).astype(np.float32),
        "cls": rng.standard_normal((rows, 1, 8)).astype(np.float32),
    }


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
    wanted = rng.standard_normal((3, 8)).astype(np.float32)
    found = search.nearest(index, features, search.unit(wanted), 9, by=by)
    for query, hits in zip(wanted.astype(np.float64), found, strict=True):
        expected = cosines(features, by, query)
        best = np.argsort(-expected)[:9]
        assert [hit.row for hit in hits] == best.tolist()
        assert [hit.id for hit in hits] == [features.ids[row] for row in best]
        # Vectors of 8 numbers: a mean, two lengths and a product of them are some 30 roundings.
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


@pytest.mark.parametrize("factory", ["IVF61,Flat", "PQ3"])
def test_a_kind_that_does_not_fit_is_refused(features, factory):
    """61 cells of 60 vectors; 8 numbers in 3 equal parts."""
    with pytest.raises(ValueError, match=f"faiss makes no index '{factory}' of these vectors: "):
        opened(features, factory=factory)
    assert not (features.folder / "search-cls.faiss").exists()


def test_features_without_rows(tmp_path, repo, album):
    write_output(tmp_path / "out", made_up(0), failed=[0, 1])
    empty = stellar_fast.open_features(tmp_path / "out")
    for by in BYS:
        index, _ = opened(empty, by)
        query = search.unit(np.ones((2, 8), np.float32))
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


# The command


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("repo"), tokenizer=False)


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("album")
    for scene in ("sea", "city", "night"):
        (root / scene).mkdir()
        for seed in range(EACH):
            photos.draw(scene, 160, 120, seed).save(root / scene / f"{seed}.jpg", quality=92)
    (root / "sea" / "broken.jpg").write_bytes(b"no picture")
    return root


@pytest.fixture
def extracted(album, repo, tmp_path) -> Path:
    result = invoke(
        "extract", album, tmp_path / "out", *small(repo), "--features", "sparse,cls,spatial",
        "--workers", "1",
    )  # fmt: skip
    assert result.exit_code == 3, result.output  # the broken one
    return tmp_path / "out"


def found_by(result) -> list[str]:
    """The ids of hits, in order."""
    assert result.exit_code == 0, result.output
    return re.findall(r"^ +-?\d\.\d{4}  row \d+ +(?:token +\d+  )?(.*)$", result.stdout, re.M)


def test_by_id_row_and_file(extracted, album, repo):
    of_id = invoke("search", extracted, "sea/2.jpg", "-k", "3")
    of_row = invoke("search", extracted, "10", "-k", "3")
    assert of_id.stdout == of_row.stdout
    assert of_id.stdout.startswith("sea/2.jpg (row 10)\n")
    assert len(found_by(of_id)) == 3
    of_file = invoke("search", extracted, album / "sea" / "2.jpg", "-k", "4", *small(repo)[:2])
    assert found_by(of_file)[0] == "sea/2.jpg"
    assert found_by(of_file)[1:] == found_by(of_id)
    both = invoke("search", extracted, "sea/2.jpg", "0", "-k", "2")
    assert both.stdout.count("(row ") == 2


def test_what_is_no_query(extracted, album, tmp_path):
    refused(invoke("search", extracted, "sea/99.jpg"), r"is neither an id of .*, nor one of its 12")
    refused(invoke("search", extracted, "12"), r"there are 12 rows, counted from 0; .* is \./12")
    broken = invoke("search", extracted, "sea/broken.jpg")
    refused(broken, r"sea/broken\.jpg: has no features: ")
    refused(invoke("search", extracted, "0", "--by", "dense"), "unknown kind of vectors 'dense'")
    refused(
        invoke("search", extracted, "0", "--token", "1"),
        "token 1 is looked for by token",
    )
    refused(invoke("search", extracted, "0", "--by", "token", "--token", "8"), "there are 8")
    refused(invoke("search", extracted, "0", "--out", tmp_path / "a.gif"), r"OUT\.html or OUT\.png")
    refused(invoke("search", extracted, "0", "--out", tmp_path / "no" / "a.png"), "no folder")
    refused(invoke("search", tmp_path / "nowhere", "0"), "no such folder")


def test_a_file_that_is_no_picture_or_of_another_model(extracted, album, repo, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    refused(invoke("search", extracted, tmp_path / "text.jpg", *small(repo)), "text.jpg: ")
    result = invoke("search", extracted, album / "sea" / "1.jpg", *small(repo, "pixel"))
    refused(result, "were made with another engine: model")


def test_features_that_were_not_extracted(tmp_path):
    write_output(tmp_path / "out", {"cls": made_up(4)["cls"]})
    refused(invoke("search", tmp_path / "out", "0", "--by", "token"), "extracted without sparse")


def test_the_index_is_told_of_on_stderr(extracted, tmp_path):
    first = invoke("search", extracted, "0")
    assert "index: built, since there was none" in first.stderr
    assert invoke("search", extracted, "0").stderr == f"index: {extracted}/search-cls.faiss\n"
    elsewhere = invoke("search", extracted, "0", "--index", tmp_path / "i.faiss", "--by", "sparse")
    assert (tmp_path / "i.faiss").exists()
    assert found_by(elsewhere)


def test_tokens_by_their_share_of_the_image(extracted):
    result = invoke("search", extracted, "0", "--by", "token", "-k", "1")
    told = [int(one) for one in re.findall(r"\(row 0\), token (\d+)$", result.stdout, re.M)]
    share = stellar_fast.open_features(extracted)["spatial"][0].mean(axis=0)
    assert sorted(told) == list(range(8))
    assert told == np.argsort(-share, kind="stable").tolist()
    one = invoke("search", extracted, "0", "--by", "token", "--token", "5", "-k", "2")
    assert one.stdout.startswith("city/0.jpg (row 0), token 5\n")
    assert len(found_by(one)) == 2


# Pictures of what was found


def test_a_sheet_shows_query_and_hits(extracted, album, tmp_path):
    out = tmp_path / "hits.png"
    result = invoke("search", extracted, "sea/0.jpg", "-k", "7", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"{out}: 7 hits\n")
    picture = np.asarray(Image.open(out)).astype(float)
    cell = sheet.SIDE + sheet.GAP
    for place, id in enumerate(["sea/0.jpg", *found_by(result)]):
        column, band = (0, 0) if place == 0 else (1 + (place - 1) % 6, (place - 1) // 6)
        left = sheet.GAP + column * cell + (2 * sheet.GAP if place else 0)
        top = sheet.HEAD + sheet.GAP + band * (cell + sheet.LINES) + 25  # of 200x150
        shown = picture[top : top + 150, left : left + 160]
        image = Image.open(album / id).resize((200, 150))
        expected = np.asarray(image).astype(float)[:, :160]
        assert np.abs(shown - expected).mean() < 8, id


def test_pictures_that_cannot_be_had_are_told(extracted, album, tmp_path, monkeypatch):
    features = stellar_fast.open_features(extracted)
    rows = [features.ids.index(id) for id in ("sea/0.jpg", "sea/1.jpg", "sea/2.jpg", "sea/3.jpg")]
    changed = {"sea/1.jpg": None, "sea/2.jpg": b"text", "sea/3.jpg": photos.draw("sea", 90, 60, 0)}
    originals = originals_of(features, rows)
    moved = tmp_path / "moved"
    moved.mkdir()
    for original in originals:
        id = original.item.id
        target = moved / Path(id).name
        content = changed.get(id, (album / id).read_bytes())
        if isinstance(content, Image.Image):
            content.save(target)
        elif content is not None:
            target.write_bytes(content)
    items = [
        Original(Item(one.item.id, str(moved / Path(one.item.id).name)), one.size)
        for one in originals
    ]
    good, gone, text, other = pictures_of([*items], "card")
    assert (good.width, good.height) == (160, 120)
    assert Image.open(BytesIO(good.jpeg)).size == (160, 120)
    assert gone == "no such file"
    assert "cannot identify image file" in text or "format" in text
    assert other == "is another image by now: 160x120 pixels were extracted, 90x60 are there"


def test_images_with_labels_and_images_in_cells_are_shown(album, repo, tmp_path):
    """What the plan has beside a file's name does not keep its picture away."""
    files = sorted((album / "sea").glob("[0-9].jpg"))
    column = cells([file.read_bytes() for file in files])
    write(tmp_path / "sea.parquet", 2, image=column, label=list(range(len(files))))
    for source, keep in ((album, "folder"), (tmp_path / "sea.parquet", "label")):
        made = tmp_path / keep
        arguments = ("extract", source, made, *small(repo), "--keep", keep, "--workers", "1")
        assert invoke(*arguments).exit_code in (0, 3)
        out = tmp_path / f"{keep}.html"
        result = invoke("search", made, "1", "-k", "2", "--out", out)
        assert result.stdout.endswith("html: 2 hits\n"), result.output
        assert "no picture: " not in out.read_text()
    features = stellar_fast.open_features(tmp_path / "label")
    shown = pictures_of(originals_of(features, [3, 0, 2]), "card")  # not in the file's order
    whole = [np.asarray(Image.open(file).convert("RGB"), int) for file in files]
    for row, picture in zip((3, 0, 2), shown, strict=True):
        found = np.asarray(Image.open(BytesIO(picture.jpeg)), int)
        assert np.argmin([np.abs(found - one).mean() for one in whole]) == row


def test_a_plan_that_does_not_tell_its_images(extracted, tmp_path):
    os.rename(extracted / "inputs.parquet", tmp_path / "inputs.parquet")
    out = tmp_path / "hits.html"
    result = invoke("search", extracted, "0", "-k", "2", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("2 hits; 2 images cannot be read any more\n")
    assert out.read_text().count("no picture: ") == 3


def test_local_networks_are_not_reached_by_a_plan(extracted):
    """Whose address a stranger may have chosen."""
    item = Item("a.jpg", "http://127.0.0.1:9/a.jpg")
    (reason,) = pictures_of([Original(item)], "card")
    assert "private" in reason or "--allow-host" in reason


def test_a_picture_that_ends_its_process_is_told(album, monkeypatch):
    good = Original(Item("good", str(album / "sea" / "0.jpg")))
    bad = Original(Item("endless", str(album / "sea" / "1.jpg")))
    monkeypatch.setattr("stellar_fast.extract.originals._work", deadly_pictures)
    monkeypatch.setattr("stellar_fast.extract.originals.cores", lambda: 1)
    found = pictures_of([good, bad, good], "card", limits=Limits(seconds=0.5))
    assert found[0] == found[2]
    assert found[1] == "decoding took more than 0.5 s"


def test_the_model_saw_the_middle_by_the_preset_eval(album):
    (picture,) = pictures_of([Original(Item("a", str(album / "sea" / "0.jpg")))], "eval")
    assert (picture.width, picture.height) == (105, 105)


@pytest.mark.parametrize("weights", ["synthetic", "sha256:0"])
def test_synthetic_weights_are_told(tmp_path, weights):
    write_output(tmp_path / "out", made_up(6), weights=weights)
    out = tmp_path / "hits.html"
    result = invoke("search", tmp_path / "out", "0", "--out", out)
    assert ("Synthetic weights" in result.stderr) == (weights == "synthetic")
    assert ("Synthetic weights" in out.read_text()) == (weights == "synthetic")
