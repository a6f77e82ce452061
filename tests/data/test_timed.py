"""Whoever reads audio that blocks is told its file within the limit, and the process still ends."""

from __future__ import annotations

import dataclasses
import errno
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.audio import BadAudio, audio_seconds
from data.buckets import spread_by_length
from data.manifest import read_manifest
from data.timed import seconds_within, within
from opd.types import Utterance

PROGRAM = """
import sys
from data.timed import seconds_within
from opd.types import Utterance
try:
    seconds_within(0.5, Utterance("a", sys.argv[1]))
except ValueError as error:
    print(error)
"""


def test_seconds_and_errors_are_those_of_the_header(speech: dict[str, Path]) -> None:
    utterance = read_manifest(speech["eval"])[0]
    assert seconds_within(60, utterance) == audio_seconds(utterance)
    with pytest.raises(BadAudio, match="nowhere"):
        seconds_within(60, Utterance("a", "/nowhere.wav"))


def test_an_error_of_the_reader_is_not_the_limit() -> None:
    def read() -> None:
        raise TimeoutError(errno.ETIMEDOUT, "the server does not answer")

    with pytest.raises(TimeoutError, match="server"):
        within(60, read, list)


def test_a_process_with_a_blocked_reader_names_the_file_and_ends(pipe: Path) -> None:
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(pipe)], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == (
        f"audio was not read within data.read_timeout_s=0.5 s: a ({pipe}); look at the storage that it is on\n"
    )
    assert time.monotonic() - began < 30


def test_a_batch_by_length_does_not_wait_for_ever(speech: dict[str, Path], pipe: Path) -> None:
    utterances = [dataclasses.replace(u, extra={}) for u in read_manifest(speech["eval"])[:2]]
    utterances[1] = dataclasses.replace(utterances[1], audio=str(pipe))
    with pytest.raises(ValueError, match=rf"{re.escape(utterances[1].id)} \(.*pipe\.wav\)"):
        spread_by_length(utterances, 1, timeout_s=0.5)
