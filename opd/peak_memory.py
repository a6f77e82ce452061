"""How much memory this process has taken at most."""

from __future__ import annotations

import resource

import torch


def peak_memory() -> dict[str, float]:
    """Bytes so far: `host`, and on a GPU `device` (torch's tensors), with what is `free` of its `total` now."""
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        found |= {"device": float(torch.cuda.max_memory_allocated()), "free": float(free), "total": float(total)}
    return found
