"""Whether several processes train together, asked in one place."""

from __future__ import annotations

import torch.distributed as dist


def several_processes() -> bool:
    """True inside an initialised process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
