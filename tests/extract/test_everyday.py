"""Runs as people start them: without a stream, by a pipe, from anywhere, on anything."""

import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import command, invoke, refused, small, write_models
from engines import small_engine
from extracting import index, touch
from loopback import head, redirect, serving
from outputs import made_up, write_output
from pictures import photograph

import stellar_fast
from stellar_fast import StellarError, files
from stellar_fast.extract import make_job, run
from stellar_fast.extract.input import discover, door
from stellar_fast.extract.input.addresses import Allowed
from stellar_fast.extract.input.sieve import Sieve
from stellar_fast.extract.records import Item
from stellar_fast.extract.stats import Progress
from stellar_fast.recipes import search


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("repo"), tokenizer=False)


def pictures(folder: Path, count: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        photograph(30, 30 + number).save(folder / f"{number}.png")
    return folder


def ids(source, column=None, **options) -> list[str]:
    return [item.id for item in discover(source, column, **options)]


# Streams


def test_a_run_without_streams(repo, tmp_path):
    pictures(tmp_path / "in")
    line = " ".join(command("extract", tmp_path / "in", tmp_path / "out", *small(repo)))
    done = subprocess.run(["sh", "-c", f"{line} <&- >&- 2>&-"], timeout=120)
    assert done.returncode == 0
    assert index(tmp_path / "out")["status"] == ["ok", "ok"]


def test_a_run_that_nobody_reads(repo, tmp_path):
    pictures(tmp_path / "in")
    (tmp_path / "in" / "2.png").write_bytes(b"none")
    line = " ".join(command("extract", tmp_path / "in", tmp_path / "out", *small(repo)))
    script = f"set -o pipefail; {line} 2>&1 | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (3, "")  # that one image has failed, and no more
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert (stats["outcome"], stats["rows"]) == ("complete", 2)


def test_a_process_without_stderr(monkeypatch, tmp_path):
    pictures(tmp_path / "in")
    monkeypatch.setattr(sys, "stderr", None)
    assert run(make_job(tmp_path / "in", tmp_path / "out"), small_engine()).rows == 2


def test_nothing_to_do_shows_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    Progress(0, 1.0).close()
    assert capsys.readouterr().err == ""


# Processes


def test_a_daemonic_process_is_told(monkeypatch, tmp_path):
    job = make_job(pictures(tmp_path / "in"), tmp_path / "out")
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(StellarError, match=r"daemonic process may not.*daemon=False"):
        run(job, small_engine())


def test_batches_that_fit_no_memory_are_told(repo, tmp_path):
    pictures(tmp_path / "in")
    arguments = ("extract", tmp_path / "in", tmp_path / "out", *small(repo))
    refused(invoke(*arguments, "--batch-size", 10**9), "give a smaller --batch-size")


@pytest.mark.parametrize("weights", ["pretrained", "synthetic"])
def test_a_picture_of_maps_says_that_its_weights_are_synthetic(
    weights, repo, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    titles = []
    monkeypatch.setattr(
        "stellar_fast.viz.pictures.save_spatial", lambda *arguments: titles.append(arguments[-2])
    )
    photograph(30, 30).save(tmp_path / "a.png")
    arguments = ("maps", tmp_path / "a.png", tmp_path / "b.png", *small(repo))
    assert invoke(*arguments, "--weights", weights).exit_code == 0
    assert titles == [
        "small (synthetic weights): a.png" if weights == "synthetic" else "small: a.png"
    ]


# Failures


def test_failures_are_counted_by_their_reasons(repo, tmp_path):
    pictures(tmp_path / "in")
    touch(tmp_path / "in", *(f"empty{number}.jpg" for number in range(5)))
    whole = (tmp_path / "in" / "0.png").read_bytes()
    for number in range(2):
        (tmp_path / "in" / f"half{number}.png").write_bytes(whole[: 100 + number])
    arguments = ("extract", tmp_path / "in", tmp_path / "out", *small(repo), "--partition-size", 4)
    for _ in range(2):  # the same when there is nothing to do
        result = invoke(*arguments)
        assert result.exit_code == 3
        lines = result.stderr.splitlines()
        start = next(at for at, line in enumerate(lines) if line.startswith("7 images failed"))
        assert lines[start + 1 : start + 3] == [
            "  5 empty file: empty0.jpg, empty1.jpg, empty2.jpg, ...",
            "  2 image file is truncated: half0.png, half1.png",
        ]


# Names


def test_an_output_whose_name_is_no_utf8(repo, tmp_path):
    pictures(tmp_path / "in")
    output = tmp_path / os.fsdecode(b"\xe9out")
    for format in ("npy", "parquet"):
        options = ("--format", format, "--overwrite")
        result = invoke("extract", tmp_path / "in", output, *small(repo), *options)
        assert result.exit_code == 0, result.output
        assert "\\xe9out: 2 images, 2 rows" in result.stdout
        assert stellar_fast.open_features(output)["cls"][:].shape[0] == 2
    again = invoke("extract", tmp_path / "in", output, *small(repo), "--format", "parquet")
    assert again.exit_code == 0 and "nothing to do" in again.stdout


@pytest.mark.parametrize("name", ["a::b", "a::b.tar", "zip::x", "x.tar", "x.csv", "http:", "a b"])
def test_local_names_that_look_like_something_else(name, tmp_path):
    from archived import write_tar

    folder = pictures(tmp_path / name)
    assert ids(folder) == ["0.png", "1.png"]
    (folder / "l.txt").write_text("0.png\n1.png\n")
    (folder / "t::u.tar").write_bytes(write_tar(2, 10))
    assert ids(folder / "l.txt") == ["0.png", "1.png"]
    assert ids(f"{folder}/*.txt") == ["0.png", "1.png"]
    assert (
        ids(folder / "t::u.tar") == ids(f"{folder}/*.tar") == ["t::u.tar::0.jpg", "t::u.tar::1.jpg"]
    )
    for item in discover(folder / "t::u.tar"):
        assert len(door.read_item(item)) == 10
    for item in discover(folder / "l.txt"):
        assert door.read_item(item).startswith(b"\x89PNG")


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures(tmp_path / "in")
    (tmp_path / "list.txt").write_text("~/in/0.png\n")
    assert [item.file for item in discover(tmp_path / "list.txt")] == [
        str(tmp_path / "in" / "0.png")
    ]
    assert run(make_job("~/in", "~/out"), small_engine()).rows == 2
    assert len(stellar_fast.open_features("~/out")) == 2


# Lists


def test_lines_that_name_a_file_again(repo, tmp_path):
    pictures(tmp_path / "in")
    source = tmp_path / "in" / "l.txt"
    source.write_text("0.png\n1.png\n./0.png\n0.png\n")
    sieve = Sieve()
    assert ids(source, skip_duplicates=True, sieve=sieve) == ["0.png", "1.png"]
    assert sieve.skipped == {"lines that name a file again": 2}
    (tmp_path / "in" / "m.txt").write_text("1.png\n")
    assert ids(f"{tmp_path}/in/?.txt", skip_duplicates=True) == ["0.png", "1.png"]
    arguments = ("extract", source, tmp_path / "out", *small(repo))
    refused(invoke(*arguments), "line 1 and .*line 3 name the same file.*--skip-duplicates")
    result = invoke(*arguments, "--skip-duplicates")
    assert result.exit_code == 0 and "left out: 2 lines that name a file again" in result.stdout


def test_a_store_whose_package_is_missing_is_told_before_any_work(monkeypatch, tmp_path):
    def missing(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    for line in ("s3://bucket/a.jpg", "zip://a.jpg::s3://bucket/a.zip"):
        (tmp_path / "l.txt").write_text(f"https://host/b.jpg\n{line}\n")
        with pytest.raises(ValueError, match=r"l\.txt: names s3:// addresses: Install s3fs"):
            discover(tmp_path / "l.txt")
    (tmp_path / "l.txt").write_text("https://host/b.jpg\nc.jpg\nzip://a.jpg::/x/a.zip\n")
    assert len(discover(tmp_path / "l.txt")) == 3


def test_empty_tars_among_others_are_counted(tmp_path):
    from archived import write_tar

    (tmp_path / "0.tar").write_bytes(write_tar(2, 10))
    (tmp_path / "1.tar").touch()
    sieve = Sieve()
    assert ids(f"{tmp_path}/{{0..1}}.tar", sieve=sieve) == ["0.tar::0.jpg", "0.tar::1.jpg"]
    assert sieve.skipped == {"empty tars": 1}
    with pytest.raises(ValueError, match=r"no images in it.*found 1 empty tars"):
        discover(tmp_path / "1.tar")


# The web


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_what_a_server_answers_is_told(status):
    with serving({}) as server:
        for name in ("a.txt", "a.tar", "a.jpg"):
            server.answers[f"/{name}"] = lambda request: [head(f"{status} X", Content_Length=0)]
        for name in ("a.txt", "a.tar"):
            with pytest.raises(OSError, match=rf"{name}: the server answers {status}"):
                discover(server.url(name))
        with pytest.raises(stellar_fast.ImageError, match=f"the server answers {status}"):
            door.read_item(Item("a", server.url("a.jpg")), Allowed.of(server.url()))


def test_why_a_server_is_not_reached():
    with serving({}) as server:
        server.answers["/a.txt"] = redirect("/a.txt")
        with pytest.raises(OSError, match="redirects more than 5 times"):
            discover(server.url("a.txt"))
    for host, reason in (
        ("127.0.0.1:1", "connection refused"),
        ("none.invalid", "name|resolution"),
    ):
        for name in ("a.txt", "a.tar", "x/a.csv"):
            with pytest.raises(OSError, match=rf"(?i){name}: .*({reason})"):
                discover(f"http://{host}/{name}")
        with pytest.raises(stellar_fast.ImageError, match=f"(?i){reason}"):
            door.read_item(Item("a", f"http://{host}/a.jpg"), Allowed.of(f"http://{host}/"))


@pytest.mark.parametrize("name", ["a.txt", "a.tar", ""])
def test_why_a_store_is_not_reached(name, monkeypatch):
    """The Hub's file system finds no file where it cannot connect."""

    def unreached(address):
        raise FileNotFoundError(str(address)) from ConnectionError("Name or service not known")

    monkeypatch.setattr(door, "_filesystem", unreached)
    with pytest.raises((ValueError, OSError), match=r"no such \w+: Name or service not known"):
        discover(f"hf://datasets/a/b/{name}")
    with pytest.raises(stellar_fast.ImageError, match="no such file: Name or service not known"):
        door.read_item(Item("a", "hf://datasets/a/b/c.jpg"))


def test_lists_and_tars_whose_address_has_a_query():
    from archived import write_tar

    lines = b"b.jpg\n/c.jpg\n../d.jpg\n"
    answers = {"/x/a.txt": lines, "/x/a.tar": write_tar(1, 10)}
    with serving(answers) as server:
        found = discover(server.url("x/a.txt?download=true"))
        assert [item.file for item in found] == [
            server.url(name) for name in ("x/b.jpg", "c.jpg", "d.jpg")
        ]
        (item,) = discover(server.url("x/a.tar?download=true"))
        assert item.size == 10
        assert len(door.read_item(item, Allowed.of(server.url()))) == 10


# Outputs


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_a_full_machine_says_nothing_of_the_files(code, monkeypatch, tmp_path):
    write_output(tmp_path / "out", made_up(7))
    features = stellar_fast.open_features(tmp_path / "out")

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "open_inside", refuse)
    monkeypatch.setattr(stellar_fast.extract.output.layout, "open_inside", refuse)
    for read in (lambda: features["cls"][0], features.verify, lambda: features.ids):
        with pytest.raises(StellarError, match=os.strerror(code)) as caught:
            read()
        assert not re.search(r"remove|damaged", str(caught.value))
    assert ("ulimit" in files.told_of(OSError(code, "x"))) == (code == errno.EMFILE)


def test_one_image_is_no_list_to_search_for(tmp_path):
    write_output(tmp_path / "out", {"cls": np.ones((3, 1, 4), np.float32)})
    features = stellar_fast.open_features(tmp_path / "out")
    for one in ("one.jpg", Path("one.jpg"), photograph(9, 9), b"bytes"):
        with pytest.raises(TypeError, match="images are a list, got one"):
            search.search(None, features, small_engine(), one)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        search.search(None, features, small_engine(), ["one.jpg"], k=0)
