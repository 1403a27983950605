"""Pictures: decoding by written rules, and the presets that make model input of them."""

from .presets import PRESETS, apply_preset, eval_size, load_batch, load_image, preset_pixels
from .reader import decode
from .refusals import MAX_PIXELS, MAX_SCANS

__all__ = [
    "MAX_PIXELS",
    "MAX_SCANS",
    "PRESETS",
    "apply_preset",
    "decode",
    "eval_size",
    "load_batch",
    "load_image",
    "preset_pixels",
]
