"""One file of a Hub repository: from its cache, or downloaded."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import DownloadError

# Tries to reach the server, and the seconds after which no further try begins: huggingface_hub's
# own retries add up to half a minute where nothing listens, and to minutes where nothing answers.
TRIES = 3
PATIENCE = 5.0
TRANSIENT = (408, 429, 500, 502, 503, 504)
COMMIT = re.compile("[0-9a-f]{40}")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# huggingface_hub's HTTP client: requests before 1.0, then httpx, then httpx2.
HTTP_CLIENTS = ("requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2")

PathLike = str | os.PathLike[str]


def _folder_here(repo: str) -> str:
    """What to say of a folder that has the name of a repository."""
    return f"; for the folder here, write './{repo}'" if os.path.isdir(repo) else ""


def fetch(
    repo: str,
    file: str,
    most_bytes: int,
    *,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """One file of a Hub repository: from the cache where it is up to date or the server is out of
    reach, else downloaded.

    Args:
        repo, file: "owner/name", and a path in it.
        most_bytes: a larger file is not downloaded.
        revision, cache_dir, token, local_files_only: as in `huggingface_hub`.

    Raises:
        DownloadError: it cannot be had; the message says why, and what to do.
    """
    folder = None if cache_dir is None else Path(cache_dir).expanduser().resolve()
    cached = partial(_cached, repo, file, revision, folder)
    try:
        # A commit does not change: what the cache has of it needs no question.
        if local_files_only or (revision is not None and COMMIT.fullmatch(revision)):
            path = cached()
            if path is not None:
                return path
            if local_files_only:
                raise LocalEntryNotFoundError("not in the cache")
        try:
            size = _reach(
                hf_hub_url(repo, file, revision=revision),
                token,
                stop=lambda: cached() is not None,
            )
        except (HFValidationError, RevisionNotFoundError, EntryNotFoundError):
            raise
        except Exception:
            path = cached()
            if path is None:
                raise
            return path
        if size is not None and size > most_bytes:
            raise _TooLarge(f"it has {size} bytes, and no such file needs more than {most_bytes}")
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=folder, token=token))
    # Whatever the library and the three HTTP clients of its supported versions raise is the same
    # to the caller: the file could not be had.
    except Exception as error:
        reason, remedy = _explain(error, repo, local_files_only)
        shown = revision or constants.DEFAULT_REVISION
        raise DownloadError(
            f"cannot get {file!r} of Hub repository {repo!r} at revision {shown!r}: {reason}; "
            f"{remedy}{_folder_here(repo)}"
        ) from error


def _cached(repo: str, file: str, revision: str | None, cache_dir: Path | None) -> Path | None:
    # Not `hf_hub_download(local_files_only=True)`, which may still ask the server for its list of
    # coding agents to describe itself to it.
    path = try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _reach(url: str, token: str | bool | None, stop: Callable[[], bool]) -> int | None:
    """A file's size, asked of the server, again for failures that pass, unless `stop()`.

    `hf_hub_download` asks again by itself, but with no option for how long.
    """
    start = time.monotonic()
    attempt = 0
    while True:
        attempt += 1
        try:
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            return get_hf_file_metadata(url, token=token, timeout=timeout).size
        except Exception as error:
            waited = time.monotonic() - start
            if attempt == TRIES or waited > PATIENCE or not _passes(error) or stop():
                raise
            time.sleep(attempt)


class _TooLarge(Exception):
    pass


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transport(error: BaseException) -> bool:
    """Whether the connection failed, as opposed to the server answering with an error."""
    client = type(error).__module__.split(".")[0] in HTTP_CLIENTS and _status(error) is None
    return client or isinstance(error, ConnectionError | TimeoutError)


def _passes(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return _is_transport(error) or _status(error) in TRANSIENT


def _explain(  # noqa: C901, one case after another
    error: BaseException, repo: str, local_files_only: bool
) -> tuple[str, str]:
    """One line each: why the file could not be had, and what to do."""
    # The library hides the server's answer behind its own "not in the cache" error.
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    log_in = "pass token= or run `hf auth login`"
    page = f"{constants.ENDPOINT}/{repo}"
    status = _status(error)
    answer = f"{constants.ENDPOINT} answered {status}"
    if local_files_only and isinstance(error, LocalEntryNotFoundError):
        return (
            "it is not in the cache, and local_files_only=True forbids to download it",
            "load once without it, or pass the cache_dir that has it",
        )
    if isinstance(error, _TooLarge):
        return str(error), f"see {page}/tree/main"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            "it is not in the cache, and HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE, or pass the cache_dir or a folder that has it",
        )
    if isinstance(error, HFValidationError):
        return (
            f"{repo!r} is no repository name ({_line(error)})",
            "give 'owner/name' or an existing folder",
        )
    if isinstance(error, LocalTokenNotFoundError):
        return "token=True, but no token is stored on this machine", log_in
    if isinstance(error, GatedRepoError):
        return f"{answer}: access to it is restricted", f"ask for access at {page}, then {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return f"{answer}: there is no such revision", f"see {page}/tree/main for those there are"
    if isinstance(error, EntryNotFoundError) and status is not None:
        return f"{answer}: there is no such file", f"see {page}/tree/main for those there are"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{answer}: there is no such repository, or it is private",
            f"check the name, or {log_in}",
        )
    if status in (401, 403):
        return f"{answer}: no permission to read it", log_in
    if status is not None:
        return answer, "try again later, or use a folder that has the files"
    if isinstance(error, FileMetadataError):
        return (
            f"{constants.ENDPOINT} does not answer as a Hub does ({_line(error)})",
            "check HF_ENDPOINT, the proxy, and whether the network wants a login",
        )
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return f"no space left on the disk ({_line(error)})", "free some, or pass another cache_dir"
    if isinstance(error, OSError) and "onsistency check failed" in str(error):
        return f"the file arrived incomplete ({_line(error)})", "load again to download it anew"
    if _is_transport(error):
        return (
            f"the connection to {constants.ENDPOINT} failed ({_line(error)}), and it is not in the "
            "cache",
            "check the network and proxy and load again, or pass a folder that has the files",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"the cache cannot be used ({_line(error)})", "pass another cache_dir"
    return f"{type(error).__name__}: {_line(error)}", "load again, or pass a folder as repo"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
