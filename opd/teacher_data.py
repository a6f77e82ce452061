"""Stage td, teacher data: transcripts of a training set by the teacher, filtered, as an ordinary manifest.

<run_dir>/td/transcripts.jsonl   what the teacher wrote, appended batch by batch; an interrupted stage goes on from it
<run_dir>/td/manifest.jsonl      what passed the filters: `text` is the teacher's, `reference` what stood there before
<run_dir>/td/counts.json         how many were left out and why, and where the texts come from
<run_dir>/td/settings.json       what the transcripts depend on: those of another teacher or length limit are not mixed in
<run_dir>/td/bad_audio.jsonl     what could not be heard, and why
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from data.manifest import write_manifest
from data.timed import seconds_within
from opd.bad_audio import LEAST_SEEN
from opd.checkpoint import atomic_write_text
from opd.evaluate import utterance_errors
from opd.schema import Config, TdConfig
from opd.survival import STOP
from opd.text import scored_language
from opd.types import Batch, TeacherTranscript, Utterance

TELL_EVERY_S = 10.0
REASONS = ("bad_audio", "empty", "unfinished", "looped", "low_logprob", "too_fast", "too_slow", "wrong")


class TeacherData:
    """The folder of one stage's teacher data."""

    def __init__(
        self,
        folder: Path,
        config: TdConfig,
        source_of: Callable[[Utterance], str],
        normaliser: str = "auto",
        max_bad_share: float = 1.0,
        read_timeout_s: float = 120.0,
    ) -> None:
        """source_of: which teacher wrote an utterance's text; it goes into its line. max_bad_share: of bad audio.

        read_timeout_s: longest wait for the header of a file whose `duration` the manifest does not have.
        """
        self.folder = folder
        self.config = config
        self.source_of = source_of
        self.normaliser = normaliser
        self.max_bad_share = max_bad_share
        self.read_timeout_s = read_timeout_s
        self.manifest = folder / "manifest.jsonl"
        self._transcripts = folder / "transcripts.jsonl"
        self._counts = folder / "counts.json"

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Notes what the transcripts depend on. Raises ValueError where those that are there were made with other settings."""
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if self._transcripts.is_file() and path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            names = sorted(saved.keys() | settings.keys())
            changed = [
                f"{n} was {saved.get(n)}, now {settings.get(n)}" for n in names if saved.get(n) != settings.get(n)
            ]
            if changed:
                raise ValueError(
                    f"{self._transcripts}: these transcripts were made with other settings: {'; '.join(changed)}; restore them, "
                    f"choose another run_dir, or remove {self.folder} to transcribe anew"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(settings, indent=2) + "\n")

    def is_complete(self) -> bool:
        """Whether the manifest is there, filtered as the stage is set now."""
        if not (self.manifest.is_file() and self._counts.is_file()):
            return False
        counts = self.counts()
        return counts["filters"] == asdict(self.config) and counts["normaliser"] == self.normaliser

    @property
    def num_transcribed(self) -> int:
        return len(self._read())

    def transcribe(
        self,
        utterances: Sequence[Utterance],
        transcribe: Callable[[Batch], list[TeacherTranscript]],
        batch_size: int,
        on_bad_audio: str,
    ) -> None:
        """Has the teacher transcribe what is left.

        Raises ValueError for bad audio with `stop`, once the rest is kept, and Stopped between two batches.
        """
        done, told = 0, time.monotonic()
        for batch in self.pending(utterances, batch_size):
            pairs = list(zip(batch, transcribe(batch), strict=True))
            bad = [(u, one) for u, one in pairs if one.error is not None and on_bad_audio == "stop"]
            self.add([pair for pair in pairs if pair not in bad])
            if bad:
                utterance, transcript = bad[0]
                raise ValueError(
                    f"utterance {utterance.id}: {transcript.error}; mend or remove it, or set data.on_bad_audio=skip to "
                    "leave such utterances out"
                )
            done += len(batch)
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                print(f"teacher data: {done} utterances transcribed", flush=True)
            STOP.check(f"after {self.num_transcribed} of {len(utterances)} transcripts, which are kept")

    def counts(self) -> dict[str, Any]:
        """What `write` counted."""
        return json.loads(self._counts.read_text(encoding="utf-8"))

    def pending(self, utterances: Sequence[Utterance], size: int) -> Iterator[Batch]:
        """Batches of what the teacher has not transcribed yet, in the order of the manifest."""
        done = self._read().keys()
        left = (u for u in utterances if u.id not in done)
        return iter(lambda: list(islice(left, size)), [])

    def add(self, pairs: Sequence[tuple[Utterance, TeacherTranscript]]) -> None:
        """Keeps transcripts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"id": utterance.id, **asdict(transcript)}, ensure_ascii=False)
            for utterance, transcript in pairs
        ]
        with open(self._transcripts, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def write(self, utterances: Sequence[Utterance]) -> str:
        """Filters what was transcribed and writes the manifest and `counts`; returns them in words.

        Raises ValueError where nothing passes, with the reasons, and where too much of the audio is bad.
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
        self._list_bad_audio(utterances, transcripts)
        left_out = {name: reasons[name] for name in REASONS if reasons[name]}
        if not kept:
            listed = ", ".join(f"{name} {count}" for name, count in left_out.items())
            raise ValueError(
                f"stage td: none of the {len(utterances)} transcripts passes the filters ({listed}); look at "
                f"{self._transcripts} and loosen the keys of section td"
            )
        counts = {
            "teacher": ", ".join(sorted({self.source_of(utterance) for utterance in kept})),
            "num_utterances": len(utterances), "num_kept": len(kept), "left_out": left_out,
            "filters": asdict(self.config), "normaliser": self.normaliser,
        }  # fmt: skip
        write_manifest(self.manifest, kept)
        atomic_write_text(self._counts, json.dumps(counts, indent=2) + "\n")
        listed = ", ".join(f"{name} {count}" for name, count in left_out.items()) or "none"
        return f"teacher data: {len(kept)} of {len(utterances)} transcripts kept, left out: {listed}"

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
        rate = len(transcript.text) / max(self._seconds(utterance), 1e-3)
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

    def _seconds(self, utterance: Utterance) -> float:
        return float(utterance.extra.get("duration") or seconds_within(self.read_timeout_s, utterance))

    def _list_bad_audio(self, utterances: Sequence[Utterance], transcripts: dict[str, TeacherTranscript]) -> None:
        bad = [(u, transcripts[u.id].error) for u in utterances if transcripts[u.id].error is not None]
        path = self.folder / "bad_audio.jsonl"
        rows = [json.dumps({"id": u.id, "audio": u.audio, "reason": reason}) + "\n" for u, reason in bad]
        if rows:
            atomic_write_text(path, "".join(rows))
        share = len(bad) / len(utterances)
        if len(utterances) >= LEAST_SEEN and share > self.max_bad_share:
            raise ValueError(
                f"stage td: {share:.1%} of the utterances are bad audio, above data.max_bad_share={self.max_bad_share:g}; they "
                f"are listed in {path}"
            )

    def _labelled(self, utterance: Utterance, transcript: TeacherTranscript) -> Utterance:
        extra = dict(utterance.extra) | {
            "text_source": self.source_of(utterance),
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


def transcript_settings(config: Config) -> dict[str, Any]:
    """What a training set's transcripts depend on, by the keys of the config."""
    settings: dict[str, Any] = {
        "data.train_manifest": config.data.train_manifest or config.data.train_manifests,
        "data.max_seconds": config.data.max_seconds,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
        "rollout.max_repeats": config.rollout.max_repeats,
    }
    for name, teacher in config.teacher.by_route().items():
        where = f"teacher.routes.{name}" if name else "teacher"
        settings |= {f"{where}.{key}": getattr(teacher, key) for key in ("kind", "path", "language", "prompt", "dtype")}
        if name:
            settings[f"{where}.match"] = config.teacher.routes[name].get("match")
    return settings
