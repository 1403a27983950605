"""The images in tars, found by their headers, so that each can be read on its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from ...printable import printable
from ..records import Item, Value
from .addresses import Allowed, label, places_of, shown
from .archives import Member, files
from .door import open_named
from .kept import Budget, of_sample, read_member, sample_of, suffixes_of
from .sieve import Sieve

# Tars read through at once; in remote stores each waits for the network most of the time.
THREADS = 8


def read_tars(
    source: str,
    root: str,
    names: list[str],
    sieve: Sieve,
    allowed: Allowed,
    keep: Sequence[str] = (),
) -> list[Item]:
    """The images of tars, in the order of the tars and of their members.

    A link is the file that it leads to, as in a folder, if that is in the same tar.

    Args:
        root: the folder that the ids count the tars' names from.
        sieve: tells images by their names, and counts what else there is.
        keep: what is carried along of the members beside an image, see `kept.values_of`.

    Raises:
        ValueError: a tar is damaged, compressed or named twice; a member is there twice; no images.
        OSError: a tar cannot be read.
    """
    places = places_of(names, source)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(partial(_read_tar, root, allowed, keep, Budget()), places))
    items = [item for part, _ in found for item in part]
    for _, one in found:
        for reason, count in one.skipped.items():
            sieve.skip(reason, count)
    if not items:
        raise ValueError(f"{shown(source)}: no images in it; {sieve.nothing()}")
    return items


def _read_tar(
    root: str, allowed: Allowed, keep: Sequence[str], budget: Budget, place: str
) -> tuple[list[Item], Sieve]:
    name_of, sieve = label(place, root), Sieve()
    items = []
    seen = set()
    keys: list[str] = []  # of the items
    beside: dict[str, dict[str, Value]] = {}  # what is kept of the members with a key
    with open_named(place, allowed, "tar") as file:
        if file.seek(0, 2) == 0:
            sieve.skip("empty tars")
            return [], sieve
        for name, member in files(file, shown(place)):
            key, suffix = sample_of(name)
            if suffix in suffixes_of(keep) and isinstance(member, Member):
                where = f"{shown(place)}: {printable(name)}"
                if f"{key}.{suffix}" in seen:
                    raise ValueError(f"{where} is there twice; an image has one")
                seen.add(f"{key}.{suffix}")
                found = read_member(file, suffix, member, keep, where)
                budget.take(list(found.values()), where)
                beside.setdefault(key, {}).update(found)
                continue
            if not sieve.keeps(name):
                continue
            if isinstance(member, str):
                sieve.skip(member)
                continue
            if member.holes:
                raise ValueError(f"{shown(place)}: {printable(name)} is stored with holes")
            id = printable(f"{name_of}::{name}")
            if id in seen:
                raise ValueError(f"{id} is in the tar twice; every image may be read once")
            seen.add(id)
            items.append(Item(id, place, member.offset, member.size))
            keys.append(key)
    if keep:
        items = [
            replace(item, kept=of_sample(keep, item.id, beside.get(key, {})))
            for item, key in zip(items, keys, strict=True)
        ]
    return items, sieve
