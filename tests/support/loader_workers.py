"""What the workers of a DataLoader do with a module; a spawned one imports it by this name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Encoded(Dataset):
    """The CLS token of each of `images`, encoded where it is asked for."""

    def __init__(self, model: Any, images: Tensor) -> None:
        self.model, self.images = model, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model.encode(self.images[index : index + 1])["cls"][0]
