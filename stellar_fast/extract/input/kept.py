"""What is carried along with each image by `--keep`: labels, captions, the name of its folder."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

from ...printable import printable
from ..records import Item, Value
from .addresses import WEB, is_address, parse
from .archives import Member
from .table import MAX_LINE

FOLDER = "folder"  # kept of what has no such column: the name of an image's folder
OF_ID: Any = object()  # stands for that, where the id is not known yet
MOST_TEXT = 4 << 30  # characters of all images together
MOST_MEMBER = 1 << 20  # bytes of one member beside an image
INT64 = range(-(1 << 63), 1 << 63)
# As webdataset reads what is beside an image by its suffix.
_TEXTS = frozenset({"txt", "text", "transcript"})
_NUMBERS = frozenset({"cls", "cls2", "class", "count", "index", "inx", "id"})
# Numbers that are the same when they are written again: 007 is a name.
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?")
# Where an id, `TAR::MEMBER`, goes from a tar to what is in it; with the digest of a query.
_TAR = re.compile(r"\.tar(?:\?[0-9a-f]{16})?::", re.IGNORECASE)


def folder_of(id: str) -> str | None:
    """The name of the folder that an image is in, by its id: in its tar or zip, if it is in one, or
    the tar's own folder where the tar has no folders."""
    path = id
    if is_address(id):  # of an archive, the member comes first; of the web, the host is no folder
        address = parse(id)
        path = address.name.partition("/")[2] if address.protocol in WEB else address.name
    folders = [part for part in path.split("/")[:-1] if part not in ("", ".")]
    return _TAR.split(folders[-1])[-1] if folders else None


def filled(values: Sequence[Any], id: str) -> tuple[Value, ...]:
    """Values with the folder of `id` for `OF_ID`."""
    return tuple(folder_of(id) if value is OF_ID else value for value in values)


class Budget:
    """What all kept values together may take.

    Attributes:
        left: characters of text.
    """

    def __init__(self) -> None:
        self.left = MOST_TEXT

    def take(self, values: Sequence[Value], where: str) -> None:
        """
        Raises:
            ValueError: a value is longer than one may be, or all are.
        """
        for value in values:
            if not isinstance(value, str):
                continue
            if len(value) > MAX_LINE:
                raise ValueError(
                    f"{where}: {len(value)} characters to keep are more than the limit of "
                    f"{MAX_LINE} of one value"
                )
            self.left -= len(value)
            if self.left < 0:
                raise ValueError(f"{where}: more than {MOST_TEXT} characters to keep")


def places(keep: Sequence[str], columns: list[str], name: str) -> list[int | None]:
    """Where each of `keep` is among the columns of a table; None is the image's folder.

    Raises:
        ValueError: there is no such column, or more than one.
    """
    for wanted in keep:
        if columns.count(wanted) > 1:
            raise ValueError(f"{name}: has {columns.count(wanted)} columns {printable(wanted)!r}")
        if wanted not in columns and wanted != FOLDER:
            known = ", ".join(printable(column)[:100] for column in columns[:20])
            has = f"; it has {known}" if columns else ""
            raise ValueError(f"{name}: no column {printable(wanted)!r} to keep{has}")
    return [columns.index(wanted) if wanted in columns else None for wanted in keep]


# Beside an image in a tar


def suffixes_of(keep: Collection[str]) -> set[str]:
    """Suffixes of the members of a tar that have what is kept."""
    return {_member(name)[0] for name in keep if name != FOLDER}


def _member(name: str) -> tuple[str, list[str]]:
    """The suffix of a member, and the fields in it: `cls`, or `label` and `json.label` of .json."""
    if name in _TEXTS | _NUMBERS:
        return name, []
    return "json", name.removeprefix("json.").split(".")


def sample_of(name: str) -> tuple[str, str]:
    """A member's key and suffix, as webdataset has them: up to the first dot of its name, and what
    follows."""
    folder, base = posixpath.split(name)
    key, _, suffix = base.partition(".")
    return posixpath.join(folder, key), suffix.lower()


def read_member(
    file: IO[bytes], suffix: str, member: Member, keep: Sequence[str], where: str
) -> dict[str, Value]:
    """What is kept of a member beside an image.

    Raises:
        ValueError: it is too long, no UTF-8 or no JSON, or a field holds no single value.
    """
    if member.holes or member.size > MOST_MEMBER:
        raise ValueError(f"{where}: {member.size} bytes are more than the limit of {MOST_MEMBER}")
    file.seek(member.offset)
    said = _said(suffix, file.read(member.size), where)
    found: dict[str, Value] = {}
    for name in keep:
        wanted, fields = _member(name)
        if name == FOLDER or wanted != suffix:
            continue
        value = said
        for field in fields:
            value = value.get(field) if isinstance(value, dict) else None
        if isinstance(value, dict | list):
            what = "an object" if isinstance(value, dict) else "a list"
            raise ValueError(
                f"{where}: {printable(name)} is {what}; integers, floats, booleans and text are "
                "kept, and a field of an object is named with a dot"
            )
        found[name] = value
    return found


def _said(suffix: str, content: bytes, where: str) -> Any:
    try:
        text = content.decode()
        if suffix in _TEXTS:
            return text
        if suffix in _NUMBERS:
            text = text.strip()
            return int(text) if _INTEGER.fullmatch(text) else text
        return json.loads(text)
    except UnicodeDecodeError:
        raise ValueError(f"{where} is no UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is no JSON that can be read") from None


def of_sample(keep: Sequence[str], id: str, beside: Mapping[str, Value]) -> tuple[Value, ...]:
    """What is kept of an image, of the members with its key."""
    return tuple(folder_of(id) if name == FOLDER else beside.get(name) for name in keep)


# Types


def numbers_of(items: list[Item], keep: Sequence[str]) -> list[Item]:
    """Items of a text table, whose values are numbers in columns where all of them are."""
    columns: list[list[Value]] = []
    for place in range(len(keep)):
        texts = [item.kept[place] for item in items]
        given = [text for text in texts if isinstance(text, str)]
        convert: Callable[[str], Value] = str
        if keep[place] == FOLDER:
            pass  # names, whatever they look like
        elif given and all(_INTEGER.fullmatch(text) and int(text) in INT64 for text in given):
            convert = int
        elif given and all(map(_FLOAT.fullmatch, given)):
            convert = float
        columns.append([convert(text) if isinstance(text, str) else None for text in texts])
    return [
        replace(item, kept=values)
        for item, values in zip(items, zip(*columns, strict=True), strict=True)
    ]


def settled(items: list[Item], keep: Sequence[str]) -> tuple[list[Item], dict[str, str]]:
    """Items with one type in each column of what is kept, and these types, as Arrow names them.

    Integers among floats become floats.

    Raises:
        ValueError: a column has values of several types, or none.
    """
    types: dict[str, str] = {}
    for place, name in enumerate(keep):
        first: dict[type, Item] = {}
        for item in items:
            value = item.kept[place]
            if value is not None and type(value) not in first:
                first[type(value)] = item
        types[name] = _type_of(name, place, first)
        if types[name] == "float64" and int in first:
            items = [
                replace(item, kept=(*item.kept[:place], float(value), *item.kept[place + 1 :]))
                if type(value := item.kept[place]) is int
                else item
                for item in items
            ]
        _check_values(items, name, place, types[name])
    return items, types


_NAMES = {int: "int64", float: "float64", str: "string", bool: "bool"}


def _type_of(name: str, place: int, first: dict[type, Item]) -> str:
    if not first:
        raise ValueError(f"no image has a value of {printable(name)!r} to keep")
    if first.keys() == {int, float}:
        return "float64"
    if len(first) > 1:
        kinds = " and ".join(
            f"{printable(repr(item.kept[place]))[:100]} of {item.id}" for item in first.values()
        )
        raise ValueError(f"the values of {printable(name)!r} are not of one type: {kinds}")
    return _NAMES[next(iter(first))]


def _check_values(items: Sequence[Item], name: str, place: int, kind: str) -> None:
    if kind not in ("int64", "string"):
        return
    for item in items:
        value = item.kept[place]
        if isinstance(value, int) and value not in INT64:
            raise ValueError(f"{item.id}: {printable(name)!r} is {value}, beyond 64 bits")
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{item.id}: {printable(name)!r} is no text of UTF-8") from None
