"""Files by HTTP: at most so many bytes, in bounded time, and from no private network unasked.

The address that a connection is made to is checked, not only the host's name, and so for every
redirect. Proxies of the environment are not used: behind one, nothing could be checked.
"""

from __future__ import annotations

import base64
import functools
import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from functools import partial
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

from ...printable import printable
from .addresses import Address, Allowed, parse

REDIRECTS = 5
SILENCE = 60.0  # seconds without a byte
SLOWEST = 100_000  # bytes a second that an answer must have, on the whole, after SILENCE
KEPT = 8  # connections that a thread keeps
ADDRESSES = 8  # of a host that are tried
BLOCK = 4 << 20  # bytes that are read ahead
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_NO_DATA = {204, 205, 304}


def is_public(text: str) -> bool:
    """Whether an IP address is one of the internet, and leads to no other one."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        elif address.ipv4_mapped is not None:
            address = address.ipv4_mapped
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    tunnel = (address.sixtofour, *(address.teredo or ()))
    return (
        address in _GLOBAL_UNICAST
        and address.is_global
        and all(is_public(str(inner)) for inner in tunnel if inner is not None)
    )


class _Clock:
    """The time that one request may take, with its redirects."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.received = 0

    def left(self) -> float:
        left = self.began + SILENCE + self.received / SLOWEST - time.monotonic()
        if left <= 0:
            raise self.expired()
        return min(left, SILENCE)

    def expired(self) -> TimeoutError:
        return TimeoutError(
            f"took too long: {self.received} bytes in {time.monotonic() - self.began:.0f} s"
        )


class _Reader(io.RawIOBase):
    """A socket's bytes, each waited for no longer than the clock says."""

    def __init__(self, raw: Any, sock: socket.socket, clock: _Clock) -> None:
        self._raw, self._sock, self._clock = raw, sock, clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._clock.left())
        try:
            count = self._raw.readinto(buffer)
        except TimeoutError:
            raise self._clock.expired() from None
        self._clock.received += count
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, clock: _Clock, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Reader(self.fp.detach(), sock, clock))


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked."""

    def __init__(self, host: str, port: int, secure: bool, allowed: Allowed) -> None:
        super().__init__(host, port)
        self._secure, self._allowed = secure, allowed
        self.default_port = 443 if secure else 80  # or Host would name the port
        self.clock = _Clock()
        self.used = False

    def connect(self) -> None:
        self.sock = _dial(self.host, self.port, self._allowed, self.clock)
        if self._secure:
            self.sock.settimeout(self.clock.left())
            self.sock = _tls().wrap_socket(self.sock, server_hostname=self.host)

    def ask(self, path: str, headers: dict[str, str], clock: _Clock) -> http.client.HTTPResponse:
        self.clock = clock
        self.response_class = partial(_Response, clock=clock)  # type: ignore[assignment]
        if self.sock is not None:
            self.sock.settimeout(clock.left())
        self.request("GET", path, headers=headers)
        return self.getresponse()


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _dial(host: str, port: int, allowed: Allowed, clock: _Clock) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:ADDRESSES]
    except UnicodeError:
        raise OSError(f"{printable(host)} is no name of a host") from None
    problem: OSError | None = None
    for family, kind, protocol, _, address in found:
        where = str(address[0])
        if not allowed.private(host, port) and not is_public(where):
            problem = OSError(
                f"{printable(host)} is at {where}, in a private network; "
                f"--allow-host {printable(host)} reads from there"
            )
            continue
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(clock.left())
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            problem = error
    raise problem or OSError(f"{printable(host)} has no address")


class _Pool(threading.local):
    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], _Connection] = {}

    def take(self, key: tuple[Any, ...]) -> _Connection:
        return self.kept.pop(key, None) or _Connection(*key)

    def keep(self, key: tuple[Any, ...], connection: _Connection) -> None:
        connection.used = True
        self.kept[key] = connection
        if len(self.kept) > KEPT:
            self.kept.pop(next(iter(self.kept))).close()


_POOL = _Pool()


class _Answer:
    """A body that is being read; closed when the block ends."""

    def __init__(self, address: Address, span: str | None, allowed: Allowed) -> None:
        """
        Args:
            span: the bytes wanted, as `Range` has them; None for the whole file.

        Raises:
            OSError: it cannot be had.
        """
        clock = _Clock()
        user = address.url
        for _ in range(REDIRECTS + 1):
            url = address.url
            assert url.hostname is not None
            secure = url.scheme == "https"
            self._key = (url.hostname, url.port or (443 if secure else 80), secure, allowed)
            headers = {"Accept-Encoding": "identity", "User-Agent": "stellar-fast"}
            if span is not None:
                headers["Range"] = span
            if url.username is not None or url.password is not None:
                user = url
            same = (user.scheme, user.hostname, user.port) == (url.scheme, url.hostname, url.port)
            if same and (user.username is not None or user.password is not None):
                name, word = (
                    unquote_to_bytes(part or "") for part in (user.username, user.password)
                )
                headers["Authorization"] = f"Basic {base64.b64encode(name + b':' + word).decode()}"
            path = quote(url.path or "/", safe="/%:=&~+!$,;'@()*[]|", errors="surrogateescape")
            path = re.sub("%(?![0-9A-Fa-f]{2})", "%25", path)
            if url.query:
                path += "?" + quote(
                    url.query, safe="/%:=&~+!$,;'@()*[]|?", errors="surrogateescape"
                )
            self._ask(path, headers, clock)
            where = self.response.headers.get("Location")
            if self.response.status not in (301, 302, 303, 307, 308) or where is None:
                return
            self.close()
            address = _redirected(address, where)
        raise OSError(f"the server redirects more than {REDIRECTS} times")

    def _ask(self, path: str, headers: dict[str, str], clock: _Clock) -> None:
        while True:
            self._connection = _POOL.take(self._key)
            try:
                self.response = self._connection.ask(path, headers, clock)
                return
            except ConnectionError:
                self._connection.close()
                # A server may end a kept connection at any time.
                if not self._connection.used:
                    raise
            except http.client.HTTPException as error:
                self._connection.close()
                raise OSError("the server's answer is no HTTP") from error
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.response.isclosed() and self._connection.sock is not None:
            _POOL.keep(self._key, self._connection)
        else:
            self.response.close()
            self._connection.close()

    def check(self) -> None:
        """
        Raises:
            OSError: this is not the file as it is.
        """
        status = self.response.status
        if status in (404, 410):
            raise FileNotFoundError("no such file")
        if not 200 <= status < 300 or status in _NO_DATA:
            raise OSError(f"the server answers {status}")
        coding = self.response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("", "identity", "aws-chunked"):
            raise OSError(
                f"the server sends it packed ({printable(coding[:40])}), though not asked"
            )

    def body(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            OSError: it is longer than `limit`, or ends early.
        """
        stated = self.response.length
        if stated is not None and stated > limit:
            raise TooLarge(f"{stated} bytes are more than the limit of {limit}")
        parts = []
        count = 0
        while count <= limit:
            try:
                part = self.response.read(min(1 << 20, limit + 1 - count))
            except (http.client.HTTPException, ValueError) as error:  # of sizes of chunks
                raise OSError(f"the answer ends after {count} bytes, or is none") from error
            if not part:
                break
            parts.append(part)
            count += len(part)
        if count > limit:
            raise TooLarge(f"more bytes than the limit of {limit}")
        if stated is not None and count != stated:
            raise OSError(f"the answer ends after {count} of its {stated} bytes")
        return b"".join(parts)


class TooLarge(OSError):
    """More bytes than may be read."""


def _redirected(address: Address, where: str) -> Address:
    # Python reads headers as Latin-1; servers send UTF-8 there.
    where = where.encode("latin-1").decode("utf-8", "surrogateescape")
    try:
        target = urljoin(str(address), where)
        if urlsplit(target).scheme in ("http", "https"):
            return parse(target)
    except ValueError:
        pass
    raise OSError("the server redirects to what is no address of the web")


def read(address: Address, limit: int, allowed: Allowed) -> bytes:
    """A whole file.

    Raises:
        OSError: it cannot be had, or has more than `limit` bytes.
    """
    with _Answer(address, None, allowed) as answer:
        answer.check()
        if answer.response.status == 206:
            raise OSError("the server gives a part of the file, though the whole was asked for")
        return answer.body(limit)


def read_range(address: Address, start: int, size: int, allowed: Allowed) -> bytes:
    """Bytes of a file, fewer only where the file ends.

    Raises:
        OSError: they cannot be had, or the server gives others.
    """
    return _read_range(address, start, size, allowed)[0] if size else b""


def _read_range(address: Address, start: int, size: int, allowed: Allowed) -> tuple[bytes, int]:
    """The bytes, and the length of the file."""
    with _Answer(address, f"bytes={start}-{start + size - 1}", allowed) as answer:
        if answer.response.status == 416:
            return b"", start
        answer.check()
        if answer.response.status != 206:
            length = answer.response.length
            if start == 0 and length is not None and length <= size:
                return answer.body(size), length
            raise OSError("the server gives no parts of files; download it first")
        found = _RANGE.fullmatch(answer.response.headers.get("Content-Range", "").strip())
        first, last, total = map(int, found.groups()) if found else (-1, -1, -1)
        if first != start or last != min(start + size, total) - 1 or last < first:
            raise OSError("the server gives other bytes than it was asked for")
        content = answer.body(size)
        if len(content) != last - first + 1:
            raise OSError(f"the server gives {len(content)} bytes and says {last - first + 1}")
        return content, total


class RangeFile(io.RawIOBase):
    """A file on the web, read by blocks where it is looked at."""

    def __init__(self, address: Address, allowed: Allowed) -> None:
        """
        Raises:
            OSError: there is none, or its server gives no parts of files.
        """
        self._address, self._allowed = address, allowed
        self._start = self._at = 0
        self._block, self.size = _read_range(address, 0, BLOCK, allowed)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self.size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self._at))
        if not count:
            return 0
        within = self._at - self._start
        if not 0 <= within <= len(self._block) - count:
            ahead = min(max(count, BLOCK), self.size - self._at)
            content, total = _read_range(self._address, self._at, ahead, self._allowed)
            if total != self.size or len(content) != ahead:
                raise OSError("the file has changed while it was read")
            self._start, self._block, within = self._at, content, 0
        buffer[:count] = self._block[within : within + count]
        self._at += count
        return count
