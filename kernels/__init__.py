"""Triton kernels, one file per op, each with its twin of the same name and signature in
`reference/ops.py`.

Empty until the first kernel lands; nothing imports this package unless a Triton backend is asked
for.
"""
