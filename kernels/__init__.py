"""Triton kernels, one op a file, with the names and signatures of `reference.ops`.

Installed as `stellar_fast.kernels`. Imported only where a Triton backend is asked for.
"""
