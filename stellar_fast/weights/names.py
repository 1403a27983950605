"""Names and shapes of every tensor of a published checkpoint, in either of its spellings.

The ViT module that trained the published weights was renamed between major versions of its library,
so two spellings of its blocks are in the wild; the older, published one is the canonical one here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from ..config import CODE_DIM, CODEBOOK_SIZE, BackboneConfig, ModelConfig
from ..errors import CheckpointError

T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]

# Of the published clustering heads: prototypes, the MLP's hidden channels, prototype channels.
CLUSTERS = 16384
HEAD_HIDDEN = 2048
PROTOTYPE_DIM = 256
VIT_TREES = ("encoder", "decoder", "teacher_encoder")

_RENAMED = {  # part of a block's name in the renamed spelling -> in the published one
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}
_RENAMED_KEY = re.compile(
    rf"({'|'.join(VIT_TREES)})\.layers\.(\d+)\."
    rf"({'|'.join(map(re.escape, _RENAMED))})\.(weight|bias)"
)


def canonical_name(name: str) -> str:
    """`name` without the `model.` prefix, in the published spelling."""
    name = name.removeprefix("model.")
    match = _RENAMED_KEY.fullmatch(name)
    if match is None:
        return name
    tree, layer, part, leaf = match.groups()
    return f"{tree}.encoder.layer.{layer}.{_RENAMED[part]}.{leaf}"


def canonical(state: Mapping[str, T]) -> dict[str, T]:
    """`state` with every name in its canonical spelling.

    Raises:
        CheckpointError: two names of `state` mean the same tensor.
    """
    names: dict[str, str] = {}
    for name in state:
        other = names.setdefault(canonical_name(name), name)
        if other != name:
            raise CheckpointError(
                f"tensors {other!r} and {name!r} are the same parameter in two spellings; "
                "keep one of them"
            )
    return {new: state[old] for new, old in names.items()}


def vit_shapes(config: BackboneConfig, tree: str) -> Shapes:
    """Tensors of one ViT under the prefix `tree`, its unused pooler included."""
    width, mlp, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: Shapes = {
        f"{tree}.embeddings.cls_token": (1, 1, width),
        f"{tree}.embeddings.position_embeddings": (1, 1 + config.num_patches, width),
        f"{tree}.embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        f"{tree}.embeddings.patch_embeddings.projection.bias": (width,),
    }
    for layer in range(config.num_hidden_layers):
        block = f"{tree}.encoder.layer.{layer}"
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for part in (
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            "attention.output.dense",
        ):
            shapes |= linear_shapes(f"{block}.{part}", width, width)
        shapes |= linear_shapes(f"{block}.intermediate.dense", mlp, width)
        shapes |= linear_shapes(f"{block}.output.dense", width, mlp)
    shapes |= {f"{tree}.layernorm.weight": (width,), f"{tree}.layernorm.bias": (width,)}
    return shapes | linear_shapes(f"{tree}.pooler.dense", width, width)


def linear_shapes(name: str, out_features: int, in_features: int) -> Shapes:
    """Weight and bias of a linear layer."""
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def cluster_head_shapes(name: str, width: int) -> Shapes:
    """Tensors of one published clustering head over tokens of `width` channels."""
    return {
        **linear_shapes(f"{name}.predictor.layers.0", HEAD_HIDDEN, width),
        **linear_shapes(f"{name}.predictor.layers.2", PROTOTYPE_DIM, HEAD_HIDDEN),
        f"{name}.layer.weight": (CLUSTERS, PROTOTYPE_DIM),
    }


def encode_shapes(config: ModelConfig) -> Shapes:
    """What `encode` reads: the encoder less its pooler, the sparse tokens, both projections."""
    width = config.backbone.hidden_size
    shapes = {
        name: shape
        for name, shape in vit_shapes(config.backbone, "encoder").items()
        if ".pooler." not in name
    }
    shapes["sparse_tokens"] = (config.num_sparse_tokens, width)
    return (
        shapes
        | linear_shapes("dense_proj", width, width)
        | linear_shapes("sparse_proj", width, width)
    )


def reconstruct_shapes(config: ModelConfig, *, pixel_head: bool = False) -> Shapes:
    """What `reconstruct` reads beyond `encode_shapes`: the decoder less embeddings and pooler."""
    shapes = {
        name: shape
        for name, shape in vit_shapes(config.decoder, "decoder").items()
        if not name.startswith(("decoder.embeddings.", "decoder.pooler."))
    }
    width, patch = config.decoder.hidden_size, config.backbone.patch_size
    shapes |= linear_shapes("decoder_proj", width, config.backbone.hidden_size)
    shapes["position_embedding.positional_encoding_gaussian_matrix"] = (2, width // 2)
    if pixel_head:
        return shapes | {
            "reconstruction_head.weight": (width, 3, patch, patch),
            "reconstruction_head.bias": (3,),
        }
    return shapes | linear_shapes("reconstruction_head", CODEBOOK_SIZE, width)


def published_shapes(
    config: ModelConfig, *, pixel_head: bool = False, teacher: bool = False
) -> Shapes:
    """Every tensor of a published file, unused ones included."""
    width = config.backbone.hidden_size
    shapes = vit_shapes(config.backbone, "encoder") | encode_shapes(config)
    shapes |= vit_shapes(config.decoder, "decoder") | reconstruct_shapes(
        config, pixel_head=pixel_head
    )
    shapes |= cluster_head_shapes("clustering_head", width) | cluster_head_shapes(
        "cls_cluster_head", width
    )
    if teacher:
        shapes |= vit_shapes(config.backbone, "teacher_encoder")
        shapes["teacher_sparse_tokens"] = (config.num_sparse_tokens, width)
        shapes |= cluster_head_shapes("teacher_head", width) | cluster_head_shapes(
            "teacher_cls_head", width
        )
    return shapes


def _res_block_shapes(name: str, inner: int, outer: int) -> Shapes:
    shapes: Shapes = {
        f"{name}.norm1.weight": (inner,),
        f"{name}.norm1.bias": (inner,),
        f"{name}.conv1.weight": (outer, inner, 3, 3),
        f"{name}.norm2.weight": (outer,),
        f"{name}.norm2.bias": (outer,),
        f"{name}.conv2.weight": (outer, outer, 3, 3),
    }
    if inner != outer:  # square, since it acts on the block's own output: see reference/vqgan.py
        shapes[f"{name}.nin_shortcut.weight"] = (outer, outer, 1, 1)
    return shapes


VQGAN_CHANNELS = (128, 128, 256, 256, 512)  # 128 times (1, 1, 2, 2, 4), level 0 is the finest
VQGAN_BLOCKS = 2  # residual blocks a level


def vqgan_decoder_shapes() -> Shapes:
    """What decoding codes to pixels reads: the decoder and the codebook."""
    top, bottom = VQGAN_CHANNELS[-1], VQGAN_CHANNELS[0]
    shapes: Shapes = {
        "decoder.conv_in.weight": (top, CODE_DIM, 3, 3),
        "decoder.conv_in.bias": (top,),
    }
    for block in range(VQGAN_BLOCKS):
        shapes |= _res_block_shapes(f"decoder.mid.{block}", top, top)
    width = top
    for level in reversed(range(len(VQGAN_CHANNELS))):
        for block in range(VQGAN_BLOCKS):
            shapes |= _res_block_shapes(
                f"decoder.up.{level}.block.{block}", width, VQGAN_CHANNELS[level]
            )
            width = VQGAN_CHANNELS[level]
        if level > 0:
            shapes[f"decoder.up.{level}.upsample_conv.weight"] = (width, width, 3, 3)
            shapes[f"decoder.up.{level}.upsample_conv.bias"] = (width,)
    shapes |= {"decoder.norm_out.weight": (bottom,), "decoder.norm_out.bias": (bottom,)}
    shapes |= {"decoder.conv_out.weight": (3, bottom, 3, 3), "decoder.conv_out.bias": (3,)}
    return shapes | {"quantize.embedding.weight": (CODEBOOK_SIZE, CODE_DIM)}


def vqgan_shapes() -> Shapes:
    """Every tensor of the MaskGIT-VQGAN file `maskgit-vqgan-imagenet-f16-256.bin`."""
    top, width = VQGAN_CHANNELS[-1], VQGAN_CHANNELS[0]
    shapes: Shapes = {"encoder.conv_in.weight": (width, 3, 3, 3)}
    for level, channels in enumerate(VQGAN_CHANNELS):
        for block in range(VQGAN_BLOCKS):
            shapes |= _res_block_shapes(f"encoder.down.{level}.block.{block}", width, channels)
            width = channels
    for block in range(VQGAN_BLOCKS):
        shapes |= _res_block_shapes(f"encoder.mid.{block}", top, top)
    shapes |= {"encoder.norm_out.weight": (top,), "encoder.norm_out.bias": (top,)}
    shapes |= {
        "encoder.conv_out.weight": (CODE_DIM, top, 1, 1),
        "encoder.conv_out.bias": (CODE_DIM,),
    }
    return shapes | vqgan_decoder_shapes()
