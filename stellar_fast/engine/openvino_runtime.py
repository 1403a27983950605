"""OpenVINO, imported without its telemetry.

Its package reports every import to a statistics server, and keeps an identifier in the home folder
for that, wherever the package `openvino_telemetry` can be imported; without it there is a stub.
"""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Makes importing `package` an ImportError, unless the program has imported it already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


with _hidden("openvino_telemetry"):
    import openvino as ov
    from openvino import opset15 as op

__all__ = ["op", "ov"]
