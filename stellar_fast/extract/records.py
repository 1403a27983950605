"""What the parts of an extraction hand each other."""

from __future__ import annotations

import os
from dataclasses import dataclass

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Item:
    """One image to read.

    Attributes:
        id: what the index calls it: its path, or its tar and member as `TAR::MEMBER`; printable.
        file: where it is, a local path or an address; for a member, its tar.
        offset, size: for a member of a tar, its bytes there.
    """

    id: str
    file: str
    offset: int | None = None
    size: int | None = None
