"""The images that rows of features were made of, read again to be looked at.

They are what a plan's `inputs.parquet` names, and as hostile as when they were extracted: read
through `input.cells`, decoded in processes with the limits of `work.sandbox`. An image that cannot
be read any more, or is another by now, is told in place of its picture.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.connection import Connection

from ..errors import ImageError, StellarError
from ..images.reader import decode, describe_error
from ..images.seen import seen
from .features import Features
from .input.addresses import Allowed
from .input.cells import read_item
from .input.door import NOTHING_MORE
from .output.index import read_index
from .output.layout import read_items
from .records import Item
from .work.sandbox import TIME_IS_UP, Limits, decoding_time, enter
from .work.workers import PATIENCE, cores, exit_of, without_interrupts

QUALITY = 82  # of the JPEGs


@dataclass(frozen=True)
class Original:
    """One image to look at.

    Attributes:
        size: width and height that it had when it was extracted; None if that is not known.
    """

    item: Item
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Picture:
    """What the model saw of an image, no longer than 512 pixels, as a JPEG."""

    jpeg: bytes
    width: int
    height: int


def originals_of(features: Features, rows: Sequence[int]) -> list[Original | str]:
    """The images of some rows; where the plan does not tell an image any more, the reason.

    Raises:
        IndexError: there is no such row.
        StellarError: an index cannot be read.
    """
    found: list[Original | str] = [""] * len(rows)
    for partition, manifest, at, inside in features.parts_of(rows):
        lines = read_index(features.folder / partition.name, manifest).to_pylist()
        good = [place for place, line in enumerate(lines) if line["status"] == "ok"]
        try:
            items = read_items(features.folder, partition, features.configuration["keep"])
        except StellarError as error:
            for place in at:
                found[place] = str(error)
            continue
        for place, row in zip(at, inside, strict=True):
            line, item = lines[good[row]], items[good[row]]
            if item.id == line["id"]:
                found[place] = Original(item, (line["width"], line["height"]))
            else:
                found[place] = "the plan names another image in its place"
    return found


def pictures_of(
    images: Sequence[Original | str],
    preset: str,
    *,
    allowed: Allowed = NOTHING_MORE,
    limits: Limits | None = None,
) -> list[Picture | str]:
    """What the model saw of each image, or the reason why it cannot be had.

    Args:
        images: reasons stay what they are.
        preset: that the features were made with.
        allowed: what may be read beyond the defaults.
        limits: of every image; the defaults if left out.
    """
    wanted = [place for place, image in enumerate(images) if isinstance(image, Original)]
    found: list[Picture | str] = ["" if isinstance(image, Original) else image for image in images]
    if not wanted:
        return found
    count = min(cores(), len(wanted))
    shares = [wanted[start::count] for start in range(count)]

    def serve(share: list[int]) -> None:
        with _Process(preset, allowed, limits or Limits()) as process:
            for place in share:
                image = images[place]
                assert isinstance(image, Original)
                found[place] = process.ask(image)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(serve, shares))
    return found


class _Process:
    """A decoding process, started again after an image that ended it."""

    def __init__(self, preset: str, allowed: Allowed, limits: Limits) -> None:
        self._limits = limits
        self._arguments = (preset, allowed, limits)
        self._context = multiprocessing.get_context("forkserver")
        self._start()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_work, args=(theirs, *self._arguments), daemon=True, name="pictures"
        )
        with without_interrupts():
            self._process.start()
        theirs.close()

    def _end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()

    def ask(self, image: Original) -> Picture | str:
        try:
            self._connection.send(image)
            if self._connection.poll(PATIENCE + self._limits.seconds):
                return self._connection.recv()
            why = f"reading took more than {PATIENCE:g} s"
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            why = f"the decoding process died ({exit_of(code)})"
            if code == -TIME_IS_UP:
                why = f"decoding took more than {self._limits.seconds:g} s"
        self._end()
        self._start()
        return why


def _work(connection: Connection, preset: str, allowed: Allowed, limits: Limits) -> None:
    """Answers every `Original` by its picture or a reason, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    enter(limits)
    try:
        while True:
            connection.send(_picture(connection.recv(), preset, allowed, limits))
    except (EOFError, ConnectionError):
        pass


def _picture(image: Original, preset: str, allowed: Allowed, limits: Limits) -> Picture | str:
    try:
        content = read_item(image.item, allowed)
        with decoding_time(limits.seconds):
            decoded = decode(content, max_pixels=limits.max_pixels)
            if image.size not in (None, decoded.size):
                was, now = ("x".join(map(str, size)) for size in (image.size, decoded.size))
                return f"is another image by now: {was} pixels were extracted, {now} are there"
            shown = seen(decoded, preset)
            file = BytesIO()
            shown.save(file, "JPEG", quality=QUALITY)
    except ImageError as error:
        return error.reason
    except Exception as error:  # memory
        return describe_error(error)
    return Picture(file.getvalue(), *shown.size)
