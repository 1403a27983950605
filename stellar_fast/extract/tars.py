"""The images in tars, found by their headers, so that each can be read on its own."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from .layout import Item
from .locations import filesystem, localized

# Tars read through at once; in remote stores each waits for the network most of the time.
THREADS = 8


def read_tars(source: str, root: str, names: list[str], suffixes: Collection[str]) -> list[Item]:
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
        raise ValueError(f"{source}: names {twice} twice; every image may be read once")

    folder = filesystem(localized(root))[1].rstrip("/") + "/"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda place: _read_tar(folder, place, suffixes), places)
        items = [item for part in found for item in part]
    if not items:
        raise ValueError(f"{source}: no images in it; looked for {' '.join(sorted(suffixes))}")
    return items


def _read_tar(folder: str, place: str, suffixes: Collection[str]) -> list[Item]:
    fs, path = filesystem(place)
    name = path.removeprefix(folder)
    items = []
    try:
        file = fs.open(path, "rb")
    except FileNotFoundError:
        raise ValueError(f"{place}: no such tar") from None
    with file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # or all would stay in memory
                    base = posixpath.basename(member.name)
                    wanted = posixpath.splitext(base)[1].lower() in suffixes
                    if not wanted or base.startswith(".") or not member.isfile():
                        continue
                    if member.issparse():
                        raise ValueError(f"{place}: {member.name} is stored with holes")
                    id = os.fsencode(f"{name}::{member.name}").decode("utf-8", "backslashreplace")
                    items.append(Item(id, place, member.offset_data, member.size))
                # tarfile takes a damaged header for the end, and members would be lost.
                file.seek(tar.offset)
                end = file.read(tarfile.BLOCKSIZE)
        except tarfile.TarError as error:
            raise ValueError(
                f"{place}: cannot be read as a tar: {error}; compressed ones are not read, "
                "as their members cannot be found alone"
            ) from error
    if end != bytes(tarfile.BLOCKSIZE):
        raise ValueError(
            f"{place}: is cut off or damaged at byte {tar.offset}, where a member or the end of "
            "the tar was expected"
        )
    seen = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{item.id} is in the tar twice; every image may be read once")
        seen.add(item.id)
    return items
