"""A folder of photographs as people have them, in many sizes and modes, and of broken files."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from pictures import photograph, saved
from PIL import Image

from stellar_fast import photos

Write = Callable[[Image.Image], bytes]
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation: turn by 90 degrees


def _sixteen_bit(image: Image.Image) -> bytes:
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return saved(Image.fromarray(grey), "PNG")


def _transparent(image: Image.Image) -> bytes:
    image = image.convert("RGBA")
    image.putalpha(image.getchannel("R"))
    return saved(image, "PNG")


KINDS: tuple[tuple[str, Write], ...] = (
    (".jpg", lambda image: saved(image, "JPEG", quality=90)),
    (".JPG", lambda image: saved(image, "JPEG", quality=75, progressive=True)),
    (".jpeg", lambda image: saved(image, "JPEG", exif=ROTATED)),
    (".jpg", lambda image: saved(image.convert("L"), "JPEG")),
    (".jpg", lambda image: saved(image.convert("CMYK"), "JPEG")),
    (".png", lambda image: saved(image, "PNG")),
    (".png", _transparent),
    (".png", lambda image: saved(image.quantize(32), "PNG")),
    (".png", lambda image: saved(image.convert("LA"), "PNG")),
    (".png", lambda image: saved(image.convert("1"), "PNG")),
    (".png", _sixteen_bit),
)


@cache
def _drawn(scene: str) -> Image.Image:
    """A large picture, drawn once a process, that photographs are cut out of."""
    return photos.draw(scene, 440, 440, seed=3)


def _broken(index: int) -> tuple[str, bytes]:
    """A suffix and bytes that are no picture, of five kinds."""
    picture = photograph(200, 150, seed=1000 + index)
    jpeg, png = saved(picture, "JPEG"), saved(picture, "PNG")
    middle = len(png) // 2
    kinds = (
        (".jpg", b""),
        (".png", b"this is no picture"),
        (".jpg", jpeg[: len(jpeg) // 2]),
        (".png", png[:middle] + bytes(64) + png[middle + 64 :]),
        (".jpeg", b"<!DOCTYPE html><html>404</html>"),
    )
    return kinds[index % len(kinds)]


def write_photographs(root: Path, good: int, broken: int) -> Path:
    """`root`, with `good` photographs in it and its folders, and `broken` files between them."""
    rng = np.random.default_rng(5)
    written = 0
    step = max(1, good // broken) if broken else good + 1
    for index in range(good):
        folder = root / ("", "summer", "summer/sea", "ünïcode")[index % 4]
        folder.mkdir(parents=True, exist_ok=True)
        suffix, write = KINDS[index % len(KINDS)]
        width, height = (int(side) for side in rng.integers(60, 400, 2))
        scene = _drawn(list(photos.SCENES)[index % len(photos.SCENES)])
        left, top = (int(rng.integers(0, room + 1)) for room in (440 - width, 440 - height))
        content = write(scene.crop((left, top, left + width, top + height)))
        (folder / f"{index:04}{suffix}").write_bytes(content)
        if index % step == 0 and written < broken:
            suffix, content = _broken(written)
            (folder / f"{index:04}-broken{suffix}").write_bytes(content)
            written += 1
    return root
