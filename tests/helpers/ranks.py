"""Runs a function on real ranks: forked processes joined by gloo, verl imported once in the parent."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

from trainers.env import set_verl_env

set_verl_env(use_gpu=False)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import trainers.fsdp2  # noqa: E402, F401  the import that takes seconds happens here, once


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, limit_s: float = 60.0) -> list[Any]:
    """What `function(*arguments)` returns on each rank. An exception on a rank fails the test with its traceback.

    limit_s   of each collective, the meeting of the ranks included
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(rank, world_size, port, theirs, function, arguments, limit_s)
        )
        process.start()
        pipes.append(ours)
        processes.append(process)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(120), f"rank {rank} of {world_size} did not answer within 120 s"
            ok, value = pickle.loads(pipe.recv_bytes())
            assert ok, f"rank {rank} failed:\n{value}"
            results.append(value)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    return results


def _rank_main(
    rank: int, world_size: int, port: int, pipe: Any, function: Callable, arguments: tuple, limit_s: float
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    try:
        from trainers.base_engine import init_process_group

        init_process_group(limit_s, use_gpu=False)
        # Plain pickle carries a tensor's bytes; the pipe's own would share memory that ends with this process.
        pipe.send_bytes(pickle.dumps((True, function(*arguments))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os._exit(0)
