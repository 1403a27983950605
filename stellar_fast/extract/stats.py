"""What a run did, how long each stage took, and which of them limited it."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from .input.sieve import told as told_skipped

STAGES = ("read", "decode", "wait", "encode", "blocked", "write")
# Share of the engine's time without work from which another stage limits the run.
IDLE = 0.1


class Timer:
    """Seconds by stage. Each stage belongs to one thread."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._taken = dict(self.seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        now = dict(self.seconds)
        taken = {stage: value - self._taken[stage] for stage, value in now.items()}
        self._taken = now
        return taken


@dataclass
class Summary:
    """What an extraction did, and how long it took from its first image to its last file.

    Attributes:
        images, rows: of the partitions that this run made; images that were tried again count.
        partitions: made by this run.
        seconds: by stage. read, decode: added up over the decoding processes. wait: the engines'
            time without work; blocked: their time until the writers took what they had; write: the
            writers' time. total: the wall clock.
        engines: processes that encoded.
        workers: decoding processes of all engines.
        earlier_images, earlier_failed: of the partitions that other runs completed, before this
            one or meanwhile.
        elsewhere: partitions that other runs were making at the end of this one.
        skipped: what the input has beside its images, by the reason; empty where it was not listed.
    """

    images: int = 0
    rows: int = 0
    partitions: int = 0
    engines: int = 1
    workers: int = 1
    earlier_images: int = 0
    earlier_failed: int = 0
    elsewhere: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def failed(self) -> int:
        return self.images - self.rows

    @property
    def all_failed(self) -> int:
        """Failed images of every partition, whichever run made it."""
        return self.failed + self.earlier_failed

    @property
    def limit(self) -> str:
        """The stage that limited the run: read, decode, encode or write."""
        busy = self.seconds["encode"] + self.seconds["wait"] + self.seconds["blocked"]
        if self.seconds["wait"] > IDLE * busy and self.seconds["wait"] >= self.seconds["blocked"]:
            return max("read", "decode", key=self.seconds.__getitem__)
        return "write" if self.seconds["blocked"] > IDLE * busy else "encode"

    def count(self, manifest: Mapping[str, Any]) -> None:
        self.images += manifest["images"]
        self.rows += manifest["rows"]
        self.partitions += 1

    def add(self, seconds: Mapping[str, float]) -> None:
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def facts(self) -> dict[str, Any]:
        """For `stats.json`."""
        total = self.seconds.get("total", 0.0)
        return {
            "images": self.images,
            "earlier_images": self.earlier_images,
            "rows": self.rows,
            "failed": self.failed,
            "skipped": dict(self.skipped),
            "partitions": self.partitions,
            "partitions_elsewhere": self.elsewhere,
            "engines": self.engines,
            "workers": self.workers,
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "images_per_second": round(self.images / total, 3) if total else 0.0,
            "limit": self.limit if self.images else None,
        }

    def __str__(self) -> str:
        total = self.seconds.get("total", 0.0)
        told = ["nothing to do"]
        if self.images:
            told = [
                f"{self.images} images, {self.rows} rows, {self.failed} failed, {total:.2f} s, "
                f"{self.images / total:.1f} images/s"
            ]
        if self.earlier_images:
            told.append(f"{self.earlier_images} images were done by earlier or other runs")
        if self.elsewhere:
            told.append(f"partitions that other runs are still at: {self.elsewhere}")
        if self.skipped:
            told.append(f"left out: {told_skipped(self.skipped)}")
        return "; ".join(told)

    @property
    def stages(self) -> str:
        """The seconds of each stage in one line, and which limited the run."""
        seconds = ", ".join(f"{stage} {self.seconds[stage]:.2f} s" for stage in STAGES)
        return f"{seconds} ({self.workers} decoding); limited by {self.limit}"


class Progress:
    """A bar on a terminal; elsewhere, such as in a job's log, a line now and then."""

    def __init__(self, total: int, seconds: float) -> None:
        """
        Args:
            total: images to do.
            seconds: between lines.
        """
        silent = total == 0 or sys.stderr is None  # there is nothing to tell, or nobody
        self._bar = tqdm(total=total, unit="image", disable=silent or None)
        self._silent = silent
        self._total, self._every = total, seconds
        self._done = self._failed = 0
        self._start = self._last = time.perf_counter()
        self._last_done = 0
        self._seconds: Counter[str] = Counter()

    def update(self, images: int, failed: int, seconds: Mapping[str, float]) -> None:
        """
        Args:
            images, failed: finished since the last call.
            seconds: by stage, since the last call.
        """
        self._done += images
        self._failed += failed
        self._seconds.update(seconds)
        self._bar.update(images)
        now = time.perf_counter()
        if self._silent or not self._bar.disable or now - self._last < self._every:
            return
        rate = (self._done - self._last_done) / (now - self._last)
        summary = Summary(seconds=dict.fromkeys(STAGES, 0.0) | dict(self._seconds))
        left = (self._total - self._done) / rate if rate else float("inf")
        print(
            f"{self._done} of {self._total} images, {self._failed} failed, {rate:.1f} images/s, "
            f"{left:.0f} s left; limited by {summary.limit}",
            file=sys.stderr,
            flush=True,
        )
        self._last, self._last_done = now, self._done
        self._seconds.clear()

    def close(self) -> None:
        self._bar.close()
