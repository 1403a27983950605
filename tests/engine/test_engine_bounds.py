"""What an engine keeps and takes on is bounded, whatever images come."""

import numpy as np
import pytest
import torch
from engines import image, small_engine
from threads import in_threads

from stellar_fast.engine import encoder, engine
from stellar_fast.engine.caching import ByteCache
from stellar_fast.errors import StellarError


@pytest.fixture
def small():
    return small_engine()


def cache(most: int) -> ByteCache[str, bytes]:
    return ByteCache(most, len)


def test_the_values_used_last_are_kept_within_the_bytes():
    kept, made = cache(10), []

    def get(key: str, size: int) -> bytes:
        def make() -> bytes:
            made.append(key)
            return key.encode() * size

        return kept.get(key, make)

    for key in "abc":
        assert get(key, 4) == key.encode() * 4
    assert (made, kept.nbytes) == (["a", "b", "c"], 8)  # a is gone
    get("b", 4)
    get("d", 4)  # c is older than b by now
    get("b", 4)
    assert (made, kept.nbytes) == (["a", "b", "c", "d"], 8)
    assert get("e", 11) == b"e" * 11  # too large to be kept, and displaces nothing
    get("b", 4)
    get("d", 4)
    assert (made, kept.nbytes) == (["a", "b", "c", "d", "e"], 8)
    assert kept.evict() and not kept.evict() and kept.nbytes == 0


def test_a_cache_of_many_threads_stays_within_its_bytes():
    kept, wrong = cache(64), []

    def work(seed: int) -> None:
        for step in range(2000):
            size = (seed * 7 + step * 13) % 40 + 1
            if kept.get(str(size), lambda size=size: b"x" * size) != b"x" * size:
                wrong.append(size)
            if step % 50 == 0:
                kept.evict()
            if kept.nbytes > 64:
                wrong.append("bytes")

    in_threads(work, range(6))
    assert not wrong


def test_position_tables_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(engine, "TABLE_BYTES", 100_000)
    small = small_engine()
    sizes = [(rows, columns) for rows in (32, 64, 96, 160) for columns in (48, 112, 208)]
    first = [small.encode(image(1, *size))["dense"] for size in sizes]
    assert 0 < small._tables.nbytes <= 100_000
    again = [small.encode(image(1, *size))["dense"] for size in sizes]
    assert all(map(torch.equal, first, again))
    assert small._tables.nbytes <= 100_000
    # One size that comes again and again finds its table.
    made = []
    table = small._encoder.table
    monkeypatch.setattr(type(table), "table", lambda *_: made.append(1) or torch.zeros(5, 64))
    for _ in range(3):
        small.encode(image(1, 32, 32))
    assert made == [1]


def failing(monkeypatch, small, failures: int) -> list[int]:
    """Makes the next forwards run out of memory; the batch sizes of all forwards."""
    sizes: list[int] = []
    honest = encoder.encode

    def encode(ops, weights, config, images, *rest):
        sizes.append(len(images))
        assert len(sizes) < 50, "tried for ever"
        if len(sizes) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return honest(ops, weights, config, images, *rest)

    monkeypatch.setattr(encoder, "encode", encode)
    return sizes


def test_tables_go_before_chunks_are_halved(small, monkeypatch):
    for side in (32, 48, 64):
        small.encode(image(1, side, side))
    x = image(4, 80, 80)
    expected = small.encode(x)["cls"]
    sizes = failing(monkeypatch, small, 1)
    assert torch.equal(small.encode(x)["cls"], expected)
    assert sizes == [4, 4]
    assert list(small._tables._kept) == [(5, 5)]

    small.encode(image(1, 32, 32))
    sizes = failing(monkeypatch, small, 2)
    small.encode(x)
    assert sizes == [4, 4, 2, 2]
    sizes = failing(monkeypatch, small, 0)
    small.encode(x)
    small.encode(image(4, 32, 32))
    assert sizes == [2, 2, 4], "what fitted is remembered, for images of this size"


def test_tables_are_given_up_once_a_call(small, monkeypatch):
    """Other threads may make tables as fast as this one gives them up."""
    tries = failing(monkeypatch, small, 10**9)
    monkeypatch.setattr(small._tables, "evict", lambda: True)
    with pytest.raises(StellarError, match="not enough memory"):
        small.encode(image(4, 32, 32))
    assert tries == [4, 4, 2, 1]


def test_larger_images_are_one_clear_error():
    small = small_engine()
    assert small.max_patches == 65_536 == (4096 // 16) ** 2
    small.max_patches = 12
    assert small.encode(image(1, 48, 64))["dense"].shape[1] == 12
    message = r"64x64 pixels, 16 patches, are more than max_patches=12: .*larger max_patches"
    with pytest.raises(ValueError, match=message):
        small.encode(image(1, 64, 64))
    with pytest.raises(ValueError, match="13 patches, are more than max_patches=12"):
        small.encode(image(1, 16, 13 * 16))
    with pytest.raises(ValueError, match="196 patches, are more than max_patches=12"):
        small.encode(["tests/golden/absent.jpg"][:0])


VIEWS = {
    "torch float": lambda: torch.zeros(1).expand(1, 3, 1 << 20, 1 << 20),
    "torch uint8": lambda: torch.zeros(1, dtype=torch.uint8).expand(1, 1 << 20, 1 << 20, 3),
    "torch float8": lambda: torch.zeros(1).to(torch.float8_e4m3fn).expand(1, 3, 1 << 20, 1 << 20),
    "numpy float": lambda: np.broadcast_to(np.float32(0), (1, 3, 1 << 20, 1 << 20)),
    "numpy float64": lambda: np.broadcast_to(np.float64(0), (1, 3, 1 << 20, 1 << 20)),
    "numpy uint8": lambda: np.broadcast_to(np.uint8(0), (1, 1 << 20, 1 << 20, 3)),
    "numpy longdouble": lambda: np.broadcast_to(np.longdouble(0), (1, 3, 1 << 20, 1 << 20)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_size_is_checked_before_anything_is_allocated(small, view):
    """Terabytes, if a copy or a feature of it were made."""
    with pytest.raises(ValueError, match="4294967296 patches, are more than max_patches=65536"):
        small.encode(VIEWS[view]())


def test_calibrate_and_reconstruct_are_bounded_too(small):
    small.precision = "fp8"
    with pytest.raises(ValueError, match="more than max_patches=65536"):
        small.calibrate(VIEWS["torch float"]())
    decoding = small_engine(purpose="reconstruct", pixel_head=True)
    lowrank = torch.zeros(1).expand(1, 1 << 40, 64)
    with pytest.raises(ValueError, match="features of 1099511627776 patches, are more than max_p"):
        decoding.reconstruct({"lowrank": lowrank})


def test_max_patches_of_load():
    import stellar_fast

    arguments = {"weights": "synthetic", "device": "cpu", "precision": "fp32"}
    with pytest.raises(ValueError, match="max_patches must be at least 1, got 0"):
        stellar_fast.load("stellar-b8", max_patches=0, **arguments)
    assert stellar_fast.load("stellar-b8", max_patches=7, **arguments).max_patches == 7
