"""The static audit: every kernel that an engine can launch, compiled for GPUs that are not there.

No list of cases is kept. The real forward runs on meta tensors for the five models, every
precision, batch bucket and choice of input and output, while `kernels.launch` hands each launch to
this file instead of running it. What differs in the compiled code is compiled once for each GPU
and read: no spills, shared memory within the GPU, the GPU's matrix instruction wherever half or
FP8 products are taken, none that rounds float32, 64-bit offsets, and the same rows, warps and
instruction depth in all tiles that batches of different sizes choose between.

    python -P benchmarks/audit/run.py [--arch 90] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":  # before Triton is imported; workers inherit it
    os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # as every launch sets it; silences a warning
sys.path.append(str(Path(__file__).parents[1]))  # `python -P` leaves it out

import torch
from audit.compilation import Compilation, Finding, compile_one
from harness.workloads import DTYPES
from torch import Tensor

from stellar_fast import kernels
from stellar_fast.config import MODELS, ModelConfig
from stellar_fast.engine import encoder
from stellar_fast.engine.encoder import OUTPUTS
from stellar_fast.engine.graphs import bucket
from stellar_fast.kernels import gpus, launch
from stellar_fast.kernels.reassemble import MAX_TOKENS
from stellar_fast.weights import names
from stellar_fast.weights.pack import pack_decoder, pack_encoder
from stellar_fast.weights.packed import (
    Block,
    EncoderWeights,
    Fp8Block,
    Fp8Linear,
    Linear,
    position_code,
)
from stellar_fast.weights.quantize import FP8

META = torch.device("meta")
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    FP8: "fp8e4nv",
}
LARGEST_BATCH = 256
BATCHES = sorted({bucket(batch, LARGEST_BATCH) for batch in range(1, LARGEST_BATCH + 1)})
QUICK_MODELS = ("stellar-b16", "stellar-h16")
OTHER_TOKENS = "stellar-b16"  # audited with as many tokens as the kernels take, too


def _fp8(block: Block) -> Fp8Block:
    """An FP8 block of meta tensors; quantizing takes numbers."""

    def layer(plain: Linear) -> Fp8Linear:
        scale = plain.bias.new_empty(plain.bias.shape, dtype=torch.float32)
        return Fp8Linear(plain.weight.to(FP8), plain.bias, scale)

    parts = {f.name: layer(getattr(block, f.name)) for f in dataclasses.fields(block)}
    return Fp8Block(**parts, attended_scale=0.1, hidden_scale=0.1)


def shallow(config: ModelConfig) -> ModelConfig:
    """One block of each kind: first, middle and last; the others launch the same."""
    return dataclasses.replace(
        config,
        backbone=dataclasses.replace(config.backbone, num_hidden_layers=3),
        num_decoder_layers=1,
    )


def encoder_of(config: ModelConfig, precision: str) -> EncoderWeights:
    """Packed weights without data."""
    with META:
        shapes = names.encode_shapes(config)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        weights = pack_encoder(state, config, DTYPES[precision], META)
    if precision == "fp8":
        first, *others = weights.blocks
        weights = dataclasses.replace(
            weights, blocks=(first, *map(_fp8, cast(list[Block], others)))
        )
    return weights


def encode(
    weights: EncoderWeights,
    config: ModelConfig,
    batch: int,
    side: int = 224,
    pixels: torch.dtype = torch.uint8,
    outputs: Iterable[str] = OUTPUTS,
    out_dtype: torch.dtype = torch.float32,
) -> None:
    """The real forward, on tensors without data; within `launch.on_gpu` with a hook."""
    images = torch.empty(batch, 3, side, side, dtype=pixels, device=META)
    cells = side // config.backbone.patch_size
    table = weights.table.table(cells, cells)
    encoder.encode(kernels, weights, config, images, table, tuple(outputs), out_dtype)


def _reconstruct(config: ModelConfig, dtype: torch.dtype) -> None:
    """As `Engine.reconstruct`, up to the VQ tokenizer, which is convolutions."""
    shapes = names.encode_shapes(config) | names.reconstruct_shapes(config)
    with META:
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    decode = pack_decoder(state, config, None, dtype, META)
    cells, width = config.backbone.grid, config.backbone.hidden_size
    code = position_code(decode.fourier, cells, cells).to(dtype)
    for batch in (1, 16, 256):
        lowrank = kernels.reassemble(
            torch.empty(batch, cells**2, config.num_sparse_tokens, device=META),
            torch.empty(batch, config.num_sparse_tokens, width, device=META),
        )
        x: Tensor
        sums: Tensor | None
        x, sums = kernels.linear_residual(
            lowrank.to(dtype),
            decode.decoder_proj.weight,
            decode.decoder_proj.bias,
            code.expand(batch, -1, -1),
        )
        heads = config.decoder.num_attention_heads
        x, sums = encoder.run_block(kernels, decode.blocks[0], x, sums, heads)
        (x,) = kernels.norm(x, *_pair(decode.norm), 1e-12, (x.shape[1],), x.dtype)
        kernels.linear(x, x.new_empty(1024, x.shape[2]), x.new_empty(1024))


def launches(config: ModelConfig, precision: str, arch: int) -> Iterator[launch.Launch]:
    """Every launch of `config` on `arch`, over batches, sizes, inputs and outputs."""
    config, dtype = shallow(config), DTYPES[precision]
    weights = encoder_of(config, precision)
    seen: list[launch.Launch] = []
    with launch.on_gpu(arch, seen.append):
        for batch in BATCHES:
            encode(weights, config, batch)
            encode(weights, config, batch, outputs=("sparse", "cls"))
        encode(weights, config, 8, pixels=torch.float32, out_dtype=dtype)
        encode(weights, config, 8, pixels=dtype, outputs=("cls",))
        for side in (98, 384, 512):
            encode(weights, config, 8, side)
        if config.name == OTHER_TOKENS:
            most = dataclasses.replace(config, num_sparse_tokens=MAX_TOKENS)
            encode(encoder_of(most, precision), most, 8)
        if precision != "fp8":  # the decoder has no FP8 blocks
            _reconstruct(config, dtype)
    yield from seen


def forward(config: ModelConfig, precision: str, batch: int, arch: int) -> list[launch.Launch]:
    """Every launch of one forward with all outputs, in order."""
    weights = encoder_of(config, precision)
    seen: list[launch.Launch] = []
    with launch.on_gpu(arch, seen.append):
        encode(weights, config, batch)
    return seen


def _pair(node: Any) -> tuple[Tensor, Tensor]:
    return node.weight, node.bias


def compilation(item: launch.Launch, arch: int) -> Compilation:
    """What Triton would compile for a launch: its arguments' types, constants, divisibility."""
    signature, constants, divisible = [], [], []
    for parameter in item.kernel.params:
        name, value = parameter.name, item.arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None:
            kind = "constexpr"
        elif isinstance(value, Tensor):
            kind = f"*{TYPES[value.dtype]}"
            divisible.append(name)
        elif hasattr(value, "block_shape"):
            block = ", ".join(map(str, value.block_shape))
            kind = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, float):
            kind = "fp32"
        elif value == 1 and free:
            kind = "constexpr"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and free:
                divisible.append(name)
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, value))
    return Compilation(
        arch=arch,
        kernel=(item.kernel.fn.__module__, item.kernel.fn.__name__),
        signature=tuple(signature),
        constants=tuple(constants),
        divisible=tuple(divisible),
        options=tuple(sorted(item.options.items())),
    )


def collect(archs: Iterable[int], models: Iterable[str], precisions: Iterable[str]) -> list:
    """The distinct compilations, in the order in which they are first launched."""
    found: dict[Compilation, None] = {}
    for arch in archs:
        for precision in precisions:
            if precision == "fp8" and arch < 89:
                continue
            for model in models:
                for item in launches(MODELS[model], precision, arch):
                    found.setdefault(compilation(item, arch))
    return list(found)


def audit(items: list[Compilation], workers: int) -> list[Finding]:
    """Each compilation's finding, in order."""
    context = multiprocessing.get_context("spawn")
    limits = [gpus.GPUS[item.arch].shared for item in items]
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        return list(pool.map(compile_one, items, limits, chunksize=4))


def families(items: list[Compilation], findings: list[Finding]) -> list[str]:
    """Kernels whose tiles, chosen by batch size, would not add a row up in one order."""
    kinds: dict[tuple, set[tuple]] = {}
    for item, finding in zip(items, findings, strict=True):
        rows = item.value("BLOCK_M")
        if rows is None or item.kernel[1] != "_linear_kernel":
            continue
        operand = dict(item.signature)["x"]
        family = (item.arch, item.kernel[1], re.sub(r"\[.*?\]", "", operand), item.value("CHUNKS"))
        depth = {re.sub(r"^(\w+)\.(\d+)x\d+x(\d+)", r"\1.\2xNx\3", name) for name in finding.matrix}
        warps = dict(item.options)["num_warps"]
        # Where four warps share an instruction, every warp of it has 16 whole rows, if there are as
        # many: then their number changes no sum.
        shape: tuple = (rows >= 16 * warps,) if item.arch == 90 else (rows, warps)
        kinds.setdefault(family, set()).add((*shape, tuple(sorted(depth))))
    return [
        f"sm_{arch} {kernel} {operand}: tiles of one family differ: {sorted(found)}"
        for (arch, kernel, operand, _), found in kinds.items()
        if len(found) > 1
    ]


FLAGS = ("RMS", "SCALE_ROWS", "GELU", "RESIDUAL", "QUANTIZE", "CHUNKS", "LOWRANK")
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_Q", "BLOCK_P", "BLOCK_D", "DIM_A", "DIM_B")


def describe(item: Compilation) -> dict[str, Any]:
    """A compilation in words, for the table."""
    types = [kind for _, kind in item.signature if kind.startswith(("*", "tensordesc"))]
    flags = [f"{f}={v}" if v is not True else f for f in FLAGS if (v := item.value(f))]
    tile = "x".join(str(v) for name in BLOCKS if (v := item.value(name)) is not None)
    return {
        "arch": item.arch,
        "kernel": item.kernel[1].strip("_").removesuffix("_kernel"),
        "types": " ".join(dict.fromkeys(re.sub(r"tensordesc<(\w+)\[.*", r"@\1", t) for t in types)),
        "flags": " ".join(flags),
        "tile": f"{tile} w{dict(item.options)['num_warps']}",
    }


def told(waits: dict[str, Any] | None) -> str:
    """Trips to the memory before, in and behind the main loop, and passes that are under way."""
    if waits is None:
        return ""
    ahead = "" if waits["under_way"] is None else f", {waits['under_way']} ahead"
    return f"{waits['before']}+{waits['each']}+{waits['after']} trips{ahead}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=sorted(gpus.GPUS))
    parser.add_argument("--quick", action="store_true", help="two models, bf16 and fp8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    archs = options.arch or sorted(gpus.GPUS)
    models = QUICK_MODELS if options.quick else list(MODELS)
    precisions = ("bf16", "fp8") if options.quick else list(DTYPES)

    items = collect(archs, models, precisions)
    print(f"{len(items)} distinct kernels for {', '.join(f'sm_{arch}' for arch in archs)}")
    findings = audit(items, options.workers)
    rows = [
        describe(item) | dataclasses.asdict(finding)
        for item, finding in zip(items, findings, strict=True)
    ]
    for row in rows:
        verdict = "; ".join(row["faults"]) or "ok"
        print(
            f"sm_{row['arch']:<4}{row['kernel']:<15}{row['tile']:<26}{row['registers']:>4} reg "
            f"{row['shared']:>7} B {row['programs']:>3}/SM  {told(row['waits']):<18} "
            f"{row['types']:<28} {row['flags']:<30} {' '.join(row['matrix']):<28} {verdict}"
        )
    differing = families(items, findings)
    for line in differing:
        print(line)
    bad = sum(bool(row["faults"]) for row in rows)
    print(
        f"{len(rows)} kernels, {bad} with violations, "
        f"{sum(row['stack'] > 0 for row in rows)} that spill, {len(differing)} families that differ"
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "families": differing}, indent=1))
    return 1 if bad or differing else 0


if __name__ == "__main__":
    sys.exit(main())
