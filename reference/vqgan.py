"""The MaskGIT-VQGAN tokenizer: cells of 16x16 pixels to one of 1024 codes each, and back.

A third party's model (the file `maskgit-vqgan-imagenet-f16-256.bin` of TiTok), here to turn codes
into pixels and to give training its targets. It is frozen: always in eval mode, never a gradient.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import CODE_DIM, CODEBOOK_SIZE
from ..weights.checkpoint import check_tensors, read_state
from ..weights.names import VQGAN_BLOCKS, VQGAN_CHANNELS, vqgan_shapes

GROUPS = 32
GROUP_NORM_EPS = 1e-6


class VQGAN(nn.Module):
    """Tokenizer between images in [0, 1] and codes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.quantize = Codebook()
        self.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Self:
        """The tokenizer with a file's weights (.bin: a torch pickle of tensors; .safetensors).

        Raises:
            DownloadError: there is no such file.
            CheckpointError: the file holds more than tensors or is damaged, or its tensors are not
                this model's.
        """
        state = read_state(path)
        check_tensors(state, vqgan_shapes(), where=str(path))
        with torch.device("meta"):  # nothing to initialise: every tensor is assigned
            tokenizer = cls()
        # copied, since a tensor read may be the file's own memory
        own = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
        tokenizer.load_state_dict(own, assign=True)
        return tokenizer.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode whatever the model around it does."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The codes of images, row by row.

        Args:
            images: (B, 3, H, W) in [0, 1], taken as they are: no other scaling.

        Returns:
            (B, H // 16 * W // 16) int64.
        """
        return self.quantize.nearest(self.encoder(images)).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The image that codes stand for.

        Args:
            codes: (B, h, w) integers below 1024; or (B, P) of a square grid, row by row.

        Returns:
            (B, 3, 16 h, 16 w) in [0, 1].
        """
        if codes.ndim == 2:
            side = math.isqrt(codes.shape[1])
            codes = codes.unflatten(1, (side, side))
        return self.decoder(self.quantize(codes)).clamp(0.0, 1.0)


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CODEBOOK_SIZE, CODE_DIM)

    def nearest(self, z: Tensor) -> Tensor:
        """The row nearest to every cell by squared distance: (B, C, h, w) -> (B, h, w) int64."""
        cells = z.movedim(1, -1)
        rows = self.embedding.weight
        # |z - e|^2 without |z|^2, which is the same for every row
        return (rows.square().sum(-1) - 2 * cells @ rows.T).argmin(dim=-1)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, C, h, w)."""
        return self.embedding(codes).movedim(-1, 1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        bottom, top = VQGAN_CHANNELS[0], VQGAN_CHANNELS[-1]
        inner = (bottom, *VQGAN_CHANNELS[:-1])
        self.conv_in = _conv3x3(3, bottom, bias=False)
        self.down = nn.ModuleList(Level(i, o) for i, o in zip(inner, VQGAN_CHANNELS, strict=True))
        self.mid = _res_blocks(top, top)
        self.norm_out = _group_norm(top)
        self.conv_out = nn.Conv2d(top, CODE_DIM, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 256, H // 16, W // 16)."""
        x = self.conv_in(images)
        for index, level in enumerate(self.down):
            x = level(x)
            if index < len(self.down) - 1:
                x = F.avg_pool2d(x, kernel_size=2)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        bottom, top = VQGAN_CHANNELS[0], VQGAN_CHANNELS[-1]
        inner = (*VQGAN_CHANNELS[1:], top)
        self.conv_in = _conv3x3(CODE_DIM, top)
        self.mid = _res_blocks(top, top)
        self.up = nn.ModuleList(  # index 0 is the finest level, which runs last
            Level(i, o, upsample=level > 0)
            for level, (i, o) in enumerate(zip(inner, VQGAN_CHANNELS, strict=True))
        )
        self.norm_out = _group_norm(bottom)
        self.conv_out = _conv3x3(bottom, 3)

    def forward(self, z: Tensor) -> Tensor:
        """(B, 256, h, w) -> (B, 3, 16 h, 16 w), not clamped."""
        x = self.conv_in(z)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Two residual blocks and, if asked for, a doubling of height and width after them."""

    def __init__(self, inner: int, outer: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.block = _res_blocks(inner, outer)
        self.upsample_conv = _conv3x3(outer, outer) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.upsample_conv is None:
            return x
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(inner)
        self.conv1 = _conv3x3(inner, outer, bias=False)
        self.norm2 = _group_norm(outer)
        self.conv2 = _conv3x3(outer, outer, bias=False)
        self.nin_shortcut = (
            nn.Conv2d(outer, outer, kernel_size=1, bias=False) if inner != outer else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, h, w) -> (B, outer, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        # The published weights were trained with the shortcut on the block's own output.
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


def _res_blocks(inner: int, outer: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResBlock(inner if block == 0 else outer, outer) for block in range(VQGAN_BLOCKS)
    )


def _conv3x3(inner: int, outer: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel_size=3, padding=1, bias=bias)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=GROUP_NORM_EPS)
