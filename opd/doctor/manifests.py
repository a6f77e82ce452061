"""Training and evaluation sets: opened as the run opens them, and a sample of their audio decoded."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np

from data.audio import SAMPLING_RATE, BadAudio, load_audio
from opd.doctor.examined import Examined
from opd.doctor.report import Finding
from opd.evaluation import Evaluation
from opd.resolve import resolve
from opd.schema import Config
from opd.teachers.routing import Router
from opd.text import scored_language
from opd.training_data import TrainingData
from opd.types import Utterance

SAMPLE = 48  # utterances of the training manifest that are decoded
EVAL_SAMPLE = 8  # of each evaluation set
SHOWN = 4  # bad ones that are named
READ_LIMIT_S = 30.0  # for all files of a sample


def spread(utterances: Sequence[Utterance], count: int) -> list[Utterance]:
    """At most `count` utterances, evenly from the first to the last."""
    positions = np.unique(np.linspace(0, len(utterances) - 1, min(count, len(utterances))).round().astype(int))
    return [utterances[position] for position in positions.tolist()]


def decoded(
    utterances: Sequence[Utterance], max_seconds: float, limit_s: float = READ_LIMIT_S
) -> tuple[dict[str, float], list[BadAudio]]:
    """(id -> seconds of those that can be read, errors of the others). Raises ValueError for a file that blocks."""
    seconds: dict[str, float] = {}
    bad: list[BadAudio] = []
    at: list[Utterance] = []

    def read() -> None:
        for utterance in utterances:
            at.append(utterance)
            try:
                seconds[utterance.id] = len(load_audio(utterance, max_seconds=max_seconds)) / SAMPLING_RATE
            except BadAudio as error:
                bad.append(error)

    reader = threading.Thread(target=read, daemon=True)  # what blocks must not keep this process from ending
    reader.start()
    reader.join(limit_s)
    if reader.is_alive():
        raise ValueError(
            f"{len(utterances)} files were not read within {limit_s:g} s; the reader is at utterance {at[-1].id!r} ({at[-1].audio})"
        )
    return seconds, bad


def _named(bad: list[BadAudio]) -> str:
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return "; ".join(map(str, bad[:SHOWN])) + more


def _only_data(config: Config) -> Config:
    """The config with absolute paths of its manifests, whatever the models' are."""
    student = dataclasses.replace(config.student, path=None)
    teacher = dataclasses.replace(config.teacher, path=None, routes={})
    return resolve(dataclasses.replace(config, student=student, teacher=teacher))


def check_train_manifest(examined: Examined) -> str:
    """The training set as the run opens it."""
    config = dataclasses.replace(examined.config, data=dataclasses.replace(examined.config.data, eval_manifests={}))
    examined.data = TrainingData(_only_data(config))
    sizes = {name: len(utterances) for name, utterances in examined.data.sources.items()}
    if not sizes:
        return "a stream, which is not looked through"
    shown = " + ".join(f"{name + ': ' if name else ''}{size:,}" for name, size in sizes.items())
    return f"{shown} utterances, {examined.data.num_texts():,} with text"


def check_train_audio(examined: Examined) -> Finding | str:
    """A sample of the training set's audio is decoded."""
    assert examined.data is not None, "the training set was opened"
    data, sources = examined.config.data, examined.data.sources
    sample = [u for utterances in sources.values() for u in spread(utterances, max(1, SAMPLE // len(sources)))]
    sample = sample or examined.data.feed.next_batch(SAMPLE)  # of a stream, its first
    seconds, bad = decoded(sample, data.max_seconds)
    examined.good = [u for u in sample if u.id in seconds]
    examined.seconds = list(seconds.values())
    said = f"{len(sample)} utterances decoded"
    if bad:
        share = len(bad) / len(sample)
        skips = data.on_bad_audio == "skip"
        limit = f"; data.max_bad_share is {data.max_bad_share:g}" if skips else ""
        return Finding(
            "warning" if skips and share <= data.max_bad_share else "fail",
            f"{said}, {len(bad)} cannot be used ({share:.1%}{limit}): {_named(bad)}",
            "mend or remove these files (python -m data.validate lists all); or leave them out with data.on_bad_audio=skip, "
            "as long as they are fewer than data.max_bad_share",
        )
    return f"{said}: {np.mean(examined.seconds):.1f} s on average, at most {max(examined.seconds):.1f} s"


def check_eval_manifests(examined: Examined) -> Finding | str | None:
    """The evaluation sets as the run opens them: each line has a reference; a sample of their audio."""
    data = examined.config.data
    if not data.eval_manifests:
        return Finding("warning", "none, so nothing tells whether the student gets better", "set data.eval_manifests")
    only_eval = dataclasses.replace(data, train_manifest=None, train_manifests={})
    resolved = _only_data(dataclasses.replace(examined.config, data=only_eval))
    examined.eval_sets = Evaluation(resolved).sets
    said, bad = [], []
    for name, utterances in examined.eval_sets.items():
        bad += decoded(spread(utterances, EVAL_SAMPLE), data.max_seconds)[1]
        said.append(f"{name}: {len(utterances):,} utterances with references")
    if bad:
        return Finding("fail", f"of a sample, {len(bad)} cannot be used: {_named(bad)}", "mend or remove these files")
    return "; ".join(said)


def check_languages(examined: Examined) -> Finding | str | None:
    """Each utterance has a teacher, which can be told its language; and there are rules to compare its transcripts by."""
    of_sets = [u for utterances in examined.eval_sets.values() for u in utterances]
    said = None
    if examined.with_teacher:
        assert examined.data is not None, "the training set was opened"
        router = Router(examined.config)
        idle = examined.data.check_routes(router, is_new=True)
        examined.data.check_streamed(router, examined.good)
        if examined.config.stage == "opd" and examined.config.eval.teacher:
            router.check(of_sets)
        found = {u.language or "none given" for u in examined.good}
        said = f"each utterance has a teacher that takes its language; in the sample: {', '.join(sorted(found))}"
        if idle:
            return Finding("warning", "; ".join(idle), "correct the route's match, or leave the route out")
    languages = {u.language for u in [*examined.good, *of_sets] if u.language}
    unknown = sorted(language for language in languages if scored_language(language) is None)
    if unknown:
        said = f"no rules for {', '.join(unknown)}: such transcripts are compared by opd-basic-1"
        return Finding("warning", said, "if it is a slip, mend `language` in the manifest or data.default_language")
    return said
