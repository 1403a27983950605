"""What is measured: each op at the models' shapes, its arithmetic and traffic, and its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stellar_fast.config import LAYER_NORM_EPS, MODELS, ModelConfig
from stellar_fast.reference import ops as oracles

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
FP8 = oracles.FP8
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # of everything but the operands of products
}
STATIC_SCALE = 4 / oracles.FP8_MAX  # of an FP8 result: numbers up to 4 keep their magnitude
OPS = {
    **dict.fromkeys(("qkv", "fc1"), "linear"),
    **dict.fromkeys(("proj", "fc2"), "linear_residual"),
}


@dataclass(frozen=True)
class Case:
    """One op of one model at one batch.

    Attributes:
        name: qkv, attention, proj, fc1, fc2, quantize_rows, patch_embed, norm, spatial_map or
            reassemble.
        rows, columns, depth: of a matrix product; otherwise rows of the op, channels, and 0.
        launches: times that a forward pass runs it.
        flops: of one run, a multiply and an add counted as two.
        moved: bytes that one run must read and write at least.
    """

    model: str
    batch: int
    precision: str
    name: str
    rows: int
    columns: int
    depth: int
    launches: int
    flops: float
    moved: float

    @property
    def key(self) -> str:
        return f"{self.model}/b{self.batch}/{self.precision}/{self.name}"


def cases(config: ModelConfig, batch: int, precision: str) -> Iterator[Case]:
    """The ops of a forward pass of `batch` images; the last block counted as a whole one.

    fp8 has the ops of the blocks that compute in it, which the first and the last do not; the
    others are those of bf16.
    """
    vit, tokens = config.backbone, config.num_sparse_tokens
    width, hidden, layers = vit.hidden_size, vit.intermediate_size, vit.num_hidden_layers
    length, patches = config.sequence_length, vit.num_patches
    pixels = 3 * vit.patch_size**2
    small = BYTES[precision]
    size = max(small, 2)  # fp8 is read; what leaves a product for another op is bf16
    rows = batch * length
    fp8 = precision == "fp8"
    blocks = layers - 2 if fp8 else layers

    def case(name, count, columns, depth, launches, flops, moved):
        return Case(
            config.name, batch, precision, name, count, columns, depth, launches, flops, moved
        )

    for name, columns, depth, residual in (
        ("qkv", 3 * width, width, 0),
        ("proj", width, width, 1),
        ("fc1", hidden, width, 0),
        ("fc2", width, hidden, 1),
    ):
        out = small if name == "fc1" else size
        moved = small * depth * (rows + columns) + out * rows * columns
        moved += size * columns + size * residual * rows * columns
        yield case(name, rows, columns, depth, blocks, 2 * rows * columns * depth, moved)
    moved = 3 * size * rows * width + small * rows * width
    yield case("attention", rows, width, 0, blocks, 4 * rows * length * width, moved)
    if fp8:
        yield case("quantize_rows", rows, width, 0, 2 * blocks, 5 * rows * width, 3 * rows * width)
        return
    moved = batch * 3 * vit.image_size**2 + size * (pixels * width + rows * width)
    moved += 4 * (1 + patches) * width
    yield case(
        "patch_embed",
        batch * patches,
        width,
        pixels,
        1,
        2 * batch * patches * width * pixels,
        moved,
    )
    yield case("norm", rows, width, 0, 1, 8 * rows * width, (size + 4) * rows * width)
    mixture = 2 * batch * patches * tokens * width
    product = 2 * batch * (patches + tokens) * width * width
    moved = 4 * batch * (2 * patches + tokens) * width + 4 * batch * patches * tokens
    moved += 2 * size * width * width
    yield case("spatial_map", batch * patches, width, width, 1, product + 2 * mixture, moved)
    moved = 4 * batch * (patches * tokens + tokens * width + patches * width)
    yield case("reassemble", batch * patches, width, tokens, 0, mixture, moved)


def flops_per_image(config: ModelConfig) -> float:
    """Of matrix products, attention, patches and head, the norm not counted: what MFU is of."""
    return sum(c.launches * c.flops for c in cases(config, 1, "bf16") if c.name != "norm")


def op_of(case: Case) -> str:
    """The name in an ops namespace."""
    return OPS.get(case.name, case.name)


def arguments(case: Case, device: torch.device, seed: int) -> tuple[list[Any], dict[str, Any]]:
    """Random inputs of the op as a forward pass hands them over."""
    config, batch = MODELS[case.model], case.batch
    dtype, length = DTYPES[case.precision], config.sequence_length
    patches, tokens = config.backbone.num_patches, config.num_sparse_tokens
    width = config.backbone.hidden_size
    # Tensors without data, of which only launches are made, have no generator.
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(kind)

    def weight(out: int, depth: int) -> Tensor:
        return draw(out, depth, scale=depth**-0.5)

    def centred(columns: int) -> Tensor:
        x = draw(batch, length, columns, kind=torch.float32)
        return (x - x.mean(-1, keepdim=True)).to(dtype)

    if case.precision == "fp8":
        return _fp8_arguments(case, draw, batch, length)
    match op_of(case):
        case "linear":
            x = centred(case.depth)
            sums = x.float().square().unflatten(-1, (-1, 64)).sum(-1).permute(2, 0, 1).contiguous()
            keywords = {"norm_eps": LAYER_NORM_EPS, "sums": sums, "gelu": case.name == "fc1"}
            return [x, weight(case.columns, case.depth), draw(case.columns)], keywords
        case "linear_residual":
            x = draw(batch, length, case.depth)
            residual = draw(batch, length, case.columns)
            return [x, weight(case.columns, case.depth), draw(case.columns), residual], {}
        case "attention":
            qkv = draw(batch, length, 3 * width)
            return [qkv[..., :width], qkv[..., width:], config.backbone.num_attention_heads], {}
        case "patch_embed":
            side = config.backbone.image_size
            images = torch.randint(
                0, 256, (batch, 3, side, side), generator=generator, device=device
            ).to(torch.uint8)
            table = draw(1 + patches, width, kind=torch.float32)
            size = config.backbone.patch_size
            sparse = draw(tokens, width)
            return [images, weight(width, 3 * size**2) / 128, table, sparse, size, 127.5], {}
        case "norm":
            lengths = [1, patches, tokens]
            return [
                centred(width),
                draw(width),
                draw(width),
                LAYER_NORM_EPS,
                lengths,
                torch.float32,
            ], {}
        case "spatial_map":
            dense = draw(batch, patches, width, kind=torch.float32)
            sparse = draw(batch, tokens, width, kind=torch.float32)
            pairs = [weight(width, width), draw(width), weight(width, width), draw(width)]
            return [dense, sparse, *pairs, config.spatial_temp], {"lowrank": True}
        case "reassemble":
            spatial = draw(batch, patches, tokens, kind=torch.float32).softmax(-1)
            return [spatial, draw(batch, tokens, width, kind=torch.float32)], {}
    raise ValueError(f"unknown op {case.name!r}")


def _fp8_arguments(
    case: Case, draw: Callable[..., Tensor], batch: int, length: int
) -> tuple[list[Any], dict[str, Any]]:
    x = draw(batch, length, case.depth or case.columns)
    match op_of(case):
        case "quantize_rows":
            return [x, LAYER_NORM_EPS], {}
        case "attention":
            qkv = draw(batch, length, 3 * case.columns)
            heads = MODELS[case.model].backbone.num_attention_heads
            views = [qkv[..., : case.columns], qkv[..., case.columns :]]
            return [*views, heads], {"out_scale": STATIC_SCALE}
    rows, scale = oracles.quantize_rows(x, LAYER_NORM_EPS)
    weight = draw(case.columns, case.depth, scale=case.depth**-0.5)
    weight_scale = weight.float().abs().amax(1) / oracles.FP8_MAX
    small = (weight.float() / weight_scale[:, None]).to(FP8)
    bias = draw(case.columns)
    if op_of(case) == "linear_residual":
        # One scale for all rows, which a static one is; it is part of the weight's.
        largest = x.float().abs().amax() / oracles.FP8_MAX
        residual = draw(batch, length, case.columns)
        values = [(x.float() / largest).to(FP8), small, bias, residual]
        return values, {"weight_scale": weight_scale * largest}
    keywords: dict[str, Any] = {"x_scale": scale, "weight_scale": weight_scale}
    if case.name == "fc1":
        keywords |= {"gelu": True, "out_scale": STATIC_SCALE}
    return [rows, small, bias], keywords


def pictures(batch: int, side: int, seed: int) -> Tensor:
    """(batch, 3, side, side) in [0, 1], smooth with noise: zeros would flatter everyone."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 14, 14, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
    noise = torch.rand(batch, 3, side, side, generator=generator)
    return (0.8 * smooth + 0.2 * noise).clamp(0, 1)
