"""A server on this machine that answers byte for byte what a test says, honest or not."""

from __future__ import annotations

import re
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

Answer = Callable[["Request"], Iterable[bytes]]
LIMIT = 1 << 20  # bytes that the fixture `server` lets be read of a file


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]  # names in lower case

    @property
    def span(self) -> tuple[int, int] | None:
        """The first and the last byte wanted."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(found[1]), int(found[2])) if found else None


@dataclass
class Server:
    """
    Attributes:
        answers: by path, without the query; bytes are served as an honest server does.
        requests: what was asked, in order.
    """

    port: int
    answers: dict[str, Answer | bytes]
    requests: list[Request] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str = "") -> str:
        return f"http://{self.host}/{path}"

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.requests]


def head(status: str = "200 OK", **headers: object) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join((f"HTTP/1.1 {status}", *lines, "", "")).encode("utf-8", "surrogateescape")


def honest(content: bytes) -> Answer:
    def answer(request: Request) -> Iterator[bytes]:
        if request.span is None:
            yield head(Content_Length=len(content)) + content
            return
        first, last = request.span[0], min(request.span[1], len(content) - 1)
        if first > last:
            yield head("416 Range Not Satisfiable", Content_Length=0)
            return
        span = f"bytes {first}-{last}/{len(content)}"
        part = content[first : last + 1]
        yield head("206 Partial Content", Content_Range=span, Content_Length=len(part)) + part

    return answer


def redirect(where: str) -> Answer:
    return lambda request: [head("302 Found", Location=where, Content_Length=0)]


@contextmanager
def serving(answers: Mapping[str, Answer | bytes]) -> Iterator[Server]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            try:
                while self.answer():
                    pass
            except OSError:
                pass  # the client has had enough

        def answer(self) -> bool:
            line = self.rfile.readline().decode("latin-1").split(" ")
            if len(line) < 2:
                return False
            headers = {}
            while (header := self.rfile.readline().decode("latin-1").strip()) != "":
                name, _, value = header.partition(":")
                headers[name.lower()] = value.strip()
            request = Request(line[1], headers)
            server.requests.append(request)
            answer = server.answers.get(request.path.partition("?")[0])
            if answer is None:
                self.wfile.write(head("404 Not Found", Content_Length=0))
                return True
            keep = isinstance(answer, bytes)
            for part in (honest(answer) if isinstance(answer, bytes) else answer)(request):
                self.wfile.write(part)
            return keep

    class Many(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 64

    with Many(("127.0.0.1", 0), Handler) as listener:
        server = Server(listener.server_address[1], dict(answers))
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
