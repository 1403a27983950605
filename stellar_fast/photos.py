"""Photograph-like scenes drawn by code, for the demo and tests: no picture of anyone's is shipped.

Every scene is a function of its size and seed alone. Colours are linear light until `_develop`,
which adds what a camera adds: a little blur, vignetting, grain and the tone curve.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

Scene = Callable[[int, int, np.random.Generator], np.ndarray]
SIZES = ((960, 720), (720, 960), (1024, 683), (768, 768), (900, 600), (600, 900))
JPEG_QUALITY = 90


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
    return _develop(SCENES[scene](width, height, rng), rng)


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


def _grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """x in [0, width / height] and y in [0, 1] from the top, (height, width) each."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return x / height, y / height


def _noise(width: int, height: int, cells: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in about [-1, 1] with octaves from `cells` features across the height upward."""
    total = np.zeros((height, width), np.float32)
    amplitude, reach = 1.0, 0.0
    for _ in range(5):
        rows = max(2, round(cells))
        columns = max(2, round(cells * width / height))
        coarse = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
        total += amplitude * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        reach += amplitude
        amplitude, cells = amplitude / 2, cells * 2
    return total * (1.6 / reach)


def _line(width: int, height: int, cells: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise as `_noise`, along the width alone: (1, width)."""
    total = np.zeros((1, width), np.float32)
    for octave in range(6):
        columns = max(4, round(cells * 2**octave * width / height))
        coarse = Image.fromarray(rng.uniform(-1, 1, (1, columns)).astype(np.float32))
        smooth = coarse.resize((width, 1), Image.Resampling.BICUBIC)
        total += np.asarray(smooth) * 0.5**octave
    return total * 0.8


def _blend(below: np.ndarray, colour: np.ndarray | tuple, cover: np.ndarray) -> np.ndarray:
    """`colour` over `below` (H, W, 3), `cover` (H, W) in [0, 1] of it."""
    cover = np.clip(cover, 0, 1)[:, :, None]
    return below * (1 - cover) + np.asarray(colour, np.float32) * cover


def _columns(left: float, right: float, width: int, height: int) -> slice:
    """The pixel columns from `left` to `right` (in picture heights), and a pixel more each way."""
    first, last = int(left * height) - 1, int(right * height) + 2
    return slice(min(max(first, 0), width), min(max(last, 0), width))


def _edge(distance: np.ndarray, height: int) -> np.ndarray:
    """1 where `distance` (in picture heights) is positive, with an edge of about a pixel."""
    return np.clip(distance * height + 0.5, 0, 1)


def _sky(x: np.ndarray, y: np.ndarray, clouds: np.ndarray, warm: float) -> np.ndarray:
    top = np.array([0.10, 0.24, 0.62], np.float32) * (1 - 0.5 * warm)
    low = np.array([0.62, 0.74, 0.86], np.float32) * (1 - warm)
    low = low + np.array([0.95, 0.52, 0.25], np.float32) * warm
    mix = np.clip(y * 1.6, 0, 1)[:, :, None]
    sky = top * (1 - mix) + low * mix
    return _blend(sky, (0.92, 0.90, 0.88), np.clip(clouds * 1.3 - 0.15, 0, 0.85) * (1 - y))


def _mountains(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(width, height)
    warm = rng.uniform(0, 0.7)
    scene = _sky(x, y, _noise(width, height, 3, rng), warm)
    sun_x, sun_y = rng.uniform(0.2, 0.8) * width / height, rng.uniform(0.12, 0.32)
    distance = np.hypot(x - sun_x, y - sun_y)
    scene = scene + np.exp(-distance * 9)[:, :, None] * np.array([1.1, 0.9, 0.55], np.float32)
    scene = _blend(scene, (1.6, 1.5, 1.2), _edge(0.035 - distance, height))
    haze = scene[int(0.5 * height)].mean(axis=0)
    for layer, base in enumerate((0.48, 0.58, 0.70)):
        line = _line(width, height, 2.5, rng) * (0.16 - 0.04 * layer)
        ground = np.array([0.05, 0.11, 0.05], np.float32) * rng.uniform(0.7, 1.5, 3)
        near = (layer + 1) / 3
        rough = 1 + 0.5 * _noise(width, height, 18, rng)[:, :, None]
        shade = haze * (1 - near) * 0.6 + ground * rough * (0.4 + near)
        scene = _blend(scene, shade, _edge(y - base - line, height))
    return scene


def _sea(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(width, height)
    warm = rng.uniform(0.3, 1.0)
    horizon = rng.uniform(0.42, 0.55)
    scene = _sky(x, y, _noise(width, height, 2.5, rng), warm)
    sun_x = rng.uniform(0.3, 0.7) * width / height
    distance = np.hypot(x - sun_x, y - horizon + 0.12)
    scene = scene + np.exp(-distance * 6)[:, :, None] * np.array([1.2, 0.7, 0.3], np.float32)
    depth = np.clip((y - horizon) / (1 - horizon), 1e-3, 1)
    # Waves shrink towards the horizon: noise is sampled in perspective.
    waves = _noise(width, height * 2, 60, rng)
    rows = np.clip((depth**0.45 * (height * 2 - 1)).astype(int), 0, height * 2 - 1)
    wave = np.take_along_axis(waves, rows, axis=0)
    water = np.array([0.03, 0.10, 0.16], np.float32) * (1 + 0.9 * wave[:, :, None])
    glitter = np.exp(-(((x - sun_x) / (0.04 + 0.25 * depth)) ** 2)) * np.clip(wave - 0.1, 0, 1)
    water = water + glitter[:, :, None] * np.array([2.4, 1.5, 0.7], np.float32)
    scene = _blend(scene, water, _edge(y - horizon, height))
    sand = np.array([0.52, 0.41, 0.27], np.float32) * (
        1 + 0.25 * _noise(width, height, 90, rng)[:, :, None]
    )
    shore = 0.88 + 0.03 * _line(width, height, 1.5, rng)
    scene = _blend(scene, (0.85, 0.88, 0.88), _edge(y - shore + 0.012, height) * 0.8)
    return _blend(scene, sand, _edge(y - shore, height))


def _still_life(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(width, height)
    table = rng.uniform(0.5, 0.6)
    wall = np.array([0.36, 0.33, 0.30], np.float32) * rng.uniform(0.6, 1.3, 3)
    light = 1.3 - 0.8 * np.hypot(x - 0.2, y)
    scene = wall * (light * (1 + 0.04 * _noise(width, height, 40, rng)))[:, :, None]
    grain = np.sin((y * 46 + 0.8 * _noise(width, height, 3, rng)) * 6) * 0.18
    grain = grain + 0.12 * _noise(width, height, 25, rng)
    wood = np.array([0.34, 0.17, 0.07], np.float32) * (1 + grain)[:, :, None] * light[:, :, None]
    scene = _blend(scene, wood, _edge(y - table, height))
    sun = np.array([-0.55, -0.65, 0.53], np.float32)  # towards the light: left, up, to the viewer
    texture = _noise(width, height, 30, rng)
    count = int(rng.integers(3, 6))
    places = (np.arange(count) + rng.uniform(0.3, 0.7, count)) / count * width / height
    for centre_x in rng.permutation(places):
        radius = rng.uniform(0.09, 0.17)
        centre_y = table + rng.uniform(0.06, 0.24) - radius * 0.4
        u, v = (x - centre_x) / radius, (y - centre_y) / radius
        shadow = np.exp(-(((u - 0.7) / 1.3) ** 2 + ((v - 0.85) / 0.28) ** 2) * 1.6)
        scene = scene * (1 - 0.75 * np.where(v > 0.3, shadow, 0))[:, :, None]
        depth = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
        lambert = np.clip(u * sun[0] + v * sun[1] + depth * sun[2], 0, 1)
        shine = np.clip(2 * lambert * depth - sun[2], 0, 1) ** 40
        fruit = rng.choice([(0.62, 0.05, 0.03), (0.75, 0.33, 0.02), (0.30, 0.42, 0.04)])
        skin = fruit * (1 + 0.15 * texture)[:, :, None]
        ball = skin * (0.08 + 1.15 * lambert)[:, :, None] + 0.8 * shine[:, :, None]
        scene = _blend(scene, ball, _edge(radius - np.hypot(x - centre_x, y - centre_y), height))
    return scene


def _street(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(width, height)
    warm = rng.uniform(0, 0.5)
    scene = _sky(x, y, _noise(width, height, 3, rng), warm)
    middle, horizon = width / height / 2, 0.62
    road = np.array([0.13, 0.13, 0.14], np.float32) * (
        1 + 0.25 * _noise(width, height, 120, rng)[:, :, None]
    )
    below = np.clip(y - horizon, 1e-3, 1)
    scene = _blend(scene, (0.38, 0.36, 0.33), _edge(y - horizon, height))
    scene = _blend(
        scene, road, _edge(np.minimum(y - horizon, below * 1.1 - abs(x - middle)), height)
    )
    dashes = (np.floor(0.6 / below + rng.uniform()) % 2) * _edge(
        below * 0.025 - abs(x - middle), height
    )
    scene = _blend(scene, (0.8, 0.8, 0.76), dashes * (y > horizon + 0.02))
    plaster = 1 + 0.15 * _noise(width, height, 50, rng)
    for side in (-1, 1):
        edge = 0.05
        while edge < middle + 0.2:
            reach = edge * rng.uniform(1.35, 1.8) + 0.06
            ends = sorted((middle + side * edge, middle + side * reach))
            strip = _columns(ends[0], ends[1], width, height)
            scene[:, strip] = _house(
                scene[:, strip],
                x[:, strip],
                y[:, strip],
                plaster[:, strip],
                side,
                (edge, reach),
                (middle, horizon),
                rng,
            )
            edge = reach
    return scene


def _house(
    scene: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    plaster: np.ndarray,
    side: int,
    span: tuple[float, float],
    vanishing: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """A facade along the street, from `span[0]` to `span[1]` away from the vanishing point."""
    height = len(y)
    away = np.maximum((x - vanishing[0]) * side, 1e-3)
    tall = rng.uniform(0.9, 1.7)  # above the horizon, as a share of the distance from the middle
    up = (vanishing[1] - y) / away  # constant along the lines that meet in the vanishing point
    along = 1 / away  # even steps of this are even steps along the street
    inside = np.minimum.reduce(
        [away - span[0], span[1] - away, (tall - up) * away, (up + 0.9) * away]
    )
    stone = rng.choice(
        [(0.42, 0.20, 0.13), (0.50, 0.43, 0.33), (0.30, 0.32, 0.36), (0.55, 0.5, 0.4)]
    )
    shade = (0.55 if side > 0 else 1.0) * plaster
    wall = stone * shade[:, :, None]
    columns = (along * rng.uniform(0.9, 1.4) * 3 * span[1] + rng.uniform()) % 1
    rows = (up * rng.integers(3, 6) + 0.2) % 1
    window = (abs(columns - 0.5) < 0.26) & (abs(rows - 0.5) < 0.3) & (up > -0.25)
    glass = np.where(rng.uniform() < 0.5, (0.10, 0.13, 0.18), (0.20, 0.24, 0.30))
    wall = np.where(window[:, :, None], glass.astype(np.float32), wall)
    return _blend(scene, wall, _edge(inside, height))


def _meadow(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(width, height)
    scene = _sky(x, y, _noise(width, height, 3.5, rng), rng.uniform(0, 0.25))
    horizon = 0.5 + 0.02 * _line(width, height, 1, rng)
    blades = _noise(max(2, width), max(2, height // 6), 40, rng)  # stretched upwards, like grass
    blades = np.asarray(Image.fromarray(blades).resize((width, height), Image.Resampling.BILINEAR))
    depth = np.clip(y - 0.45, 0.02, 1)
    grass = (
        np.array([0.12, 0.25, 0.04], np.float32)
        * (0.8 + 0.7 * blades * np.sqrt(depth) + 0.3 * _noise(width, height, 4, rng))[:, :, None]
    )
    scene = _blend(scene, grass, _edge(y - horizon, height))
    for _ in range(int(rng.integers(2, 5))):
        scene = _tree(scene, x, y, rng)
    colours = ((0.85, 0.75, 0.08), (0.75, 0.08, 0.10), (0.82, 0.80, 0.85))
    for _ in range(160):
        flower_y = rng.uniform(0.58, 1)
        radius = 0.012 * (flower_y - 0.5) * 2
        flower_x = rng.uniform(0, width / height)
        top, left = int((flower_y - radius) * height), int((flower_x - radius) * height)
        bottom, right = top + int(2 * radius * height) + 2, left + int(2 * radius * height) + 2
        patch = np.s_[max(top, 0) : bottom, max(left, 0) : right]
        distance = np.hypot(x[patch] - flower_x, y[patch] - flower_y)
        scene[patch] = _blend(
            scene[patch], colours[rng.integers(3)], _edge(radius - distance, height)
        )
    return scene


def _tree(scene: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = y.shape
    foot_y = rng.uniform(0.52, 0.64)
    size = 0.18 + (foot_y - 0.5) * 1.6
    foot_x = rng.uniform(0.05, 0.95) * width / height
    shadow = np.exp(
        -(((x - foot_x - size * 0.3) / size) ** 2 + ((y - foot_y) / (size * 0.1)) ** 2) * 2
    )
    scene = scene * (1 - 0.6 * shadow)[:, :, None]
    trunk = np.minimum(size * 0.05 - abs(x - foot_x), np.minimum(foot_y - y, y - foot_y + size))
    scene = _blend(scene, (0.10, 0.06, 0.03), _edge(trunk, height))
    leaves = _noise(width, height, 22, rng)
    u, v = (x - foot_x) / (size * 0.55), (y - foot_y + size * 1.05) / (size * 0.6)
    crown = (1 - np.hypot(u, v) + 0.35 * leaves) * size * 0.3
    lit = np.clip(0.75 - 0.45 * u - 0.55 * v + 0.6 * leaves, 0.12, 1.8)
    colour = np.array([0.06, 0.15, 0.03], np.float32) * rng.uniform(0.8, 1.5, 3)
    return _blend(scene, colour * lit[:, :, None], _edge(crown, height))


def _night(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(width, height)
    scene = np.array([0.012, 0.016, 0.035], np.float32) * (1.2 + y)[:, :, None]
    horizon = 0.6
    for _ in range(26):
        left, wide = rng.uniform(-0.1, 1.1) * width / height, rng.uniform(0.05, 0.16)
        roof = horizon - rng.uniform(0.08, 0.42)
        strip = _columns(left, left + wide, width, height)
        u, v = x[:, strip] - left, y[:, strip] - roof  # from the tower's upper left corner
        inside = np.minimum.reduce([u, wide - u, v, horizon - roof - v])
        dark = np.array([0.02, 0.022, 0.03], np.float32) * rng.uniform(0.5, 1.5)
        tower = _blend(scene[:, strip], dark, _edge(inside, height))
        lamps = rng.uniform(size=(60, 30)) < 0.35
        row, column = v / 0.018, u / 0.014
        lit = lamps[np.clip(row, 0, 59).astype(int), np.clip(column, 0, 29).astype(int)]
        lit &= (row % 1 < 0.6) & (column % 1 < 0.6) & (inside > 0.004)
        lamp = np.array([1.0, 0.72, 0.32], np.float32) * rng.uniform(0.5, 1.3)
        scene[:, strip] = np.where(lit[:, :, None], lamp, tower)
    moon = np.hypot(x - rng.uniform(0.2, 0.8) * width / height, y - 0.14)
    craters = 1 + 0.2 * _noise(width, height, 40, rng)
    scene = scene + np.exp(-moon * 14)[:, :, None] * 0.12
    scene = _blend(scene, (0.95 * craters)[:, :, None] * np.ones(3), _edge(0.045 - moon, height))
    ripple = (
        0.01 * _noise(width, height, 60, rng) * height * np.clip(y - horizon, 0, 1) * 3
    ).astype(int)
    rows = np.clip(
        np.round(2 * horizon * height - y * height).astype(int) + ripple * 4, 0, height - 1
    )
    mirror = np.take_along_axis(scene, rows[:, :, None], axis=0) * 0.55
    return np.where((y > horizon)[:, :, None], mirror, scene)


SCENES: dict[str, Scene] = {
    "mountains": _mountains,
    "sea": _sea,
    "still-life": _still_life,
    "street": _street,
    "meadow": _meadow,
    "night": _night,
}


def _develop(light: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Linear light (H, W, 3) to an 8-bit picture, as a camera would."""
    height, width = light.shape[:2]
    x, y = _grid(width, height)
    corner = np.hypot(x - width / height / 2, y - 0.5) / np.hypot(width / height / 2, 0.5)
    light = np.clip(light, 0, None) * (1 - 0.2 * corner**2)[:, :, None]
    tone = (1 - np.exp(-1.6 * light)) ** (1 / 2.2)
    picture = Image.fromarray((np.clip(tone, 0, 1) * 255).astype(np.uint8))
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    grain = rng.normal(0, 2.5, (height, width, 1)).astype(np.float32)
    return Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8))
