"""What the tests of extraction share."""

from pathlib import Path

from pyarrow import parquet


def index(output: Path) -> dict[str, list]:
    return parquet.read_table(output / "index.parquet").to_pydict()


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


class Wrapped:
    """An engine with another `encode`."""

    def __init__(self, engine, encode) -> None:
        self.config, self.precision = engine.config, engine.precision
        self.weights, self.max_batch = engine.weights, engine.max_batch
        self.encode = encode


def scaled(engine, factor: float) -> Wrapped:
    """An engine whose features are `factor` times larger."""

    def encode(images, **arguments):
        return {name: value * factor for name, value in engine.encode(images, **arguments).items()}

    return Wrapped(engine, encode)
