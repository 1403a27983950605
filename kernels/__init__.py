"""Triton kernels, one file for each op of `reference/ops.py`, under the same name and signature.

Empty until the first kernel lands; nothing imports this package yet.
"""
