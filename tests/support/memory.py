"""What this process takes."""

import resource
import sys


def peak() -> int:
    """The most bytes that it ever had."""
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
