"""The images under a folder of this machine."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from ...printable import printable
from ..records import Item


def walk(root: Path, suffixes: Collection[str]) -> Iterator[Item]:
    """The files with one of the suffixes, not hidden, of a folder and all under it.

    Links are followed, but every folder is visited once: by its own path if that is under the root,
    and otherwise by the first of the links to it, in sorted order.

    Raises:
        OSError: a folder cannot be listed.
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
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in visited:
            continue
        visited.add(identity)
        folders: list[Path] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = Path(entry.path)
                if _is_folder(entry):
                    (links if entry.is_symlink() else folders).append(path)
                elif path.suffix.lower() in suffixes:
                    yield Item(printable(path.relative_to(root).as_posix()), entry.path)
        pending += sorted(folders, reverse=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle of links: a file that cannot be read
        return False
