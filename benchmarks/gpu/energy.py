"""Energy that a GPU has drawn, by the driver's own counter.

NVML comes with the driver; it is called directly, since its Python package may not be installed.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any


class EnergyMeter:
    """Joules since the driver was loaded.

    Args:
        uuid: of the device, as torch gives it, without the prefix "GPU-".
        library: NVML; tests hand in another.

    Raises:
        OSError: no NVML, no such device, or one without the counter (older than Volta, or MIG).
    """

    def __init__(self, uuid: str, library: Any = None) -> None:
        self._library = library or ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        name = ctypes.c_char_p(f"GPU-{uuid}".encode())
        self._call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(self._device))
        self.joules()

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise OSError(f"{name} gave NVML error {status}")

    def joules(self) -> float:
        """The counter, which is in mJ."""
        found = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(found))
        return found.value / 1e3


def joules_per_call(
    meter: EnergyMeter,
    call: Callable[[], object],
    synchronize: Callable[[], None],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Mean energy of back-to-back calls over `seconds`, what the device draws idle included."""
    synchronize()
    before, end, calls = meter.joules(), clock() + seconds, 0
    while clock() < end:
        call()
        calls += 1
        if calls % 8 == 0:
            synchronize()
    synchronize()
    return (meter.joules() - before) / calls
