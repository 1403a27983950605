"""Random inputs of each op as a forward pass hands them over, and whether a result is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from harness import relative_error
from stellar_fast.reference import ops as oracles
from torch import Tensor

from stellar_fast.config import LAYER_NORM_EPS, MODELS

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


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def results(returned: Any) -> list[Tensor]:
    """The tensors of an op that are the result, partial sums left out."""
    items = [returned] if isinstance(returned, Tensor) else list(returned)
    return [item for item in items if item is not None]


def refusal(case: Case, kernel: Callable[..., Any], inputs: tuple[list, dict]) -> str | None:
    """Why `kernel` gets no figure on these inputs, with the numbers; None where it is right.

    The error against float64 may be twice that of the oracle in the case's dtype, and the rounding
    of the result. A result in FP8 is held against the numbers before they were quantized, whose
    rounding the oracle's error has in it.
    """
    values, keywords = inputs
    oracle = getattr(oracles, op_of(case))
    writes_sums = op_of(case) in ("linear_residual", "patch_embed")
    with torch.no_grad():
        ours = results(kernel(*values, **keywords))
        plain = results(oracle(*values, **keywords))
        wide = {name: _widened(value) for name, value in keywords.items()}
        scale = wide.pop("out_scale", None)
        exact = results(oracle(*map(_widened, values), **wide))
        if scale is not None:
            limit = oracles.FP8_MAX
            exact = [(result / scale).clamp(-limit, limit) for result in exact]
    if writes_sums:
        ours, plain, exact = ours[:1], plain[:1], exact[:1]
    if not len(ours) == len(plain) == len(exact):
        return f"{len(ours)} results instead of {len(exact)}"
    for i, (found, near, right) in enumerate(zip(ours, plain, exact, strict=True)):
        rounded = 0.0 if scale is not None else torch.finfo(found.dtype).eps / 2 / math.sqrt(3)
        budget = 2 * relative_error(near, right) + rounded
        error = relative_error(found, right)
        if not error <= budget:  # nor is NaN
            return f"result {i}: error {error:.3e} exceeds its budget {budget:.3e}"
    return None
