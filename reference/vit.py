"""The vision transformer of encoder, decoder and teacher, in the published state-dict spelling.

Modules are nested as the published tensor names are
(`encoder.layer.N.attention.attention.query.weight`); all computing goes through `ops`. Pre-norm
blocks, exact GELU, LayerNorm eps 1e-12 (the ViT-MAE backbones' value).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import LAYER_NORM_EPS, BackboneConfig
from . import ops

INIT_STD = 0.02  # truncated normal of every matrix, token and position at creation, as ViT-MAE's


class BlockOutput(NamedTuple):
    """What a stack of blocks gives.

    Attributes:
        last_hidden_state: (B, S, D).
        hidden_states: the stack's input and the output of every block, where asked for.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None


class Output(NamedTuple):
    """What a whole transformer gives.

    Attributes:
        last_hidden_state: (B, 1 + P, D), after the final LayerNorm.
        pooler_output: (B, D).
        hidden_states: as of `BlockOutput`, before the final LayerNorm.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None


class VisionTransformer(nn.Module):
    """A ViT whose caller may append tokens to the patches: `embeddings`, then `forward_tokens`.

    Called as a whole it answers as `transformers.ViTModel`, which is what the published model is
    built of. `embeddings` and `pooler` are published for the decoder too, which uses neither, and
    no model uses `pooler`.

    Args:
        config: the geometry.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = BlockStack(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.pooler = Pooler(config.hidden_size)
        self.apply(_initialise)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Every block, then the final LayerNorm: (B, S, D) -> (B, S, D)."""
        return self.layernorm(self.encoder(x).last_hidden_state)

    def forward(
        self,
        pixel_values: Tensor,
        *,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
    ) -> Output:
        """The ViT alone, without sparse tokens.

        Args:
            pixel_values: as `Embeddings` takes them.
            interpolate_pos_encoding: of no effect, as there.
            output_hidden_states: give `hidden_states` too.
        """
        found = self.encoder(self.embeddings(pixel_values), output_hidden_states)
        x = self.layernorm(found.last_hidden_state)
        return Output(x, self.pooler(x), found.hidden_states)


class Embeddings(nn.Module):
    """Patch projection, CLS token and the position table of the backbone's own image size."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + config.num_patches, width))
        self.patch_embeddings = PatchProjection(config)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The patches' positions on a grid, row by row: (rows * columns, D).

        Resized (bicubic, `align_corners=False`) when the grid is not the table's own.
        """
        grid = self.config.grid
        patches = self.position_embeddings[:, 1:]
        if (rows, columns) != (grid, grid):
            patches = rearrange(patches, "b (rows columns) d -> b d rows columns", rows=grid)
            patches = F.interpolate(
                patches, size=(rows, columns), mode="bicubic", align_corners=False
            )
            patches = rearrange(patches, "b d rows columns -> b (rows columns) d")
        return patches[0]

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """The sequence that enters the first block: CLS, and the patches with their positions.

        Args:
            pixel_values: (B, 3, H, W), normalised; rows and columns beyond a whole patch are
                dropped.
            interpolate_pos_encoding: of no effect: positions are resized where the grid is not the
                table's own.

        Returns:
            (B, 1 + P, D) with P = (H // patch) * (W // patch), row by row.

        Raises:
            ValueError: the images are no (B, 3, H, W) or smaller than one patch.
        """
        patch, shape = self.config.patch_size, tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {shape}")
        rows, columns = shape[2] // patch, shape[3] // patch
        if not rows or not columns:
            raise ValueError(f"images of {shape[2]}x{shape[3]} pixels hold no patch of {patch}")
        cls = (self.cls_token + self.position_embeddings[:, :1])[0]
        positions, projection = self.positions(rows, columns), self.patch_embeddings.projection
        if not is_plain(projection, nn.Conv2d):
            tiles = rearrange(projection(pixel_values), "b d rows columns -> b (rows columns) d")
            return torch.cat([cls.expand(shape[0], -1, -1), tiles + positions], dim=1)
        assert projection.bias is not None, "the patch projection is built with a bias"
        table = torch.cat([cls, positions + projection.bias])
        none = cls.new_empty(0, cls.shape[1])
        x, _ = ops.patch_embed(pixel_values, projection.weight.flatten(1), table, none, patch)
        return x


class PatchProjection(nn.Module):
    """Holds the patch convolution; `ops.patch_embed` applies its weight as a matrix."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.projection = nn.Conv2d(3, config.hidden_size, kernel_size=patch, stride=patch)


class BlockStack(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, output_hidden_states: bool = False) -> BlockOutput:
        """Every block, of x (B, S, D)."""
        seen = [x]
        for block in self.layer:
            x = block(x)
            if output_hidden_states:
                seen.append(x)
        return BlockOutput(x, tuple(seen) if output_hidden_states else None)


class Block(nn.Module):
    """`x += proj(attention(LN(x)))`, then `x += fc2(gelu(fc1(LN(x))))`."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width = config.hidden_size
        # In the published order, by which optimisers number the parameters in their state.
        self.attention = Attention(config)
        self.intermediate = Dense(width, config.intermediate_size)
        self.output = Dense(config.intermediate_size, width)
        self.layernorm_before = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.layernorm_after = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = self.attention(self.layernorm_before(x), residual=x)
        hidden = self.intermediate(self.layernorm_after(x), gelu=True)
        return self.output(hidden, residual=x)


class Attention(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.attention = QueryKeyValue(config.hidden_size)
        self.output = Dense(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Self-attention of x (B, S, D), projected and added to `residual`: (B, S, D)."""
        query, key, value = self.attention(x)
        attended = ops.attention(query, torch.cat([key, value], dim=-1), self.num_heads)
        return self.output(attended, residual=residual)


class QueryKeyValue(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(x), self.key(x), self.value(x)


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer does what its parameters say: no hook listens, and nothing such as an adapter
    stands in its place. Then an op may take its parameters instead of calling it."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is kind and not hooks and "forward" not in vars(layer)


class Dense(nn.Module):
    """`ops.linear`, or with a residual `ops.linear_residual`, with the parameters of `dense`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        if not is_plain(self.dense):
            y = self.dense(x)
            y = F.gelu(y) if gelu else y
            return y if residual is None else y + residual
        if residual is None:
            return ops.linear(x, self.dense.weight, self.dense.bias, gelu=gelu)
        y, _ = ops.linear_residual(x, self.dense.weight, self.dense.bias, residual)
        return y


class Pooler(nn.Module):
    """The tanh of a projection of the CLS token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, D)."""
        return torch.tanh(self.dense(x[:, 0]))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Embeddings):
        nn.init.trunc_normal_(module.cls_token, std=INIT_STD)
        nn.init.trunc_normal_(module.position_embeddings, std=INIT_STD)
