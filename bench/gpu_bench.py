"""What the cases of bench.gpu share: a size on a device, and how seconds and megabytes are taken there."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu_models import Size, decoding_arguments, make_inputs, make_model


@dataclass
class Bench:
    """What the cases of a size share."""

    name: str
    size: Size
    device: torch.device
    dtype: torch.dtype
    runs: int
    bytes_per_s: float
    no_graphs: str = ""  # why nothing that runs on fixed memory is timed

    @property
    def arguments(self) -> dict[str, Any]:
        return decoding_arguments(self.size, self.device)

    def model(self) -> Any:
        return make_model(self.size.decoder, self.size.whisper, self.device, self.dtype)

    def inputs(self) -> dict[str, torch.Tensor]:
        return make_inputs(self.size, self.device, self.dtype, self.size.whisper["num_mel_bins"])

    def seconds(self, function: Callable[[], Any]) -> float:
        return seconds_of(function, self.device, self.runs)

    def peak_mb(self, function: Callable[[], Any]) -> float | None:
        """Megabytes over what is allocated now; None where the device does not count."""
        if self.device.type != "cuda":
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


def seconds_of(function: Callable[[], Any], device: torch.device, runs: int) -> float:
    """Median over runs, after one that is not counted."""
    taken = []
    for _ in range(runs + 1):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes read and written a second by a copy of this size: the most that reading weights could reach."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source), device, runs=5)
