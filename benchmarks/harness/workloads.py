"""What is measured on a GPU: each op at the models' shapes, its arithmetic and its traffic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stellar_fast.config import MODELS, ModelConfig

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


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


def all_cases(precision: str, batch: int) -> list[Case]:
    """The ops of all five models."""
    return [case for config in MODELS.values() for case in cases(config, batch, precision)]
