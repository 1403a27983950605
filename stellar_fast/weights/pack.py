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
from .residency import let_go

# Numbers of a matrix that are in float64 at once. They stay in a processor's cache, and PyTorch
# does not share so few out among threads, whose barriers took more time than the work.
AT_ONCE = 1 << 15
State = Mapping[str, Tensor]
Layout = Callable[[Linear], Linear]  # what a back end makes of each layer as soon as it is packed


def as_it_is(layer: Linear) -> Linear:
    return layer


def _without_mean(tensor: Tensor, dim: int) -> Tensor:
    """`tensor`, in float64, less its mean over an axis: in its place."""
    return tensor.sub_(tensor.sum(dim, keepdim=True).div_(tensor.shape[dim]))


def _step(weight: Tensor) -> int:
    """How many rows are taken to float64 at once."""
    return max(1, AT_ONCE // weight[0].numel()) if weight.device.type == "cpu" else len(weight)


def _blocks(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(_step(weight))


class _Packer:
    """Reads a state dict by name and rounds the result to the engine's dtype and device."""

    def __init__(
        self, state: State, dtype: torch.dtype, device: torch.device, layout: Layout = as_it_is
    ) -> None:
        self.state, self.dtype, self.device, self.layout = state, dtype, device, layout

    def cast(self, tensor: Tensor) -> Tensor:
        return self._own(tensor, self.dtype)

    def exact(self, tensor: Tensor) -> Tensor:
        return self._own(tensor, torch.float32)

    def _own(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # A copy even where nothing changes: the state may be a file mapped into memory.
        return tensor.to(device=self.device, dtype=dtype, copy=True).contiguous()

    def double(self, name: str) -> Tensor:
        """A copy of a tensor in float64."""
        return self.state[name].to(torch.float64, copy=True)

    def linear(self, weight: Tensor, bias: Tensor) -> Linear:
        """`weight` is rounded already, `bias` not yet."""
        return self.layout(Linear(weight.to(self.device), self.cast(bias)))

    def plain(self, name: str) -> Linear:
        return self.linear(self.cast(self.state[f"{name}.weight"]), self.state[f"{name}.bias"])

    def norm(self, name: str) -> Norm:
        return Norm(self.cast(self.state[f"{name}.weight"]), self.cast(self.state[f"{name}.bias"]))

    def writer(self, name: str) -> Linear:
        """A layer whose output is added to the residual stream."""
        weight = self.state[f"{name}.weight"]
        mean = weight.new_zeros(weight.shape[1:], dtype=torch.float64)
        for rows in _blocks(weight):
            mean += rows.double().sum(0)
        mean /= len(weight)
        packed = weight.new_empty(weight.shape, dtype=self.dtype)
        for out, rows in zip(_blocks(packed), _blocks(weight), strict=True):
            out.copy_(rows.to(torch.float64, copy=True).sub_(mean))
        return self.linear(packed, _without_mean(self.double(f"{name}.bias"), 0))

    def reader(self, norm: str, *names: str) -> Linear:
        """The layers `names`, fused, behind the LayerNorm `norm`, which is folded into them."""
        gamma, beta = self.double(f"{norm}.weight"), self.double(f"{norm}.bias")
        weights = [self.state[f"{name}.weight"] for name in names]
        counts = list(map(len, weights))
        weight = weights[0].new_empty((sum(counts), len(gamma)), dtype=self.dtype)
        bias = gamma.new_empty(sum(counts))
        places = zip(names, weights, weight.split(counts), bias.split(counts), strict=True)
        for name, given, packed, shift in places:
            shift.copy_(self.state[f"{name}.bias"])
            blocks = zip(_blocks(given), _blocks(packed), strict=True)
            for part, (rows, out) in zip(shift.split(_step(given)), blocks, strict=True):
                rows = rows.to(torch.float64, copy=True)
                part.add_(rows.mm(beta[:, None])[:, 0])
                out.copy_(rows.mul_(gamma))
        return self.linear(weight, bias)

    def block(self, tree: str, layer: int) -> Block:
        name = f"{tree}.encoder.layer.{layer}"
        qkv = self.reader(f"{name}.layernorm_before", *_attention(name))
        return Block(qkv=qkv, **self._behind_attention(name))

    def last_block(self, tree: str, layer: int) -> LastBlock:
        name = f"{tree}.encoder.layer.{layer}"
        norm, (query, *key_value) = f"{name}.layernorm_before", _attention(name)
        return LastBlock(
            query=self.reader(norm, query),
            key_value=self.reader(norm, *key_value),
            **self._behind_attention(name),
        )

    def _behind_attention(self, name: str) -> dict[str, Linear]:
        layers = {
            "proj": self.writer(f"{name}.attention.output.dense"),
            "fc1": self.reader(f"{name}.layernorm_after", f"{name}.intermediate.dense"),
            "fc2": self.writer(f"{name}.output.dense"),
        }
        # They have been read for the last time.
        let_go(value for key, value in self.state.items() if key.startswith(f"{name}."))
        return layers


def _attention(block: str) -> tuple[str, ...]:
    return tuple(f"{block}.attention.attention.{part}" for part in ("query", "key", "value"))


def pack_encoder(
    state: State,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantize: Callable[[Block, torch.dtype], Fp8Block] | None = None,
    layout: Layout = as_it_is,
) -> EncoderWeights:
    """Weights of `encode` from a state dict with the tensors of `names.encode_shapes`.

    Args:
        dtype: of the matrices and of what the kernels add to them; position tables stay float32.
        quantize: for every block but the first and the last; given it in float64, and `dtype`.
        layout: of each linear layer.
    """
    pack = _Packer(state, dtype, device, layout)
    exact = _Packer(state, torch.float64, device)
    backbone = config.backbone
    embeddings = "encoder.embeddings"
    projection = f"{embeddings}.patch_embeddings.projection"
    mean = torch.tensor(IMAGE_MEAN, dtype=torch.float64)[None, :, None, None]
    std = torch.tensor(IMAGE_STD, dtype=torch.float64)[None, :, None, None]
    kernel = _without_mean(pack.double(f"{projection}.weight"), 0).div_(std)
    shift = _without_mean(pack.double(f"{projection}.bias"), 0)
    shift.sub_(kernel.clone().mul_(mean.sub_(PIXEL_CENTRE)).sum((1, 2, 3)))
    patch = kernel.flatten(1)
    positions = state[f"{embeddings}.position_embeddings"][0]
    cls = pack.double(f"{embeddings}.cls_token")[0].add_(positions[:1])
    grid = positions[1:].float().reshape(backbone.grid, backbone.grid, -1)
    table = PatchTable(
        cls=pack.exact(_without_mean(cls, -1)),
        positions=pack.exact(grid),
        shift=pack.exact(shift),
    )
    layers = backbone.num_hidden_layers

    def block(layer: int) -> Block | Fp8Block:
        if quantize is None or layer == 0:
            return pack.block("encoder", layer)
        return quantize(exact.block("encoder", layer), dtype)

    return EncoderWeights(
        patch=pack.cast(patch),
        patch_uint8=pack.cast(patch.clone().div_(255)),
        table=table,
        sparse_tokens=pack.cast(_without_mean(pack.double("sparse_tokens"), -1)),
        blocks=tuple(block(layer) for layer in range(layers - 1)),
        last=pack.last_block("encoder", layers - 1),
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
    layout: Layout = as_it_is,
) -> DecoderWeights:
    """Weights of `reconstruct` from a state dict with the tensors of `names.reconstruct_shapes`.

    Args:
        vqgan: the tokenizer's decoder; None where the checkpoint has the pixel head.
        layout: of each linear layer.
    """
    pack = _Packer(state, dtype, device, layout)
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
