"""Photograph-like scenes drawn by code, for the demo and tests: no picture of anyone's is shipped.

Things of one kind on a background of two colours, with texture, blur and grain; a function of the
scene, its size and seed alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZES = ((960, 720), (720, 960), (1024, 683), (768, 768), (900, 600), (600, 900))
JPEG_QUALITY = 90
# Colours above, below and of the things; what these are, how many, and their size in heights.
SCENES = {
    "mountains": ((110, 150, 210), (70, 90, 60), (96, 88, 90), "triangle", 5, 0.45),
    "sea": ((240, 180, 120), (20, 70, 110), (235, 235, 225), "triangle", 4, 0.16),
    "forest": ((150, 170, 140), (40, 60, 25), (52, 36, 22), "trunk", 14, 0.5),
    "city": ((150, 160, 180), (60, 60, 66), (120, 105, 95), "block", 9, 0.4),
    "flowers": ((90, 130, 60), (30, 80, 30), (220, 70, 130), "disc", 16, 0.09),
    "fruit": ((190, 170, 140), (120, 80, 50), (210, 120, 20), "disc", 5, 0.22),
    "night": ((10, 14, 40), (20, 18, 24), (250, 220, 150), "disc", 30, 0.03),
}


def draw(scene: str, width: int, height: int, seed: int) -> Image.Image:
    """One RGB picture of `width` x `height` pixels.

    Args:
        scene: of `SCENES`.

    Raises:
        ValueError: unknown scene.
    """
    if scene not in SCENES:
        raise ValueError(f"unknown scene {scene!r}; known: {', '.join(SCENES)}")
    rng = np.random.default_rng([seed, list(SCENES).index(scene)])
    above, below, colour, kind, count, size = SCENES[scene]
    down = np.linspace(0, 1, height)[:, None, None] ** rng.uniform(0.6, 1.6)
    ground = (1 - down) * np.array(above) + down * np.array(below)
    ground = ground * rng.uniform(0.9, 1.1, 3) * (1 + 0.25 * _texture(width, height, rng))
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for far in np.sort(rng.uniform(0.3, 1, count)):  # the far ones first: small, and higher up
        half = far * size * height / 2 * rng.uniform(0.7, 1.2)
        x, y = rng.uniform(0, width), height * (0.25 + 0.6 * far * rng.uniform(0.4, 1.1))
        fill = tuple(int(min(255, part)) for part in colour * rng.uniform(0.6, 1.25, 3))
        if kind == "triangle":
            pen.polygon([(x - half, y), (x + half, y), (x, y - 1.5 * half)], fill)
        elif kind == "disc":
            pen.ellipse([x - half, y - half, x + half, y + half], fill)
        else:
            side = half * (0.2 if kind == "trunk" else 0.5)
            pen.rectangle([x - side, y - 1.6 * half, x + side, y + half], fill)
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(height / 900)), np.float64)
    soft = soft * (1 + 0.12 * _texture(width, height, rng)) + rng.normal(0, 4, soft.shape)
    return Image.fromarray(soft.clip(0, 255).astype(np.uint8))


def _texture(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of four octaves in about [-1, 1]: (height, width, 1)."""
    total = np.zeros((height, width))
    for octave in range(4):
        cells = 5 << octave
        coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return total[:, :, None]


def write(folder: Path, count: int) -> list[Path]:
    """Writes `count` JPEG files of varied scenes and sizes into `folder`: their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        scene = list(SCENES)[index % len(SCENES)]
        path = folder / f"{scene}-{index // len(SCENES) + 1}.jpg"
        draw(scene, *SIZES[index % len(SIZES)], seed=index).save(path, quality=JPEG_QUALITY)
        paths.append(path)
    return paths
