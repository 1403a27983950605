"""The decoder's position code: random Fourier features of a cell's place on the grid."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn


class RandomFourierPosition(nn.Module):
    """Position code with frequencies drawn once and saved with the model.

    Args:
        width: channels of the code, even.
    """

    positional_encoding_gaussian_matrix: Tensor  # (2, width / 2): frequencies of x, of y

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, rows: int, columns: int) -> Tensor:
        """The codes of a grid's cells, row by row: (rows * columns, width).

        Cell (i, j) has c = 2 * ((j + 0.5) / columns, (i + 0.5) / rows) - 1 and angles 2 pi c @ G;
        the code is sin a0, cos a0, sin a1, cos a1, ...
        """
        matrix = self.positional_encoding_gaussian_matrix
        # half precision has too few digits for angles of many turns
        frequencies = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        y = (torch.arange(rows, device=matrix.device, dtype=frequencies.dtype) + 0.5) / rows
        x = (torch.arange(columns, device=matrix.device, dtype=frequencies.dtype) + 0.5) / columns
        cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        angles = 2 * math.pi * ((2 * cells - 1) @ frequencies)
        code = torch.stack([angles.sin(), angles.cos()], dim=-1)
        code = rearrange(code, "rows columns half pair -> (rows columns) (half pair)")
        return code.to(matrix.dtype)
