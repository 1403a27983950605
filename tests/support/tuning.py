"""Rows of tuning runs, and a table that is made of them."""

from dataclasses import asdict, replace

from gpu import tune

from stellar_fast.kernels.tables import AttentionTile, Tile

FACTS = {
    "name": "gpu",
    "device": "a GPU",
    "date": "2026-01-02",
    "commit": "abc",
    "versions": {"triton": "3"},
    "command": "gpu.py",
}
OWN = Tile(128, 256, 64, num_warps=8, num_stages=3, slices=2)
OTHER = Tile(128, 128, 64, num_warps=8, num_stages=4, slices=2)
THIRD = replace(OTHER, num_stages=3)
NARROW = AttentionTile(64, 64, 4, 3)
WIDE = AttentionTile(128, 64, 4, 3)


def timing(median: float, spread: float = 0.01) -> dict[str, float]:
    return {"median": median, "low": median * (1 - spread), "high": median * (1 + spread)}


def row(own, times: dict, rows: int = 64, shape=("bf16", 3840, 1280), arch: int = 90) -> dict:
    """A row as `tune.measure` writes it; the heuristics' tile takes 100."""
    attention = isinstance(own, AttentionTile)
    tiles = [
        {"tile": asdict(tile), "alike": True} | (timing(took) if isinstance(took, float) else took)
        for tile, took in times.items()
    ]
    return {
        "stage": "tune",
        "key": f"{shape} {rows} {arch}",
        "name": "kernel",
        "op": "attention" if attention else "qkv",
        "arch": arch,
        "rows": rows,
        "shape": list(shape),
        **timing(100.0),
        tune.OURS: asdict(own),
        "tiles": tiles,
    }


def sound() -> dict:
    rows = [row(OWN, {OTHER: 90.0}), row(NARROW, {WIDE: 90.0}, shape=("bf16", 273, 80))]
    return tune.table_of(FACTS, rows)
