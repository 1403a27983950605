"""Each kernel on the device beside what PyTorch offers for the same op, on the same inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from gpu_timing import Call, sets_beyond_cache, time_in_turn
from harness import relative_error
from stellar_fast.reference import ops as oracles
from torch import Tensor

from stellar_fast import torch_ops
from stellar_fast.config import LAYER_NORM_EPS, MODELS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(kind)

    def weight(out: int, depth: int) -> Tensor:
        return draw(out, depth, scale=depth**-0.5)

    match op_of(case):
        case "linear":
            x = draw(batch, length, case.depth, kind=torch.float32)
            x = (x - x.mean(-1, keepdim=True)).to(dtype)
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
            x = draw(batch, length, width)
            lengths = [1, patches, tokens]
            return [x, draw(width), draw(width), LAYER_NORM_EPS, lengths, torch.float32], {}
        case "spatial_map":
            dense = draw(batch, patches, width, kind=torch.float32)
            sparse = draw(batch, tokens, width, kind=torch.float32)
            pairs = [weight(width, width), draw(width), weight(width, width), draw(width)]
            return [dense, sparse, *pairs, config.spatial_temp], {"lowrank": True}
        case "reassemble":
            spatial = draw(batch, patches, tokens, kind=torch.float32).softmax(-1)
            return [spatial, draw(batch, tokens, width, kind=torch.float32)], {}
    raise ValueError(f"unknown op {case.name!r}")


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
    of the result.
    """
    values, keywords = inputs
    oracle = getattr(oracles, op_of(case))
    writes_sums = op_of(case) in ("linear_residual", "patch_embed")
    with torch.no_grad():
        ours = results(kernel(*values, **keywords))
        plain = results(oracle(*values, **keywords))
        wide = {name: _widened(value) for name, value in keywords.items()}
        exact = results(oracle(*map(_widened, values), **wide))
    if writes_sums:
        ours, plain, exact = ours[:1], plain[:1], exact[:1]
    if not len(ours) == len(plain) == len(exact):
        return f"{len(ours)} results instead of {len(exact)}"
    for i, (found, near, right) in enumerate(zip(ours, plain, exact, strict=True)):
        rounded = torch.finfo(found.dtype).eps / 2 / math.sqrt(3)
        budget = 2 * relative_error(near, right) + rounded
        error = relative_error(found, right)
        if not error <= budget:  # nor is NaN
            return f"result {i}: error {error:.3e} exceeds its budget {budget:.3e}"
    return None


def measure(case: Case, seconds: float, compiles: bool) -> dict[str, Any]:
    """A row: the kernel and its baselines in turn; or why it is refused.

    A baseline that cannot run says why instead of a time.
    """
    from stellar_fast import kernels

    device, name = torch.device("cuda"), op_of(case)
    kernel = getattr(kernels, name)
    first = arguments(case, device, 0)
    reason = refusal(case, kernel, first)
    row: dict[str, Any] = {"key": case.key, "flops": case.flops, "bytes": case.moved}
    if reason is not None:
        return {**row, "refused": reason}
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = sets_beyond_cache(int(case.moved), cache)
    sets = [first, *(arguments(case, device, seed) for seed in range(1, count))]
    functions = {
        "kernel": kernel,
        "eager": getattr(oracles, name),
        "torch_ops": getattr(torch_ops, name),
    }
    refused: dict[str, str] = {}
    if compiles:
        start = time.perf_counter()
        functions["compile"] = torch.compile(
            getattr(oracles, name), mode="max-autotune-no-cudagraphs", dynamic=False
        )
    calls: dict[str, list[Call]] = {}
    for key, function in functions.items():
        alternatives = [
            lambda function=function, values=values, keywords=keywords: function(
                *values, **keywords
            )
            for values, keywords in sets
        ]
        try:
            alternatives[0]()
            torch.cuda.synchronize()
        except (RuntimeError, TypeError) as error:
            refused[key] = str(error).splitlines()[0]
            continue
        calls[key] = alternatives
        if key == "compile":
            row["compile_seconds"] = time.perf_counter() - start
    with torch.no_grad():
        timings = time_in_turn(calls, seconds=seconds)
    for key, timing in timings.items():
        row[key] = {"median": timing.median, "low": timing.low, "high": timing.high}
    median = timings["kernel"].median
    row |= {"tflops": case.flops / median / 1e12, "gb_per_second": case.moved / median / 1e9}
    return {**row, "not_run": refused} if refused else row
