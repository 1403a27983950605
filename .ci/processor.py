"""Prints which processor this is, and what it can do that decides how numbers are rounded."""

import os
from pathlib import Path

import torch

FLAGS = ("sse4_1", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni")
FLAGS += ("amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")

facts: dict[str, str] = {}
if Path("/proc/cpuinfo").exists():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
has = (facts.get("flags") or facts.get("Features") or "").split()
print(f"processor: {facts.get('model name', 'unknown')}, {os.cpu_count()} cores")
print(f"  family {facts.get('cpu family', '?')}, model {facts.get('model', '?')}")
print(f"  has {' '.join(flag for flag in FLAGS if flag in has) or 'none of the flags looked for'}")
print(f"  PyTorch computes with {torch.backends.cpu.get_cpu_capability()}")
print(f"  load average {os.getloadavg()[0]:.2f}")
