"""What decoding processes of tests run: `work`, with attacks told by the name of the image."""

import os
import time
from pathlib import Path

import numpy as np

from stellar_fast.extract import decoding

MIB = 1 << 20


def attacked_work(*arguments) -> None:
    """A decoding process whose decoder does what the image's name says."""
    read_item, decode = decoding.read_item, decoding.decode
    items = []

    def read(item):
        items.append(item)
        return read_item(item)

    def attack(content, **options):
        name, root = items[-1].id, Path(items[-1].file).parent.parent
        if "mark" in name:
            (root / "marked").touch()
        if "hang" in name:
            time.sleep(600)
        if "loop" in name:
            while True:
                pass
        if "eat" in name:
            eaten = []
            for _ in range(1 << 14):  # more than the machine has
                eaten.append(np.ones(MIB, np.uint8))
        if "one-bite" in name:
            np.ones(1 << 36, np.uint8)
        if "crumbs" in name:
            eaten = []
            while True:
                eaten.append(bytes(100))
        if "write" in name:
            with (root / "written").open("wb", buffering=0) as file:
                for _ in range(8):
                    file.write(bytes(MIB))
        if "core" in name:
            os.chdir(root)
            os.abort()
        return decode(content, **options)

    decoding.read_item, decoding.decode = read, attack
    decoding.work(*arguments)
