"""The published STELLAR model: encode, reconstruct, and the forward pass for training.

Shapes: B images, P patches, K sparse tokens, D encoder width. Formulas: arXiv 2602.01905 and the
code published with it, whose constructor arguments, defaults and state-dict names these are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CODEBOOK_SIZE, IMAGE_MEAN, IMAGE_STD, BackboneConfig, ModelConfig
from ..names import canonical
from . import ops
from .clustering import ClusteringHead
from .loading import load_checkpoint, take_out_other_head
from .position import RandomFourierPosition
from .pretrain import training_predictions
from .teacher import attach_teacher
from .vit import VisionTransformer
from .vqgan import VQGAN

DEFAULT_BACKBONE = "facebook/vit-mae-base"
FEATURES = ("sparse", "spatial", "dense", "lowrank", "cls")


class STELLARModel(nn.Module):
    """STELLAR in plain PyTorch. Parts that were not asked for are not built.

    Args:
        num_sparse_tokens: K.
        spatial_temp: divisor of the cosine similarities of the spatial map; None: dot products over
            sqrt(D).
        do_koleo: the KoLeo loss in training.
        do_recon: build the decoder, and train it.
        num_decoder_layers: blocks of the decoder.
        vq_model: the tokenizer: its weights file (.bin or .safetensors) or a `VQGAN`. With it the
            decoder predicts codes; without it (None) a transposed convolution draws pixels.
        do_clustering: build the clustering heads, and train with their losses.
        num_clusters, predictor_layers, prototype_dim: size of the clustering heads, as
            `ClusteringHead` takes them.
        do_cls: cluster the CLS token too.
        logits_temp, sk_temp, n_sk_iter, sk_scale: temperature of the predictions; temperature,
            rounds and column exponent of the Sinkhorn-Knopp targets.
        do_masking, num_masks, masking_ratio, focal_mode: train on that many masked global views;
            the mode is "gaussian", "block" or None.
        color_augmentation: colour-augment the masked views.
        do_cropping, num_local_crops: train on that many local views.
        hungarian_match: match predicted sparse tokens to their targets.
        momentum_teacher, teacher_momentum: let an exponential moving average of the model give the
            targets.
        model_checkpoint_path: weights to start from, a safetensors file or a torch pickle of
            tensors (as such or under "state_dict"), read without pickle code. Every tensor that
            this model is built of must be there.
        vit_pretrained: the encoder's geometry and nothing else: a published backbone's name, a
            mapping of `BackboneConfig`'s fields or a `BackboneConfig`; None is
            facebook/vit-mae-base. Nothing is downloaded.

    Raises:
        ValueError: an argument is out of range, or `momentum_teacher` comes without
            `do_clustering`.
        CheckpointError: a weights file does not fit.
    """

    clustering_head: ClusteringHead
    cls_cluster_head: ClusteringHead
    teacher_encoder: VisionTransformer
    teacher_sparse_tokens: nn.Parameter
    teacher_head: ClusteringHead
    teacher_cls_head: ClusteringHead

    def __init__(
        self,
        num_sparse_tokens: int,
        spatial_temp: float | None = 0.06,
        do_koleo: bool = True,
        do_recon: bool = True,
        num_decoder_layers: int = 6,
        vq_model: str | PathLike[str] | VQGAN | None = None,
        do_clustering: bool = True,
        num_clusters: int = 16384,
        predictor_layers: int | None = 2,
        prototype_dim: int | None = 256,
        do_cls: bool = True,
        logits_temp: float = 0.12,
        sk_temp: float = 0.06,
        n_sk_iter: int = 3,
        sk_scale: float = 1.0,
        do_masking: bool = True,
        num_masks: int = 8,
        masking_ratio: float = 0.75,
        focal_mode: str | None = "gaussian",
        color_augmentation: bool = True,
        do_cropping: bool = True,
        num_local_crops: int = 8,
        hungarian_match: bool = True,
        momentum_teacher: bool = False,
        teacher_momentum: float = 0.996,
        model_checkpoint_path: str | PathLike[str] | None = None,
        vit_pretrained: str | Mapping[str, object] | BackboneConfig | None = None,
    ) -> None:
        super().__init__()
        if momentum_teacher and not do_clustering:
            raise ValueError(
                "momentum_teacher=True gives clustering targets: it needs do_clustering=True"
            )
        backbone = BackboneConfig.resolve(vit_pretrained or DEFAULT_BACKBONE)
        self.config = ModelConfig(
            "STELLARModel", backbone, num_sparse_tokens, num_decoder_layers, spatial_temp
        )
        self.num_sparse_tokens, self.spatial_temp = num_sparse_tokens, spatial_temp
        self.do_koleo, self.do_recon = do_koleo, do_recon
        self.do_clustering, self.num_clusters, self.do_cls = do_clustering, num_clusters, do_cls
        self.logits_temp, self.sk_temp = logits_temp, sk_temp
        self.n_sk_iter, self.sk_scale = n_sk_iter, sk_scale
        self.do_masking, self.num_masks = do_masking, num_masks
        self.masking_ratio, self.focal_mode = masking_ratio, focal_mode
        self.color_augmentation = color_augmentation
        self.do_cropping, self.num_local_crops = do_cropping, num_local_crops
        self.hungarian_match = hungarian_match
        self.momentum_teacher, self.teacher_momentum = momentum_teacher, teacher_momentum

        width = backbone.hidden_size
        self.encoder = VisionTransformer(backbone)
        self.sparse_tokens = nn.Parameter(torch.randn(num_sparse_tokens, width) * width**-0.5)
        self.dense_proj = nn.Linear(width, width)
        self.sparse_proj = nn.Linear(width, width)
        self.tokenizer = _tokenizer(vq_model)
        if do_recon:
            self._build_decoder()
        if do_clustering:
            self.clustering_head = ClusteringHead(
                width, num_clusters, predictor_layers, prototype_dim
            )
            if do_cls:
                self.cls_cluster_head = ClusteringHead(
                    width, num_clusters, predictor_layers, prototype_dim
                )
        if momentum_teacher:
            attach_teacher(self)
        if model_checkpoint_path is not None:
            load_checkpoint(self, model_checkpoint_path)

    def _build_decoder(self) -> None:
        decoder, patch = self.config.decoder, self.config.backbone.patch_size
        width = decoder.hidden_size
        self.decoder = VisionTransformer(decoder)
        self.decoder_proj = nn.Linear(self.config.backbone.hidden_size, width)
        self.position_embedding = RandomFourierPosition(width)
        self.reconstruction_head: nn.Linear | nn.ConvTranspose2d
        if self.tokenizer is None:
            self.reconstruction_head = nn.ConvTranspose2d(width, 3, kernel_size=patch, stride=patch)
        else:
            self.reconstruction_head = nn.Linear(width, CODEBOOK_SIZE)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images, differentiable: call it under `torch.no_grad()` where none is wanted.

        Args:
            images: (B, 3, H, W) floating point, RGB in [0, 1], at least one patch high and wide;
                what is left beyond whole patches is dropped.

        Returns:
            sparse (B, K, D), spatial (B, P, K), dense (B, P, D), lowrank (B, P, D), cls (B, 1, D).

        Raises:
            ValueError: the images have another shape or are not floating point.
        """
        cls, sparse, dense = self.encode_tokens(images)
        spatial, _ = ops.spatial_map(
            dense,
            sparse,
            self.dense_proj.weight,
            self.dense_proj.bias,
            self.sparse_proj.weight,
            self.sparse_proj.bias,
            self.spatial_temp,
            lowrank=False,
        )
        lowrank = ops.reassemble(spatial, sparse)
        return {
            "sparse": sparse,
            "spatial": spatial,
            "dense": dense,
            "lowrank": lowrank,
            "cls": cls,
        }

    def encode_tokens(
        self, images: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's output alone.

        Args:
            images: as `encode` takes them.
            keep: (B, kept) int64, the patches of each image that are not masked; None keeps all.

        Returns:
            cls (B, 1, D), sparse (B, K, D), dense (B, P or kept, D).
        """
        x = self.encoder(self.normalize(images), self.sparse_tokens, keep)
        patches = x.shape[1] - 1 - self.num_sparse_tokens
        cls, dense, sparse = x.split([1, patches, self.num_sparse_tokens], dim=1)
        return cls, sparse, dense

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
        self, features: Mapping[str, Tensor] | Tensor, spatial: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Images from features.

        Args:
            features: what `encode` returned, of which `lowrank` is read or else `sparse` and
                `spatial`; or the sparse tokens (B, K, D) themselves.
            spatial: (B, P, K), with sparse tokens. The patches are taken as a square grid of side h
                = sqrt(P), the only one that the decoder knows.

        Returns:
            With a tokenizer: reconstruction (B, 3, 16 h, 16 h) in [0, 1], tokens (B, P) int64,
                logits (B, P, 1024).
            With the pixel head: reconstruction (B, 3, patch * h, patch * h) as the head gives it,
                not clamped.

        Raises:
            ValueError: the model has no decoder, features are missing or do not fit each other, P
                is no square.
        """
        decoded = self.forward_decoder(_lowrank(features, spatial))
        predicted = self.apply_head(decoded)
        if self.tokenizer is None:
            return {"reconstruction": predicted}
        tokens = predicted.argmax(dim=-1)
        side = _side(decoded)
        codes = tokens.unflatten(1, (side, side))
        pixels = self.tokenizer.decode(codes)
        return {"reconstruction": pixels, "tokens": tokens, "logits": predicted}

    def forward_decoder(self, lowrank: Tensor) -> Tensor:
        """The decoder's output before its head: (B, P, D) -> (B, P, 512), P a square number.

        Raises:
            ValueError: the model has no decoder, or P is no square.
        """
        if not self.do_recon:
            raise ValueError("this model was built with do_recon=False and has no decoder")
        side = _side(lowrank)
        x = self.decoder_proj(lowrank) + self.position_embedding(side, side)
        return self.decoder.forward_tokens(x)

    def apply_head(self, decoded: Tensor) -> Tensor:
        """(B, P, 512) to code logits (B, P, 1024); with the pixel head to pixels, h = sqrt(P).

        The pixels are (B, 3, patch * h, patch * h), not clamped.
        """
        if isinstance(self.reconstruction_head, nn.Linear):
            return self.reconstruction_head(decoded)
        side = _side(decoded)
        return self.reconstruction_head(decoded.transpose(1, 2).unflatten(2, (side, side)))

    def forward(
        self, inputs: Mapping[str, Tensor], mode: str = "train"
    ) -> dict[str, dict[str, Tensor]]:
        """The published forward pass.

        Args:
            inputs: "image" (B, 3, H, W); in training also what the losses asked for need: "labels"
                (B,), "global_views" (B, G, 3, 224, 224), "local_views" (B, L, 3, 96, 96), all RGB
                in [0, 1].
            mode: "eval" or "train".

        Returns:
            {"predictions": ...}: in eval mode `evaluation_predictions`, in training those,
            "gold_labels" and the losses.

        Raises:
            ValueError: another mode, or an input that does not fit.
        """
        if mode == "eval":
            return {"predictions": self.evaluation_predictions(inputs["image"])}
        if mode != "train":
            raise ValueError(f'mode must be "train" or "eval", got {mode!r}')
        return {"predictions": training_predictions(self, inputs)}

    def evaluation_predictions(self, images: Tensor) -> dict[str, Tensor]:
        """`encode`'s features and two made of them.

        Returns:
            also concat (B, K, D + P), each token beside its map, and peak_dist (B, K), the largest
            value of its map, without gradient.
        """
        features = self.encode(images)
        sparse, spatial = features["sparse"], features["spatial"]
        features["concat"] = torch.cat([sparse, spatial.transpose(1, 2)], dim=2)
        features["peak_dist"] = spatial.detach().amax(dim=1)
        return features

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Not in load_state_dict: a module that holds this one must load the same files.
        own = {name[len(prefix) :]: name for name in state_dict if name.startswith(prefix)}
        state = canonical({name: state_dict.pop(full) for name, full in own.items()})
        other_head = take_out_other_head(self, state)
        state_dict.update({prefix + name: value for name, value in state.items()})
        unexpected_keys.extend(prefix + name for name in other_head)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _tokenizer(vq_model: str | PathLike[str] | VQGAN | None) -> VQGAN | None:
    if vq_model is None:
        return None
    if isinstance(vq_model, VQGAN):
        return vq_model.eval().requires_grad_(False)
    if isinstance(vq_model, (str, PathLike)):
        return VQGAN.from_file(vq_model)
    raise ValueError(f"vq_model must be a path, a VQGAN or None, got {type(vq_model).__name__}")


def _lowrank(features: Mapping[str, Tensor] | Tensor, spatial: Tensor | None) -> Tensor:
    if isinstance(features, Mapping):
        if spatial is not None:
            raise ValueError(
                "give reconstruct either a dict of features or sparse and spatial, not both"
            )
        if "lowrank" in features:
            return features["lowrank"]
        if not {"sparse", "spatial"} <= features.keys():
            raise ValueError(
                "reconstruct needs lowrank, or sparse and spatial; the features hold "
                f"{sorted(features)}"
            )
        sparse, spatial = features["sparse"], features["spatial"]
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
