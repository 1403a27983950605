"""Prints, for every launch of a model, whether the audit compiles what a GPU would be given.

A process of its own, for Triton must not interpret; nothing is compiled. Used by test_audit.py.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import triton
from audit import run as audit
from audit.compilation import compiled
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver

from stellar_fast.config import MODELS


class Driver:
    """As much of a GPU as Triton asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are kept for each device: every part is one

    def get_current_stream(self, device: int) -> int:
        return 0


class Reached(Exception):
    """The compiler was reached; its text is the key."""


def compile_nothing(source, target, options) -> None:
    """In the place of `triton.compile`: what Triton's cache would be asked for."""
    raise Reached(f"{source.hash()} {make_backend(target).parse_options(dict(options)).hash()}")


def key(call) -> str:
    try:
        call()
    except Reached as reached:
        return str(reached)
    raise AssertionError("it did not reach the compiler")


def main() -> None:
    triton.compile = triton.compiler.compile = compile_nothing
    found = {}
    for arch in (80, 90):
        driver.set_active(Driver(arch))
        for precision in ("fp32", "bf16", "fp8")[: 3 if arch == 90 else 2]:
            for item in audit.launches(MODELS["stellar-h16"], precision, arch):
                compilation = audit.compilation(item, arch)
                if compilation in found:
                    continue
                audited = key(lambda c=compilation: compiled(c))
                launched = key(
                    lambda i=item: i.kernel.warmup(grid=i.grid, **i.arguments, **i.options)
                )
                found[compilation] = audited == launched
    names = [(item.arch, item.kernel[1], same) for item, same in found.items()]
    json.dump(names, sys.stdout)


if __name__ == "__main__":
    main()
