"""The published STELLAR model as far as features and images go: encode, and reconstruct.

Shapes: B images, P patches, K sparse tokens, D encoder width. Formulas: arXiv 2602.01905 and the
code published with it, whose state-dict names these are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import CODEBOOK_SIZE, IMAGE_MEAN, IMAGE_STD, ModelConfig
from . import ops
from .position import RandomFourierPosition
from .vit import VisionTransformer, is_plain
from .vqgan import VQGAN


class Autoencoder(nn.Module):
    """Images to features, and with a decoder back.

    Args:
        config: the geometry.
        do_recon: build the decoder.
        vq_model: the tokenizer: its weights file (.bin or .safetensors) or a `VQGAN`. With it the
            decoder predicts codes; without it (None) a transposed convolution draws pixels.

    Raises:
        ValueError: `vq_model` is none of these.
        CheckpointError: the tokenizer's file does not fit.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        do_recon: bool,
        vq_model: str | PathLike[str] | VQGAN | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_sparse_tokens, self.spatial_temp = config.num_sparse_tokens, config.spatial_temp
        self.do_recon = do_recon
        width, decoder = config.backbone.hidden_size, config.decoder
        self.encoder_dim = width
        tokenizer = _tokenizer(vq_model)
        self.encoder = VisionTransformer(config.backbone)
        if do_recon:
            self.decoder = VisionTransformer(decoder)
        self.sparse_tokens = nn.Parameter(
            torch.randn(config.num_sparse_tokens, width) * width**-0.5
        )
        self.position_embedding = RandomFourierPosition(decoder.hidden_size)
        self.dense_proj = nn.Linear(width, width)
        self.sparse_proj = nn.Linear(width, width)
        if do_recon:
            self.decoder_proj = nn.Linear(width, decoder.hidden_size)
            self.reconstruction_head = self._head(tokenizer)
        self.tokenizer = tokenizer

    def _head(self, tokenizer: VQGAN | None) -> nn.Linear | nn.ConvTranspose2d:
        width, patch = self.config.decoder.hidden_size, self.config.backbone.patch_size
        if tokenizer is None:
            return nn.ConvTranspose2d(width, 3, kernel_size=patch, stride=patch)
        return nn.Linear(width, CODEBOOK_SIZE)

    def encode(self, images: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
        """Features of images, differentiable: call it under `torch.no_grad()` where none is wanted.

        Args:
            images: as `features` takes them, or a mapping that holds them as "image".

        Returns:
            As `features`.

        Raises:
            ValueError: the images have another shape or are not floating point, or there are none.
        """
        return self.features(images_of(images))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images.

        Args:
            images: (B, 3, H, W) floating point, RGB in [0, 1], at least one patch high and wide;
                what is left beyond whole patches is dropped.

        Returns:
            sparse (B, K, D); spatial (B, P, K); concat (B, K, D + P), each token beside its map;
            lowrank (B, P, D); dense (B, P, D); cls (B, 1, D); peak_dist (B, K), the largest value
            of each token's map, without gradient.

        Raises:
            ValueError: the images have another shape or are not floating point.
        """
        cls, sparse, dense = self.forward_image(images)
        spatial = self.spatial_distribution(dense, sparse)
        return {
            "sparse": sparse,
            "spatial": spatial,
            "concat": torch.cat([sparse, rearrange(spatial, "b p k -> b k p")], dim=2),
            "lowrank": ops.reassemble(spatial, sparse),
            "dense": dense,
            "cls": cls,
            "peak_dist": spatial.detach().amax(dim=1),
        }

    def forward_image(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's output alone: (B, 3, H, W) as `features` takes it -> cls (B, 1, D), sparse
        (B, K, D), dense (B, P, D)."""
        return self.forward_encoder(self.patch_embedding(image))

    def spatial_distribution(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """The spatial map of tokens: dense (B, P, D), sparse (B, K, D) -> (B, P, K)."""
        if is_plain(self.dense_proj) and is_plain(self.sparse_proj):
            of_dense: tuple[Tensor, Tensor] = self.dense_proj.weight, self.dense_proj.bias
            of_sparse: tuple[Tensor, Tensor] = self.sparse_proj.weight, self.sparse_proj.bias
        else:
            # Called, and then projected by the identity.
            dense, sparse = self.dense_proj(dense), self.sparse_proj(sparse)
            identity = torch.eye(self.encoder_dim, dtype=dense.dtype, device=dense.device)
            of_dense = of_sparse = identity, torch.zeros_like(identity[0])
        spatial, _ = ops.spatial_map(
            dense, sparse, *of_dense, *of_sparse, self.spatial_temp, lowrank=False
        )
        return spatial

    def patch_embedding(self, image: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """CLS and patches with their positions, of pixels in [0, 1]: (B, 3, H, W) -> (B, 1 + P, D).

        Positions are resized where images are of another size, whatever the published argument
        says.
        """
        return self.encoder.embeddings(self.normalize(image))

    def forward_encoder(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1 + P, D), as `patch_embedding` gives it or fewer patches of it -> cls (B, 1, D),
        sparse (B, K, D), dense (B, P, D)."""
        return encode_with(self.encoder, embeddings, self.sparse_tokens)

    def encode_kept(self, images: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`forward_image` of some patches of each image.

        Args:
            images: as `features` takes them.
            keep: (B, kept) int64, the patches that the encoder sees, in the order wanted; they keep
                the position they had.

        Returns:
            cls (B, 1, D), sparse (B, K, D), dense (B, kept, D).
        """
        x = self.patch_embedding(images)
        kept = x[:, 1:].gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return self.forward_encoder(torch.cat([x[:, :1], kept], dim=1))

    def normalize(self, images: Tensor) -> Tensor:
        """[0, 1] pixels (B, 3, H, W) to the encoder's input, in the wider of the two dtypes."""
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be floating point (B, 3, H, W) in [0, 1], got {images.dtype} of "
                f"shape {tuple(images.shape)}"
            )
        images = images.to(torch.promote_types(images.dtype, self.sparse_tokens.dtype))
        mean, std = (images.new_tensor(stats).view(3, 1, 1) for stats in (IMAGE_MEAN, IMAGE_STD))
        return (images - mean) / std

    def reconstruct(
        self, sparse: Mapping[str, Tensor | None] | Tensor, spatial: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Images from features.

        Args:
            sparse: the sparse tokens (B, K, D); or what `encode` returned, of which `lowrank` is
                read, or else `sparse` and `spatial`.
            spatial: (B, P, K), with sparse tokens. The patches are taken as a square grid of side h
                = sqrt(P), the only one that the decoder knows.

        Returns:
            With a tokenizer: reconstruction (B, 3, 16 h, 16 h) in [0, 1], tokens (B, P) int64,
                logits (B, P, 1024).
            With the pixel head: reconstruction (B, 3, patch * h, patch * h) as the head gives it,
                not clamped, and the same as logits.

        Raises:
            RuntimeError: the model has no decoder.
            ValueError: features are missing or do not fit each other, P is no square.
        """
        decoded = self.forward_decoder(_lowrank(sparse, spatial))
        predicted = self.apply_head(decoded)
        if self.tokenizer is None:
            return {"reconstruction": predicted, "logits": predicted}
        tokens = predicted.argmax(dim=-1)
        side = _side(decoded)
        codes = rearrange(tokens, "b (rows columns) -> b rows columns", rows=side)
        pixels = self.tokenizer.decode(codes)
        return {"reconstruction": pixels, "tokens": tokens, "logits": predicted}

    def forward_decoder(self, embeddings: Tensor) -> Tensor:
        """The decoder's output before its head, of lowrank: (B, P, D) -> (B, P, 512), P a square
        number.

        Raises:
            RuntimeError: the model has no decoder.
            ValueError: P is no square.
        """
        if not self.do_recon:
            raise RuntimeError("this model was built with do_recon=False and has no decoder")
        side = _side(embeddings)
        x = self.decoder_proj(embeddings) + self.position_embedding(side, side)
        return self.decoder.forward_tokens(x)

    def apply_head(self, decoded: Tensor) -> Tensor:
        """(B, P, 512) to code logits (B, P, 1024); with the pixel head to pixels, h = sqrt(P).

        The pixels are (B, 3, patch * h, patch * h), not clamped.
        """
        if isinstance(self.reconstruction_head, nn.Linear):
            return self.reconstruction_head(decoded)
        side = _side(decoded)
        grid = rearrange(decoded, "b (rows columns) c -> b c rows columns", rows=side)
        return self.reconstruction_head(grid)


def encode_with(
    encoder: VisionTransformer, embeddings: Tensor, sparse_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs [CLS | patches] (B, 1 + P, D) with tokens (K, D) behind them: cls (B, 1, D), sparse
    (B, K, D), dense (B, P, D)."""
    tokens = sparse_tokens.expand(embeddings.shape[0], -1, -1)
    x = encoder.forward_tokens(torch.cat([embeddings, tokens], dim=1))
    cls, dense, sparse = x.split([1, embeddings.shape[1] - 1, tokens.shape[1]], dim=1)
    return cls, sparse, dense


def images_of(images: Any) -> Any:
    """What a mapping holds as "image"; anything else as it is.

    Raises:
        ValueError: the mapping holds no "image".
    """
    if not isinstance(images, Mapping):
        return images
    if "image" not in images:
        raise ValueError(f"encode reads 'image' of a mapping; this one holds {sorted(images)}")
    return images["image"]


def _tokenizer(vq_model: str | PathLike[str] | VQGAN | None) -> VQGAN | None:
    if vq_model is None:
        return None
    if isinstance(vq_model, VQGAN):
        return vq_model.eval().requires_grad_(False)
    if isinstance(vq_model, (str, PathLike)):
        return VQGAN.from_file(vq_model)
    raise ValueError(f"vq_model must be a path, a VQGAN or None, got {type(vq_model).__name__}")


def _lowrank(features: Mapping[str, Tensor | None] | Tensor, spatial: Tensor | None) -> Tensor:
    if isinstance(features, Mapping):
        given = {name: value for name, value in features.items() if value is not None}
        if "lowrank" in given:
            return given["lowrank"]
        if not {"sparse", "spatial"} <= given.keys():
            raise ValueError(
                f"reconstruct needs lowrank, or sparse and spatial; the features hold "
                f"{sorted(given)}"
            )
        sparse, spatial = given["sparse"], given["spatial"]
    else:
        sparse = features
    if spatial is None:
        raise ValueError("reconstruct needs spatial beside sparse: the tokens alone have no layout")
    shapes = tuple(spatial.shape), tuple(sparse.shape)
    if spatial.ndim != 3 or sparse.ndim != 3 or spatial.shape[::2] != sparse.shape[:2]:
        raise ValueError(
            f"spatial must be (B, P, K) and sparse (B, K, D), got {shapes[0]} and {shapes[1]}"
        )
    return ops.reassemble(spatial, sparse)


def _side(patches: Tensor) -> int:
    """Side h of the square grid that (B, P, C) patches come from."""
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(
            f"reconstruction needs a square grid of patches, and {patches.shape[1]} is no square "
            "number"
        )
    return side
