"""Features of many images: what to read, the plan, the pipeline, and what is written."""

from .devices import device_names
from .failures import told_failures
from .input import discover
from .input.sieve import told
from .job import DEFAULT_FEATURES, Job, identify, parse_share, plan, prepare, todo
from .output.foreign import DTYPES, FEATURES
from .output.layout import Plan, check_sums, complete, read_manifest, read_plan
from .records import Item
from .runner import run, run_devices
from .stats import Summary
from .work.pipeline import Options, Pipeline, Stopped

__all__ = [
    "DEFAULT_FEATURES",
    "DTYPES",
    "FEATURES",
    "Item",
    "Job",
    "Options",
    "Pipeline",
    "Plan",
    "Stopped",
    "Summary",
    "check_sums",
    "complete",
    "device_names",
    "discover",
    "identify",
    "parse_share",
    "plan",
    "prepare",
    "read_manifest",
    "read_plan",
    "run",
    "run_devices",
    "todo",
    "told",
    "told_failures",
]
