"""Servers that send more than they say, other than was asked for, or never an end."""

import gzip
import socket
import threading
import tracemalloc
import zlib

import pytest
from archived import write_tar
from loopback import LIMIT, Request, head, honest, redirect

from stellar_fast import ImageError
from stellar_fast.extract.input import archives, discover, door, web
from stellar_fast.extract.input.addresses import Allowed
from stellar_fast.extract.records import Item


def read(server, path: str = "a.jpg", *span: int) -> bytes:
    return door.read_item(Item("a", server.url(path), *span), Allowed.of(server.url()))


def reason(server, path: str = "a.jpg", *span: int) -> str:
    with pytest.raises(ImageError) as caught:
        read(server, path, *span)
    return caught.value.reason


class Counted:
    """A body of `size` bytes, or without an end, that knows how much of it was taken."""

    def __init__(self, start: bytes, size: int = 1 << 40, part: bytes = bytes(1 << 16)) -> None:
        self.start, self.size, self.part = start, size, part
        self.taken = 0

    def __call__(self, request: Request):
        yield self.start
        while self.taken < self.size:
            yield self.part
            self.taken += len(self.part)


ENDLESS = {
    "no length": head(),
    "a length": head(Content_Length=1 << 40),
    "a negative length": head(Content_Length=-5),
    "a length that is no number": head(Content_Length="many"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_no_body_is_read_beyond_the_limit(kind, server):
    server.answers["/a.jpg"] = body = Counted(ENDLESS[kind])
    tracemalloc.start()
    assert "the limit of 1048576" in reason(server)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * LIMIT
    assert body.taken < 100 * LIMIT  # the rest is in the sockets


def test_chunks_without_an_end_stop_at_the_limit(server):
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    server.answers["/a.jpg"] = Counted(head(Transfer_Encoding="chunked"), part=chunk)
    assert "the limit of 1048576" in reason(server)
    server.answers["/a.jpg"] = lambda _: [
        head(Transfer_Encoding="chunked"),
        b"5\r\nhello\r\n0\r\n\r\n",
    ]
    assert read(server) == b"hello"
    for broken in (b"xyz\r\n", b"FFFFFFFFFFFFFFFFFFFF\r\nabc", b"5\r\nhel", b"-5\r\nhello\r\n"):
        server.answers["/a.jpg"] = lambda _, b=broken: [head(Transfer_Encoding="chunked"), b]
        assert "the answer ends" in reason(server)


def test_bodies_up_to_the_limit_are_read(server):
    content = bytes(range(256)) * (LIMIT // 256)
    server.answers["/a.jpg"] = content
    assert read(server) == content
    server.answers["/a.jpg"] = content + b"x"
    assert "1048577 bytes are more than the limit" in reason(server)
    server.answers["/a.jpg"] = lambda _: [head(), content]
    assert read(server) == content


def test_an_image_is_one_request_on_a_connection_that_is_kept(server, monkeypatch):
    dialled = []
    dial = web._dial
    monkeypatch.setattr(web, "_dial", lambda *where: (dialled.append(where), dial(*where))[1])
    names = [f"{number}.jpg" for number in range(5)]
    for name in names:
        server.answers[f"/{name}"] = name.encode()
    assert [read(server, name) for name in names] == [name.encode() for name in names]
    assert server.paths == [f"/{name}" for name in names]
    assert len(dialled) == 1


def test_more_than_was_stated_is_no_part_of_this_file_or_the_next(server):
    server.answers["/a.jpg"] = lambda _: [head(Content_Length=5) + b"hello" + head() + b"other"]
    server.answers["/b.jpg"] = b"its own"
    assert read(server) == b"hello"
    assert read(server, "b.jpg") == b"its own"


def test_less_than_was_stated_is_an_error(server):
    server.answers["/a.jpg"] = lambda _: [head(Content_Length=500) + b"hello"]
    assert reason(server) == "the answer ends after 5 of its 500 bytes"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "x-gzip, identity", "GZIP"])
def test_packed_bodies_are_not_unpacked(coding, server):
    bomb = gzip.compress(bytes(64 << 20)) if "gzip" in coding.lower() else zlib.compress(b"x")
    server.answers["/a.jpg"] = lambda _: [head(Content_Encoding=coding) + bomb]
    assert "packed" in reason(server)
    assert server.requests[0].headers["accept-encoding"] == "identity"
    server.answers["/a.jpg"] = lambda _: [head(Content_Encoding="identity") + b"x"]
    assert read(server) == b"x"


@pytest.mark.parametrize("status", ["204 No Content", "403 No", "500 Broken", "999 x", "206 Part"])
def test_an_answer_that_is_not_the_file_is_an_error(status, server):
    server.answers["/a.jpg"] = lambda _: [head(status, Content_Length=5) + b"hello"]
    assert "the server" in reason(server)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n",
        b"hello\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\na: " + b"b" * 1_000_000,
        b"HTTP/9.9 " + b"x" * 1_000_000,
    ],
    ids=["nothing", "a line", "text", "a status", "headers", "a long header", "a long line"],
)
def test_what_is_no_http_is_an_error(answer, server):
    server.answers["/a.jpg"] = lambda _: [answer]
    assert reason(server)
    server.answers["/a.jpg"] = b"fine"
    assert read(server) == b"fine"


# Time


class Time:
    """A clock that goes on by `step` seconds whenever it is looked at."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def dripping(first: bytes):
    def answer(request: Request):
        yield first
        while True:
            yield b"x"
            event.wait(0.002)

    event = threading.Event()
    return answer


@pytest.mark.parametrize(
    "first",
    [head(), head(Content_Length=1000), b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\nX: ", b""],
    ids=["body", "length", "status", "header", "nothing"],
)
def test_a_server_that_drips_is_left(first, server, monkeypatch):
    monkeypatch.setattr(web, "time", Time(step=1.0))
    server.answers["/a.jpg"] = dripping(first)
    assert "took too long" in reason(server)


def test_endless_interim_answers_are_left(server, monkeypatch):
    monkeypatch.setattr(web, "time", Time(step=1.0))
    monkeypatch.setattr(web, "SLOWEST", 1 << 40)
    server.answers["/a.jpg"] = Counted(b"", part=b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
    assert "took too long" in reason(server)


def test_a_server_that_says_nothing_is_left(server, monkeypatch):
    monkeypatch.setattr(web, "SILENCE", 0.5)
    release = threading.Event()

    def silent(request):
        release.wait(60)
        yield b""

    server.answers["/a.jpg"] = silent
    try:
        assert "timed out" in reason(server) or "took too long" in reason(server)
    finally:
        release.set()


def test_redirects_share_one_time(server, monkeypatch):
    monkeypatch.setattr(web, "time", Time(step=15.0))
    server.answers["/a.jpg"] = redirect("/a.jpg")
    assert "took too long" in reason(server)


def test_a_body_that_comes_along_has_all_its_time(server, monkeypatch):
    monkeypatch.setattr(web, "time", Time(step=1.0))
    monkeypatch.setattr(web, "SLOWEST", 100)
    server.answers["/a.jpg"] = lambda _: [head(Content_Length=LIMIT)] + [bytes(1 << 10)] * 1024
    assert len(read(server)) == LIMIT


# Parts of files


def span_answer(first, last, total, content: bytes, status="206 Partial Content", **headers):
    headers = {"Content_Range": f"bytes {first}-{last}/{total}", **headers}
    return lambda _: [head(status, **headers), content]


def test_a_part_is_the_part_that_was_asked_for(server):
    server.answers["/a.tar"] = bytes(range(200))
    assert read(server, "a.tar", 10, 50) == bytes(range(10, 60))
    assert "10 of its 50 bytes" in reason(server, "a.tar", 190, 50)
    assert "0 of its 50 bytes" in reason(server, "a.tar", 500, 50)
    fifty = bytes(50)
    for answer in (
        span_answer(11, 60, 200, fifty),
        span_answer(10, 58, 200, bytes(49)),
        span_answer(10, 60, 200, bytes(51)),
        span_answer(10, 59, 200, bytes(51)),
        span_answer(10, 59, 200, bytes(49)),
        span_answer(10, 59, "*", fifty),
        span_answer(10, 59, 20, fifty),
        span_answer(0, 199, 200, bytes(200), "200 OK"),
        span_answer(10, 59, 200, fifty, Content_Encoding="gzip"),
        span_answer(10, 59, 200, bytes(49), Content_Length=50),
        span_answer(59, 10, 200, b""),
        lambda _: [head("206 Partial Content"), fifty],
        lambda _: [head("206 Partial Content", Content_Range="bytes */200"), fifty],
        lambda _: [head("200 OK", Content_Length=200), bytes(200)],
        lambda _: [head("200 OK"), fifty],
        Counted(head("206 Partial Content", Content_Range="bytes 10-59/200")),
        Counted(head("200 OK")),
    ):
        server.answers["/a.tar"] = answer
        assert reason(server, "a.tar", 10, 50)
    assert "more than the limit" in reason(server, "a.tar", 10, LIMIT + 1)


def test_tars_on_the_web_are_read_by_parts(server, monkeypatch):
    monkeypatch.setattr(web, "BLOCK", 4096)
    server.answers |= {"/x/0.tar": write_tar(20, 3000), "/x/1.tar": write_tar(3, 10)}
    items = discover(server.url("x/{0..1}.tar"))
    assert [item.id for item in items] == [
        *(f"0.tar::{n}.jpg" for n in range(20)),
        *(f"1.tar::{n}.jpg" for n in range(3)),
    ]
    for number, item in enumerate(items[:20]):
        assert door.read_item(item, Allowed.of(server.url())) == bytes([number]) * 3000


def test_a_tar_of_a_server_without_parts_or_that_changes_is_an_error(server, monkeypatch):
    monkeypatch.setattr(web, "BLOCK", 4096)
    content = write_tar(20, 3000)
    server.answers["/a.tar"] = lambda _: [head(Content_Length=len(content)), content]
    with pytest.raises(OSError, match=r"a\.tar: the server gives no parts of files"):
        discover(server.url("a.tar"))
    small = write_tar(1, 10)[:2048]
    server.answers["/a.tar"] = lambda _: [head(Content_Length=len(small)), small]
    assert len(discover(server.url("a.tar"))) == 1
    asked = []

    def growing(request):
        asked.append(request)
        return honest(content + bytes(len(asked)))(request)

    server.answers["/a.tar"] = growing
    with pytest.raises(OSError, match="has changed"):
        discover(server.url("a.tar"))


def test_an_endless_tar_is_not_endless_work(server, monkeypatch):
    """A server that makes up a tar of any length as it is asked for."""
    monkeypatch.setattr(archives, "MAX_MEMBERS", 1000)
    block = write_tar(1, 0)[:512]

    def made_up(request):
        first, last = request.span
        content = (block * ((last - first) // 512 + 2))[first % 512 :][: last - first + 1]
        span = f"bytes {first}-{last}/{1 << 60}"
        yield head("206 Partial Content", Content_Range=span, Content_Length=len(content))
        yield content

    server.answers["/a.tar"] = made_up
    with pytest.raises(ValueError, match=r"twice|the limit of 1000 members"):
        discover(server.url("a.tar"))


# Honest servers


def test_connections_are_kept_and_opened_again(server):
    server.answers |= {f"/{n}.jpg": str(n).encode() for n in range(5)}
    ports = set()
    dial = web._dial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "_dial", lambda *a: ports.add(s := dial(*a)) or s)
        assert [read(server, f"{n}.jpg") for n in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        assert len(ports) == 1
        for sock in ports.copy():  # as a server that ends it
            sock.shutdown(socket.SHUT_RDWR)
        assert read(server, "3.jpg") == b"3"
        assert len(ports) == 2


def test_no_proxy_of_the_environment_is_used(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server.answers["/a.jpg"] = b"fine"
    assert read(server) == b"fine"
