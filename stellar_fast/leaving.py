"""How a process of ours ends."""

from __future__ import annotations

import os
import sys


def leave(status: int = 0) -> None:
    """Ends this process as one that was forked ends, its work being on disk.

    The interpreter's own end waits for no thread that a library started, and one that then asks for
    the interpreter, as Arrow's and torch's do, aborts the process ("terminate called without an
    active exception"): complete work would end with a failure.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads any longer, or it is closed
            continue
    os._exit(status)
