"""What an engine accepts: batches of images as one (B, 3, H, W) tensor, and features."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# How far past the ends of [0, 1] a pixel may be: bicubic resizing overshoots by a quarter on the
# hardest edges, and one resize after another by more. Pixels in 0..255 go beyond it, and so do
# normalised ones.
OVERSHOOT = 0.5


def as_batch(images: Any, preset: str, patch_size: int, max_patches: int) -> tuple[Tensor, bool]:
    """Images in any accepted form as a tensor, and whether its range is still to be checked.

    Args:
        images: a float or uint8 tensor or NumPy array (B, 3, H, W), uint8 also (B, H, W, 3); or a
            list of PIL images and paths, each decoded and resized by `preset` (`images.PRESETS`);
            or a mapping that holds one of these as "image".
        patch_size, max_patches: images are of one patch at least, and of no more than these.

    Raises:
        TypeError: neither a tensor, an array nor a list of images.
        ValueError: wrong shape, size, channels or dtype, or a mapping without "image".
        ImageError: a listed image could not be decoded.
    """
    if not isinstance(images, Tensor) and isinstance(images, Mapping):
        if "image" not in images:
            raise ValueError(
                "encode reads 'image' of a mapping; this one holds "
                f"{', '.join(map(str, images)) or 'nothing'}"
            )
        images = images["image"]
    if isinstance(images, np.ndarray):
        images = _from_numpy(images, patch_size, max_patches)
    if isinstance(images, Tensor):
        batch = _check_layout(images)
        _check_size(batch, patch_size, max_patches)
        if batch.dtype.itemsize == 1 and batch.dtype != torch.uint8:
            batch = batch.float()  # float8 has neither comparison nor arithmetic
        return batch, batch.dtype != torch.uint8
    if _is_one_image(images):
        raise TypeError(
            f"encode takes a batch, got one {type(images).__name__}; put it into a list: "
            "encode([image])"
        )
    if isinstance(images, Sequence):
        batch = _from_list(images, preset)
        _check_size(batch, patch_size, max_patches)
        return batch, False
    raise TypeError(
        "encode takes a tensor or NumPy array (B, 3, H, W), or a list of PIL images or paths; "
        f"got {type(images).__name__}"
    )


def _is_one_image(images: Any) -> bool:
    from PIL import Image

    return isinstance(images, str | bytes | os.PathLike | Image.Image)


def _from_list(images: Sequence[Any], preset: str) -> Tensor:
    from ..images.presets import SIZE, check_preset, load_batch

    check_preset(preset)
    for index, image in enumerate(images):
        if not _is_one_image(image):
            raise TypeError(
                f"a list holds PIL images or paths; item {index} is a {type(image).__name__} "
                "(stack tensors or arrays into one batch)"
            )
    if not images:
        return torch.zeros((0, 3, SIZE, SIZE), dtype=torch.uint8)
    return load_batch(images, preset)


def _from_numpy(array: np.ndarray, patch_size: int, max_patches: int) -> Tensor:
    if array.dtype.kind not in "fu" or (array.dtype.kind == "u" and array.dtype.itemsize != 1):
        raise ValueError(
            f"images must be uint8 or floats in [0, 1], got a NumPy array of dtype {array.dtype}"
        )
    # torch has no negative strides, foreign byte order or float128; it warns of read-only memory.
    native = np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    usable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    if native != array.dtype or not usable:
        # Before the copy: a view that repeats one value may stand for terabytes.
        kind = torch.uint8 if array.dtype.kind == "u" else torch.float32
        described = _check_layout(torch.empty(array.shape, dtype=kind, device="meta"))
        _check_size(described, patch_size, max_patches)
        array = np.array(array, dtype=native, order="C")
    return torch.from_numpy(array)


def _check_layout(images: Tensor) -> Tensor:
    """`images` as (B, 3, H, W), a view."""
    shape = tuple(images.shape)
    if images.is_sparse or images.layout != torch.strided or images.is_quantized:
        raise ValueError(f"images must be a dense tensor, got layout {images.layout}")
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise ValueError(f"images must be uint8 or floats in [0, 1], got dtype {images.dtype}")
    if images.dim() == 3:
        raise ValueError(
            f"images must be a batch (B, 3, H, W), got one image {shape}; add a dimension: x[None]"
        )
    if images.dim() != 4:
        raise ValueError(f"images must have shape (B, 3, H, W), got {shape}")
    if shape[1] == 3:
        return images
    if shape[3] == 3:
        if images.dtype == torch.uint8:
            return images.permute(0, 3, 1, 2)
        raise ValueError(
            f"float images must be (B, 3, H, W), got {shape}; channels last is for uint8, "
            "otherwise x.permute(0, 3, 1, 2)"
        )
    raise ValueError(f"images must have 3 channels (RGB), got shape {shape}")


def _check_size(images: Tensor, patch_size: int, max_patches: int) -> None:
    height, width = images.shape[2:]
    if height < patch_size or width < patch_size:
        raise ValueError(
            f"images must be at least one patch of {patch_size}x{patch_size} pixels, got "
            f"{height}x{width}"
        )
    patches = (height // patch_size) * (width // patch_size)
    check_patches(patches, max_patches, f"images of {height}x{width} pixels, {patches} patches")


def check_patches(patches: int, max_patches: int, what: str) -> None:
    """Raises ValueError when `what` has more patches an image than the engine takes."""
    if patches > max_patches:
        raise ValueError(
            f"{what}, are more than max_patches={max_patches}: resize or cut them, or load with a "
            "larger max_patches (attention takes time by its square)"
        )


def check_range(images: Tensor) -> None:
    """Raises ValueError where the floats `images`, at least one, are NaN or further from [0, 1]
    than a resize overshoots."""
    if images.device.type == "cpu" and images.dtype == torch.float32:
        # By this thread alone: torch's would still be spinning when another runtime's begin.
        array = images.detach().numpy()
        low, high = float(array.min()), float(array.max())
    else:
        low, high = torch.stack(images.aminmax()).tolist()  # a GPU is waited for once
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        found = "NaN" if low != low or high != high else f"values from {low:.4g} to {high:.4g}"
        hint = ""
        if high > 2:
            hint = "; pixels in 0..255 go in as uint8, or divided by 255"
        elif low < 0:
            hint = "; normalisation by mean and std is inside the model, do not apply it before"
        raise ValueError(f"float images must lie in [0, 1], found {found}{hint}")


def as_features(
    features: Mapping[str, Tensor] | Tensor, spatial: Tensor | None, width: int, tokens: int
) -> tuple[Tensor, ...]:
    """What `Engine.reconstruct` was given, as (lowrank,) or (spatial, sparse).

    Args:
        features: the dict of `encode`, or sparse (B, K, D).
        spatial: (B, P, K), with sparse tokens.
        width: D.
        tokens: K.

    Raises:
        TypeError, ValueError: features are missing or are of another type or shape.
    """
    if isinstance(features, Tensor):
        if spatial is None:
            raise ValueError(
                "reconstruct needs the features dict of encode, or sparse and spatial; "
                "spatial is missing"
            )
        features = {"sparse": features, "spatial": spatial}
    elif not isinstance(features, Mapping):
        raise TypeError(
            f"reconstruct takes a features dict or tensors, got {type(features).__name__}"
        )
    elif spatial is not None:
        raise ValueError("spatial goes with sparse tokens, the features dict has its own")
    features = {name: part for name, part in features.items() if part is not None}
    names = ("lowrank",) if "lowrank" in features else ("spatial", "sparse")
    missing = [name for name in names if name not in features]
    if missing:
        raise ValueError(
            "reconstruct needs 'lowrank', or 'sparse' and 'spatial'; got "
            f"{', '.join(map(str, features)) or 'none'}"
        )
    expected = {"lowrank": ("P", width), "spatial": ("P", tokens), "sparse": (tokens, width)}
    parts = tuple(features[name] for name in names)
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(part).__name__}")
        want = expected[name]
        fits = part.dim() == 3 and part.is_floating_point() and part.shape[2] == want[1]
        if not fits or (name == "sparse" and part.shape[1] != tokens) or len(part) != len(parts[0]):
            raise ValueError(
                f"{name} must be a float tensor (B, {want[0]}, {want[1]}), got {part.dtype} "
                f"{tuple(part.shape)}"
            )
    return parts
