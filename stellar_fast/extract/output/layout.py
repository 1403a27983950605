"""What an output folder holds, and what makes a part of it complete.

    OUTPUT/plan.json        the configuration, and the partitions that the input was cut into
    OUTPUT/inputs.parquet   every image of the plan, one row group a partition: id, file, for a
                            member of a tar its offset and size there, for a cell of a Parquet file
                            its column, group and row, and what is kept of it; its owner's alone,
                            since the addresses may have credentials
    OUTPUT/part-00000/      one partition: all of the files below, or it is not there
        sparse.npy ...      one file a feature, (rows, ...) of the plan's dtype; or, as the plan's
                            format is "parquet", features.parquet
        index.parquet       one line an image: id, row, status, reason, width, height,
                            and what the plan keeps
        manifest.json       counts, sizes and checksums of the others; written last
    OUTPUT/stats.json       what the last run did and what limited it

A partition is complete if it has a manifest, which is in the folder before the folder has its name.
The plan is made before any work and never changes; a partition is made by one process at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import StellarError
from ...files import folder_to_disk, open_inside, remove, replacing, writing
from ..footer import read_footer
from ..input.addresses import without_user
from ..records import Item, PathLike
from .foreign import (
    MOST_IMAGES,
    MOST_PARTITIONS,
    MOST_TEXT,
    check_manifest,
    check_plan,
    read_json,
    shown,
)
from .text import plain

if TYPE_CHECKING:
    import pyarrow

SCHEMA = 3
PLAN = "plan.json"
INPUTS = "inputs.parquet"
STATS = "stats.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Partition:
    """A run of images in the order of the input.

    Attributes:
        digest: of the images, see `digest_of`.
    """

    index: int
    images: int
    digest: str

    @property
    def name(self) -> str:
        return f"part-{self.index:05d}"


@dataclass(frozen=True)
class Plan:
    """The contents of `plan.json`.

    Attributes:
        configuration: what decides the bytes of the features: model, precision, preset, features,
            dtype, format, batch_size, partition_size, input.
        facts: where the weights came from, and the like; nothing depends on it.
    """

    configuration: Mapping[str, Any]
    partitions: tuple[Partition, ...]
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raises ValueError where `read_plan` would refuse it."""
        most = max((part.images for part in self.partitions), default=0)
        for found, limit, remedy in (
            (len(self.partitions), MOST_PARTITIONS, "give a larger --partition-size"),
            (most, MOST_IMAGES, "give a smaller --partition-size"),
        ):
            if found > limit:
                what = "partitions" if limit == MOST_PARTITIONS else "images in one partition"
                raise ValueError(f"{found} {what}, and {limit} are the most; {remedy}")

    @property
    def images(self) -> int:
        return sum(partition.images for partition in self.partitions)

    @cached_property
    def digest(self) -> str:
        """Of the configuration; every manifest repeats it."""
        text = json.dumps(self.configuration, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of(items: Iterable[Item]) -> str:
    """SHA-256 of images in their order: id, file, offset, size, column, group, row and what is
    kept, a zero byte after each.

    Of an address, without its user and password, since a digest could tell a guess at them.
    """
    digest = hashlib.sha256()
    for item in items:
        place = without_user(item.file), item.offset, item.size, item.column, item.group, item.row
        text = "".join(f"{fact}\0" for fact in (item.id, *place, *map(repr, item.kept)))
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read_plan(output: PathLike) -> Plan:
    """The plan of an output folder.

    Raises:
        StellarError: there is none, it cannot be read, or it is of another version.
    """
    path = Path(output) / PLAN
    try:
        content = read_json(Path(output), PLAN)
    except FileNotFoundError:
        raise StellarError(
            f"{path}: no such file; an output of `stellar-fast extract` has one"
        ) from None
    if content.get("schema") != SCHEMA:
        raise StellarError(
            f"{path}: schema {shown(content.get('schema'))}, but this version of stellar-fast "
            f"reads schema {SCHEMA}; use the version that wrote it, or extract anew with "
            "--overwrite"
        )
    check_plan(path, content)
    partitions = tuple(
        Partition(index, part["images"], part["digest"])
        for index, part in enumerate(content["partitions"])
    )
    return Plan(content["configuration"], partitions, content["facts"])


def write_plan(output: Path, plan: Plan, items: Sequence[Item]) -> None:
    """Writes `inputs.parquet`, then `plan.json`, each whole or not at all.

    Raises:
        StellarError: they cannot be written.
    """
    _write_inputs(output / INPUTS, plan, items)
    content = {
        "schema": SCHEMA,
        "configuration": plan.configuration,
        "images": plan.images,
        "partitions": [{"images": part.images, "digest": part.digest} for part in plan.partitions],
        "facts": plan.facts,
    }
    write_json(output / PLAN, content)
    folder_to_disk(output)


def _inputs_schema(keep: Mapping[str, str]) -> pyarrow.Schema:
    import pyarrow

    return pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("file", pyarrow.binary()),  # a file's name may be no UTF-8
            ("offset", pyarrow.int64()),
            ("size", pyarrow.int64()),
            ("column", pyarrow.string()),
            ("group", pyarrow.int32()),
            ("row", pyarrow.int64()),
            *((f"kept.{name}", pyarrow.type_for_alias(kind)) for name, kind in keep.items()),
        ]
    )


def _write_inputs(path: Path, plan: Plan, items: Sequence[Item]) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = _inputs_schema(plan.configuration["keep"])
    start = 0
    _remove_leftovers(path)
    with replacing(path) as temporary:
        # The addresses may have credentials, which nothing else of an output has.
        temporary.chmod(0o600)
        # By an open file: Arrow takes no name that is no UTF-8.
        with temporary.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
            for partition in plan.partitions:
                part = items[start : start + partition.images]
                start += partition.images
                columns = [
                    [item.id for item in part],
                    [os.fsencode(item.file) for item in part],
                    [item.offset for item in part],
                    [item.size for item in part],
                    [item.column for item in part],
                    [item.group for item in part],
                    [item.row for item in part],
                    *zip(*(item.kept for item in part), strict=True),
                ]
                table = pyarrow.table(columns, schema=schema)
                if table.nbytes > MOST_TEXT:
                    raise StellarError(
                        f"{partition.name} has {table.nbytes} bytes of names and of what is kept, "
                        f"and {MOST_TEXT} are the most; give a smaller --partition-size"
                    )
                writer.write_table(table, row_group_size=len(part))


def read_items(output: PathLike, partition: Partition, keep: Mapping[str, str]) -> list[Item]:
    """The images of one partition, from `inputs.parquet`.

    Args:
        keep: of the plan's configuration.

    Raises:
        StellarError: the file is not the plan's.
    """
    from pyarrow import ArrowException, parquet

    path = Path(output) / INPUTS
    try:
        with open_inside(Path(output), INPUTS) as opened:
            group = read_footer(opened)[partition.index]
            size = sum(column.size for column in group.columns)
            if group.rows != partition.images or size > MOST_TEXT:
                raise ValueError(
                    f"{partition.name} has {group.rows} lines of {size} bytes, not "
                    f"{partition.images} of {MOST_TEXT} at most"
                )
            schema = _inputs_schema(keep)
            if not parquet.ParquetFile(opened).schema_arrow.equals(schema):
                raise ValueError("its columns are not those of a plan's images")
            text = [field.name for field in schema if str(field.type) in ("string", "binary")]
            with parquet.ParquetFile(opened, read_dictionary=text) as file:
                columns = plain(file.read_row_group(partition.index), text).to_pydict()
        items = [
            Item(name, os.fsdecode(place), offset, size, column, group, row, tuple(kept))
            for name, place, offset, size, column, group, row, *kept in zip(
                *columns.values(), strict=True
            )
        ]
    except (OSError, ArrowException, IndexError, TypeError, ValueError) as error:
        raise StellarError(f"{path}: cannot be read: {error}") from error
    if digest_of(items) != partition.digest:
        raise StellarError(
            f"{path}: {partition.name} names other images than {PLAN}; use --overwrite"
        )
    return items


def read_manifest(
    output: PathLike, plan: Plan, index: int, *, held: bool = True
) -> dict[str, Any] | None:
    """The manifest of a partition; None if the partition is not complete.

    Args:
        held: whether its files are here, to be looked at; those of a store are there.

    Raises:
        StellarError: the partition is of another plan, a field of the manifest is not what it can
            be, or a file is no regular file of the partition or has another size.
    """
    partition = plan.partitions[index]
    folder = Path(output) / partition.name
    try:
        manifest = read_json(Path(output), partition.name, MANIFEST)
    except FileNotFoundError:
        return None
    remedy = f"remove {folder} and run again"
    expected = (SCHEMA, plan.digest, partition.digest)
    if tuple(manifest.get(key) for key in ("schema", "configuration", "digest")) != expected:
        raise StellarError(f"{folder} was made by another plan than {PLAN}; {remedy}")
    check_manifest(folder / MANIFEST, manifest, plan.configuration, partition.images, index)
    for name, facts in manifest["files"].items() if held else ():
        size = _size(folder / name)
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes, not {facts['bytes']}"
            raise StellarError(f"{folder / name} {found}; {remedy}")
    return manifest


def _size(path: Path) -> int | None:
    """Bytes of a regular file; None where there is nothing. `open_inside` refuses what else there
    may be."""
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except FileNotFoundError:
        return None


def complete(output: PathLike, plan: Plan, *, held: bool = True) -> dict[int, dict[str, Any]]:
    """The manifests of the partitions that are complete, by partition, in order.

    Raises:
        StellarError: as `read_manifest`.
    """
    found = (
        (part.index, read_manifest(output, plan, part.index, held=held)) for part in plan.partitions
    )
    return {index: manifest for index, manifest in found if manifest is not None}


def check_sums(output: PathLike, plan: Plan, index: int) -> None:
    """Reads a complete partition through.

    Raises:
        StellarError: it is not complete, or a file is not what its manifest says.
    """
    manifest = read_manifest(output, plan, index)
    folder = Path(output) / plan.partitions[index].name
    if manifest is None:
        raise StellarError(f"{folder} is not complete")
    for name, facts in manifest["files"].items():
        with open_inside(Path(output), folder.name, name) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != facts["sha256"]:
            raise StellarError(
                f"{folder / name} has changed since it was written: its SHA-256 is {found}, not "
                f"{facts['sha256']}; remove {folder} and run again"
            )


def sha256_of(path: PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """What differs between two configurations, of the fields in `known`: "field (old -> new)".

    A field that has fields of its own is told by those; by its name alone, if that differs.
    """
    found = []
    for field in known:
        first, second = old.get(field), new.get(field)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            if first.get("name") != second.get("name"):
                first, second = first.get("name"), second.get("name")
            else:
                inner = difference(first, second, {**first, **second})
                found += [f"{field}.{told}" for told in inner]
                continue
        if first != second:
            found.append(f"{field} ({json.dumps(first)} -> {json.dumps(second)})")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
        StellarError: it cannot be written.
    """
    _remove_leftovers(path)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _remove_leftovers(path: Path) -> None:
    """Removes what `replacing` left of this file in a process that was killed."""
    with writing(path):
        for leftover in path.parent.glob(f".{path.stem}.*{path.suffix}"):
            remove(leftover)
