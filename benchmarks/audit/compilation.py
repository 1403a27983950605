"""Compiles one launch for a GPU that need not be there, and reads the machine code.

Works in processes of its own: Triton must not have been told to interpret.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from audit.machine_code import MATRIX, STORES, Anatomy, Instruction, anatomy, parse
from audit.waits import Waits, waits

REGISTERS = 65_536  # of one multiprocessor, from sm_80 to sm_120
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # resident on one multiprocessor
SHARED_OF_SM = {80: 167_936, 86: 102_400, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
RESERVED = 1024  # bytes of shared memory that the driver takes of each program
LARGEST_STEP = 256  # an index times a constant up to this is an index; beyond, an offset
# The matrix instruction of each GPU, by the dtype of its operands, for tiles of 64 rows and more;
# smaller ones take HMMA, or QMMA, everywhere.
EXPECTED = {
    80: {"half": "HMMA"},
    86: {"half": "HMMA"},
    89: {"half": "HMMA", "fp8": "QMMA"},
    90: {"half": "HGMMA", "fp8": "QGMMA"},
    100: {"half": "UTCHMMA", "fp8": "UTCQMMA"},
    120: {"half": "HMMA", "fp8": "QMMA"},
}
SMALL = {"half": "HMMA", "fp8": "QMMA"}


@dataclass(frozen=True)
class Compilation:
    """What one compiled kernel is made from.

    Attributes:
        kernel: module and name of the jit function.
        signature: its arguments and their types, in order.
        constants: arguments that are compile-time constants.
        divisible: arguments that are multiples of 16.
        options: num_warps and further options of the compiler.
    """

    arch: int
    kernel: tuple[str, str]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    def value(self, name: str) -> Any:
        return dict(self.constants).get(name)


@dataclass(frozen=True)
class Finding:
    """What the machine code of a compilation is, and what is wrong with it."""

    registers: int
    stack: int
    local: int
    shared: int
    programs: int
    matrix: tuple[str, ...]
    faults: tuple[str, ...]
    anatomy: Anatomy | None
    waits: Waits | None = None


def jit_function(kernel: tuple[str, str]) -> Any:
    module, name = kernel
    return getattr(importlib.import_module(module), name)


@cache
def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _disassembled(cubin: bytes) -> tuple[dict[str, int], list[Instruction]]:
    """Resource usage by name, and the machine instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [_tool("cuobjdump"), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump reports no resources: {usage!r}")
    names = ("registers", "stack", "static_shared", "local")
    return dict(zip(names, map(int, found.groups()), strict=True)), parse(code)


def compiled(item: Compilation) -> Any:
    """Triton's compiled kernel; what it cannot compile raises an error of its own kinds.

    The very compilation of a launch on a GPU, under the same key of Triton's cache.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stellar_fast.kernels.launch import TRITON

    function = jit_function(item.kernel)
    names = function.arg_names
    fixed = {parameter.name for parameter in function.params if parameter.do_not_specialize}
    # Without effect but on the key: a constant has attributes, if none, since Triton 3.7.
    with_constants = TRITON >= (3, 7)
    source = ASTSource(
        function,
        dict(item.signature),
        constexprs={(names.index(name),): value for name, value in item.constants},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] if name in item.divisible else []
            for name, kind in item.signature
            if (with_constants if kind == "constexpr" else kind[0] in "*i" and name not in fixed)
        },
    )
    return triton.compile(
        source, target=GPUTarget("cuda", item.arch, 32), options=dict(item.options)
    )


def compile_one(item: Compilation, limit: int) -> Finding:
    """Compiles and checks; `limit` is the GPU's shared memory for one program, in bytes."""
    try:
        kernel = compiled(item)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = f"does not compile: {(lines or [repr(error)])[0]}"
        return Finding(0, 0, 0, 0, 0, (), (reason,), None)
    usage, instructions = _disassembled(kernel.asm["cubin"])
    threads = 32 * kernel.metadata.num_warps
    shared = kernel.metadata.shared
    faults = []
    counts = Counter(instruction.kind for instruction in instructions)
    if usage["stack"] or usage["local"] or counts["STL"] or counts["LDL"]:
        faults.append(f"spills: {usage['stack']} B of stack, {usage['local']} B of local memory")
    if shared > limit:
        faults.append(f"shared memory: {shared} B, the GPU has {limit} B")
    if not any(counts[kind] for kind in STORES):
        faults.append("empty: it stores nothing to global memory")
    programs = min(
        REGISTERS // (-(-usage["registers"] // 8) * 8 * threads),
        SHARED_OF_SM[item.arch] // (shared + RESERVED),
        WARPS[item.arch] * 32 // threads,
    )
    if programs < 1 and not faults:
        faults.append("does not fit a multiprocessor")
    matrix = sorted({item.name for item in instructions if MATRIX.match(item.name)})
    faults += _matrix_faults(item.arch, kernel.asm["ttir"], matrix)
    faults += _offset_faults(kernel.asm["ttir"])
    found = waits(instructions)
    faults += idle(item, found)
    if item.arch == 90:
        faults += held_up(_assembled(kernel.asm["ptx"]))
    return Finding(
        usage["registers"],
        usage["stack"],
        usage["local"],
        shared,
        programs,
        tuple(matrix),
        tuple(faults),
        anatomy(instructions, item.arch),
        found,
    )


def idle(item: Compilation, found: Waits) -> list[str]:
    """Pipelines that stand still for what they have just asked for.

    With two stages the newest loads are all that there are, and with one there is no pipeline.
    Products of attention wait for one another, since the softmax is between them.
    """
    faults = []
    stages = dict(item.options).get("num_stages", 1)
    if stages > 2 and found.under_way == 0:
        faults.append(f"pipeline: with {stages} stages, a pass waits for the newest loads")
    if stages > 1 and found.under_way is not None and found.each:
        faults.append(f"pipeline: a pass waits {found.each} times for loads of its own")
    if stages > 1 and found.products == 0 and item.kernel[1] != "_attention_kernel":
        faults.append("pipeline: a pass waits for its own products")
    return faults


def _assembled(ptx: str) -> str:
    """What the assembler says of the code of an sm_90 kernel.

    Raises:
        ValueError: none of Triton's assemblers takes it.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for name in ("ptxas", "ptxas-blackwell"):  # the older one knows no newer PTX
            command = [_tool(name), "-arch=sm_90a", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout + done.stderr
    raise ValueError(f"no assembler takes the code: {done.stderr}")


def held_up(said: str) -> list[str]:
    """Matrix instructions that wait for one another, by the assembler's own words."""
    return [line.strip() for line in said.splitlines() if "Potential Performance Loss" in line]


def _matrix_faults(arch: int, ttir: str, matrix: list[str]) -> list[str]:
    """Whether products are taken on the GPU's matrix units, and exact ones are not."""
    faults = []
    for rows, operand in set(re.findall(r"tt\.dot .*? : tensor<(\d+)x[\dx]*x(\w+)>", ttir)):
        if operand == "f32":
            if any("TF32" in name or ".1684" in name or ".1688.F32" in name for name in matrix):
                faults.append(f"float32 products are not exact: {', '.join(matrix)}")
            continue
        kinds = EXPECTED[arch] if int(rows) >= 64 else SMALL
        wanted = kinds.get("fp8" if operand.startswith("f8") else "half")
        if wanted is None or not any(name.split(".")[0] == wanted for name in matrix):
            faults.append(
                f"products of {operand} without {wanted or 'any instruction of the GPU'}: "
                f"{', '.join(matrix) or 'no matrix instruction'}"
            )
    return faults


_ASSIGNMENT = re.compile(r"^\s*(%[\w#:]+) = \"?([\w.]+)\"?(.*)$")
_CARRIES = {
    "arith.addi", "arith.subi", "arith.extsi", "arith.extui", "arith.select", "arith.minsi",
    "arith.maxsi", "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape",
}  # fmt: skip


def _offset_faults(ttir: str) -> list[str]:
    """Products of 32 bits that reach an address: they wrap where rows times width pass 2^31.

    An index times a small constant is allowed: it counts rows, columns or steps, not elements.
    """
    lines: dict[str, tuple[str, list[str], str]] = {}
    offsets = []
    for line in ttir.splitlines():
        found = _ASSIGNMENT.match(line)
        if not found:
            continue
        name, op, rest = found.groups()
        operands = re.findall(r"%[\w#]+", rest.split(" : ")[0])
        lines[name.split(":")[0]] = (op, operands, line)
        if op == "tt.addptr":
            offsets.append(operands[1])

    def constant(name: str) -> int | None:
        op, operands, line = lines.get(name, ("", [], ""))
        if op == "arith.constant":
            value = re.search(r"dense<(-?\d+)>|constant (-?\d+)", line)
            return int(value.group(1) or value.group(2)) if value else None
        if op in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi"):
            return constant(operands[0])
        return None

    faults, seen = [], set()

    def follow(name: str) -> None:
        if name in seen or name not in lines:
            return
        seen.add(name)
        op, operands, line = lines[name]
        if op == "arith.muli":
            narrow = re.search(r": (?:tensor<[\dx]*xi32>|i32)", line.split(" loc(")[0])
            factors = [abs(c) for c in map(constant, operands) if c is not None]
            if narrow and not (factors and min(factors) <= LARGEST_STEP):
                faults.append(f"32-bit offset: {line.split(' loc(')[0].strip()}")
        if op in _CARRIES or op == "arith.muli":
            for operand in operands:
                follow(operand)

    for offset in offsets:
        follow(offset)
    return faults
