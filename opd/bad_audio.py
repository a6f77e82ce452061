"""Utterances whose audio was left out of a run: counted, listed in bad_audio.jsonl, and limited in their share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd.checkpoint import atomic_write_text

LEAST_SEEN = 100  # a share means little before some utterances were seen


class BadAudioList:
    """The list of one run. `counts` has `seen` and `bad_audio`, and lives in the run's loop state."""

    def __init__(self, path: Path, counts: dict[str, Any], max_share: float) -> None:
        self.path = path
        self.counts = counts
        self.max_share = max_share

    def truncate(self, step: int) -> None:
        """Drops what was listed after a checkpoint: those steps are run again."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").split("\n")
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            atomic_write_text(self.path, "".join(f"{line}\n" for line in kept))

    def note(self, step: int, bad: list[tuple[str, str, str]], num_seen: int) -> set[str]:
        """Adds (utterance id, path, reason) of a step; returns the ids. Raises ValueError above the limit on their share."""
        self.counts["seen"] += num_seen
        self.counts["bad_audio"] += len(bad)
        if bad:
            with open(self.path, "a", encoding="utf-8") as file:
                for utterance_id, audio, reason in bad:
                    row = {"id": utterance_id, "audio": audio, "reason": reason, "step": step}
                    file.write(json.dumps(row) + "\n")
            share = self.counts["bad_audio"] / self.counts["seen"]
            if self.counts["seen"] >= LEAST_SEEN and share > self.max_share:
                raise ValueError(
                    f"step {step}: {share:.1%} of the utterances seen so far are bad audio, above "
                    f"data.max_bad_share={self.max_share:g}; they are listed in {self.path}"
                )
        return {utterance_id for utterance_id, _, _ in bad}
