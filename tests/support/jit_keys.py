"""Whether the audit compiles what a GPU would be given, for every launch of a model.

For a process in which Triton does not interpret, as that of audit_faults.py, and in which nothing
is compiled any more.
"""

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


def compared(model: str, points: list[tuple[int, str]]) -> list[tuple[int, str, bool]]:
    """Part, kernel and whether the keys agree, for what differs in the code of these launches.

    Args:
        points: parts and precisions.
    """
    triton.compile = triton.compiler.compile = compile_nothing
    found = {}
    for arch, precision in points:
        driver.set_active(Driver(arch))
        for item in audit.launches(MODELS[model], precision, arch):
            compilation = audit.compilation(item, arch)
            if compilation in found:
                continue
            audited = key(lambda c=compilation: compiled(c))
            launched = key(lambda i=item: i.kernel.warmup(grid=i.grid, **i.arguments, **i.options))
            found[compilation] = audited == launched
    return [(item.arch, item.kernel[1], same) for item, same in found.items()]
