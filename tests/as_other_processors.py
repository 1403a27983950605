"""Runs the numerical tests as other processors would compute them.

    python -P tests/as_other_processors.py            every way, half an hour on two cores
    python -P tests/as_other_processors.py --short    three ways that differ most, minutes

A processor is told by its instruction set, which PyTorch's own kernels, oneDNN and NumPy's products
are capped at, by whether oneDNN serves it, and by how many threads share a sum. What follows the
options goes to pytest, such as `-k attention`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# ONEDNN_MAX_CPU_ISA -> ATEN_CPU_CAPABILITY and OPENBLAS_CORETYPE, which NumPy's products obey, from
# the least; None leaves all of them to the processor.
INSTRUCTION_SETS = {
    "SSE41": ("default", "Nehalem"),
    "AVX2": ("avx2", "Haswell"),
    "AVX512_CORE": ("avx512", "SkylakeX"),
    None: None,
}
CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability())"


@dataclass(frozen=True)
class Processor:
    """One way to compute."""

    instruction_set: str | None
    onednn: bool
    threads: int

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        onednn = "oneDNN" if self.onednn else "no oneDNN"
        return f"{self.instruction_set or 'as it is'}, {onednn}, {threads}"

    def fits(self, capability: str) -> bool:
        """Whether a processor whose own capability this is, as PyTorch says, can compute so."""
        if self.instruction_set is None:
            return True
        levels = [caps[0].upper() for caps in INSTRUCTION_SETS.values() if caps is not None]
        own = levels.index(capability) if capability in levels else -1
        return list(INSTRUCTION_SETS).index(self.instruction_set) <= own

    @property
    def environment(self) -> dict[str, str]:
        changed = {
            "OMP_NUM_THREADS": str(self.threads),
            "STELLAR_TEST_ONEDNN": str(int(self.onednn)),
        }
        caps = INSTRUCTION_SETS[self.instruction_set]
        if self.instruction_set is not None and caps is not None:
            changed["ONEDNN_MAX_CPU_ISA"] = self.instruction_set
            changed["ATEN_CPU_CAPABILITY"], changed["OPENBLAS_CORETYPE"] = caps
        return {**os.environ, **changed}


EVERY = [Processor(*way) for way in itertools.product(INSTRUCTION_SETS, (True, False), (1, 2))]
SHORT = [Processor("SSE41", True, 1), Processor("AVX2", True, 1), Processor(None, False, 2)]


def capability_in(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", CAPABILITY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="the three ways that differ most")
    options, arguments = parser.parse_known_args()
    failed = []
    own = capability_in(dict(os.environ))
    for processor in SHORT if options.short else EVERY:
        environment = processor.environment
        if not processor.fits(own):
            print(f"== left out: {processor}; this processor is {own}", flush=True)
            continue
        print(f"== {processor} (PyTorch says {capability_in(environment)})", flush=True)
        start = time.monotonic()
        tests = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        if processor.threads == 1:  # as each of several workers has
            tests += ["-n", "2"]
        done = subprocess.run(
            [*tests, "-m", "numerical and not slow", *arguments], cwd=ROOT, env=environment
        )
        if done.returncode:
            failed.append(processor)
        print(f"   {time.monotonic() - start:.0f} s", flush=True)
    for processor in failed:
        print(f"failed: {processor}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
