"""Features of many images: what to read, the plan, the pipeline, and what is written.

    job = make_job("photos/", "features/", dtype="float16")   # the fields of `Options`
    summary = run(job, engine)

`run_devices` and `ray_runner.run` do the same by several processes, and `open_features` reads what
was written. Importing this package imports none of it: the command line is to be quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .job import identify, make_job
    from .options import Job, Options
    from .runner import run, run_devices
    from .stats import Summary

__all__ = ["Job", "Options", "Summary", "identify", "make_job", "run", "run_devices"]

_LAZY = {
    "Job": "options",
    "Options": "options",
    "Summary": "stats",
    "identify": "job",
    "make_job": "job",
    "run": "runner",
    "run_devices": "runner",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
