"""The vision transformer of encoder, decoder and teacher, in the published state-dict spelling.

Modules are nested as the published tensor names are
(`encoder.layer.N.attention.attention.query.weight`); all computing goes through `ops`. Pre-norm
blocks, exact GELU, LayerNorm eps 1e-12 (the ViT-MAE backbones' value).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import LAYER_NORM_EPS, BackboneConfig
from . import ops

INIT_STD = 0.02  # truncated normal of every matrix, token and position at creation, as ViT-MAE's


class VisionTransformer(nn.Module):
    """A ViT whose caller may append tokens to the patches.

    `embeddings` and `pooler` are published for the decoder too, which uses neither, and no model
    uses `pooler`.

    Args:
        config: the geometry.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = BlockStack(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.pooler = Dense(config.hidden_size, config.hidden_size)
        self.apply(_initialise)

    def embed(self, images: Tensor, extra: Tensor | None = None) -> Tensor:
        """The sequence that enters the first block: CLS, patches with their positions, `extra`.

        Args:
            images: (B, 3, H, W), normalised; rows and columns beyond a whole patch are dropped.
            extra: (K, D), the same for every image, appended without a position; None appends
                nothing.

        Returns:
            (B, 1 + P + K, D) with P = (H // patch) * (W // patch), row by row.

        Raises:
            ValueError: the images are no (B, 3, H, W) or smaller than one patch.
        """
        return self.embeddings(images, extra)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Every block, then the final LayerNorm: (B, S, D) -> (B, S, D)."""
        for block in self.encoder.layer:
            x = block(x)
        return self.layernorm(x)

    def forward(self, images: Tensor, extra: Tensor, keep: Tensor | None = None) -> Tensor:
        """`embed`, then only the patches in `keep`, then `forward_tokens`.

        Args:
            images: (B, 3, H, W), normalised.
            extra: (K, D).
            keep: (B, kept) int64, for each image the patches that stay, in the order wanted; they
                keep the position they had. None keeps all.

        Returns:
            (B, 1 + kept + K, D).
        """
        x = self.embed(images, extra)
        if keep is not None:
            patches = x[:, 1 : x.shape[1] - extra.shape[0]]
            kept = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            x = torch.cat([x[:, :1], kept, x[:, x.shape[1] - extra.shape[0] :]], dim=1)
        return self.forward_tokens(x)


class Embeddings(nn.Module):
    """Patch projection, CLS token and the position table of the backbone's own image size."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + config.num_patches, width))
        self.patch_embeddings = PatchProjection(config)

    def table(self, rows: int, columns: int) -> Tensor:
        """What each row of the sequence starts from on a grid: (1 + rows * columns, D).

        Row 0 is the CLS token with its position; the others are the patches' positions, resized
        (bicubic, `align_corners=False`) when the grid is not the table's own, plus the projection's
        bias.
        """
        grid = self.config.grid
        cls, patches = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        if (rows, columns) != (grid, grid):
            patches = rearrange(patches, "b (rows columns) d -> b d rows columns", rows=grid)
            patches = F.interpolate(
                patches, size=(rows, columns), mode="bicubic", align_corners=False
            )
            patches = rearrange(patches, "b d rows columns -> b (rows columns) d")
        bias = self.patch_embeddings.projection.bias
        assert bias is not None, "the patch projection is built with a bias"
        patches = patches + bias
        return torch.cat([self.cls_token + cls, patches], dim=1)[0]

    def forward(self, images: Tensor, extra: Tensor | None = None) -> Tensor:
        patch = self.config.patch_size
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {shape}")
        rows, columns = shape[2] // patch, shape[3] // patch
        if not rows or not columns:
            raise ValueError(f"images of {shape[2]}x{shape[3]} pixels hold no patch of {patch}")
        weight = self.patch_embeddings.projection.weight.flatten(1)
        if extra is None:
            extra = weight.new_empty(0, weight.shape[0])
        x, _ = ops.patch_embed(images, weight, self.table(rows, columns), extra, patch)
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


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer does what its parameters say: no hook listens, and nothing such as an
    adapter stands in its place. Then an op may take its parameters instead of calling it."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and not hooks and "forward" not in vars(layer)


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


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Embeddings):
        nn.init.trunc_normal_(module.cls_token, std=INIT_STD)
        nn.init.trunc_normal_(module.position_embeddings, std=INIT_STD)
