"""Features of many images: which images to read, the loop, and what is written."""

from .reader import Item, discover
from .runner import DEFAULT_FEATURES, DTYPES, Job, Summary, plan, run

__all__ = ["DEFAULT_FEATURES", "DTYPES", "Item", "Job", "Summary", "discover", "plan", "run"]
