"""`source.locate` against a server that speaks the Hub's HTTP."""

import errno
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import HubServer, files, index, locate_in_process

from stellar_fast.errors import DownloadError
from stellar_fast.weights import hub, source

OFFLINE = {"HF_HUB_OFFLINE": "1"}
METADATA = SimpleNamespace(size=11)


def case(repo: str, **arguments) -> dict:
    return {"name": "small", "repo": repo} | arguments


def contents(row: dict) -> bytes:
    assert "error" not in row, row
    return Path(row["weights"]).read_bytes()


def weights_in(home: Path) -> list[Path]:
    """Weights that the cache would give out, and whole blobs; older versions of the library keep
    what is unfinished beside them, to resume it."""
    blobs = [path for path in home.rglob("blobs/*") if path.suffix != ".incomplete"]
    return [path for path in blobs if b"weights" in path.read_bytes()[:16]] + list(
        home.rglob("*.safetensors")
    )


@pytest.fixture(scope="module")
def server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def test_a_download_is_kept_and_found_without_the_network(server, home, tmp_path):
    server.add("org/plain", files())
    plain, elsewhere = case("org/plain"), {"cache_dir": str(tmp_path / "elsewhere")}
    first, second, local, other, miss = locate_in_process(
        [
            plain,
            plain,
            case("org/plain", local_files_only=True),
            case("org/plain", **elsewhere),
            case("org/plain", local_files_only=True, cache_dir=str(tmp_path / "empty")),
        ],
        server.endpoint,
        home,
    )
    assert contents(first) == b"the weights"
    assert first["config"]["num_sparse_tokens"] == 8 and first["config"]["spatial_temp"] == 0.1
    assert first["config"]["backbone"]["hidden_size"] == 768
    assert second["weights"] == first["weights"] == local["weights"]
    assert Path(first["weights"]).is_relative_to(home)
    assert Path(other["weights"]).is_relative_to(tmp_path / "elsewhere")
    bodies = [request.path.rsplit("/")[-1] for request in server.asked("org/plain", "GET")]
    assert bodies == ["config.json", "small.safetensors"] * 2  # once for each cache
    assert miss["error"] == "DownloadError"
    for part in ("'config.json'", "'org/plain'", "'main'", "local_files_only=True", "not in the"):
        assert part in miss["message"]

    before = len(server.requests)
    for settings, arguments in [(OFFLINE, {}), ({}, {"local_files_only": True})]:
        hit, gone = locate_in_process(
            [case("org/plain", **arguments), case("org/never", **arguments)],
            server.endpoint,
            home,
            **settings,
        )
        assert contents(hit) == b"the weights"
        assert gone["error"] == "DownloadError"
        assert gone["seconds"] == 0  # nothing to try again
        assert ("HF_HUB_OFFLINE is set" in gone["message"]) == (settings is OFFLINE)
        assert "'org/never'" in gone["message"] and "not in the cache" in gone["message"]
    assert len(server.requests) == before


def test_revisions_and_commits(server, home):
    repo = server.add("org/versions", files(b"new"))
    commit = repo.push(files(b"old"), "v1")
    rows = locate_in_process(
        [
            case("org/versions"),
            case("org/versions", revision="v1"),
            case("org/versions", revision="v1", local_files_only=True),
        ],
        server.endpoint,
        home,
    )
    assert list(map(contents, rows)) == [b"new", b"old", b"old"]
    before = len(server.requests)
    (pinned,) = locate_in_process([case("org/versions", revision=commit)], server.endpoint, home)
    assert contents(pinned) == b"old"
    assert len(server.requests) == before  # a commit in the cache needs no question


def test_weights_are_of_the_commit_of_their_config(server, home):
    repo = server.add("org/pushed", files(b"first"))
    repo.on_body = lambda file: repo.push(files(b"second")) and None
    (row,) = locate_in_process([case("org/pushed")], server.endpoint, home)
    assert contents(row) == b"first"
    repo.on_body = lambda file: None
    (row,) = locate_in_process([case("org/pushed")], server.endpoint, home)
    assert contents(row) == b"second"


def test_token_goes_to_the_hub_and_not_to_the_storage(server, home):
    server.add("org/private", files(), token="hf_secret", large=("small.safetensors",))
    with_token, wrong = locate_in_process(
        [
            case("org/private", token="hf_secret"),
            case("org/private", token="hf_wrong", cache_dir=str(home / "other")),
        ],
        server.endpoint,
        home,
    )
    assert contents(with_token) == b"the weights"
    right = [r for r in server.asked("org/private") if "hf_wrong" not in str(r.headers)]
    hub_requests = [r for r in right if r.host == "hub"]
    assert {r.headers.get("authorization") for r in hub_requests} == {"Bearer hf_secret"}
    (stored,) = [r for r in right if r.host == "cdn"]
    assert stored.method == "GET" and "authorization" not in stored.headers
    assert wrong["error"] == "DownloadError" and "answered 401" in wrong["message"]
    assert "pass token=" in wrong["message"] and "hf_wrong" not in wrong["message"]


def test_a_renamed_repository_is_followed(server, home):
    server.add("org/new-name", files())
    server.add("org/old-name", {}, moved_to="org/new-name")
    (row,) = locate_in_process([case("org/old-name")], server.endpoint, home)
    assert contents(row) == b"the weights"


def cut_once(repo, cut: int):
    """Cuts the first body of the weights after `cut` bytes."""

    def on_body(file: str) -> None:
        if file.endswith(".safetensors"):
            repo.cuts.append(cut)
            repo.on_body = lambda file: None

    return on_body


def test_a_cut_download_is_resumed(server, home):
    # The library writes 10 MiB at a time, and resumes after the last whole write.
    weights = bytes(range(256)) * (12 * 2**20 // 256)
    repo = server.add("org/cut", files(weights), large=("small.safetensors",))
    repo.on_body = cut_once(repo, 11 * 2**20)
    # Versions before 2.0 need a second call for it.
    *_, row = locate_in_process([case("org/cut")] * 2, server.endpoint, home)
    assert contents(row) == weights
    ranges = [r.headers.get("range") for r in server.asked("org/cut", "GET") if r.host == "cdn"]
    assert ranges == [None, f"bytes={10 * 2**20}-"]


@pytest.mark.parametrize("large", [(), ("small.safetensors",)])
def test_a_body_of_the_wrong_size_is_no_file(server, home, large):
    name = f"org/short-{len(large)}"
    repo = server.add(name, files(), large=large)
    repo.on_body = lambda file: setattr(repo, "extra", 5)
    broken, cached = locate_in_process(
        [case(name), case(name, local_files_only=True)], server.endpoint, home
    )
    assert broken["error"] == cached["error"] == "DownloadError"
    for part in ("'small.safetensors'", repr(name), "incomplete", "size 16", "size 11"):
        assert part in broken["message"]
    assert "load again" in broken["message"] and "\n" not in broken["message"]
    assert "'small.safetensors'" in cached["message"] and "not in the" in cached["message"]
    assert not weights_in(home)

    repo.extra, repo.on_body = 0, lambda file: None
    (again,) = locate_in_process([case(name)], server.endpoint, home)
    assert contents(again) == b"the weights"
    assert weights_in(home)


def test_a_connection_that_is_always_cut_ends(server, home):
    repo = server.add("org/cut-forever", files())
    repo.on_body = lambda file: repo.cuts.append(4) if file.endswith("safetensors") else None
    broken, cached = locate_in_process(
        [case("org/cut-forever"), case("org/cut-forever", local_files_only=True)],
        server.endpoint,
        home,
    )
    assert broken["error"] == cached["error"] == "DownloadError"
    assert "'small.safetensors'" in broken["message"] and "network" in broken["message"]
    assert broken["seconds"] < 60  # the library tries again by itself
    assert not weights_in(home)


def test_html_for_a_config_and_its_remedy(server, home):
    # A page in place of the file that the headers speak of: the same ETag before and after.
    repo = server.add("org/html", {"config.json": b"<!DOCTYPE html><p>Sign in"}, etag="same")
    (row,) = locate_in_process([case("org/html")], server.endpoint, home)
    assert row["error"] == "CheckpointError"
    assert "config.json is not JSON" in row["message"] and "<!DOCTYPE html>" in row["message"]
    stale = Path(row["message"].split("delete ")[1].split(" and load again")[0])
    assert stale.is_relative_to(home)
    stale.unlink()
    repo.push(files())
    (row,) = locate_in_process([case("org/html", local_files_only=True)], server.endpoint, home)
    assert row["error"] == "DownloadError"
    repo.on_body = lambda file: setattr(repo, "etag", None)
    (row,) = locate_in_process([case("org/html")], server.endpoint, home)
    assert contents(row) == b"the weights"


FAILURES = {
    "no-repo": (case("org/absent"), ["'config.json'", "404", "no such repository", "token="]),
    "no-revision": (
        case("org/there", revision="v9"),
        ["'v9'", "'org/there'", "404", "no such revision", "/org/there/tree/main"],
    ),
    "no-config": (case("org/no-config"), ["'config.json'", "404", "no such file"]),
    "no-weights": (case("org/no-weights"), ["'small.safetensors'", "404", "no such file"]),
    "private": (case("org/secret"), ["401", "it is private", "token="]),
    "gated": (case("org/gated"), ["403", "restricted", "/org/gated", "token="]),
    "unauthorized": (case("org/401"), ["401", "no permission", "token="]),
    "forbidden": (case("org/403"), ["403", "no permission", "token="]),
    "server-error": (case("org/500"), ["answered 500", "try again later"]),
    "too-many": (case("org/429"), ["answered 429", "try again later"]),
    "portal": (case("org/portal"), ["does not answer as a Hub does", "HF_ENDPOINT", "proxy"]),
    "bad-name": (case("org/-bad-"), ["'org/-bad-' is no repository name", "owner/name"]),
    "no-name": (case(""), ["'' is no repository name", "owner/name"]),
    "no-token": (case("org/there", token=True), ["no token is stored", "hf auth login"]),
    "absent-path": (case("./absent/folder"), ["'./absent/folder' is a path", "no such folder"]),
}


@pytest.fixture(scope="module")
def failures(server, tmp_path_factory):
    """What every case of `FAILURES` gave, all in one process."""
    server.add("org/there", files())
    server.add("org/no-config", {"other.txt": b""})
    server.add("org/no-weights", {"config.json": index()})
    server.add("org/secret", files(), token="hf_secret")
    server.add("org/gated", files(), gated=True)
    for status in (401, 403, 429, 500):
        server.add(f"org/{status}", files(), failures=[status], broken=True)
    server.add("org/portal", files(), portal=True)
    home = tmp_path_factory.mktemp("home")
    rows = locate_in_process([case for case, _ in FAILURES.values()], server.endpoint, home)
    return dict(zip(FAILURES, rows, strict=True)), home


@pytest.mark.parametrize("failure", FAILURES)
def test_one_error_says_what_where_and_what_to_do(failures, failure):
    row = failures[0][failure]
    asked, parts = FAILURES[failure]
    assert row["error"] == "DownloadError", row
    for part in [asked["repo"], *parts]:
        assert part in row["message"]
    assert "\n" not in row["message"]
    # Two pauses, where it may pass; some versions of the library add their own after a 429.
    passes = failure in ("server-error", "too-many")
    assert row["seconds"] == (1 + 2 if passes else 0) or failure == "too-many"


def test_failures_leave_no_weights(failures):
    _, home = failures
    assert not weights_in(home)


def test_a_failure_that_passes_is_waited_for(server, home):
    server.add("org/flaky", files(), failures=[503, 502])
    (row,) = locate_in_process([case("org/flaky")], server.endpoint, home)
    assert contents(row) == b"the weights"
    assert row["seconds"] == 1 + 2


def test_unknown_names_cost_no_weights(server, home):
    server.add("org/names", files())
    before = len(server.requests)
    published, other = locate_in_process(
        [{"name": "stellar-x", "repo": source.PUBLISHED_REPO}, case("org/names") | {"name": "big"}],
        server.endpoint,
        home,
    )
    assert published["error"] == other["error"] == "ValueError"
    assert "'stellar-x'" in published["message"] and "stellar-h16" in published["message"]
    assert "'big'" in other["message"] and "has: small" in other["message"]
    asked = [request for request in server.requests[before:] if "/resolve/" in request.path]
    assert asked and all(request.path == "/org/names/resolve/main/config.json" for request in asked)


def test_no_server_ends_soon_and_the_cache_still_serves(server, home):
    server.add("org/kept", files())
    (first,) = locate_in_process([case("org/kept")], server.endpoint, home)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls and never answers
        port = silent.getsockname()[1]
        rows = locate_in_process(
            [case("org/kept"), case("org/unseen")],
            f"http://127.0.0.1:{port}",
            home,
            timeout=0.1,
        )
    rows += locate_in_process(
        [case("org/kept"), case("org/unseen")], f"http://127.0.0.1:{port}", home
    )
    for hit, miss in (rows[:2], rows[2:]):
        assert hit["weights"] == first["weights"] and hit["seconds"] == 0
        assert miss["error"] == "DownloadError"
        for part in ("'config.json'", "'org/unseen'", "'main'", f":{port} failed"):
            assert part in miss["message"]
        assert "check the network" in miss["message"] and "folder" in miss["message"]
        assert miss["seconds"] == 1 + 2


def test_a_server_out_of_order_leaves_the_cache_in_use(server, home):
    repo = server.add("org/once", files())
    (first,) = locate_in_process([case("org/once")], server.endpoint, home)
    repo.failures, repo.broken = [500], True
    (second,) = locate_in_process([case("org/once")], server.endpoint, home)
    assert second["weights"] == first["weights"] and second["seconds"] == 0


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ["no space left", "free some"]),
        (
            PermissionError(errno.EACCES, "Permission denied", "/c"),
            ["cache cannot be used", "'/c'"],
        ),
        (ConnectionResetError("reset\nby peer"), ["failed (reset by peer)", "check the network"]),
        (RuntimeError("Data processing error"), ["RuntimeError: Data processing error"]),
    ],
)
def test_a_failure_while_writing(monkeypatch, tmp_path, error, parts):
    def download(*args, **arguments):
        raise error

    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *args, **arguments: METADATA)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(DownloadError) as caught:
        source.locate("small", repo="org/name", revision="v1", cache_dir=tmp_path)
    assert caught.value.__cause__ is error
    for part in ("'config.json'", "'org/name'", "'v1'", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
