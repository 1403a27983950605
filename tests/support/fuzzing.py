"""Mutants decoded in a process of their own, which may die, hang or eat memory: that is the test.

`python tests/support/fuzzing.py FIRST LAST [FORMAT...]` prints what became of those seeds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection

from memory import peak
from mutants import FORMATS, RARE, mutant, originals

Case = tuple[str, int]  # format and seed
LOAD = "stellar_fast.images:load_image"  # what is tested, found by name in the decoding process


@dataclass
class Outcome:
    """What became of many mutants.

    Attributes:
        bad: cases that were neither a picture nor an ImageError, and what they were instead.
        slowest: seconds of the slowest, and which it was.
        peak: largest resident size of the decoding process, bytes.
        start: its resident size before the first mutant.
    """

    pictures: Counter[str]
    errors: Counter[str]
    reasons: Counter[str]
    bad: list[tuple[Case, str]]
    slowest: tuple[float, Case | None]
    peak: int
    start: int


def run(cases: Iterable[Case], *, limit: float, max_pixels: int, preset: str = "card") -> Outcome:
    """Decodes each mutant and applies `preset`; `limit` is seconds for one picture."""
    outcome = Outcome(Counter(), Counter(), Counter(), [], (0.0, None), 0, 0)
    context = multiprocessing.get_context("spawn")

    def start() -> tuple[multiprocessing.process.BaseProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, LOAD, max_pixels, preset), daemon=True
        )
        process.start()
        theirs.close()
        outcome.start = ours.recv()
        return process, ours

    process, pipe = start()
    for case in cases:
        pipe.send(mutant(*case))
        what = None
        if not pipe.poll(limit):
            what = f"no answer in {limit:g} s"
        else:
            try:
                kind, detail, seconds, peak = pipe.recv()
            except EOFError:
                process.join()
                what = f"the process died: exit code {process.exitcode}"
        if what is not None:
            outcome.bad.append((case, what))
            process.kill()
            process.join()
            process, pipe = start()
            continue
        outcome.slowest = max(outcome.slowest, (seconds, case), key=lambda found: found[0])
        outcome.peak = max(outcome.peak, peak)
        if kind == "picture":
            outcome.pictures[case[0]] += 1
        elif kind == "error":
            outcome.errors[case[0]] += 1
            outcome.reasons[detail] += 1
        else:
            outcome.bad.append((case, detail))
    pipe.send(None)
    process.join()
    return outcome


def _serve(pipe: Connection, name: str, max_pixels: int, preset: str) -> None:
    from stellar_fast.errors import ImageError
    from stellar_fast.images.presets import SIZE

    module, _, function = name.partition(":")
    load = getattr(import_module(module), function)
    warnings.simplefilter("ignore")
    load(originals("PNG")[0], preset, max_pixels=max_pixels)  # what imports take is no picture's
    pipe.send(peak())
    while (data := pipe.recv()) is not None:
        began = time.perf_counter()
        try:
            pixels = load(data, preset, max_pixels=max_pixels)
        except ImageError as error:
            ok = bool(error.reason) and "\n" not in str(error)
            answer = ("error", error.reason) if ok else ("bad", f"a reason {error.reason!r}")
        except BaseException as error:
            answer = ("bad", f"{type(error).__name__}: {error}")
        else:
            shape = tuple(pixels.shape)
            good = shape == (3, SIZE, SIZE) and not bool((pixels != pixels).any())
            answer = ("picture", "") if good else ("bad", f"pixels {shape}, NaN or not")
        pipe.send((*answer, time.perf_counter() - began, peak()))


def misbehave(data: bytes, preset: str, *, max_pixels: int):
    """`images.load_image`, but without torch, which takes seconds to import; or what data say."""
    from stellar_fast import images

    if data == b"EXIT":
        os._exit(7)
    if data == b"HANG":
        time.sleep(3600)
    if data == b"RAISE":
        raise KeyError("raised")
    return images.preset_pixels(images.decode(data, max_pixels=max_pixels), preset)


if __name__ == "__main__":
    first, last, *formats = sys.argv[1:]
    from stellar_fast.images.refusals import MAX_PIXELS

    for name in formats or (*FORMATS, *RARE):
        began = time.perf_counter()
        seeds = range(int(first), int(last))
        found = run(((name, seed) for seed in seeds), limit=60, max_pixels=MAX_PIXELS)
        print(
            f"{name}: {found.pictures[name]} pictures, {found.errors[name]} errors, "
            f"{len(found.bad)} bad; slowest {found.slowest}; peak {found.peak / 2**20:.0f} MiB "
            f"(start {found.start / 2**20:.0f}); {time.perf_counter() - began:.1f} s"
        )
        for case, what in found.bad[:20]:
            print("  bad:", case, what)
        for reason, count in found.reasons.most_common(12):
            print(f"  {count:5d} {reason}")
