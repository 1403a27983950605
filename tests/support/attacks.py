"""What decoding processes of tests run: `work`, with attacks told by the name of the image."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from stellar_fast.extract.work import decoding

MIB = 1 << 20


def attacked_work(*arguments) -> None:
    """A decoding process whose decoder does what the image's name says."""
    read_item, decode = decoding.read_item, decoding.decode
    items = []

    def read(item, allowed):
        items.append(item)
        return read_item(item, allowed)

    def attack(content, **options):
        name, root = items[-1].id, Path(items[-1].file).parent.parent
        if "mark" in name:
            (root / "marked").touch()
        eaten: list[object] = []
        # All of these end at last, and the picture is decoded: the failure of a missing limit.
        if "hang" in name:
            time.sleep(60)
        if "loop" in name:
            while time.process_time() < 60:
                pass
        if "eat" in name:
            eaten.extend(np.ones(MIB, np.uint8) for _ in range(1 << 10))
        if "one-bite" in name:
            eaten.append(np.ones(1 << 30, np.uint8))
        if "crumbs" in name:
            eaten.extend(bytes(100) for _ in range(1 << 23))
        if "write" in name:
            with (root / "written").open("wb", buffering=0) as file:
                for _ in range(8):
                    file.write(bytes(MIB))
        if "core" in name:
            os.chdir(root)
            os.abort()
        return decode(content, **options)

    patched: Any = decoding
    patched.read_item, patched.decode = read, attack
    decoding.work(*arguments)
