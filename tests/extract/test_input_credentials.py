"""Credentials in addresses: used, and found nowhere but in inputs.parquet."""

import base64
import json
import os
import stat

import pytest
from commands import invoke, small, write_models
from extracting import index
from loopback import head, redirect, serving
from pictures import png

from stellar_fast import ImageError, StellarError
from stellar_fast.extract import make_job, run
from stellar_fast.extract.input import discover, door
from stellar_fast.extract.input.addresses import Allowed, scrubbed, shown
from stellar_fast.extract.output.layout import digest_of, read_items, read_plan
from stellar_fast.extract.records import Item

SECRETS = ("hunter2", "alice", "s3cr3t", "deadbeefsig", "fr4gment")


def secret(server, path: str, query: str = "X-Amz-Signature=deadbeefsig&token=s3cr3t") -> str:
    return f"http://alice:hunter2@{server.host}/{path}?{query}#fr4gment"


def assert_no_secrets(content: bytes | str, where: object) -> None:
    content = content if isinstance(content, bytes) else content.encode()
    for word in SECRETS:
        assert word.encode() not in content, (word, where)


def test_no_file_of_an_output_has_them_but_the_one_that_needs_them(tmp_path, engine):
    os.umask(mask := os.umask(0))
    with serving({"/a.png": png(), "/broken.png": b"no picture"}) as server:
        lines = [secret(server, path) for path in ("a.png", "broken.png", "none.png")]
        lines += [secret(server, "a.png", "other=s3cr3t")]
        server.answers["/list.txt"] = "\n".join(lines).encode()
        source = secret(server, "list.txt")
        run(make_job(source, tmp_path / "out", partition_size=2), engine)
        basic = f"Basic {base64.b64encode(b'alice:hunter2').decode()}"
        assert {request.headers["authorization"] for request in server.requests} == {basic}
        assert all("s3cr3t" in path and "fr4gment" not in path for path in server.paths)
    table = index(tmp_path / "out")
    assert table["status"] == ["ok", "failed", "failed", "ok"]
    for path in sorted((tmp_path / "out").rglob("*")):
        if path.is_file() and path.name != "inputs.parquet":
            assert_no_secrets(path.read_bytes(), path)
    assert_no_secrets(json.dumps(table), "index")
    assert len({*table["id"]}) == 4
    assert table["id"][0] == shown(lines[0])
    mode = stat.S_IMODE((tmp_path / "out" / "inputs.parquet").stat().st_mode)
    assert mode == 0o600
    assert stat.S_IMODE((tmp_path / "out" / "plan.json").stat().st_mode) == 0o666 & ~mask


def test_an_input_with_them_is_the_same_when_it_is_resumed(tmp_path, engine):
    with serving({"/a.png": png()}) as server:
        server.answers["/list.txt"] = b"a.png\n"
        source = secret(server, "list.txt")
        run(make_job(source, tmp_path / "out"), engine)
        for again in (source, source.replace("hunter2", "other"), source.replace("alice", "bob")):
            for arguments in ({}, {"resume": True}):
                assert run(make_job(again, tmp_path / "out", **arguments), engine).images == 0
        plan = read_plan(tmp_path / "out")
        (item,) = read_items(tmp_path / "out", plan.partitions[0], {})
        assert item.file == f"http://alice:hunter2@{server.host}/a.png"
        with pytest.raises(ValueError, match="another configuration") as caught:
            make_job(source.replace("token", "tokens"), tmp_path / "out")
        assert_no_secrets(str(caught.value), "message")


def test_ids_are_distinct_and_without_order(tmp_path):
    lines = [f"https://host/image?id={n}" for n in range(1000)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    ids = [item.id for item in discover(tmp_path / "list.txt")]
    assert len({*ids}) == 1000
    (tmp_path / "list.txt").write_text("\n".join(reversed(lines)))
    assert [item.id for item in discover(tmp_path / "list.txt")] == ids[::-1]
    # A fragment is no part of what is asked for.
    (tmp_path / "list.txt").write_text("https://host/a#1\nhttps://host/a#2\n")
    with pytest.raises(ValueError, match="name the same file"):
        discover(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://alice:hunter2@host:8/a.jpg", "https://host:8/a.jpg"),
        ("https://alice@hunter2@host/a@b.jpg", "https://host/a@b.jpg"),
        ("HTTPS://alice@host/a.jpg#fr4gment", "https://host/a.jpg"),
        ("zip://a@b.jpg::https://alice@host/a.zip", "zip://a@b.jpg::https://host/a.zip"),
        ("s3://alice:hunter2@bucket/a.jpg", "s3://bucket/a.jpg"),
        ("s3://bucket/a@b.jpg", "s3://bucket/a@b.jpg"),
        ("abfs://box@account.dfs.core.windows.net/a", "abfs://box@account.dfs.core.windows.net/a"),
        ("hf://datasets/a/b@main/c.jpg", "hf://datasets/a/b@main/c.jpg"),
        ("ftp://alice@host/a.jpg", "ftp://host/a.jpg"),
        ("/home/a@b/c?d#e.jpg", "/home/a@b/c?d#e.jpg"),
        # As the README of extract has it.
        ("https://host/a.jpg?id=7", "https://host/a.jpg?f422c82d6db73d91"),
    ],
)
def test_what_is_shown(address, expected):
    assert shown(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "https://alice:hunter2@ho st/a.jpg?token=s3cr3t",
        "https://alice:hun/hunter2@host/a.jpg?token=s3cr3t#fr4gment",
        "https://alice:hunter2@host:x/a.jpg?token=s3cr3t",
        "https:/alice:hunter2@host/a.jpg?token=s3cr3t",
        "https:alice:hunter2@host/a.jpg?token=s3cr3t",
        "ftp://alice:hunter2@host/a.jpg?token=s3cr3t",
        "reference://x::https://alice:hunter2@host/a.jpg?token=s3cr3t",
        "s3://x::https://alice:hunter2@host/a.jpg?token=s3cr3t",
        "zip://alice:hunter2@host?token=s3cr3t",
        "https://alice:hunter2@host/{0..9.jpg?token=s3cr3t",
        "https://alice:hunter2@host/{0..9}x{a}.tar?token=s3cr3t",
        "https://alice:hunter2@host/folder?token=s3cr3t",
        "https://alice:hunter2@host.invalid/a.tar?token=s3cr3t",
        "https://alice:hunter2@host.invalid/{a,b}.csv?token=s3cr3t",
        "s3://alice:hunter2@bucket/*.tar?token=s3cr3t",
        "a\x1bb://alice:hunter2@host/x?token=s3cr3t",
    ],
)
def test_no_message_has_them(address, tmp_path):
    (tmp_path / "list.txt").write_text(f"{address}\nb\n{address}\n")
    problems = []
    for source in (address, tmp_path / "list.txt"):
        with pytest.raises((ValueError, OSError)) as caught:
            discover(source)
        problems.append(caught.value)
    if "://" in address:  # without, it would be a path, and no list gives such a one
        with pytest.raises(ImageError) as failed:
            door.read_item(Item("a", address))
        problems.append(failed.value)
    for problem in problems:
        while problem is not None:  # as a traceback prints them
            assert_no_secrets(repr(problem) + str(problem), address)
            problem = problem.__cause__ or (
                None if problem.__suppress_context__ else problem.__context__
            )


def test_what_stores_say_of_an_address_is_scrubbed(monkeypatch):
    address = "s3://bucket/a.jpg?X-Amz-Signature=deadbeefsig&token=s3cr3t"
    said = (
        "GET https://alice:hunter2@bucket.s3/a.jpg?X-Amz-Signature=deadbeefsig failed, "
        "token=s3cr3t was wrong, deadbeefsig\x1b[2J at zip://x::https://bob:hunter2@h/?s3cr3t"
    )

    def fail(*arguments):
        raise RuntimeError(said)

    monkeypatch.setattr(door, "_filesystem", fail)
    with pytest.raises(ImageError) as caught:
        door.read_item(Item("a", address))
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    for text in (str(caught.value), scrubbed(said, address)):
        assert "RuntimeError" in text or "failed" in text
        for word in ("hunter2", "alice", "Signature=deadbeefsig", "token=s3cr3t", "\x1b"):
            assert word not in text


def test_they_go_to_no_other_host(tmp_path):
    with serving({"/b.png": png()}) as other, serving({}) as server:
        server.answers |= {"/a.png": redirect(other.url("b.png")), "/c.png": redirect("/d.png?e")}
        server.answers["/d.png"] = png()
        allowed = Allowed.of(server.url(), (), [other.host])
        assert door.read_item(Item("a", secret(server, "a.png")), allowed) == png()
        assert "authorization" not in other.requests[0].headers
        assert_no_secrets(str(other.requests), "another host")
        assert door.read_item(Item("a", secret(server, "c.png")), allowed) == png()
        assert "authorization" in server.requests[-1].headers


def test_a_digest_tells_nothing_of_a_password():
    one = [Item("a", "https://alice:hunter2@host/a.jpg?x=1")]
    two = [Item("a", "https://bob:other@host/a.jpg?x=1")]
    assert digest_of(one) == digest_of(two)
    assert digest_of(one) != digest_of([Item("a", "https://alice:hunter2@host/a.jpg?x=2")])


def test_the_command_line_prints_none(tmp_path):
    repo = write_models(tmp_path / "repo")
    with serving({"/a.png": lambda _: [head("500 x")]}) as server:
        server.answers["/list.txt"] = f"{secret(server, 'a.png')}\n".encode()
        done = invoke("extract", secret(server, "list.txt"), tmp_path / "o", *small(repo))
        assert done.exit_code == 3, done.output
        assert_no_secrets(done.output, "output")
        fails = ("--on-error", "fail")
        done = invoke("extract", secret(server, "list.txt"), tmp_path / "p", *small(repo), *fails)
        assert done.exit_code == 1
        assert "the server answers 500" in done.output
        assert_no_secrets(done.output, "output")
        assert_no_secrets((tmp_path / "p" / "stats.json").read_bytes(), "stats")


def test_an_error_of_the_engine_says_none(tmp_path, engine):
    with serving({"/a.png": b"x"}) as server:
        server.answers["/list.txt"] = f"{secret(server, 'a.png')}\n".encode()
        with pytest.raises(StellarError) as caught:
            run(make_job(secret(server, "list.txt"), tmp_path / "o", on_error="fail"), engine)
        assert_no_secrets(str(caught.value), "message")


def test_what_is_said_of_a_table_does_not_repeat_its_rows(tmp_path):
    address = 'https://alice:hunter2@host/a.jpg?token=s3cr3t&x="y z" deadbeefsig'
    for content in (
        f"path,n\na.jpg,1\n{address}\n",
        f"path\na.jpg\n{address},{address}\n",
        f"{address},{address}\n1\n",
        f'path,n\n"{address}',
        "https://alice:hunter2@host/a.jpg?token=s3cr3t,b\nhttps://host,c\n",
    ):
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(ValueError, match=r"a\.csv") as caught:
            discover(tmp_path / "a.csv")
        assert_no_secrets(str(caught.value), content)
        assert caught.value.__cause__ is None
