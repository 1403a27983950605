"""Where inputs are, as text: taken apart, checked, and shown without credentials.

Nothing here opens anything; `door` does, and checks every address by this module first.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from urllib.parse import SplitResult, urlsplit

from ...printable import printable

LOCAL = frozenset({"file", "local"})
WEB = frozenset({"http", "https"})
STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"})
ARCHIVES = frozenset({"zip", "tar"})
READ = LOCAL | WEB | STORES | ARCHIVES
# Names of a container before an @, which in other addresses is the user.
_CONTAINER_FIRST = frozenset({"az", "abfs", "abfss"})

# The most names that the braces of a pattern may stand for.
MAX_NAMES = 1_000_000

_PROTOCOL = r"[A-Za-z][A-Za-z0-9+.\-_]*"
_ADDRESS = re.compile(rf"({_PROTOCOL})(?:://(.*)|::(.*))", re.DOTALL)
_ADDRESSES_IN_TEXT = re.compile(rf"{_PROTOCOL}://[^\s'\"<>|]+")
_ONE_SLASH = re.compile(rf"(?:{'|'.join(sorted(READ | {'data'}))}):(?!//|:)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


@dataclass(frozen=True)
class Allowed:
    """What may be opened beyond the defaults of the extract package's README.

    Attributes:
        protocols: names in lower case.
        hosts: (host, port) that may be in a private network; None is any port.
    """

    protocols: frozenset[str] = frozenset()
    hosts: frozenset[tuple[str, int | None]] = frozenset()

    @classmethod
    def of(cls, source: str, protocols: Iterable[str] = (), hosts: Iterable[str] = ()) -> Allowed:
        """What the options allow, and the host that the input itself names.

        Args:
            protocols: names as of `--allow-protocol`.
            hosts: HOST or HOST:PORT as of `--allow-host`.

        Raises:
            ValueError: neither the name of a protocol nor a host.
        """
        names = [name.lower().removesuffix("://") for name in protocols]
        for name in names:
            if not re.fullmatch(_PROTOCOL, name):
                raise ValueError(f"a protocol is a name such as ftp, got {printable(name)!r}")
        named = [_host(text) for text in hosts]
        if is_address(source):
            base = parse(source).base
            if base.protocol in WEB:
                named.append(_origin(base.url))
        return cls(frozenset(names), frozenset(named))

    def private(self, host: str, port: int) -> bool:
        """Whether `host` may be in a private network."""
        return not self.hosts.isdisjoint({(host, None), (host, port)})


def _host(text: str) -> tuple[str, int | None]:
    whole = f"[{text}]" if text.count(":") > 1 and "[" not in text else text
    try:
        parts = urlsplit(f"//{whole}")
        if parts.hostname and parts.netloc == whole and not re.search(r"[@\\\s%]", whole):
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ValueError(f"a host is HOST or HOST:PORT, got {printable(text)!r}")


def _origin(url: SplitResult) -> tuple[str, int]:
    assert url.hostname is not None
    return url.hostname, url.port or (443 if url.scheme == "https" else 80)


@dataclass(frozen=True)
class Address:
    """An address taken apart: `PROTOCOL://path`, or `PROTOCOL://path::inner`.

    Attributes:
        protocol: in lower case.
        path: what follows, for the web with its host.
        inner: the address of the file that this one is in; of an archive's member, its archive.
    """

    protocol: str
    path: str
    inner: Address | None = None

    def __str__(self) -> str:
        text = f"{self.protocol}://{self.path}"
        return text if self.inner is None else f"{text}::{self.inner}"

    @property
    def base(self) -> Address:
        """The address that all others are in."""
        return self if self.inner is None else self.inner.base

    @property
    def local(self) -> bool:
        return self.base.protocol in LOCAL

    @property
    def url(self) -> SplitResult:
        """The parts of an address on the web."""
        return urlsplit(f"{self.protocol}://{self.path}")

    @property
    def name(self) -> str:
        """The path without what is no part of the file's name."""
        return self.path.partition("?")[0].partition("#")[0] if self.inner is None else self.path

    def beside(self, line: str) -> Address:
        """What a relative line of the list at this address names; a line that begins with a slash
        counts from the root of the store."""
        root = ""
        path = self.name
        if self.protocol in WEB:
            root, slash, rest = path.partition("/")
            path = slash + rest
        path = posixpath.normpath(posixpath.join(posixpath.dirname(path), line))
        path = path if root or line.startswith("/") else path.lstrip("/")
        return Address(self.protocol, f"{root}{path}", self.inner)


def is_address(text: str) -> bool:
    """Whether `text` is an address, `PROTOCOL://...` or a chain with `::`, rather than a path."""
    return "://" in text


def parse(text: str) -> Address:
    """
    Raises:
        ValueError: `text` is no address that anything could be read from. The message has no
            credentials.
    """
    found = _ADDRESS.match(text)
    if found is None or _CONTROL.search(text):
        raise ValueError(f"{_roughly(text)}: is no address; one is PROTOCOL://...")
    protocol, path, chained = found.group(1).lower(), found.group(2) or "", found.group(3)
    if protocol in WEB:
        address = Address(protocol, path)
        try:
            url = address.url
            host, _ = url.hostname, url.port
        except ValueError:
            host = None
        if not host or re.search(r"[\\\s%]", url.netloc):
            raise ValueError(f"{_roughly(text)}: names no host")
        return Address(protocol, path.partition("#")[0])
    if protocol in LOCAL:
        return Address("file", os.path.abspath(path))
    if chained is None:
        path, separator, chained = path.partition("::")
        if not separator:
            return Address(protocol, path)
    if protocol in STORES:
        raise ValueError(f"{_roughly(text)}: only zip:// and tar:// are in another address by ::")
    inner = parse(chained) if is_address(chained) else Address("file", os.path.abspath(chained))
    return Address(protocol, path, inner)


def check(text: str, allowed: Allowed, *, local: bool = True) -> str:
    """An address or a path as it is opened: a local one absolute, others as they are.

    Args:
        local: whether `text` may name local files.

    Raises:
        ValueError: it may not be opened; what to do.
    """
    if _ONE_SLASH.match(text):
        raise ValueError(
            f"{_roughly(text)}: an address has ://, and a file of such a name is written ./"
        )
    if "\0" in text:
        raise ValueError(f"{printable(text)}: holds a zero byte")
    address = parse(text) if is_address(text) else Address("file", os.path.abspath(text))
    for part in _chain(address):
        _check_protocol(part, address, allowed)
    for part in _chain(address):
        _check_chain(part, address)
    if address.local and not local:
        raise ValueError(
            f"{shown(text)}: a local file, named by a list that is not local itself; keep a copy "
            "of the list here to read it"
        )
    return address.path if address.protocol in LOCAL else str(address)


def _check_protocol(part: Address, whole: Address, allowed: Allowed) -> None:
    if part.protocol not in READ | allowed.protocols:
        raise ValueError(
            f"{shown(str(whole))}: {part.protocol}:// is not read, only local files, http, https, "
            "s3, gs, az, abfs and hf, and zip and tar files there; --allow-protocol "
            f"{part.protocol} opens it, with all that it can reach"
        )


def _check_chain(part: Address, whole: Address) -> None:
    if part.protocol in ARCHIVES:
        if part.inner is None or part.inner.inner is not None:
            raise ValueError(
                f"{shown(str(whole))}: a {part.protocol} is read as {part.protocol}://MEMBER::FILE"
            )
    elif part.inner is not None and part.base.protocol in WEB:
        raise ValueError(
            f"{shown(str(whole))}: {part.protocol}:// would read the web without a check of hosts"
        )


def locate(line: str, own: Address, allowed: Allowed) -> tuple[str, str]:
    """Where a line of the list at `own` points, and the image's id.

    Raises:
        ValueError: it may not be opened, see `check`.
    """
    if is_address(line):
        return check(line, allowed, local=own.local), shown(line)
    if own.protocol == "file":  # a list on this machine, as it is
        if line.startswith("~/"):
            line = os.path.expanduser(line)
        if line.startswith("/"):
            return check(line, allowed), printable(line)
        check(line, Allowed())  # how it is spelled
        return os.path.abspath(os.path.join(os.path.dirname(own.path), line)), printable(line)
    check(line, allowed)  # how it is spelled
    return check(str(own.beside(line)), allowed, local=own.local), printable(line)


def address_of(text: str) -> Address:
    """A path or an address, taken apart."""
    place = localized(text)
    return parse(place) if is_address(place) else Address("file", place)


def label(place: str, root: str) -> str:
    """What ids call a file of which a pattern names many: its name in the folder `root`."""
    if not is_address(place):
        return place.removeprefix(os.path.join(os.path.abspath(root), ""))
    text, folder = shown(place), root if root.endswith("://") else shown(root)
    if parse(place).inner is not None:
        text, folder = text.partition("::")[0], folder.partition("::")[0]
    # Stores that have a root spell it or not.
    return text.replace(":///", "://").removeprefix(folder.replace(":///", "://"))


def localized(text: str) -> str:
    """The absolute local path that `text` is or that a `file://` address names; else the address.

    Raises:
        ValueError: no address.
    """
    if not is_address(text):
        return os.path.abspath(text)
    address = parse(text)
    return address.path if address.protocol in LOCAL else str(address)


def places_of(names: Iterable[str], source: str) -> list[str]:
    """Where the files are that an input names, each by `localized`.

    Raises:
        ValueError: one of them is named twice.
    """
    places = [localized(name) for name in names]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ValueError(
            f"{shown(source)}: names {shown(twice)} twice; every image may be read once"
        )
    return places


# Without credentials


def shown(text: str) -> str:
    """A path or an address for people: printable, without user, password and fragment, and with
    the SHA-256 of its query, cut to 16 digits, in place of the query."""
    if not is_address(text):
        return printable(text)
    try:
        address = parse(text)
    except ValueError:
        return _roughly(text)
    return printable("::".join(map(_shown_part, _chain(address))))


def _chain(address: Address) -> Iterator[Address]:
    yield address
    if address.inner is not None:
        yield from _chain(address.inner)


def _shown_part(part: Address) -> str:
    if part.protocol in LOCAL:
        return f"{part.protocol}://{part.path}"
    if part.inner is not None and part.protocol in ARCHIVES:
        return f"{part.protocol}://{part.path}"
    name, mark, query = part.path.partition("?")
    _, rest = _user_and_rest(part.protocol, name)
    if mark:
        rest += f"?{hashlib.sha256(query.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
    return f"{part.protocol}://{rest}"


def _user_and_rest(protocol: str, path: str) -> tuple[str, str]:
    authority, slash, rest = path.partition("/")
    user, at, host = authority.rpartition("@")
    if not at or (protocol in _CONTAINER_FIRST and ":" not in user):
        return "", path
    return user, f"{host}{slash}{rest}"


def without_user(text: str) -> str:
    """An address without its user and password."""
    if not is_address(text):
        return text
    return "::".join(
        f"{part.protocol}://{_user_and_rest(part.protocol, part.path)[1]}"
        for part in _chain(parse(text))
    )


def _roughly(text: str) -> str:
    """What is no address: without anything that could be a user, a password or a query."""
    if is_address(text) or _ONE_SLASH.match(text):
        text = re.sub(r"[?#].*", "?", text, flags=re.DOTALL)
        text = re.sub(r"(:/*).*@", r"\1", text, flags=re.DOTALL)
    return printable(text)


def scrubbed(text: str, address: str) -> str:
    """What somebody else said of `address`, without its credentials."""
    text = _ADDRESSES_IN_TEXT.sub(lambda found: shown(found[0]), text)
    for part in address.split("::"):
        user = part.partition("://")[2].rpartition("@")[0]
        query = part.partition("?")[2]
        for secret in (query, *query.split("&"), user, user.partition(":")[2]):
            if secret:
                text = text.replace(secret, "...")
    return printable(text)


# Patterns


def expand_braces(pattern: str) -> list[str]:
    """What the braces of a pattern stand for, as webdataset has them: `{0000..0009}`, `{a,b}`.

    Raises:
        ValueError: neither of these, or more than `MAX_NAMES` names.
    """
    parts = _BRACES.split(pattern)  # texts, with what stood in braces between them
    choices = [
        [part] if index % 2 == 0 else _choices(part, pattern) for index, part in enumerate(parts)
    ]
    count = prod(map(len, choices))
    if count > MAX_NAMES:
        raise ValueError(
            f"{shown(pattern)}: stands for {count} names, more than the limit of {MAX_NAMES}"
        )
    return list(map("".join, itertools.product(*choices)))


def _choices(inside: str, pattern: str) -> list[str]:
    span = _RANGE.fullmatch(inside)
    if span is None:
        if "," not in inside:
            raise ValueError(
                f"{shown(pattern)}: {{{printable(inside)}}} is neither a range, {{0000..0009}}, "
                "nor a choice, {a,b}"
            )
        return inside.split(",")
    first, last = map(int, span.groups())
    if first > last:
        raise ValueError(f"{shown(pattern)}: the range {{{inside}}} is empty")
    if last - first >= MAX_NAMES:
        raise ValueError(
            f"{shown(pattern)}: the range {{{inside}}} has more than the limit of {MAX_NAMES} names"
        )
    width = len(span[1]) if span[1].startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]
