"""Settings that must be made before torch and Triton are imported."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has about one core; more threads than cores make every worker slower.
    os.environ["OMP_NUM_THREADS"] = "1"

if not Path("/dev/nvidiactl").exists():
    # No GPU: kernels run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    if os.environ.get("STELLAR_TEST_ONEDNN") == "0":
        import torch

        torch.backends.mkldnn.enabled = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" not in config.getoption("markexpr"):
        soak = [item for item in items if "soak" in item.keywords]
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if "soak" not in item.keywords]
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
