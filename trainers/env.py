"""Environment variables that verl reads when it is imported. This file imports nothing, so it can come first."""

from __future__ import annotations

import os
import warnings


def verl_env(use_gpu: bool) -> dict[str, str]:
    """Environment of every process that imports verl: on CPU our platform plug-in, on a GPU host verl's own."""
    env = {
        # verl warns once in each process for every training backend that is not installed.
        # DeepSpeed calls collectives by names that torch 2.13 warns about, each time.
        "PYTHONWARNINGS": "ignore::UserWarning:verl.workers.engine,ignore::FutureWarning:torch.distributed.c10d_logger",
        "VERL_LOGGING_LEVEL": "WARN",
    }
    if not use_gpu:
        env |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "trainers.platform_cpu", "DS_ACCELERATOR": "cpu"}
    return env


def set_verl_env(use_gpu: bool) -> None:
    """Sets `verl_env` in this process. Call it before verl is first imported."""
    os.environ.update(verl_env(use_gpu))
    warnings.filterwarnings("ignore", category=UserWarning, module="verl.workers.engine")
