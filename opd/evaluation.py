"""The evaluation sets of a run: transcribed by whoever is asked, scored, logged, and the last transcripts kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.index import open_manifest
from opd.evaluate import sample_table, score_transcripts, write_transcripts
from opd.metrics import MetricsLog
from opd.schema import Config
from opd.text import scored_language
from opd.types import Batch

Transcribe = Callable[[Batch], list[str | None]]


class Evaluation:
    """`sets` are the evaluation sets by name, as far as eval.max_utterances. Raises ValueError for a bad manifest."""

    def __init__(self, config: Config) -> None:
        self.config = config.eval
        self.sets = {name: self._read(name, path, config) for name, path in config.data.eval_manifests.items()}
        self._transcripts: dict[str, dict[str, str]] = {}

    def _read(self, name: str, path: str, config: Config) -> Batch:
        utterances = open_manifest(path, require_text=True, default_language=config.data.language_of(name))
        return list(utterances[: self.config.max_utterances or None])

    def __call__(self, step: int, transcribe: Transcribe, log: MetricsLog | None) -> dict[str, dict[str, Any]]:
        """The result of each set; `transcribe` gives None for bad audio, which is left out. `log` takes them all."""
        results = {}
        for name, utterances in self.sets.items():
            texts = transcribe(utterances)
            pairs = [(u, text) for u, text in zip(utterances, texts, strict=True) if text is not None]
            if not pairs:
                raise ValueError(f"evaluation set {name}: none of its {len(utterances)} utterances could be read")
            ids, languages = [u.id for u, _ in pairs], [scored_language(u.language) for u, _ in pairs]
            references, hypotheses = [str(u.text) for u, _ in pairs], [text for _, text in pairs]
            rules, num_samples = self.config.normaliser, self.config.num_samples
            result = score_transcripts(references, hypotheses, languages, rules)
            results[name] = result.to_dict()
            self._transcripts[name] = dict(zip(ids, hypotheses, strict=True))
            if log is not None:
                samples = sample_table(ids, references, hypotheses, languages, num_samples, normaliser=rules)
                log.log_eval(step, name, result, samples)
        return results

    def languages(self) -> list[str]:
        """Codes of the sets' languages, those that are not known left out."""
        found = {scored_language(u.language) for utterances in self.sets.values() for u in utterances}
        return sorted(language for language in found if language)

    def write_transcripts(self, folder: Path) -> None:
        """transcripts-<set>.jsonl of the last evaluation."""
        for name, texts in self._transcripts.items():
            write_transcripts(folder / f"transcripts-{name}.jsonl", texts)


def note_wer(state: dict[str, Any], step: int, wer: float, patience: int) -> bool:
    """Notes an evaluation after `step` in the loop's state; True where the run should stop early."""
    best = state.get("best_wer")
    improved = best is None or wer < best
    state["best_wer"] = wer if improved else best
    state["no_better"] = 0 if improved else state["no_better"] + 1
    state["last_wer"] = {"step": step, "wer": wer}
    stop = bool(patience) and state["no_better"] >= patience
    if stop:
        print(f"step {step}: no better WER in {state['no_better']} evaluations, stopping early")
    return stop
