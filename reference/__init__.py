"""The published STELLAR model in plain PyTorch: the oracle of every kernel, to train."""

from .model import STELLARModel

__all__ = ["STELLARModel"]
