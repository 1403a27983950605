"""Settings that must be made before torch and Triton are imported; which tests are left out."""

import os
from collections import Counter
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has about one core; more threads than cores make every worker slower.
    os.environ["OMP_NUM_THREADS"] = "1"

if not Path("/dev/nvidiactl").exists():
    # No GPU: kernels run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# Marks that a run leaves out unless its -m names them or a test is asked for by its name.
UNASKED = ("slow", "soak")
OPENVINO_FILES = ("test_openvino.py", "test_int8.py", "test_trial.py", "test_precision.py")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("STELLAR_TEST_ONEDNN") == "0":  # by as_other_processors.py
        import torch

        torch.backends.mkldnn.enabled = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_name = any("::" in argument for argument in config.args)
    asked = config.getoption("markexpr")
    left_out: Counter[str] = Counter()
    for mark in UNASKED:
        if by_name or mark in asked:
            continue
        unasked = [item for item in items if item.get_closest_marker(mark)]
        left_out[mark] = len(unasked)
        config.hook.pytest_deselected(items=unasked)
        items[:] = [item for item in items if not item.get_closest_marker(mark)]
    _remember(config, left_out)
    if "ONEDNN_MAX_CPU_ISA" in os.environ:  # by as_other_processors.py
        reason = "OpenVINO cannot pass for another processor's: see engine/backends.py"
        for item in items:
            if item.path.name in OPENVINO_FILES:
                item.add_marker(pytest.mark.skip(reason=reason))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


LEFT_OUT = pytest.StashKey[Counter]()


def _remember(config: pytest.Config, left_out: Counter) -> None:
    config.stash[LEFT_OUT] = left_out
    if hasattr(config, "workeroutput"):  # a worker of pytest-xdist, which collects for all
        config.workeroutput["left_out"] = dict(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """What the workers of pytest-xdist left out; each collects the same."""
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    left_out = +config.stash.get(LEFT_OUT, Counter())
    for mark, count in left_out.items():
        tests = "1 test" if count == 1 else f"{count} tests"
        terminalreporter.write_line(f"left out: {tests} marked {mark}; run them by -m {mark}")
