"""The published STELLAR model in plain PyTorch: the oracle of the engine, and the module to train."""

from .model import STELLARModel

__all__ = ["STELLARModel"]
