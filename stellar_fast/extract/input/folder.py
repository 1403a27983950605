"""The images under a folder of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...printable import printable
from ..records import Item
from .sieve import Sieve


def walk(root: Path, sieve: Sieve) -> Iterator[Item]:
    """The images of a folder and of all under it, as `sieve` tells them by their names.

    Links are followed, but every folder is visited once: by its own path if that is under the root,
    and otherwise by the first of the links to it, in sorted order. A folder that cannot be listed
    is an item, which then cannot be read: one line of the index, and not the end of all others.

    Raises:
        OSError: the root cannot be listed.
    """
    # Not os.walk, which leaves out a folder that cannot be read and circles in links to parents.
    visited: set[tuple[int, int]] = set()
    pending = [root]
    links: list[Path] = []
    while pending or links:
        if not pending:
            links.sort(reverse=True)
            pending.append(links.pop())
        folder = pending.pop()
        try:
            status = folder.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in visited:
                continue
            visited.add(identity)
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError:
            if folder == root:
                raise
            yield _item(folder, root)
            continue
        folders: list[Path] = []
        for entry in found:
            path = Path(entry.path)
            if _is_folder(entry):
                if entry.name.startswith("."):
                    sieve.skip("hidden folders")
                else:
                    (links if entry.is_symlink() else folders).append(path)
            elif sieve.keeps(entry.name):
                yield _item(path, root)
        pending += sorted(folders, reverse=True)


def _item(path: Path, root: Path) -> Item:
    return Item(printable(path.relative_to(root).as_posix()), str(path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle, or is too long
        return False
