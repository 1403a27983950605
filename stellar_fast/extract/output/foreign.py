"""The JSON files of an output folder, as a stranger may have written them: nothing is taken from
them that is not of its type, within its range, and of one mind with the rest.

An output folder may come from the web. Its plan and manifests say how much to allocate and which
files to open, so every field is held to a rule here, in one place, before anything uses it.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import StellarError
from ...files import open_inside, parse_json
from .formats import FORMATS

FEATURES = ("sparse", "cls", "spatial", "dense")
DTYPES = {"float32": 4, "float16": 2}  # bytes a number

# A plan of `MOST_PARTITIONS` has some 12 MB; at the usual partition size, 400 million images.
MOST_JSON = 16 << 20  # bytes
MOST_DEPTH = 32  # a plan has 5, with a model's configuration
MOST_PARTITIONS = 100_000
MOST_IMAGES = 1 << 18  # of one partition: its index and its list are in memory as a whole
MOST_TEXT = 128 << 20  # bytes of ids and reasons in one index
MOST_ROW = (1 << 31) - 1  # bytes of one feature of one image; Arrow has no wider column

MOST_KEPT = 64  # columns that are carried along
MOST_NAME = 200  # characters of such a column's name
INDEX = "index.parquet"
# Of every index; then come the columns that are carried along.
INDEX_COLUMNS = {
    "id": "string",
    "row": "int64",
    "status": "string",
    "reason": "string",
    "width": "int32",
    "height": "int32",
}
KEPT_TYPES = ("int64", "float64", "string", "bool")

Rule = tuple[str, Callable[[Any], bool]]


def whole(least: int, most: int) -> Rule:
    """An integer; a boolean is none."""
    return (
        f"an integer from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def same(value: Any) -> Rule:
    """This value and type; `1` is neither `True` nor `1.0`."""
    return f"{value!r}", lambda found: type(found) is type(value) and found == value


def one_of(*values: str) -> Rule:
    return f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values


TEXT: Rule = "text", lambda value: isinstance(value, str)
TEXT_OR_NULL: Rule = "text or null", lambda value: value is None or isinstance(value, str)
OBJECT: Rule = "an object", lambda value: isinstance(value, dict)
SHA256: Rule = (
    "the 64 hexadecimal digits of a SHA-256",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
)
_MANY = whole(1, 1 << 53)


def held(where: str, content: Any, rules: Mapping[str, Rule], *, closed: bool = False) -> dict:
    """`content`, which is an object that has every field of `rules` as its rule has it.

    Args:
        closed: whether it may have no other field.

    Raises:
        StellarError: it is not.
    """
    if not isinstance(content, dict):
        raise StellarError(f"{where} is {shown(content)}, not an object")
    for name, (wanted, holds) in rules.items():
        if name not in content:
            raise StellarError(f"{where} has no {name!r}")
        if not holds(content[name]):
            raise StellarError(f"{where}: {name!r} is {shown(content[name])}, not {wanted}")
    if closed and len(content) > len(rules):
        other = next(name for name in content if name not in rules)
        raise StellarError(f"{where} has {shown(other)}, which does not belong there")
    return content


def _features(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(name, str) for name in value)
        and value == [name for name in FEATURES if name in value]
    )


KEPT_NAMES: Rule = (
    f"at most {MOST_KEPT} names of columns that an index has not",
    lambda names: (
        len(names) <= MOST_KEPT
        and all(
            isinstance(name, str)
            and 0 < len(name) <= MOST_NAME
            and name.isprintable()
            and name not in INDEX_COLUMNS
            for name in names
        )
    ),
)
_KEPT: Rule = (
    f"{KEPT_NAMES[0]}, each with one of {', '.join(KEPT_TYPES)}",
    lambda value: (
        isinstance(value, dict)
        and KEPT_NAMES[1](value)
        and all(isinstance(kind, str) and kind in KEPT_TYPES for kind in value.values())
    ),
)

# What else a configuration holds, nothing here depends on.
CONFIGURATION: Mapping[str, Rule] = {
    "model": OBJECT,
    "weights": TEXT,
    "precision": TEXT,
    "input": TEXT,
    "column": TEXT_OR_NULL,
    "id_column": TEXT_OR_NULL,
    "keep": _KEPT,
    "preset": TEXT,
    "scaled_decode": ("true or false", lambda value: isinstance(value, bool)),
    "features": (f"some of {', '.join(FEATURES)}, in this order", _features),
    "dtype": one_of(*DTYPES),
    "format": one_of(*FORMATS),
    "batch_size": _MANY,
    "partition_size": _MANY,
}
_PARTITION: Mapping[str, Rule] = {"images": whole(1, MOST_IMAGES), "digest": SHA256}


def check_plan(path: Path, content: dict[str, Any]) -> None:
    """Holds a plan to its rules; its `schema` was looked at before.

    Raises:
        StellarError: it breaks one.
    """
    where = f"{path} is no plan of an extraction: it"
    partitions: Rule = (
        f"a list of 1 to {MOST_PARTITIONS} partitions",
        lambda value: isinstance(value, list) and 1 <= len(value) <= MOST_PARTITIONS,
    )
    held(where, content, {"configuration": OBJECT, "facts": OBJECT, "partitions": partitions})
    configuration = held(f"{where}s configuration", content["configuration"], CONFIGURATION)
    backbone = held(f"{where}s model", configuration["model"], {"backbone": OBJECT})["backbone"]
    held(f"{where}s backbone", backbone, {"patch_size": whole(1, 1 << 16)})
    for index, part in enumerate(content["partitions"]):
        held(f"{where}s partition {index}", part, _PARTITION)
    images = sum(part["images"] for part in content["partitions"])
    held(where, content, {"images": same(images)})


def check_manifest(
    path: Path, content: dict[str, Any], configuration: Mapping[str, Any], images: int, index: int
) -> None:
    """Holds a manifest to the plan's `configuration` and to `images`, its partition's; its digests
    were looked at before.

    Raises:
        StellarError: it breaks a rule.
    """
    where = f"{path} is no manifest of this partition: it"
    names, dtype = configuration["features"], configuration["dtype"]
    rules = {
        "partition": same(index),
        "images": same(images),
        "rows": whole(0, images),
        "format": same(configuration["format"]),
        "keep": same(configuration["keep"]),
        "features": OBJECT,
        "files": OBJECT,
    }
    held(where, content, rules)
    rows = content["rows"]
    held(where, content, {"failed": same(images - rows)})
    features = held(f"{where}s features", content["features"], _each(names, OBJECT), closed=True)
    for name in names:
        # Two axes beside the rows, as every feature has.
        shape: Rule = (
            f"{rows} rows of two axes, of at most {MOST_ROW} bytes a row",
            lambda value: (
                isinstance(value, list)
                and len(value) == 3
                and all(type(size) is int for size in value)
                and value[0] == rows
                and min(value[1:]) >= 1
                and math.prod(value[1:]) * DTYPES[dtype] <= MOST_ROW
            ),
        )
        held(f"{where}s {name}", features[name], {"shape": shape, "dtype": same(dtype)})
    expected = files_of(configuration)
    files = held(f"{where}s files", content["files"], _each(expected, OBJECT), closed=True)
    for name in expected:
        held(f"{where}s {name}", files[name], {"bytes": _MANY, "sha256": SHA256})


def files_of(configuration: Mapping[str, Any]) -> list[str]:
    """The names of a partition's files, those and no others, but for its manifest."""
    return [*FORMATS[configuration["format"]].names(configuration["features"]), INDEX]


def read_json(folder: Path, *names: str) -> dict[str, Any]:
    """The object in a JSON file of an output folder.

    Raises:
        FileNotFoundError: there is no such file.
        StellarError: it is no regular file of the folder, longer than `MOST_JSON`, or no JSON
            object.
    """
    path = folder.joinpath(*names)
    try:
        with open_inside(folder, *names) as file:
            text = file.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise StellarError(f"{path}: has more than {MOST_JSON} bytes, the most there may be")
        content = parse_json(text)
    except FileNotFoundError:
        raise
    except RecursionError:
        raise StellarError(f"{path}: cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise StellarError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise StellarError(f"{path}: holds no JSON object")
    level: list[Any] = [content]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    if level:
        raise StellarError(f"{path}: cannot be read: it is nested too deeply")
    return content


def _each(names: list[str], rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


def shown(value: Any) -> str:
    """A value in a line, however long or deep it is; `repr` makes control characters visible."""
    return reprlib.repr(value)
