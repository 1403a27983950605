"""What is trained: the autoencoder, its clustering heads, its teacher, and how losses are taken.

Formulas: arXiv 2602.01905 and the code published with it, whose constructor arguments, defaults and
state-dict names these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ...config import BACKBONES, BackboneConfig, ModelConfig
from ...weights.backbone import read_backbone
from ...weights.names import canonical
from ..loading import load_checkpoint, take_out_other_head
from ..model import Autoencoder
from ..vit import VisionTransformer
from ..vqgan import VQGAN
from .augment import augment_colors
from .clustering import ClusteringHead, soft_cross_entropy
from .masking import random_masking
from .matching import match
from .teacher import attach_teacher, encode_with_teacher, scheduled_momentum, update_teacher

DEFAULT_BACKBONE = "facebook/vit-mae-base"
# Optimisers number parameters in the order of their modules, and so do the states they save.
PUBLISHED_ORDER = (
    "encoder",
    "decoder",
    "position_embedding",
    "teacher_encoder",
    "dense_proj",
    "sparse_proj",
    "decoder_proj",
    "reconstruction_head",
    "tokenizer",
    "clustering_head",
    "cls_cluster_head",
    "teacher_head",
    "teacher_cls_head",
)


Geometry = Mapping[str, object] | BackboneConfig


def _backbone(
    source: str | PathLike[str] | Geometry | None, *, known: bool
) -> tuple[BackboneConfig, dict[str, Tensor]]:
    """The encoder's geometry, and the weights that it starts from if `source` names any.

    Args:
        known: all weights come from elsewhere.
    """
    if not isinstance(source, (str, PathLike)):
        return BackboneConfig.resolve(source or DEFAULT_BACKBONE), {}
    # On the meta device there is nothing to fill.
    if source in BACKBONES and (known or torch.get_default_device().type == "meta"):
        return BackboneConfig.resolve(str(source)), {}
    return read_backbone(source)


class Student(Autoencoder):
    """All of STELLAR but its training forward. Parts that were not asked for are not built.

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
        do_masking, num_masks, masking_ratio, focal_mode: train on that many masked global views, or
            as many as there are; the mode is "gaussian", "block" or None.
        color_augmentation: colour-augment the global views. Local views are augmented always.
        do_cropping, num_local_crops: train on that many local views, or as many as there are.
        hungarian_match: match predicted sparse tokens to their targets.
        do_global_align: hold the image and its second global view against each other; of no effect
            with a teacher.
        momentum_teacher, teacher_momentum: let an exponential moving average of the model give the
            targets.
        teacher_momentum_final, teacher_momentum_schedule_steps: with both, the momentum goes from
            `teacher_momentum` to the final one in that many updates, along half a cosine.
        model_checkpoint_path: weights to start from, a safetensors file or a torch pickle of
            tensors (as such or under "state_dict"), read without pickle code. Every tensor that
            this model is built of must be there.
        vit_pretrained: a ViT whose weights the encoder starts from: a Hub repository such as
            "facebook/vit-mae-base" or a local folder, each with a ViT's `config.json` and weights.
            None, and a geometry (a mapping of `BackboneConfig`'s fields or a `BackboneConfig`),
            starts from random weights, and downloads nothing. So does the name of a published
            backbone that cannot be downloaded, with a warning, since a whole checkpoint is usually
            loaded next.
        vit_config: the geometry, as a mapping or a `BackboneConfig`, instead of `vit_pretrained`;
            with neither it is that of facebook/vit-mae-base.

    Raises:
        ValueError: an argument is out of range, `momentum_teacher` comes without `do_clustering`,
            or `vit_pretrained` with `vit_config`.
        DownloadError: `vit_pretrained` cannot be had.
        CheckpointError: a weights file does not fit.
    """

    augment: Callable[[Tensor], Tensor]  # of (V, 3, H, W) training views, one draw for all of them
    _step_counter: Tensor
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
        do_global_align: bool = False,
        momentum_teacher: bool = False,
        teacher_momentum: float = 0.996,
        teacher_momentum_final: float | None = None,
        teacher_momentum_schedule_steps: int | None = None,
        model_checkpoint_path: str | PathLike[str] | None = None,
        vit_pretrained: str | PathLike[str] | Geometry | None = None,
        vit_config: Geometry | None = None,
    ) -> None:
        if momentum_teacher and not do_clustering:
            raise ValueError(
                "momentum_teacher=True gives clustering targets: it needs do_clustering=True"
            )
        if vit_pretrained is not None and vit_config is not None:
            raise ValueError("give one of vit_pretrained and vit_config, not both")
        backbone, weights = _backbone(
            vit_pretrained or vit_config, known=model_checkpoint_path is not None
        )
        config = ModelConfig(
            "STELLARModel", backbone, num_sparse_tokens, num_decoder_layers, spatial_temp
        )
        super().__init__(config, do_recon=do_recon, vq_model=vq_model)
        self.encoder.load_state_dict(weights, strict=False)
        self.do_koleo = do_koleo
        self.do_clustering, self.num_clusters, self.do_cls = do_clustering, num_clusters, do_cls
        self.logits_temp = logits_temp
        self.do_masking, self.num_masks = do_masking, num_masks
        self.masking_ratio, self.focal_mode = masking_ratio, focal_mode
        self.color_augmentation = color_augmentation
        self.do_cropping, self.num_local_crops = do_cropping, num_local_crops
        self.hungarian_match, self.do_global_align = hungarian_match, do_global_align
        self.momentum_teacher, self.teacher_momentum = momentum_teacher, teacher_momentum
        self.first_teacher_momentum = teacher_momentum
        self.teacher_momentum_final = teacher_momentum_final
        self.teacher_momentum_schedule_steps = teacher_momentum_schedule_steps
        # No state dict would give it a value after it was made on the meta device.
        counted = "cpu" if self.sparse_tokens.is_meta else None
        self.register_buffer(
            "_step_counter",
            torch.zeros((), dtype=torch.int64, device=counted),
            persistent=False,
        )
        self.augment = augment_colors

        width = backbone.hidden_size
        if do_clustering:
            sizes = width, num_clusters, predictor_layers, prototype_dim
            settings = n_sk_iter, sk_scale, sk_temp, logits_temp
            self.clustering_head = ClusteringHead(*sizes, *settings)
            if do_cls:
                self.cls_cluster_head = ClusteringHead(*sizes, *settings)
        if momentum_teacher:
            attach_teacher(self)
        for name in PUBLISHED_ORDER:
            if name in self._modules:
                self._modules[name] = self._modules.pop(name)
        if model_checkpoint_path is not None:
            load_checkpoint(self, model_checkpoint_path)

    def forward_masked(
        self, image: Tensor, ratio: float = 0.75
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The encoder's output of images of which only some patches are seen.

        Args:
            image: (V, 3, H, W) in [0, 1].
            ratio: share of the patches to drop, as `random_masking` draws them by `focal_mode`.

        Returns:
            cls (V, 1, D), sparse (V, K, D); mask (V, P), 1 where a patch was dropped and 0 where it
            was kept; ids_restore (V, P) int64, each patch's place behind one another of the kept
            and the dropped ones.
        """
        patch = self.config.backbone.patch_size
        patches = (image.shape[2] // patch) * (image.shape[3] // patch)
        kept, dropped = random_masking(
            len(image), patches, ratio, self.focal_mode, device=image.device
        )
        cls, sparse, _ = self.encode_kept(image, kept)
        mask = torch.zeros(len(image), patches, device=image.device).scatter_(1, dropped, 1.0)
        return cls, sparse, mask, torch.cat([kept, dropped], dim=1).argsort(dim=1)

    def forward_teacher(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`forward_image` of the teacher, without gradient; of the model itself without one."""
        return (
            encode_with_teacher(self, image) if self.momentum_teacher else self.forward_image(image)
        )

    def match_tokens(
        self, sparse_pred: Tensor, sparse_tgt: Tensor, token_filter: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The target of every predicted token, without gradient.

        Args:
            sparse_pred: (B V, K, D), V views of each image in a row.
            sparse_tgt: (B, K, D).
            token_filter: (B, K), above 0 for the targets that count, as `match` has it; None: all.

        Returns:
            index (B V, K) and plan (B V, K, K), as `match`; None and None without
            `hungarian_match`.
        """
        if not self.hungarian_match:
            return None, None
        views = len(sparse_pred) // len(sparse_tgt)
        if token_filter is not None:
            token_filter = token_filter.repeat_interleave(views, dim=0)
        targets = sparse_tgt.repeat_interleave(views, dim=0)
        return match(sparse_pred, targets, wanted=token_filter)

    def rearrange_sparse_targets(self, assignments: Tensor, index_tgt: Tensor) -> Tensor:
        """The assignments (B, T, C) of images as V views of each see them: token t of a view takes
        row `index_tgt[:, t]` (B V, T) -> (B V, T, C)."""
        views = len(index_tgt) // len(assignments)
        image = torch.arange(len(index_tgt), device=index_tgt.device) // views
        return assignments[image.unsqueeze(1), index_tgt]

    def contrastive_loss(
        self,
        logits_pred: Tensor,
        cluster_tgt: Tensor,
        index_tgt: Tensor | None = None,
        pred_filter: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of V views an image with the image's own assignments, at `logits_temp`.

        Args:
            logits_pred: (B V, T, C), V views of each image in a row.
            cluster_tgt: (B, T, C).
            index_tgt: (B V, T), which of the image's tokens each is held against; None: its own.
            pred_filter: (B V, T), what each token's term is multiplied by before all are averaged.

        Returns:
            A scalar.
        """
        if index_tgt is None:
            views = len(logits_pred) // len(cluster_tgt)
            targets = cluster_tgt.repeat_interleave(views, dim=0)
        else:
            targets = self.rearrange_sparse_targets(cluster_tgt, index_tgt)
        return soft_cross_entropy(logits_pred, targets, self.logits_temp, pred_filter)

    def update_teacher(self) -> None:
        """Moves the teacher one step towards the model; nothing without a teacher.

        Attributes:
            teacher_momentum: afterwards, the momentum of this step.
            _step_counter: () int64, the steps of the schedule so far. It is in no state dict;
                training that goes on sets it.
        """
        if not self.momentum_teacher:
            return
        steps = self.teacher_momentum_schedule_steps
        if self.teacher_momentum_final is not None and steps:
            self.teacher_momentum = scheduled_momentum(
                int(self._step_counter),
                steps,
                self.first_teacher_momentum,
                self.teacher_momentum_final,
            )
            self._step_counter += 1
        update_teacher(self, self.teacher_momentum)

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
