"""A stand-in for the Hub on this machine: the endpoints that `huggingface_hub` downloads through, a
log of what was asked, and repositories that fail in chosen ways."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

PORTAL = b"<!DOCTYPE html><html><body>Please log in to this network</body></html>"
PRIVATE_SETTINGS = re.compile("HF_|HUGGING|TRANSFORMERS_OFFLINE|.*_PROXY$", re.IGNORECASE)

CLIENT = """
import dataclasses, json, sys, time
from types import SimpleNamespace
from stellar_fast.weights import hub, source

clock = 0.0

def sleep(seconds):
    global clock
    clock += seconds

time.sleep = sleep  # of the library, which imports it anew
hub.time = SimpleNamespace(sleep=sleep, monotonic=lambda: clock)
cases, timeout = json.load(sys.stdin)
if timeout is not None:
    hub.constants.HF_HUB_ETAG_TIMEOUT = timeout
for case in cases:
    clock = 0.0
    try:
        located = source.locate(**case)
        row = {"weights": str(located.weights), "config": dataclasses.asdict(located.config)}
    except Exception as error:
        row = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(row | {"seconds": clock}), flush=True)
"""

ENTRY = {
    "weights": "small.safetensors",
    "num_sparse_tokens": 8,
    "num_decoder_layers": 2,
    "spatial_temp": 0.1,
    "backbone": "facebook/vit-mae-base",
}


def index(**changes: Any) -> bytes:
    """A `config.json` with one model, "small"."""
    return json.dumps({"models": {"small": ENTRY | changes}}).encode()


def files(weights: bytes = b"the weights") -> dict[str, bytes]:
    return {"config.json": index(), "small.safetensors": weights}


def locate_in_process(
    cases: list[dict[str, Any]],
    endpoint: str,
    home: Path,
    *,
    timeout: float | None = None,
    **settings: str,
) -> list[dict[str, Any]]:
    """`source.locate` of every case in one new process, since `huggingface_hub` reads its
    environment when it is imported.

    The process has a clock of its own, which only sleeping moves: no pause takes any time.

    Args:
        timeout: seconds that a server is given to answer in, real ones.

    Returns:
        For each case "seconds", those slept between tries, and either "weights" and "config", or
        "error" and "message".
    """
    kept = {key: value for key, value in os.environ.items() if not PRIVATE_SETTINGS.match(key)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CLIENT],
        input=json.dumps([cases, timeout]),
        env=kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "*"} | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(cases), done.stderr
    return rows


@dataclass(frozen=True)
class Request:
    """One request; `host` is "hub" or "cdn", header names are in lower case."""

    method: str
    host: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Repo:
    """What the server has under one name, and how it misbehaves.

    Attributes:
        revisions: commit id of every branch and tag.
        commits: files of every commit.
        large: files that are answered with a redirect to the other host, as Git-LFS files are.
        token: needed to see the repository at all.
        gated: it is seen, but not to be read.
        failures: statuses to answer with, one a request, before the repository works; the last one
            stays if `broken`.
        extra: bytes that are promised for a file beyond those there are.
        cuts: bytes after which the connection breaks, one for each body sent.
        etag: of every file, whatever is in it.
        portal: answers come from a login page, not from a Hub.
        moved_to: the repository's new name.
        on_body: called with the file's name before its body is sent.
    """

    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: tuple[str, ...] = ()
    token: str | None = None
    gated: bool = False
    failures: list[int] = field(default_factory=list)
    broken: bool = False
    extra: int = 0
    cuts: list[int] = field(default_factory=list)
    etag: str | None = None
    portal: bool = False
    moved_to: str | None = None
    on_body: Callable[[str], None] = lambda file: None

    def push(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Commits `files` and moves the branch; returns the commit's id."""
        digest = hashlib.sha1(revision.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        commit = digest.hexdigest()
        self.commits[commit] = files
        self.revisions[revision] = commit
        return commit


class HubServer:
    """Serves `repos` on two ports of 127.0.0.1, the Hub's and the storage's that large files are
    redirected to, until it is closed."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self._servers = []
        for host in ("hub", "cdn"):
            handler = type("Handler", (_Handler,), {"hub": self, "host": host})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def add(self, name: str, files: dict[str, bytes], **behaviour: Any) -> Repo:
        repo = self.repos[name] = Repo(**behaviour)
        repo.push(files)
        return repo

    def asked(self, repo: str, method: str | None = None) -> list[Request]:
        """The requests about one repository so far."""
        return [
            request
            for request in self.requests
            if request.path.startswith(f"/{repo}/") and method in (None, request.method)
        ]

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    host: str
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, self.host, path, headers))
        match = re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = self.hub.repos.get(match[1]) if match else None
        if match is None or repo is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        name, revision, file = match.groups()
        if repo.moved_to:
            location = path.replace(name, repo.moved_to, 1)
            return self._send(307, {"Location": location}, b"")
        if repo.failures:
            status = repo.failures[0] if repo.broken else repo.failures.pop(0)
            return self._error(status, None, "the server is out of order")
        if repo.portal:
            return self._send(200, {"Content-Type": "text/html", "ETag": '"portal"'}, PORTAL)
        if self.host == "hub":
            sent = headers.get("authorization")
            if sent is not None and repo.token is not None and sent != f"Bearer {repo.token}":
                return self._error(401, None, "Invalid credentials in Authorization header")
            if repo.token is not None and sent is None:
                return self._error(401, "RepoNotFound", "Repository not found")
            if repo.gated:
                return self._error(403, "GatedRepo", f"Access to model {name} is restricted")
        commit = revision if revision in repo.commits else repo.revisions.get(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repo.commits[commit].get(file)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        return self._file(repo, file, commit, content)

    def _file(self, repo: Repo, file: str, commit: str, content: bytes) -> None:
        etag = f'"{repo.etag or hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file in repo.large and self.host == "hub":
            linked = {
                "Location": self.hub.storage + self.path,
                "X-Linked-ETag": etag,
                "X-Linked-Size": str(len(content) + repo.extra),
            }
            return self._send(302, headers | linked, b"")
        headers |= {"ETag": etag, "Content-Type": "application/octet-stream"}
        if self.command == "HEAD":
            return self._send(200, headers, content, len(content) + repo.extra)
        repo.on_body(file)
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        cut = repo.cuts.pop(0) if repo.cuts else None
        return self._send(206 if wanted else 200, headers, body, cut=cut)

    def _error(
        self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        coded = {"X-Error-Code": code} if code else {}
        self._send(status, {**(headers or {}), **coded, "X-Error-Message": message}, b"")

    def _send(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        length: int | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
