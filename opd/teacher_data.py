"""Stage td, teacher data: transcripts of a training set by the teacher, filtered, as an ordinary manifest.

<run_dir>/td/transcripts.jsonl   what the teacher wrote, appended batch by batch; an interrupted stage goes on from it
<run_dir>/td/manifest.jsonl      what passed the filters: `text` is the teacher's, `reference` what stood there before
<run_dir>/td/counts.json         how many were left out and why, and where the texts come from
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from data.manifest import write_manifest
from opd.checkpoint import atomic_write_text
from opd.evaluate import utterance_errors
from opd.schema import TdConfig
from opd.text import scored_language
from opd.types import Batch, TeacherTranscript, Utterance

REASONS = ("bad_audio", "empty", "unfinished", "looped", "low_logprob", "too_fast", "too_slow", "wrong")


class TeacherData:
    """The folder of one stage's teacher data. `source` goes into the counts and every line: which teacher wrote it."""

    def __init__(self, folder: Path, config: TdConfig, source: str, normaliser: str = "auto") -> None:
        self.folder = folder
        self.config = config
        self.source = source
        self.normaliser = normaliser
        self.manifest = folder / "manifest.jsonl"
        self._transcripts = folder / "transcripts.jsonl"
        self._counts = folder / "counts.json"

    def is_complete(self) -> bool:
        return self.manifest.is_file() and self._counts.is_file()

    def counts(self) -> dict[str, Any]:
        """What `write` counted."""
        return json.loads(self._counts.read_text(encoding="utf-8"))

    def pending(self, utterances: Sequence[Utterance], size: int) -> Iterator[Batch]:
        """Batches of what the teacher has not transcribed yet, in the order of the manifest."""
        done = self._read().keys()
        left = (u for u in utterances if u.id not in done)
        return iter(lambda: list(islice(left, size)), [])

    def add(self, batch: Batch, transcripts: list[TeacherTranscript]) -> None:
        """Keeps the transcripts of a batch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"id": utterance.id, **asdict(transcript)}, ensure_ascii=False)
            for utterance, transcript in zip(batch, transcripts, strict=True)
        ]
        with open(self._transcripts, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def write(self, utterances: Sequence[Utterance]) -> dict[str, Any]:
        """Filters what was transcribed and writes the manifest; returns the counts.

        Raises ValueError where nothing passes, with the reasons.
        """
        transcripts = self._read()
        kept: Batch = []
        reasons: Counter[str] = Counter()
        for utterance in utterances:
            reason = self.reason(utterance, transcripts[utterance.id])
            if reason:
                reasons[reason] += 1
            else:
                kept.append(self._labelled(utterance, transcripts[utterance.id]))
        left_out = {name: reasons[name] for name in REASONS if reasons[name]}
        if not kept:
            listed = ", ".join(f"{name} {count}" for name, count in left_out.items())
            raise ValueError(
                f"stage td: none of the {len(utterances)} transcripts passes the filters ({listed}); look at "
                f"{self._transcripts} and loosen the keys of section td"
            )
        counts = {
            "teacher": self.source, "num_utterances": len(utterances), "num_kept": len(kept), "left_out": left_out,
            "filters": asdict(self.config), "normaliser": self.normaliser,
        }  # fmt: skip
        write_manifest(self.manifest, kept)
        atomic_write_text(self._counts, json.dumps(counts, indent=2) + "\n")
        return counts

    def reason(self, utterance: Utterance, transcript: TeacherTranscript) -> str | None:
        """Why a transcript is not used (one of REASONS), None where it is."""
        config = self.config
        if transcript.error is not None:
            return "bad_audio"
        if not transcript.text:
            return "empty"
        if not transcript.finished:
            return "unfinished"
        if transcript.looped:
            return "looped"
        if transcript.avg_logprob < config.min_avg_logprob:
            return "low_logprob"
        rate = len(transcript.text) / max(_seconds(utterance), 1e-3)
        if rate > config.max_chars_per_second:
            return "too_fast"
        if rate < config.min_chars_per_second:
            return "too_slow"
        if config.max_wer is not None and utterance.text is not None:
            language = scored_language(utterance.language)
            errors = utterance_errors(utterance.text, transcript.text, language, self.normaliser)
            if errors.wer_errors > config.max_wer * max(1, errors.ref_words):
                return "wrong"
        return None

    def _labelled(self, utterance: Utterance, transcript: TeacherTranscript) -> Utterance:
        extra = dict(utterance.extra) | {
            "text_source": self.source,
            "avg_logprob": round(transcript.avg_logprob, 4),
            "num_tokens": transcript.num_tokens,
        }
        if utterance.text is not None:
            extra["reference"] = utterance.text
        return dataclasses.replace(utterance, text=transcript.text, extra=extra)

    def _read(self) -> dict[str, TeacherTranscript]:
        """Transcripts by utterance id. A line that a crash cut short is left out, and made again."""
        if not self._transcripts.is_file():
            return {}
        whole, _, cut = self._transcripts.read_text(encoding="utf-8").rpartition("\n")
        if cut:
            atomic_write_text(self._transcripts, f"{whole}\n" if whole else "")
        rows = [json.loads(line) for line in whole.split("\n") if line]
        return {row.pop("id"): TeacherTranscript(**row) for row in rows}


def _seconds(utterance: Utterance) -> float:
    from data.audio import audio_seconds

    return float(utterance.extra.get("duration") or audio_seconds(utterance))
