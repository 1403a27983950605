"""A session of Ray: the one there is, a cluster's, or a private one of this machine."""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import MissingExtraError, StellarError
from .work.workers import cores

# For Ray's own messages in a session that is started here: manifests are all that it carries.
OBJECT_STORE = 128 << 20  # bytes


@contextmanager
def session(address: str | None) -> Iterator[None]:
    """A session for as long as the block runs; one that this process already has stays.

    Args:
        address: of a cluster, as `ray.init` takes it; "local" or None for this machine alone.

    Raises:
        MissingExtraError: Ray is not installed.
        ConnectionError: there is no cluster at `address`.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("extraction on a Ray cluster", "ray") from error
    if ray.is_initialized():
        yield
    elif address is None or address == "local":
        with _local():
            yield
    else:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _local() -> Iterator[None]:
    """A session of this machine that no other one and no other user can reach: what reaches Ray's
    ports or sockets may run code.

    Raises:
        StellarError: Ray listens on more than the loopback.
    """
    import ray
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]

    environment, clusters = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    # Ray's own way to stay on the loopback, which is its default on macOS and Windows alone: the
    # variable is for the processes that it starts, the constant for this one.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
    Config.initialize("")  # reads the environment again
    try:
        # Ray opens its own folder to all; the one around it is this user's alone.
        with tempfile.TemporaryDirectory(prefix="stellar-") as private:
            try:
                ray.init(
                    "local",
                    # The cores that this process may use: in a container fewer than there are.
                    num_cpus=cores(),
                    object_store_memory=OBJECT_STORE,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    _temp_dir=os.path.join(private, "ray"),
                )
                host = ray.util.get_node_ip_address()
                if not ipaddress.ip_address(host).is_loopback:
                    raise StellarError(
                        f"Ray {ray.__version__} listens on {host}, where others may reach it; "
                        "install the Ray of constraints.txt, or extract without it"
                    )
                yield
            finally:
                ray.shutdown()
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        os.environ.clear()
        os.environ.update(environment)
        Config.initialize("")


@functools.cache
def _token() -> str:
    """What processes of a local session show each other; Ray keeps the first that it sees."""
    return secrets.token_hex(32)
