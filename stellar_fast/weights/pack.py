"""A checkpoint's tensors -> the engine's: fused, centred, folded in float64 and rounded once.

Two identities, applied offline, leave one number per row of every LayerNorm in front of a linear
layer:

* LayerNorm does not see a shift of its row, so whatever writes to the residual stream (patches,
  positions, tokens, the attention and MLP output layers) may have its mean over the width taken
  away. Every row then has mean 0 and LayerNorm is `x / sqrt(mean(x²) + eps) * gamma + beta`.
* `gamma` and `beta` go into the next linear layer: `W' = W diag(gamma)`, `b' = b + W beta`.

Pixels enter unnormalised, less the middle of their range: what is left of `(x - mean) / std` is
folded into the patch weights and the position table. Without the middle taken away the products
would cancel against the table, and cost float32 two bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..config import IMAGE_MEAN, IMAGE_STD, ModelConfig
from .names import VQGAN_BLOCKS, VQGAN_CHANNELS
from .packed import (
    PIXEL_CENTRE,
    Block,
    DecoderWeights,
    EncoderWeights,
    Fp8Block,
    LastBlock,
    Linear,
    Norm,
    PatchTable,
    ResBlock,
    VQGANWeights,
)

State = Mapping[str, Tensor]


def _centred(weight: Tensor) -> Tensor:
    """`weight` (O, ...) in float64 with its mean over the outputs taken away."""
    weight = weight.double()
    return weight - weight.mean(0, keepdim=True)


class _Packer:
    """Reads a state dict by name and rounds the result to the engine's dtype and device."""

    def __init__(self, state: State, dtype: torch.dtype, device: torch.device) -> None:
        self.state, self.dtype, self.device = state, dtype, device

    def cast(self, tensor: Tensor) -> Tensor:
        return self._own(tensor, self.dtype)

    def exact(self, tensor: Tensor) -> Tensor:
        return self._own(tensor, torch.float32)

    def _own(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # A copy even where nothing changes: the state may be a file mapped into memory.
        return tensor.to(device=self.device, dtype=dtype, copy=True).contiguous()

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.weight"].double(), self.state[f"{name}.bias"].double()

    def linear(self, weight: Tensor, bias: Tensor) -> Linear:
        return Linear(self.cast(weight), self.cast(bias))

    def plain(self, name: str) -> Linear:
        return self.linear(*self.pair(name))

    def norm(self, name: str) -> Norm:
        weight, bias = self.pair(name)
        return Norm(self.cast(weight), self.cast(bias))

    def writer(self, name: str) -> Linear:
        """A layer whose output is added to the residual stream."""
        weight, bias = self.pair(name)
        return self.linear(_centred(weight), _centred(bias))

    def reader(self, norm: str, *names: str) -> Linear:
        """The layers `names`, fused, behind the LayerNorm `norm`, which is folded into them."""
        gamma, beta = self.pair(norm)
        weights, biases = zip(*(self.pair(name) for name in names), strict=True)
        weight, bias = torch.cat(weights), torch.cat(biases)
        return self.linear(weight * gamma, bias + weight @ beta)

    def block(self, tree: str, layer: int) -> Block:
        name = f"{tree}.encoder.layer.{layer}"
        attention = f"{name}.attention.attention"
        parts = (f"{attention}.query", f"{attention}.key", f"{attention}.value")
        return Block(
            qkv=self.reader(f"{name}.layernorm_before", *parts),
            proj=self.writer(f"{name}.attention.output.dense"),
            fc1=self.reader(f"{name}.layernorm_after", f"{name}.intermediate.dense"),
            fc2=self.writer(f"{name}.output.dense"),
        )


def _split_query(block: Block) -> LastBlock:
    width = block.qkv.weight.shape[1]
    query = Linear(block.qkv.weight[:width], block.qkv.bias[:width])
    key_value = Linear(block.qkv.weight[width:], block.qkv.bias[width:])
    return LastBlock(query, key_value, block.proj, block.fc1, block.fc2)


def pack_encoder(
    state: State,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantize: Callable[[Block, torch.dtype], Fp8Block] | None = None,
) -> EncoderWeights:
    """Weights of `encode` from a state dict with the tensors of `names.encode_shapes`.

    Args:
        dtype: of the matrices and of what the kernels add to them; position tables stay float32.
        quantize: for every block but the first and the last; given it in float64, and `dtype`.
    """
    pack = _Packer(state, dtype, device)
    exact = _Packer(state, torch.float64, device)
    backbone = config.backbone
    embeddings = "encoder.embeddings"
    kernel, bias = pack.pair(f"{embeddings}.patch_embeddings.projection")
    mean = torch.tensor(IMAGE_MEAN, dtype=torch.float64)[None, :, None, None]
    std = torch.tensor(IMAGE_STD, dtype=torch.float64)[None, :, None, None]
    kernel, bias = _centred(kernel) / std, _centred(bias)
    shift = bias - (kernel * (mean - PIXEL_CENTRE)).sum((1, 2, 3))
    patch = kernel.flatten(1)
    positions = state[f"{embeddings}.position_embeddings"][0]
    cls = state[f"{embeddings}.cls_token"][0].double() + positions[:1].double()
    grid = positions[1:].float().reshape(backbone.grid, backbone.grid, -1)
    table = PatchTable(
        cls=pack.exact(cls - cls.mean(-1, keepdim=True)),
        positions=pack.exact(grid),
        shift=pack.exact(shift),
    )
    tokens = state["sparse_tokens"].double()
    layers = backbone.num_hidden_layers

    def block(layer: int) -> Block | Fp8Block:
        if quantize is None or layer == 0:
            return pack.block("encoder", layer)
        return quantize(exact.block("encoder", layer), dtype)

    return EncoderWeights(
        patch=pack.cast(patch),
        patch_uint8=pack.cast(patch / 255),
        table=table,
        sparse_tokens=pack.cast(tokens - tokens.mean(-1, keepdim=True)),
        blocks=tuple(block(layer) for layer in range(layers - 1)),
        last=_split_query(pack.block("encoder", layers - 1)),
        norm=pack.norm("encoder.layernorm"),
        dense_proj=pack.plain("dense_proj"),
        sparse_proj=pack.plain("sparse_proj"),
    )


def pack_decoder(
    state: State,
    config: ModelConfig,
    vqgan: VQGANWeights | None,
    dtype: torch.dtype,
    device: torch.device,
) -> DecoderWeights:
    """Weights of `reconstruct` from a state dict with the tensors of `names.reconstruct_shapes`.

    Args:
        vqgan: the tokenizer's decoder; None where the checkpoint has the pixel head.
    """
    pack = _Packer(state, dtype, device)
    layers = config.decoder.num_hidden_layers
    return DecoderWeights(
        decoder_proj=pack.writer("decoder_proj"),
        fourier=pack.exact(state["position_embedding.positional_encoding_gaussian_matrix"]),
        blocks=tuple(pack.block("decoder", layer) for layer in range(layers)),
        norm=pack.norm("decoder.layernorm"),
        head=pack.plain("reconstruction_head"),
        vqgan=vqgan,
    )


def _res_block(pack: _Packer, name: str) -> ResBlock:
    """One residual block of the VQGAN.

    Where channel counts differ, the published block adds `nin_shortcut(h)` to its own output h
    rather than a projection of its input, so the sum is (I + N) conv2(...), and I + N goes into
    conv2.
    """
    conv2 = pack.state[f"{name}.conv2.weight"].double()
    shortcut = pack.state.get(f"{name}.nin_shortcut.weight")
    if shortcut is not None:
        mix = torch.eye(conv2.shape[0], dtype=torch.float64) + shortcut[:, :, 0, 0].double()
        conv2 = torch.einsum("om,mihw->oihw", mix, conv2)
    return ResBlock(
        norm1=pack.norm(f"{name}.norm1"),
        conv1=pack.cast(pack.state[f"{name}.conv1.weight"]),
        norm2=pack.norm(f"{name}.norm2"),
        conv2=pack.cast(conv2),
    )


def pack_vqgan(state: State, dtype: torch.dtype, device: torch.device) -> VQGANWeights:
    """Weights of the VQGAN's decoder from a state dict (`names.vqgan_decoder_shapes`)."""
    pack = _Packer(state, dtype, device)
    blocks = range(VQGAN_BLOCKS)
    coarse_to_fine = list(reversed(range(len(VQGAN_CHANNELS))))
    return VQGANWeights(
        codebook=pack.cast(state["quantize.embedding.weight"]),
        conv_in=pack.plain("decoder.conv_in"),
        mid=tuple(_res_block(pack, f"decoder.mid.{block}") for block in blocks),
        levels=tuple(
            tuple(_res_block(pack, f"decoder.up.{level}.block.{block}") for block in blocks)
            for level in coarse_to_fine
        ),
        upsample=tuple(
            pack.plain(f"decoder.up.{level}.upsample_conv") for level in coarse_to_fine[:-1]
        ),
        norm_out=pack.norm("decoder.norm_out"),
        conv_out=pack.plain("decoder.conv_out"),
    )
