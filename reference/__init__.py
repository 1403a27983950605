"""The published STELLAR model in plain PyTorch: the engine's oracle, and the module to train."""

from .pretrain.stellar import STELLARModel

__all__ = ["STELLARModel"]
