"""What a teacher wrote and how it scored fixed texts, on disk: the next run with the same teacher and audio reads it.

One small file per utterance, written beside its place and renamed, so that any number of workers, runs and machines may
share the folder. A name is the digest of all that the result depends on: the teacher's weights, its prompt and number
type, the audio (path, segment, size and time of change), the text's ids, the student's vocabulary, in whose ids a score
is written, and what of the score is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.sound import file_of
from opd.support import NUM_EXTRA
from opd.teachers.base import Teacher
from opd.teachers.fingerprints import fingerprint, replace_file, vocabulary_digest
from opd.teachers.merging import EMPTY, merge_scores
from opd.teachers.routing import Router
from opd.types import Batch, Rollout, TeacherTranscript, Utterance

if TYPE_CHECKING:
    from opd.schema import Config

Tensors = dict[str, torch.Tensor]
VERSION = 2  # of what is stored; raise it when scores or transcripts of the same inputs change


class CacheFolder:
    """The files of one teacher in `teacher.cache_dir`. `config` is a config as a dictionary, its teacher section that one's."""

    def __init__(self, config: dict[str, Any]) -> None:
        section, rollout = config["teacher"], config["rollout"]
        self.folder = Path(section["cache_dir"]).expanduser()
        told = {name: section[name] for name in ("kind", "language", "prompt", "dtype")}
        weights = fingerprint(section["path"], self.folder / "weights")
        self.identity = [VERSION, weights, told, config["data"]["max_seconds"]]
        self.decoding = {name: rollout[name] for name in ("max_new_tokens", "max_repeats")}

    def path(self, what: str, utterance: Utterance, asked: Any, suffix: str) -> Path:
        parts = [what, self.identity, _audio_identity(utterance), utterance.language, asked]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        return self.folder / what / digest[:2] / f"{digest}{suffix}"

    def transcript_path(self, utterance: Utterance) -> Path:
        return self.path("transcript", utterance, self.decoding, ".json")

    def transcript(self, utterance: Utterance) -> TeacherTranscript | None:
        """What the teacher wrote, where it is kept. A damaged file (a machine that lost power) counts as none."""
        try:
            return TeacherTranscript(**json.loads(self.transcript_path(utterance).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # no JSON, no text, or other fields
            return None


class KeptTexts:
    """Kept transcripts of a run's teachers, for a process that has none of them."""

    def __init__(self, config: Config) -> None:
        self.config, self.router = config, Router(config)
        self.folders: dict[str, CacheFolder] = {}

    def __call__(self, utterances: Batch) -> dict[str, str]:
        """Utterance id -> transcript, of those whose teacher keeps one."""
        texts = {}
        for utterance in utterances:
            name = self.router.route(utterance)
            if name is None or not self.router.teachers[name].cache_dir:
                continue
            if name not in self.folders:
                section = asdict(self.router.teachers[name])
                self.folders[name] = CacheFolder(self.config.to_dict() | {"teacher": section})
            transcript = self.folders[name].transcript(utterance)
            if transcript is not None:
                texts[utterance.id] = transcript.text
        return texts


class CachedTeacher:
    """A `Teacher` that looks into a folder first. `hits` and `misses` count utterances.

    A score can be kept where it depends on the teacher and the text alone: `rollout.source=manifest` (fixed texts) with
    `loss.support=teacher`. Under the union it also has the teacher's view of the student's top-k, which every step changes.
    """

    def __init__(self, teacher: Teacher, config: dict[str, Any], student_path: str) -> None:
        loss, rollout = config["loss"], config["rollout"]
        self.teacher, self.kept = teacher, CacheFolder(config)
        self.kept.folder.mkdir(parents=True, exist_ok=True)
        self.keeps_scores = (
            rollout["source"] == "manifest" and loss["support"] == "teacher" and loss["kind"] != "full_kl"
        )
        self.scoring = {name: loss[name] for name in ("top_k", "temperature")}
        if self.keeps_scores:
            self.scoring["vocabulary"] = vocabulary_digest(student_path)
        self.hits = self.misses = 0

    def facts(self) -> dict[str, Any]:
        return self.teacher.facts()

    # -- transcripts -------------------------------------------------------------------------------------------------

    def transcribe(self, utterances: Batch) -> list[TeacherTranscript]:
        """The kept transcripts, and the teacher's of the others, which are kept then. Bad audio is not kept."""
        kept = {row: self.kept.transcript(utterance) for row, utterance in enumerate(utterances)}
        found = {row: transcript for row, transcript in kept.items() if transcript is not None}
        missing = [row for row in range(len(utterances)) if row not in found]
        self._count(len(found), len(missing))
        if missing:
            written = self.teacher.transcribe([utterances[row] for row in missing])
            for row, transcript in zip(missing, written, strict=True):
                found[row] = transcript
                if transcript.error is None:
                    path = self.kept.transcript_path(utterances[row])
                    replace_file(path, lambda temp, one=transcript: temp.write_text(json.dumps(asdict(one))))
        return [found[row] for row in range(len(utterances))]

    # -- scores ------------------------------------------------------------------------------------------------------

    def score(self, utterances: Batch, rollout: Tensors) -> Tensors:
        """`TeacherScore` of a `Rollout`, both as dictionaries with the same B and T; kept rows are read, not scored."""
        return self.score_and_count(utterances, rollout)[0]

    def score_and_count(self, utterances: Batch, rollout: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """As the teacher's own; of a kept score, the columns of the student's top-k say nothing (-inf). Bad audio is not kept."""
        if not self.keeps_scores:
            return self.teacher.score_and_count(utterances, rollout)
        written = Rollout.from_dict(rollout)
        lengths = written.response_mask_BT.sum(1).tolist()
        ids = [row[:length] for row, length in zip(written.response_ids_BT.tolist(), lengths, strict=True)]
        paths = [
            self.kept.path("score", utterance, [self.scoring, row], ".safetensors")
            for utterance, row in zip(utterances, ids, strict=True)
        ]
        kept = [_read_score(path) for path in paths]
        missing = [row for row, score in enumerate(kept) if score is None]
        self._count(len(paths) - len(missing), len(missing))
        bad: list[tuple[str, str, str]] = []
        if missing:
            part = {name: tensor[missing] for name, tensor in rollout.items()}
            scored, scored_counts = self.teacher.score_and_count([utterances[row] for row in missing], part)
            bad = scored_counts["bad_audio"]
            bad_ids = {utterance_id for utterance_id, _, _ in bad}
            retokenised = self._retokenised([utterances[row] for row in missing], part)
            for index, row in enumerate(missing):
                if utterances[row].id in bad_ids:
                    lengths[row], kept[row] = 0, (_row_of(scored, index, 0), 0)
                else:
                    kept[row] = _keep_score(paths[row], scored, index, lengths[row], retokenised[index])
        found = [score for score in kept if score is not None]
        merged = merge_scores([[row] for row in range(len(found))], [tensors for tensors, _ in found])
        merged = self._widened(merged, written)
        counts = {
            "positions": sum(lengths),
            "aligned": int(merged["aligned_mask_BT"].sum()),
            "responses": sum(length > 0 for length in lengths),
            "retokenised": sum(retokenised for _, retokenised in found),
            "bad_audio": bad,
        }
        return merged, counts

    def _retokenised(self, utterances: Batch, rollout: Tensors) -> list[int]:
        """1 for each response that did not map id for id."""
        mapper = getattr(self.teacher, "mapper", None)
        rows = zip(rollout["response_ids_BT"].tolist(), rollout["response_mask_BT"].sum(1).tolist(), strict=True)
        return [int(mapper is not None and mapper.map_response(ids[:n]).retokenised) if n else 0 for ids, n in rows]

    def _widened(self, merged: Tensors, written: Rollout) -> Tensors:
        """The stored fields at the shape of this rollout: T positions, C = K + 2 candidates."""
        length = written.response_ids_BT.shape[1]
        extra = merged["candidate_logprobs_BTC"]
        topk = torch.full((*extra.shape[:2], written.topk_ids_BTK.shape[2]), float("-inf"), dtype=extra.dtype)
        merged = merged | {"candidate_logprobs_BTC": torch.cat([topk, extra], dim=2)}
        return {name: _lengthened(tensor, length, EMPTY.get(name, 0)) for name, tensor in merged.items()}

    def _count(self, hits: int, misses: int) -> None:
        self.hits += hits
        self.misses += misses


def _audio_identity(utterance: Utterance) -> list[Any]:
    file = file_of(utterance.audio)
    try:
        stat = os.stat(file or "")
        changed = [stat.st_size, stat.st_mtime_ns]
    except OSError:
        changed = []
    return [
        os.path.abspath(utterance.audio) if file else utterance.audio,
        utterance.begin_time,
        utterance.end_time,
        *changed,
    ]


def _keep_score(path: Path, scored: Tensors, index: int, length: int, retokenised: int) -> tuple[Tensors, int]:
    """Keeps and returns one row of a score, cut to its response and without the columns of the student's top-k."""
    row = _row_of(scored, index, length)
    replace_file(path, lambda temp: save_file(row, temp, metadata={"retokenised": str(retokenised)}))
    return row, retokenised


def _row_of(scored: Tensors, index: int, length: int) -> Tensors:
    """One row of a score in the form that is kept."""
    row = {name: tensor[index : index + 1, :length].contiguous() for name, tensor in scored.items()}
    return row | {"candidate_logprobs_BTC": row["candidate_logprobs_BTC"][:, :, -NUM_EXTRA:].contiguous()}


def _read_score(path: Path) -> tuple[Tensors, int] | None:
    """A row and whether it was re-tokenised; None where it is not kept, or damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["retokenised"])  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError):
        return None


def _lengthened(tensor: torch.Tensor, length: int, fill: float) -> torch.Tensor:
    """A (B, T, ...) tensor with `length` positions."""
    widths = [0, 0] * (tensor.dim() - 2) + [0, length - tensor.shape[1]]
    return torch.nn.functional.pad(tensor, widths, value=fill)
