"""What of a photograph a preset shows to the model, for people to look at."""

from __future__ import annotations

from PIL import Image

from .presets import EVAL_SIDE, SIZE, check_preset

SHOWN_SIDE = 512  # pixels: more than a panel of a picture has


def seen(image: Image.Image, preset: str) -> Image.Image:
    """The part of a photograph that a preset shows to the model, in the photograph's own
    proportions, no longer than 512 pixels."""
    check_preset(preset)
    if preset == "eval":
        side = round(min(image.size) * SIZE / EVAL_SIDE)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    scale = SHOWN_SIDE / max(image.size)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
