"""`stellar-fast search`: queries of every kind, and the pictures of what was found."""

import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from commands import invoke, refused, small, write_models
from extracting import deadly_pictures
from outputs import made_up, write_output
from parquets import cells, write
from PIL import Image

import stellar_fast
from stellar_fast import photos
from stellar_fast.extract.originals import Original, originals_of, pictures_of
from stellar_fast.extract.records import Item
from stellar_fast.extract.work.sandbox import Limits
from stellar_fast.viz import sheet

pytest.importorskip("faiss", reason="the extra 'recipes' is not installed")

pytestmark = pytest.mark.usefixtures("own_key")
EACH = 4


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
