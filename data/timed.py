"""Reading with a limit: storage that does not answer (a dead network disk, a pipe) holds whoever reads it for ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

from data.audio import audio_seconds
from opd.types import Utterance

Result = TypeVar("Result")


def within(timeout_s: float, read: Callable[[], Result], reading: Callable[[], Sequence[str]]) -> Result:
    """What `read()` returns or raises. Raises ValueError, with the files that `reading()` names, after timeout_s seconds.

    It is done in a thread that does not keep the process: where it never ends, the process still can.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(read())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="read", daemon=True).start()
    return result_within(timeout_s, future, reading)


def result_within(timeout_s: float, future: Future[Result], reading: Callable[[], Sequence[str]]) -> Result:
    """As `within`, for what is being read already."""
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        if future.done():  # it is the reader's own error
            raise
        raise ValueError(
            f"audio was not read within data.read_timeout_s={timeout_s:g} s: {', '.join(reading())}; "
            "look at the storage that it is on"
        ) from error


def seconds_within(timeout_s: float, utterance: Utterance) -> float:
    """`audio_seconds` with the limit."""
    return within(timeout_s, lambda: audio_seconds(utterance), lambda: [f"{utterance.id} ({utterance.audio})"])
