"""A local session of Ray: nobody but this process's own can reach it, and it leaves nothing."""

import ipaddress
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

psutil = pytest.importorskip("psutil")
pytest.importorskip("ray", reason="the extra 'ray' is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# In a process of its own, which has imported Ray, and knows it without tokens, before the session.
SESSION = """
import os, sys, ray
os.environ["RAY_AUTH_MODE"] = "disabled"
before = dict(os.environ)
from stellar_fast.extract.ray_session import session
for _ in range(2):
    with session(None):
        worker = ray.get(ray.remote(lambda: os.getpid()).remote())
        print(worker, ray.get_runtime_context().gcs_address,
              ray._private.worker._global_node.get_session_dir_path(), flush=True)
        sys.stdin.readline()
    assert dict(os.environ) == before
"""

# What a stranger would do.
SUBMIT = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False)
print("ran", ray.get(ray.remote(lambda: 7).remote()))
"""


def listening(process) -> list[tuple[str, str]]:
    """(process name, address) of every TCP socket that listens and every UDP socket."""
    found = []
    for one in (process, *process.children(recursive=True)):
        try:
            sockets = one.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        found += [
            (one.name(), socket.laddr.ip)
            for socket in sockets
            if socket.status == psutil.CONN_LISTEN or (socket.laddr and not socket.raddr)
        ]
    return found


def loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_a_local_session_is_private_and_leaves_nothing(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SESSION],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            for turn in range(2):
                worker, address, folder = process.stdout.readline().split()
                sockets = listening(psutil.Process(process.pid))
                assert len(sockets) >= 4, "Ray's own servers are not among them"
                assert {name for name, _ in sockets} >= {"gcs_server", "raylet"}
                assert [found for found in sockets if not loopback(found[1])] == []
                private = Path(folder).parent.parent
                assert stat.S_IMODE(private.stat().st_mode) == 0o700
                assert (private.stat().st_uid, psutil.pid_exists(int(worker))) == (
                    os.getuid(),
                    True,
                )
                if turn == 0:
                    refused(address, tmp_path)
                process.stdin.write("\n")
                process.stdin.flush()
                if turn == 1:
                    assert process.wait(120) == 0
                    assert not private.exists()
        finally:
            process.kill()


def refused(address: str, home: Path) -> None:
    """Another process of this machine cannot run code there: with no token, or a wrong one."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Or Ray would look for the session at this machine's address in the network, without end.
    clean["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    for told in (
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    ):
        done = subprocess.run(
            [sys.executable, "-c", SUBMIT, address],
            env={**clean, "HOME": str(home), **told},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, "ran" in done.stdout) == (1, False)
        assert "token" in done.stderr
