"""Batches to the engine's device and features back, beside the engine's own work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .decoding import SHAPE

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Moving:
    """A copy under way on a CUDA stream; on a CPU it is done, and there is no event."""

    tensors: Mapping[str, Tensor]
    event: Any = None

    def wait(self) -> None:
        """Returns when the tensors may be read by the CPU."""
        if self.event is not None:
            self.event.synchronize()


class Copies:
    """Copies for one engine. On CUDA, images go up on a stream of their own from pinned memory
    while the engine encodes the batch before, and features come down into pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None

    @property
    def ahead(self) -> int:
        """Batches that may be on the device unfinished while the next is handed to it."""
        return 1 if self._cuda else 0

    def buffer(self, batch_size: int, dtype: str) -> Tensor:
        """Memory for a batch of images, (batch_size, 3, 224, 224)."""
        kind = getattr(torch, dtype)
        return torch.empty((batch_size, *SHAPE), dtype=kind, device="cpu", pin_memory=self._cuda)

    def up(self, images: Tensor) -> Moving:
        """Begins to copy images to the device. They must not change until they were encoded."""
        if self._stream is None:
            return Moving({"images": images})
        with torch.cuda.stream(self._stream):
            moved = images.to(self._device, non_blocking=True)
            return Moving({"images": moved}, self._stream.record_event())

    def use(self, moving: Moving) -> Tensor:
        """The images, for work on the device's current stream."""
        images = moving.tensors["images"]
        if moving.event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(moving.event)
            images.record_stream(stream)  # or its memory could be given away before it was read
        return images

    def down(self, features: Mapping[str, Tensor]) -> Moving:
        """Begins to copy features to the CPU, after the work on the device's current stream."""
        if self._stream is None:
            return Moving(features)
        found = {}
        for name, feature in features.items():
            found[name] = torch.empty(
                feature.shape, dtype=feature.dtype, device="cpu", pin_memory=True
            )
            found[name].copy_(feature, non_blocking=True)
        return Moving(found, torch.cuda.current_stream(self._device).record_event())
