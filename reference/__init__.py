"""The published STELLAR model in plain PyTorch: the oracle of every kernel, and the module to
train."""
