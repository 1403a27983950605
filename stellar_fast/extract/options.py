"""What an extraction may be told, by the command line and in Python, and what is made of it.

Nothing heavy is imported: the command line reads this for its help.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .records import Item

if TYPE_CHECKING:
    from .input.addresses import Allowed
    from .output.store import Store
    from .work.sandbox import Limits


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to extract; the line of each field is what `stellar-fast extract --help` says of it.

    Those from `features` to `keep` are in the plan: they decide what is in the files, and an
    output that was begun with others may not be gone on with. The rest belongs to one run. In
    particular what may be read beyond the defaults is never the plan's, which may be a stranger's;
    and the limits of decoding are in every manifest instead, since an image that failed by them may
    be tried again under others.
    """

    features: Annotated[Collection[str], "Some of sparse,cls,spatial,dense, with commas."] = (
        *("sparse", "cls"),
    )
    dtype: Annotated[str, "Of the files: float32; or float16, half the space."] = "float32"
    format: Annotated[str, "npy; or parquet, with an id beside each row."] = "npy"
    preset: Annotated[
        str, "card (resized to 224x224) or eval (shorter side 256, centre crop 224)."
    ] = "card"
    scaled_decode: Annotated[
        bool, "Read large JPEGs at a half, quarter or eighth: faster, not quite the same pixels."
    ] = False
    batch_size: Annotated[int | None, "Images encoded at once; 16 on a CPU, 256 on a GPU."] = None
    partition_size: Annotated[int | None, "Images in each part of the output; 4096."] = None
    skip_duplicates: Annotated[bool, "Leave out lines that name a file again."] = False
    column: Annotated[
        str | None, "Of paths: the only one, path, url, file; of images in Parquet: image, jpg, ..."
    ] = None
    id_column: Annotated[str | None, "Of Parquet with images: ids; FILE::ROW if left out."] = None
    keep: Annotated[
        Collection[str], "Carry along: label,caption of a table; cls,txt,FIELD of tars; folder."
    ] = ()
    workers: Annotated[int | None, "Processes that decode; one for each core."] = None
    max_pixels: Annotated[int, "Width times height of an image; a larger one has failed."] = (
        50_000_000
    )
    decode_seconds: Annotated[float, "To decode an image in; one that takes longer has failed."] = (
        30.0
    )
    worker_memory: Annotated[
        int | None, "For a process to decode in; 2048, or more for more --max-pixels."
    ] = None
    on_error: Annotated[str, "record images that cannot be read; or fail at the first."] = "record"
    max_errors: Annotated[int | None, "Stop when more images than this have failed."] = None
    retry_failed: Annotated[bool, "Try images that failed before once more."] = False
    partitions: Annotated[str, "Make the K-th of N shares, for job arrays without locks."] = "1/1"
    resume: Annotated[bool, "Go on by the plan; do not list the input again."] = False
    overwrite: Annotated[bool, "Remove an earlier output and start anew."] = False
    dummy_reader: Annotated[bool, "Encode noise, to measure all but reading."] = False
    dummy_writer: Annotated[bool, "Write nothing, to measure all but writing."] = False
    allow_protocol: Annotated[Collection[str], "Read NAME:// addresses too."] = ()
    allow_host: Annotated[Collection[str], "Read a private network's host."] = ()

    @property
    def share(self) -> tuple[int, int]:
        """(k, n): of every n partitions the k-th, from 1 to n.

        Raises:
            ValueError: `partitions` does not say so.
        """
        k, slash, n = self.partitions.partition("/")
        if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
            raise ValueError(
                f"a share is K/N, from 1/N for the first of N to N/N, got {self.partitions!r}"
            )
        return int(k), int(n)


@dataclass(frozen=True)
class Job:
    """A checked extraction, made by `make_job`.

    Attributes:
        configuration: the plan's, but for what the engine decides.
        items: the images; None where those of an existing plan are taken as they are.
        batch_size: None is the engine's `max_batch`.
        workers: processes that decode for each engine.
        allowed, limits: of reading and decoding an image, by the options.
        skipped: what the input has beside its images, by the reason.
        store: where the output is, if not on this machine; `output` is what stands for it here.
    """

    output: Path
    configuration: Mapping[str, Any]
    items: Sequence[Item] | None
    batch_size: int | None
    workers: int
    options: Options
    allowed: Allowed
    limits: Limits
    skipped: Mapping[str, int] = field(default_factory=dict)
    store: Store | None = None

    @property
    def writes(self) -> bool:
        """Whether there is an output folder; without one, `items` has the images."""
        return not self.options.dummy_writer

    @property
    def held(self) -> bool:
        """Whether the files of complete partitions are on this machine."""
        return self.store is None

    def listed(self, partition: int, count: int) -> list[Item]:
        """The images of a partition, of a job that has them."""
        assert self.items is not None
        start = partition * self.configuration["partition_size"]
        return list(self.items[start : start + count])
