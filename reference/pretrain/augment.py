"""The published augmentations of training images, by kornia (extra `pretrain`).

kornia draws from torch's global stream on the CPU: `torch.manual_seed` makes them repeatable.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from ...errors import MissingExtraError
from ..precision import at_least_float32

VIEW_SIZE, VIEW_SCALE = 224, (0.36, 1.0)
CROP_SIZE, CROP_SCALE = 96, (0.06, 0.36)


def require_kornia(feature: str) -> ModuleType:
    """`kornia.augmentation`.

    Raises:
        MissingExtraError: kornia is not installed.
    """
    try:
        import kornia.augmentation
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "kornia":
            raise
        raise MissingExtraError(feature, "pretrain") from error
    return kornia.augmentation


@torch.no_grad()
def augment_colors(images: Tensor, *, same_on_batch: bool = True) -> Tensor:
    """Colour jitter (0.4, 0.4, 0.2, 0.1) with probability 0.8, greyscale 0.2, 9x9 blur 0.5.

    Args:
        images: (B, 3, H, W) floating point in [0, 1], H and W above 4 (the blur reflects).
        same_on_batch: one draw for all images of the call, as in the published training code,
            where torchvision's transforms are given the batch; False draws for each image.

    Returns:
        (B, 3, H, W) in [0, 1], of the same dtype (half precision is computed in float32).

    Raises:
        MissingExtraError: kornia is not installed.
    """
    kornia = require_kornia("colour augmentation")
    # ColorJitter and not ColorJiggle: it is the one with torchvision's formulas.
    transform = nn.Sequential(
        kornia.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8, same_on_batch=same_on_batch),
        kornia.RandomGrayscale(p=0.2, same_on_batch=same_on_batch),
        kornia.RandomGaussianBlur((9, 9), (0.1, 2.0), p=0.5, same_on_batch=same_on_batch),
    )
    computed = transform(at_least_float32(images))
    return computed.clamp(0.0, 1.0).to(images.dtype)


@torch.no_grad()
def training_views(image: Tensor, num_global: int = 8, num_local: int = 8) -> dict[str, Tensor]:
    """The views of one photograph that a training forward takes, before colour augmentation.

    Global views are random resized crops of 36 to 100 % of the area to 224x224, local views of 6 to
    36 % to 96x96, bicubic, each flipped left to right with probability 0.5.

    Args:
        image: (3, H, W) floating point in [0, 1], of any size.

    Returns:
        global_views (num_global, 3, 224, 224), local_views (num_local, 3, 96, 96) and image
        (3, 224, 224), which is the first global view; stacked over a batch, what
        `training_predictions` takes.

    Raises:
        MissingExtraError: kornia is not installed.
        ValueError: the image is not floating point (3, H, W), or no global view is asked for.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(
            f"image must be floating point (3, H, W) in [0, 1], got {image.dtype} of shape "
            f"{tuple(image.shape)}"
        )
    if num_global < 1 or num_local < 0:
        raise ValueError(
            "at least one global view is needed (the first is the image), got "
            f"num_global={num_global}, num_local={num_local}"
        )
    kornia = require_kornia("drawing training views")

    def crops(count: int, size: int, scale: tuple[float, float]) -> Tensor:
        if count == 0:
            return image.new_empty(0, 3, size, size)
        transform = nn.Sequential(
            kornia.RandomResizedCrop((size, size), scale=scale, resample="bicubic"),
            kornia.RandomHorizontalFlip(p=0.5),
        )
        return transform(image.expand(count, -1, -1, -1)).clamp(0.0, 1.0)

    global_views = crops(num_global, VIEW_SIZE, VIEW_SCALE)
    return {
        "image": global_views[0],
        "global_views": global_views,
        "local_views": crops(num_local, CROP_SIZE, CROP_SCALE),
    }
