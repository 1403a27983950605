"""Extractions that are killed, in children of another process."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from extracting import SUPPORT


class Driver:
    """Extractions in children of another process, see `extract_driver.py`."""

    def __init__(self, photographs: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(SUPPORT / "extract_driver.py"), photographs],
            env={**os.environ, "PYTHONPATH": str(SUPPORT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._asked, self._told = self.process.stdin, self.process.stdout

    def extract(self, output: Path | str, kill_after: float | None = None, step: int = 0) -> int:
        """How the child ended: 0, or less a signal's number."""
        self._asked.write(f"{output}\t{step}\n")
        self._asked.flush()
        child = int(self._told.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = int(self._told.readline())
        patience = time.monotonic() + 120
        while (alive := of_session(child)) and time.monotonic() < patience:
            time.sleep(0.02)
        assert alive == [], "processes outlive the one that started them"
        return code

    def close(self) -> None:
        self._asked.close()
        self.process.wait()


def of_session(session: int) -> list[psutil.Process]:
    """Processes that are left of one; not those that only wait to be reaped."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
