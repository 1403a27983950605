"""Reading weights files: safetensors, or a torch pickle of nothing but tensors, never of code.

A file is told by its first bytes, not by its name, so that what a failed download leaves behind (an
HTML page, a Git-LFS pointer, half a file) is recognised for what it is.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, DownloadError, listing
from ..files import MAX_JSON, parse_json
from . import pickles
from .names import Shapes, canonical, canonical_name

PathLike = str | os.PathLike[str]
# Narrower floats mean nothing without scales, which the published layout has no place for.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_state(path: PathLike, *, inside: str | None = None) -> dict[str, Tensor]:
    """Every tensor of a weights file: on the CPU, in the file's dtype, by canonical name.

    Safetensors are mapped into memory: a tensor's bytes are read when they are first used.

    Args:
        path: a safetensors file, or a torch pickle that holds one {name: tensor} dict.
        inside: the key under which a pickle may hold that dict among a training run's other state.

    Raises:
        DownloadError: there is no such file.
        CheckpointError: the file is something else, or damaged; the message says what was found.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        found = "it is a folder" if os.path.isdir(path) else "there is no such file"
        raise DownloadError(f"{path}: expected a weights file, but {found}; check the path")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DownloadError(f"{path}: the weights file cannot be read: {error.strerror}") from error
    _refuse_what_is_no_weights_file(path, head)
    # A safetensors file opens with 8 bytes of length, which may be anything, and a brace.
    is_pickle = head[8:9] != b"{" and head.startswith((b"PK\x03\x04", b"\x80"))
    state = _read_pickle(path, inside) if is_pickle else _read_safetensors(path, head)
    try:
        return canonical(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


# What wrappers put before the names of a module's parameters.
_WRAPPERS = {
    "module.": "DataParallel",
    "_orig_mod.": "torch.compile",
    "_forward_module.": "a trainer",
    "_fsdp_wrapped_module.": "FSDP",
}


def _again(path: Path) -> str:
    """The remedy for a damaged file. While it is there, the Hub's cache gives it out again, and
    `path` is only a link to it."""
    resolved = path.resolve()
    name = "it" if resolved == path else resolved
    return f"if it was downloaded, delete {name} and download it again"


def _refuse_what_is_no_weights_file(path: Path, head: bytes) -> None:
    if not head:
        raise CheckpointError(f"{path}: expected weights, found an empty file; {_again(path)}")
    if head.startswith(b"version https://git-lfs"):
        fields = dict(
            line.split(" ", 1) for line in head.decode(errors="replace").splitlines() if " " in line
        )
        raise CheckpointError(
            f"{path}: expected weights, found a Git-LFS pointer to {fields.get('size', '?')} bytes "
            f"(oid {fields.get('oid', '?')}); run 'git lfs pull' in its repository, or download "
            "the file itself"
        )
    if head.lstrip().startswith(b"{") and b"weight_map" in head:
        raise CheckpointError(
            f"{path}: expected weights, found the index of a checkpoint in several files; put them "
            "into one: save_file({name: tensor ...}) of safetensors.torch, over all of them"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{path}: expected weights, found an HTML page, such as a login or an error page; "
            f"{_again(path)} from its direct address"
        )


def _read_safetensors(path: Path, head: bytes) -> dict[str, Tensor]:
    read_header(path, head)
    try:
        with opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors ({reason(error)}); {_again(path)}"
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """`safe_open`, of a file that may have any name: safetensors takes only names in UTF-8."""
    with path.open("rb") as file:
        odd = any("\udc80" <= character <= "\udcff" for character in str(path))
        name = f"/dev/fd/{file.fileno()}" if odd else path
        with safe_open(name, framework="pt", device="cpu") as tensors:
            yield tensors


def read_header(path: Path, head: bytes) -> dict[str, Any]:
    """The header of a safetensors file that begins with `head`, its tensors' offsets checked
    against the file's size.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    size = path.stat().st_size
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:9] != b"{" or length > MAX_JSON:
        raise CheckpointError(
            f"{path}: expected safetensors or a torch pickle, found {size} bytes that begin "
            f"{head[:16]!r} (a header has at most {MAX_JSON}); {_again(path)}"
        )
    if 8 + length > size:
        raise CheckpointError(_truncated(path, size, 8 + length, "its header alone"))
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = parse_json(file.read(length))
        ends = (e["data_offsets"][1] for k, e in header.items() if k != "__metadata__")
        end = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the safetensors header is damaged ({type(error).__name__}: "
            f"{reason(error)}); {_again(path)}"
        ) from error
    if end > size:
        raise CheckpointError(_truncated(path, size, end, "its header"))
    return header


def _truncated(path: Path, size: int, expected: int, by: str) -> str:
    return f"{path}: truncated, {size} bytes where {by} promises {expected}; {_again(path)}"


def _read_pickle(path: Path, inside: str | None) -> dict[str, Tensor]:
    try:
        with pickles.opened(path) as (found, read):
            views = _state_dict(path, found, inside)
            return {name: read(view) for name, view in views.items()}
    except CheckpointError:
        raise
    except pickles.MoreThanTensors as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path}: expected a state dict {{name: tensor}}, found a TorchScript archive, "
                "which is a program; save its state_dict() alone"
            ) from error
        raise CheckpointError(
            f"{path}: the pickle holds more than dense tensors and was not run ({error}); load it "
            "where you trust it and save its state dict as safetensors"
        ) from error
    except pickles.DAMAGE as error:
        raise CheckpointError(
            f"{path}: damaged or truncated torch pickle of {path.stat().st_size} bytes "
            f"({reason(error)}); {_again(path)}"
        ) from error


def _state_dict(path: Path, found: Any, inside: str | None) -> dict[str, pickles.View]:
    if isinstance(found, dict) and isinstance(found.get(inside), dict):
        found = found[inside]
    if not isinstance(found, dict):
        kind = "Tensor" if isinstance(found, pickles.View) else type(found).__name__
        raise CheckpointError(f"{path}: expected a state dict {{name: tensor}}, found a {kind}")
    strange = [
        str(key)
        for key, value in found.items()
        if not (isinstance(key, str) and isinstance(value, pickles.View))
    ]
    if strange:
        nested = next((key for key in strange if isinstance(found.get(key), dict)), None)
        remedy = ""
        if nested is not None:
            remedy = f"; if '{listing([nested])}' is the state dict, save that alone"
        raise CheckpointError(
            f"{path}: expected a plain state dict {{name: dense tensor}}, found other entries: "
            f"{listing(strange)}{remedy}"
        )
    return found


def reason(error: BaseException) -> str:
    """One line of an error, for a message: those of libraries repeat what the file says."""
    return listing([next(iter(str(error).splitlines()), type(error).__name__)])


def check_tensors(
    state: Mapping[str, Tensor],
    expected: Shapes,
    *,
    where: str,
    ignored: Collection[str] = (),
) -> None:
    """Every expected tensor is there, of its shape, in floats of 16 to 64 bits, and finite.

    Args:
        state: under canonical names.
        expected: {canonical name: shape}.
        where: the file, for the message.
        ignored: names that may be there too.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape, which names them; or one
            is not of `WEIGHT_DTYPES`, or holds NaN or infinity.
    """
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected and name not in ignored]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    kinds = {"missing": missing, "of another shape": misshapen, "unknown": unknown}
    wrong = [f"{len(names)} {kind}: {listing(names)}" for kind, names in kinds.items() if names]
    if wrong:
        hint = _hint(missing, unknown)
        raise CheckpointError(
            f"{where}: {len(expected)} tensors expected; {'; '.join(wrong)}. {hint}"
        )
    silent = sys.stderr is None or None  # None is: unless it is a terminal
    for name in tqdm(expected, desc=f"Checking {Path(where).name}", unit="tensor", disable=silent):
        tensor = state[name]
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{where}: {name} must be floating point of 16, 32 or 64 bits, found "
                f"{tensor.dtype}; save it in one of these"
            )
        if not all(map(math.isfinite, bounds(tensor))):
            raise CheckpointError(
                f"{where}: {name} holds NaN or infinity; the file is damaged, or the training "
                "run diverged"
            )


def _hint(missing: Collection[str], unknown: Collection[str]) -> str:
    wanted = set(missing)
    for prefix, wrapper in _WRAPPERS.items():
        inside = (name.removeprefix(prefix) for name in unknown if name.startswith(prefix))
        if any(canonical_name(name) in wanted for name in inside):
            return (
                f"Its names begin with {prefix}, which {wrapper} puts before them: save the "
                "state_dict of the module inside"
            )
    return "Is this the file of this model?"


def bounds(tensor: Tensor) -> tuple[float, float]:
    """Its least and its largest value, both NaN if there is one in it; of no values 0 and 0."""
    if not tensor.numel():
        return 0.0, 0.0
    low, high = torch.stack(tensor.float().aminmax()).tolist()
    return low, high
