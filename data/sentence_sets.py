"""Spoken sentences: the texts of data/sentences.py in the voices of data/synthetic.py, several seconds an utterance.

`ensure_sentences(names)` makes the sets that are asked for, once; `python -m data.sentence_sets [NAME ...]` does it from
a shell. No text of a training set is one of the unlabelled sets, and none of either is one of the evaluation sets.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from data.build import MARKER, build_once, cache_home
from data.espeak import check_installed
from data.sentences import Draw, sentences, with_word_errors
from data.synthetic import FEW_LABEL_VOICES, SNR, TRAINING_VOICES, UNSEEN_VOICES, Voice, make_set

__all__ = ["SENTENCE_SETS", "SentenceSet", "ensure_sentences"]

NOISY_SNR = (0.0, 10.0)  # dB, in place of 5–25
WORD_ERROR_RATE = 0.15  # of the references of sentences_noisy_references

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SentenceSet:
    """One set: `num_utterances` different sentences of one part (data.sentences.PARTS), spoken and mixed with noise.

    Sets of one seed and size are the same sentences, voices and noises, so that they differ in the SNR alone.
    references_of    another set, whose audio this one has with word errors in the references
    """

    part: str
    seed: int
    num_utterances: int
    voices: tuple[Voice, ...] = TRAINING_VOICES
    with_text: bool = True
    snr: tuple[float, float] = SNR
    references_of: str | None = None


# Changing a set, the grammar, a voice list or the drawing of the audio changes the sets: raise the version with it.
SENTENCES_NAME = "sentences-v1"
LABELLED = SentenceSet("training", seed=21, num_utterances=4_000)
UNLABELLED = SentenceSet("unlabelled", seed=23, num_utterances=6_000, with_text=False)
SEEN_VOICES = SentenceSet("evaluation", seed=24, num_utterances=200)
UNSEEN_VOICES_SET = SentenceSet("evaluation", seed=25, num_utterances=500, voices=UNSEEN_VOICES)
SENTENCE_SETS: dict[str, SentenceSet] = {
    "sentences_labelled": LABELLED,
    "sentences_few_labels": SentenceSet("training", seed=22, num_utterances=400, voices=FEW_LABEL_VOICES),
    "sentences_noisy_references": replace(LABELLED, references_of="sentences_labelled"),
    "sentences_unlabelled": UNLABELLED,
    "sentences_seen_voices": SEEN_VOICES,
    "sentences_unseen_voices": UNSEEN_VOICES_SET,
    "sentences_noisy_unlabelled": replace(UNLABELLED, snr=NOISY_SNR),
    "sentences_noisy_seen_voices": replace(SEEN_VOICES, snr=NOISY_SNR),
    "sentences_noisy_unseen_voices": replace(UNSEEN_VOICES_SET, snr=NOISY_SNR),
}


def ensure_sentences(names: Iterable[str] = tuple(SENTENCE_SETS), home: Path | None = None) -> dict[str, Path]:
    """Make the named sets where they are missing (about a minute for 5,000 utterances) and return name -> manifest path.

    They live in `home`/speech/sentences-v1, `home` being $OPD_HOME or ~/.cache/opd by default. An interrupted build is
    redone, and a second process waits for the first. Raises ValueError for an unknown name, and when eSpeak is needed
    and not installed.
    """
    folder = cache_home(home) / "speech" / SENTENCES_NAME
    manifests = {}
    for name in names:
        if name not in SENTENCE_SETS:
            raise ValueError(f"there is no set of sentences {name!r}; there are {', '.join(SENTENCE_SETS)}")
        manifests[name] = folder / name / f"{name}.jsonl"
        if not (folder / name / MARKER).exists():
            _build(folder, name, SENTENCE_SETS[name])
    return manifests


def _build(folder: Path, name: str, sentence_set: SentenceSet) -> None:
    """Make one set in `folder`/`name`, and first the one whose audio it has."""

    def make(partial: Path) -> str:
        logger.info("making %s: %d spoken sentences, in %s", name, sentence_set.num_utterances, folder / name)
        if sentence_set.references_of:
            source = sentence_set.references_of
            _write_careless(folder / source / f"{source}.jsonl", partial / f"{name}.jsonl", sentence_set.seed)
        else:
            texts = sentences(sentence_set.part, sentence_set.num_utterances, sentence_set.seed)
            make_set(
                partial,
                name,
                sentence_set.num_utterances,
                sentence_set.seed,
                voices=sentence_set.voices,
                with_text=sentence_set.with_text,
                texts=texts,
                snr=sentence_set.snr,
            )
        return f"{sentence_set.num_utterances} utterances"

    if sentence_set.references_of:
        ensure_sentences([sentence_set.references_of], folder.parent.parent)
    check_installed()
    build_once(folder / name, make)


def _write_careless(source: Path, target: Path, seed: int) -> None:
    """The manifest `source` with word errors in its texts; the audio stays where it is."""
    from data.manifest import read_manifest, write_manifest  # here, since they import torch, which speech does without

    draw = Draw(seed)
    utterances = [
        replace(
            utterance,
            audio=os.path.relpath(utterance.audio, target.parent),
            text=with_word_errors(str(utterance.text), WORD_ERROR_RATE, draw),
        )
        for utterance in read_manifest(source, require_text=True)
    ]
    write_manifest(target, utterances)


def main() -> None:
    """Make the sets and say where they are."""
    parser = argparse.ArgumentParser(prog="python -m data.sentence_sets", description="Make sets of spoken sentences.")
    parser.add_argument("names", nargs="*", default=list(SENTENCE_SETS), metavar="NAME", help="sets (default: all)")
    parser.add_argument("--home", type=Path, help="folder to keep them in (default: $OPD_HOME or ~/.cache/opd)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    try:
        manifests = ensure_sentences(arguments.names, arguments.home)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, path in manifests.items():
        print(f"{name:30s} {path}")
    print(f"ready after {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
