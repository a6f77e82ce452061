"""Transcription of whole manifests: batches of like length, on one or several devices, continued after an interruption.

Finished utterances go to `<output>.journal` at once. The result appears in one step when all are done, beside
`<output>.summary.json`, which says what made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.audio import BadAudio, audio_seconds, load_audio
from data.command_line import check_writable
from data.manifest import parse_line, read_rows
from opd.results import SetResult
from opd.transcribe import SAMPLING_RATE, DecodeSettings, PreparedBatch, Transcriber
from opd.types import Utterance

RESULT_FIELDS = ("pred_text", "pred_text_raw", "audio_seconds", "transcription_seconds")


@dataclass(frozen=True)
class ModelSettings:
    """What `Transcriber` is made from, in a form that reaches another process."""

    model_path: str
    processor_path: str | None = None
    dtype: str = "auto"
    attn_implementation: str = "auto"
    decode: DecodeSettings = field(default_factory=DecodeSettings)

    def transcriber(self, device: str) -> Transcriber:
        return Transcriber(
            self.model_path,
            self.processor_path,
            device=device,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            settings=self.decode,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that tell one result from another; `weights` changes when the checkpoint's files do."""
        folder = Path(self.model_path)
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")) if folder.is_dir() else []
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return {
            "model_path": self.model_path,
            "processor_path": self.processor_path or self.model_path,
            "weights": hashlib.sha256(repr(stamps).encode()).hexdigest()[:16] if files else "hub",
            "dtype": self.dtype,
            **self.decode.to_dict(),
        }


@dataclass(frozen=True)
class ManifestJob:
    """One manifest to transcribe: its rows (as written, with the utterance each describes) and where the result goes."""

    source: Path
    output: Path
    rows: list[tuple[dict[str, Any], Utterance]]
    settings: dict[str, Any]

    @property
    def journal(self) -> Path:
        return self.output.with_name(self.output.name + ".journal")

    @property
    def summary(self) -> Path:
        return self.output.with_name(self.output.name + ".summary.json")

    @classmethod
    def open(
        cls,
        source: str | Path,
        output: str | Path,
        model: ModelSettings,
        field_names: dict[str, str] | None = None,
        default_language: str | None = None,
    ) -> ManifestJob:
        """Reads the manifest. Raises ValueError for a bad line."""
        rows = read_rows(source, field_names, default_language)
        # Not the paths: a folder that moved is the same job.
        digest = hashlib.sha256(Path(source).read_bytes() + repr(sorted((field_names or {}).items())).encode())
        settings = {"manifest": digest.hexdigest()[:16], **model.to_dict()}
        return cls(Path(source), Path(output), rows, settings)


@dataclass(frozen=True)
class Outcome:
    """What became of row `line` (from 0): a transcript, or an error. seconds: its share of its batch's wall time."""

    line: int
    pred_text: str = ""
    pred_text_raw: str = ""
    audio_seconds: float = 0.0
    seconds: float = 0.0
    error: str | None = None

    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = dict(
            zip(RESULT_FIELDS, (self.pred_text, self.pred_text_raw, self.audio_seconds, self.seconds), strict=True)
        )
        return fields if self.error is None else {**fields, "error": self.error}


class Journal:
    """What a job has done so far, in `<output>.journal`: a header line with the settings, then a line per utterance.

    It stays when the job is complete: the same command, run again, tries what failed and scores anew without decoding.
    """

    def __init__(self, job: ManifestJob, overwrite: bool = False) -> None:
        """Opens the journal of an earlier run, or begins one.

        Raises ValueError where the journal comes from other settings, or the output has none, and overwrite is False.
        """
        self.job = job
        self.done: dict[int, Outcome] = {}
        check_writable("--output ", job.output)
        if job.journal.exists() and not overwrite:
            self._read()
        if self.done:
            return
        if job.output.exists() and not overwrite:
            raise ValueError(f"{job.output}: exists and is no result of this command; choose another, or --overwrite")
        _write_lines(job.journal, [json.dumps({"settings": job.settings})])

    def remaining(self) -> list[int]:
        """Lines that have no transcript yet; those that failed are tried again."""
        return [line for line in range(len(self.job.rows)) if line not in self.done or self.done[line].error]

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Keeps outcomes: a killed process does not lose them."""
        with self.job.journal.open("a", encoding="utf-8") as file:
            for outcome in outcomes:
                self.done[outcome.line] = outcome
                file.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Every row as written, with its outcome, in the manifest's order. All must be done."""
        return [
            {key: value for key, value in fields.items() if key != "error"} | self.done[line].fields()
            for line, (fields, _) in enumerate(self.job.rows)
        ]

    def write_result(self, rows: Iterable[dict[str, Any]], result: SetResult) -> None:
        """Writes the output and its summary, each in one step."""
        _write_lines(self.job.output, (json.dumps(row, ensure_ascii=False) for row in rows))
        summary = {**result.to_dict(), "settings": self.job.settings}
        _write_lines(self.job.summary, [json.dumps(summary, indent=2, ensure_ascii=False)])

    def _read(self) -> None:
        path, ours = self.job.journal, self.job.settings
        *lines, torn = path.read_bytes().split(b"\n")  # the last line of a killed run may be torn
        if len(lines) < 2:
            return  # a run that did nothing: its model could not be loaded, say
        settings = parse_line(lines[0], f"{path}:1").get("settings") or {}
        if settings != ours:
            different = sorted(key for key in ours if settings.get(key) != ours[key])
            raise ValueError(
                f"{self.job.output}: is the result of another run ({', '.join(different)} differ); choose another "
                "--output, or pass --overwrite to begin anew"
            )
        for number, line in enumerate(lines[1:], start=2):
            outcome = Outcome(**parse_line(line, f"{path}:{number}"))
            self.done[outcome.line] = outcome
        if torn:
            os.truncate(path, path.stat().st_size - len(torn))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    os.replace(temporary, path)


# -- batches -----------------------------------------------------------------------------------------------------------

Clip = tuple[int, Utterance]  # (line, utterance)


def measure(clips: Sequence[Clip]) -> tuple[dict[int, float], list[Outcome]]:
    """Seconds of each clip by line, from the files' headers, and the outcome of those that cannot be read."""

    def seconds(clip: Clip) -> float | Outcome:
        try:
            return audio_seconds(clip[1])
        except BadAudio as error:
            return Outcome(clip[0], error=str(error))

    with ThreadPoolExecutor(8) as pool:
        measured = list(zip(clips, pool.map(seconds, clips), strict=True))
    lengths = {clip[0]: value for clip, value in measured if isinstance(value, float)}
    return lengths, [value for _, value in measured if isinstance(value, Outcome)]


def plan_batches(
    clips: Sequence[Clip], seconds: dict[int, float], batch_size: int, max_audio_seconds: float
) -> list[list[Clip]]:
    """Clips of like length together, longest first: at most `batch_size`, and no more audio than as many full windows."""
    batches: list[list[Clip]] = []
    room = 0.0
    for clip in sorted((clip for clip in clips if clip[0] in seconds), key=lambda clip: (-seconds[clip[0]], clip[0])):
        length = seconds[clip[0]]
        if not batches or len(batches[-1]) == batch_size or length > room:
            batches.append([])
            room = batch_size * max_audio_seconds
        batches[-1].append(clip)
        room -= length
    return batches


def transcribe_batches(
    transcriber: Transcriber, batches: Iterable[list[Clip]], batch_size: int
) -> Iterator[list[Outcome]]:
    """The outcomes of each batch. The next batch's audio is read and cut while one is decoded."""
    remaining = iter(batches)
    with ThreadPoolExecutor(1) as pool:

        def submit_next() -> Any:
            batch = next(remaining, None)
            return None if batch is None else pool.submit(_load, transcriber, batch, batch_size)

        pending = submit_next()
        while pending is not None:
            loaded = pending.result()
            pending = submit_next()
            yield _decode(transcriber, loaded)


@dataclass(frozen=True)
class LoadedBatch:
    """A batch on its way to the device. feature_seconds: how long its features took."""

    lines: list[int]
    audio_seconds: list[float]
    inputs: list[PreparedBatch]
    failed: list[Outcome]
    feature_seconds: float


def _load(transcriber: Transcriber, batch: list[Clip], batch_size: int) -> LoadedBatch:
    lines, waveforms, failed = [], [], []
    for line, utterance in batch:
        try:
            waveforms.append(load_audio(utterance))
            lines.append(line)
        except BadAudio as error:
            failed.append(Outcome(line, error=str(error)))
    began = time.perf_counter()
    inputs = transcriber.prepare(waveforms, batch_size)
    seconds = [len(samples) / SAMPLING_RATE for samples in waveforms]
    return LoadedBatch(lines, seconds, inputs, failed, time.perf_counter() - began)


def _decode(transcriber: Transcriber, batch: LoadedBatch) -> list[Outcome]:
    began = time.perf_counter()
    transcripts = transcriber.decode(batch.inputs, len(batch.lines))
    share = (time.perf_counter() - began + batch.feature_seconds) / max(1, len(batch.lines))
    return batch.failed + [
        Outcome(line, transcript.text, transcript.raw, round(seconds, 4), round(share, 6))
        for line, seconds, transcript in zip(batch.lines, batch.audio_seconds, transcripts, strict=True)
    ]
