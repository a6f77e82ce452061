"""A batch of utterances to a list of waveforms, with one policy for audio that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident

import numpy as np

from data.audio import SAMPLING_RATE, BadAudio, load_audio
from opd.types import Utterance

PLACEHOLDER_SECONDS = 0.5


class Collator:
    """Reads the audio of a batch; `on_bad_audio` is "stop" (raise the first BadAudio) or "skip" (silence instead)."""

    def __init__(self, *, max_seconds: float | None = None, on_bad_audio: str = "stop") -> None:
        if on_bad_audio not in ("stop", "skip"):
            raise ValueError(f"on_bad_audio must be 'stop' or 'skip', not {on_bad_audio!r}")
        self.max_seconds = max_seconds
        self.on_bad_audio = on_bad_audio
        self._reading: dict[int, Utterance] = {}  # by thread

    def reading(self) -> list[str]:
        """Id and path of what is being read at this moment, for when it does not come to an end."""
        return [f"{utterance.id} ({utterance.audio})" for utterance in list(self._reading.values())]

    def collate(self, utterances: Sequence[Utterance]) -> tuple[list[np.ndarray], list[BadAudio]]:
        """Return (a float32 [samples at 16 kHz] waveform for each utterance in order, the errors of the skipped ones).

        A skipped utterance keeps its row as 0.5 s of silence, so that shapes and shards stay; the caller masks it out.
        """
        waveforms: list[np.ndarray] = []
        bad: list[BadAudio] = []
        for utterance in utterances:
            self._reading[get_ident()] = utterance
            try:
                waveforms.append(load_audio(utterance, max_seconds=self.max_seconds))
            except BadAudio as error:
                if self.on_bad_audio == "stop":
                    raise
                bad.append(error)
                waveforms.append(np.zeros(int(PLACEHOLDER_SECONDS * SAMPLING_RATE), dtype=np.float32))
            finally:
                del self._reading[get_ident()]
        return waveforms, bad
