"""Extractions in processes of their own, to be killed, and what they must have left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from extracting import SMALL_PARTS, SUPPORT, parts


class Driver:
    """Extractions in children of another process, see `extract_driver.py`."""

    def __init__(self, source: Path | str, options: dict[str, Any] | None = None) -> None:
        """
        Args:
            options: of `make_job`; `SMALL_PARTS` if left out.
        """
        told = json.dumps(SMALL_PARTS if options is None else options)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(SUPPORT / "extract_driver.py"), source, told],
            env={**os.environ, "PYTHONPATH": str(SUPPORT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def extract(self, output: Path, kill_after: float | None = None, step: int = 0) -> int:
        """How the child ended: 0, or less a signal's number."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{output}\t{step}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = int(self.process.stdout.readline())
        patience = time.monotonic() + 120
        while (alive := of_session(child)) and time.monotonic() < patience:
            time.sleep(0.02)
        assert alive == [], "processes outlive the one that started them"
        return code

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def of_session(session: int) -> list[psutil.Process]:
    """Processes that are left of one; not those that only wait to be reaped."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def assert_whole(output: Path, expected: dict[str, bytes]) -> None:
    """Whatever has a partition's name is a partition, to the byte."""
    for part in parts(output):
        for path in part.iterdir():
            name = path.relative_to(output).as_posix()
            if path.name != "manifest.json":
                assert path.read_bytes() == expected[name]
        assert (part / "manifest.json").is_file()
