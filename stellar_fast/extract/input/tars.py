"""The images in tars, found by their headers, so that each can be read on its own."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ...printable import printable
from ..records import Item
from .addresses import Allowed, is_address, localized, parse, shown
from .archives import members
from .door import open_file

# Tars read through at once; in remote stores each waits for the network most of the time.
THREADS = 8


def read_tars(
    source: str, root: str, names: list[str], suffixes: Collection[str], allowed: Allowed
) -> list[Item]:
    """The images of tars, in the order of the tars and of their members.

    Args:
        root: the folder that the ids count the tars' names from.

    Raises:
        ValueError: a tar is damaged, compressed or named twice; a member is there twice; no images.
        OSError: a tar cannot be read.
    """
    places = [localized(name) for name in names]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ValueError(
            f"{shown(source)}: names {shown(twice)} twice; every image may be read once"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(partial(_read_tar, root, suffixes, allowed), places)
        items = [item for part in found for item in part]
    if not items:
        raise ValueError(
            f"{shown(source)}: no images in it; looked for {' '.join(sorted(suffixes))}"
        )
    return items


def _read_tar(root: str, suffixes: Collection[str], allowed: Allowed, place: str) -> list[Item]:
    label = _label(place, root)
    items = []
    seen = set()
    try:
        file = open_file(place, allowed)
    except FileNotFoundError:
        raise ValueError(f"{shown(place)}: no such tar") from None
    with file:
        for member in members(file, shown(place)):
            base = posixpath.basename(member.name)
            wanted = posixpath.splitext(base)[1].lower() in suffixes
            if not wanted or base.startswith(".") or not member.regular:
                continue
            if member.holes:
                raise ValueError(f"{shown(place)}: {printable(member.name)} is stored with holes")
            id = printable(f"{label}::{member.name}")
            if id in seen:
                raise ValueError(f"{id} is in the tar twice; every image may be read once")
            seen.add(id)
            items.append(Item(id, place, member.offset, member.size))
    return items


def _label(place: str, root: str) -> str:
    """What ids call a tar: its name in `root`."""
    if not is_address(place):
        return place.removeprefix(os.path.join(os.path.abspath(root), ""))
    text, folder = shown(place), root if root.endswith("://") else shown(root)
    if parse(place).inner is not None:
        text, folder = text.partition("::")[0], folder.partition("::")[0]
    # Stores that have a root spell it or not.
    return text.replace(":///", "://").removeprefix(folder.replace(":///", "://"))
