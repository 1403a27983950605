"""What is known of each GPU generation that the kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU generation.

    Attributes:
        arch: compute capability times ten, as the compiler counts.
        processors: streaming multiprocessors; of its usual product, where no device is asked.
        shared: bytes of shared memory that one program may have.
        descriptors: whether matrices are read and written through TMA descriptors.
    """

    arch: int
    processors: int
    shared: int
    descriptors: bool

    @property
    def starts_early(self) -> bool:
        """Whether a launch may start before the one before it has ended."""
        return self.arch >= 90


GPUS = {
    80: Gpu(80, 108, 166_912, descriptors=False),
    86: Gpu(86, 84, 101_376, descriptors=False),
    89: Gpu(89, 142, 101_376, descriptors=False),
    90: Gpu(90, 132, 232_448, descriptors=True),
    100: Gpu(100, 148, 232_448, descriptors=True),
    120: Gpu(120, 170, 101_376, descriptors=True),
}
INTERPRETED = GPUS[90]  # whose kernels the interpreter runs, unless told otherwise


def gpu_of_capability(major: int, minor: int) -> Gpu:
    """The generation that a compute capability counts as.

    Raises:
        ValueError: older than sm_80.
    """
    capability = 10 * major + minor
    if capability < 80:
        raise ValueError(
            f"the Triton kernels need compute capability 8.0 or later, this device has "
            f"{major}.{minor}; load with backend='torch'"
        )
    if capability in GPUS:
        return GPUS[capability]
    known = {8: 86, 9: 90, 10: 100, 11: 100}
    return GPUS[known.get(major, 120)]
