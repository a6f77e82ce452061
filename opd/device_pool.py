"""The batches of a job on one device, or spread over several with a process for each."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.multiprocessing

from opd.batch_transcribe import Clip, ModelSettings, Outcome, transcribe_batches

POLL_SECONDS = 1.0


def outcomes_on(
    devices: Sequence[str], model: ModelSettings, batches: Sequence[list[Clip]], batch_size: int
) -> Iterator[list[Outcome]]:
    """The outcomes of every batch, in the order in which they are finished.

    One device works in this process. With several (a name may repeat: "cpu", "cpu"), each has a process with its own
    copy of the model that takes the next batch when it is free. Raises RuntimeError when one of them ends early.
    """
    if len(devices) == 1 or len(batches) < 2:
        yield from transcribe_batches(model.transcriber(devices[0]), batches, batch_size)
        return
    context = torch.multiprocessing.get_context("spawn")
    tasks: Any = context.Queue()
    results: Any = context.Queue()
    for task in [*batches, *[None] * len(devices)]:
        tasks.put(task)
    processes = [
        context.Process(target=_work, args=(device, len(devices), model, batch_size, tasks, results), daemon=True)
        for device in devices
    ]
    for process in processes:
        process.start()
    try:
        for _ in batches:
            yield _next_result(results, processes)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _next_result(results: Any, processes: list[Any]) -> list[Outcome]:
    while True:
        try:
            outcomes, error = results.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if dead := [process for process in processes if process.exitcode not in (None, 0)]:
                raise RuntimeError(
                    f"a worker process ended with status {dead[0].exitcode} (memory?); run the same command again to go on"
                ) from None
            continue
        if error is not None:
            raise RuntimeError(error)
        return outcomes


def _work(device: str, num_workers: int, model: ModelSettings, batch_size: int, tasks: Any, results: Any) -> None:
    """A worker process: takes batches until it gets None."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))
    try:
        for outcomes in transcribe_batches(model.transcriber(device), iter(tasks.get, None), batch_size):
            results.put((outcomes, None))
    except Exception as error:
        traceback.print_exc()
        results.put(([], f"{device}: {error}"))


def _end_with_parent() -> None:
    """Ends this process when its parent is gone: a killed parent cannot, and a worker would wait for batches for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process"
    wait([parent.sentinel])
    os._exit(1)
