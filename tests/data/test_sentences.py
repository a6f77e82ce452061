"""Sentences: real grammar, parts that share no text, and spoken sets that are made one by one."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import sentence_sets, synthetic
from data.audio import load_audio
from data.manifest import read_manifest
from data.sentence_sets import NOISY_SNR, SENTENCE_SETS, SENTENCES_NAME, SentenceSet, ensure_sentences
from data.sentences import NAMES, PARTS, TEENS, TENS, UNITS, Draw, part_of, sentences, with_word_errors
from data.synthetic import FEW_LABEL_VOICES, TRAINING_VOICES, UNSEEN_VOICES, DigitSet
from opd.evaluate import score_transcripts
from opd.resolve import resolve_manifests

NOUNS = {
    "bird": "birds", "dog": "dogs", "horse": "horses", "farmer": "farmers", "sailor": "sailors", "man": "men",
    "teacher": "teachers", "girl": "girls", "woman": "women", "boat": "boats", "house": "houses", "letter": "letters",
    "apple": "apples", "book": "books", "box": "boxes", "stone": "stones",
}  # fmt: skip
SINGULAR, PLURAL = list(NOUNS), list(NOUNS.values())
VERBS = {
    "wait": "waits", "sing": "sings", "sleep": "sleeps", "work": "works", "run": "runs", "see": "sees", "find": "finds",
    "carry": "carries", "want": "wants", "like": "likes", "say": "says", "know": "knows", "think": "thinks",
    "count": "counts",
}  # fmt: skip
ADJECTIVE = "(?:(?:old|new|small|quiet|red|blue|green|white|heavy|empty) )?"
NOUN = rf"(?:{'|'.join([*SINGULAR, *PLURAL])})\b"
NUMBER = rf"(?:(?:{'|'.join((*UNITS, *TEENS, *TENS, 'one', 'hundred', 'and'))}) )+"
PHRASE = rf"(?:a |an |the |this |that |every |these |those |many |both |{NUMBER}){ADJECTIVE}({NOUN})"
BASE, THIRD = list(VERBS), list(VERBS.values())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return sentences("training", 3_000, seed=1)


# -- texts -------------------------------------------------------------------------------------------------------------


def test_sentences_are_distinct_and_of_the_asked_length(texts: list[str]) -> None:
    assert len(set(texts)) == 3_000
    assert {len(text.split()) for text in texts} == set(range(8, 21))
    assert all(re.fullmatch(r"[a-z]+(?: [a-z]+)*", text) for text in texts)
    assert 120 <= len({word for text in texts for word in text.split()}) <= 200


def test_sentences_are_the_same_everywhere() -> None:
    """The words themselves are pinned: they decide what every cached set says, in any process and Python version."""
    text = "\n".join("\n".join(sentences(part, 200, seed=7)) for part in PARTS)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "5f680c7bb5cc1a2c"


def test_parts_share_no_text(texts: list[str]) -> None:
    others = {part: {text for seed in (1, 2) for text in sentences(part, 600, seed)} for part in PARTS}
    assert not others["training"] & others["unlabelled"]
    assert not others["evaluation"] & (others["training"] | others["unlabelled"] | set(texts))
    assert all(part_of(text) == part for part, found in others.items() for text in found)
    assert sentences("training", 50, seed=1) == texts[:50]
    assert sentences("training", 50, seed=2) != texts[:50]


def test_shares_of_the_parts() -> None:
    found = [part_of(f"sentence {i}") for i in range(5_000)]
    assert {part: pytest.approx(found.count(part) / 5_000, abs=0.03) for part in PARTS} == PARTS


@pytest.mark.parametrize(
    ("pattern", "least", "nouns"),
    [
        (rf"\b(?:one|every|this|an) {ADJECTIVE}({NOUN})", 500, SINGULAR),
        (rf"\b(?:these|those|both|many|{'|'.join(UNITS)}) {ADJECTIVE}({NOUN})", 1_000, PLURAL),
        (rf"\bthere (?:is|was) (?:a|an|one) {ADJECTIVE}({NOUN})", 50, SINGULAR),
        (rf"\bthere (?:are|were) {NUMBER}{ADJECTIVE}({NOUN})", 50, PLURAL),
    ],
)
def test_nouns_agree_with_what_counts_them(texts: list[str], pattern: str, least: int, nouns: list[str]) -> None:
    found = [match for text in texts for match in re.findall(pattern, text)]
    assert len(found) >= least
    assert set(found) <= set(nouns)


def test_verbs_agree_with_a_subject_that_stands_far_back(texts: list[str]) -> None:
    """Between subject and verb stands a noun of the other number."""
    far = rf"^{PHRASE} (?:near|behind|under|who [a-z]+) {PHRASE} (is|was|are|were)\b"
    found = [match for text in texts for match in re.findall(far, text)]
    assert len(found) >= 100
    for head, between, verb in found:
        assert (head in PLURAL) != (between in PLURAL)
        assert (verb in ("are", "were")) == (head in PLURAL), (head, between, verb)


def test_no_wrong_form_follows_a_word(texts: list[str]) -> None:
    pairs = {pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)}
    singular = {"he", "she", "it"}
    assert not pairs & {(pronoun, verb) for pronoun in singular for verb in ("are", "were", "do", *BASE)}
    assert not pairs & {("they", verb) for verb in ("is", "was", "does", *THIRD)}
    assert not pairs & {("not", verb) for verb in THIRD}
    assert not {word for first, word in pairs if first == "a" and word[0] in "aeiou"}
    assert not {word for first, word in pairs if first == "an" and word[0] not in "aeiou"}
    statements = [text for text in texts if text.split()[0] not in ("do", "does", "did")]
    after_names = {(a, b) for text in statements for a, b in re.findall(r"\b([a-z]+) ([a-z]+)\b", text)}
    assert not after_names & {(name, verb) for name in NAMES for verb in ("are", "were", *BASE)}


def test_pronouns_refer_to_the_person(texts: list[str]) -> None:
    own = {name: pronouns.possessive for name, pronouns in NAMES.items()}
    openings = [text for text in texts if text.split()[0] in own and " that " not in text]
    found = [
        (own[text.split()[0]], word)
        for text in openings
        for word in text.split()
        if word in ("his", "her", "their", "its") and not re.search("when|because|while|before|after|if|until", text)
    ]
    assert len(found) >= 50
    assert all(expected == word for expected, word in found)


def test_counting_goes_up_by_one(texts: list[str]) -> None:
    order = {number: index for index, number in enumerate(("one", *UNITS))}
    counts = [
        re.findall(rf"\b({'|'.join(order)}) {NOUN}", text.split(" count")[1]) for text in texts if " count" in text
    ]
    assert len(counts) >= 100
    assert all(order[b] == order[a] + 1 for words in counts for a, b in zip(words, words[1:], strict=False))


def test_some_sentences_repeat_words_that_invite_loops(texts: list[str]) -> None:
    assert sum("again and again" in text for text in texts) >= 20
    assert sum("very very very" in text for text in texts) >= 20
    assert sum(re.search(r"\b([a-z]+) and \1\b", text) is not None for text in texts) >= 20


def test_word_errors_come_at_the_given_rate(texts: list[str]) -> None:
    careless = [with_word_errors(text, 0.15, Draw(index)) for index, text in enumerate(texts)]
    result = score_transcripts(texts, careless, normaliser="opd-basic-1")
    assert result.wer == pytest.approx(0.15, abs=0.015)
    for errors in (result.substitutions, result.deletions, result.insertions):
        assert errors / result.num_ref_words == pytest.approx(0.05, abs=0.012)
    assert {word for text in careless for word in text.split()} <= {word for text in texts for word in text.split()}
    assert [with_word_errors(text, 0.15, Draw(index)) for index, text in enumerate(texts)] == careless
    assert with_word_errors(texts[0], 0.0, Draw(0)) == texts[0]
    assert all(with_word_errors("one dog", 1.0, Draw(seed)) for seed in range(20))


# -- spoken sets -------------------------------------------------------------------------------------------------------


def test_table_of_sets() -> None:
    sizes = {name: s.num_utterances for name, s in SENTENCE_SETS.items() if s.snr != NOISY_SNR}
    assert sizes == {
        "sentences_labelled": 4_000,
        "sentences_few_labels": 400,
        "sentences_noisy_references": 4_000,
        "sentences_unlabelled": 6_000,
        "sentences_seen_voices": 200,
        "sentences_unseen_voices": 500,
    }
    for name, s in SENTENCE_SETS.items():
        part = "evaluation" if "seen" in name else "unlabelled" if "unlabelled" in name else "training"
        voices = UNSEEN_VOICES if "unseen" in name else FEW_LABEL_VOICES if "few" in name else TRAINING_VOICES
        assert (s.part, s.voices, s.with_text) == (part, voices, part != "unlabelled"), name
        if s.snr == NOISY_SNR:
            assert replace(s, snr=(5.0, 25.0)) == SENTENCE_SETS[name.replace("noisy_", "")]
    assert len({s.seed for s in SENTENCE_SETS.values()}) == 5


@pytest.fixture
def tiny_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, with the shape of SENTENCE_SETS in small; returns the folder that the sets are made in."""
    pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed: pip install '.[speech]'")
    labelled = SentenceSet("training", seed=1, num_utterances=8)
    sets = {
        "sentences_labelled": labelled,
        "sentences_noisy_references": replace(labelled, references_of="sentences_labelled"),
        "sentences_unlabelled": SentenceSet("unlabelled", seed=2, num_utterances=6, with_text=False),
        "sentences_unseen_voices": SentenceSet("evaluation", seed=3, num_utterances=6, voices=UNSEEN_VOICES),
        "sentences_noisy_unseen_voices": SentenceSet("evaluation", 3, 6, voices=UNSEEN_VOICES, snr=NOISY_SNR),
    }
    monkeypatch.setattr(sentence_sets, "SENTENCE_SETS", sets)
    monkeypatch.setenv("OPD_HOME", str(tmp_path))
    return tmp_path / "speech" / SENTENCES_NAME


def made(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.usefixtures("tiny_sets")
def test_spoken_set_says_the_sentences_of_its_part() -> None:
    manifests = ensure_sentences(["sentences_unseen_voices", "sentences_unlabelled"])
    utterances = read_manifest(manifests["sentences_unseen_voices"], require_text=True)
    assert [utterance.text for utterance in utterances] == sentences("evaluation", 6, seed=3)
    assert {utterance.extra["voice"] for utterance in utterances} <= {voice.name for voice in UNSEEN_VOICES}
    for utterance in utterances:
        seconds = len(load_audio(utterance)) / 16_000
        assert 1.0 < seconds < 12.0
        assert seconds == pytest.approx(utterance.extra["duration"], abs=1e-3)
        assert 0.08 < seconds / len(str(utterance.text).split()) < 0.9
    lines = manifests["sentences_unlabelled"].read_text().splitlines()
    assert len(lines) == 6
    assert all("text" not in json.loads(line) for line in lines)


def test_only_what_is_asked_for_is_made_and_only_once(tiny_sets: Path) -> None:
    ensure_sentences(["sentences_unlabelled"])
    assert made(tiny_sets) == ["sentences_unlabelled"]
    assert made(tiny_sets.parent) == [SENTENCES_NAME], "no digits"
    before = {path: path.stat().st_mtime_ns for path in (tiny_sets / "sentences_unlabelled").rglob("*")}
    assert len(before) == 1 + 1 + 1 + 6
    ensure_sentences(["sentences_unlabelled"])
    assert {path: path.stat().st_mtime_ns for path in (tiny_sets / "sentences_unlabelled").rglob("*")} == before


def test_noisy_variant_is_the_same_speech_in_more_noise(tiny_sets: Path) -> None:
    names = ["sentences_unseen_voices", "sentences_noisy_unseen_voices"]
    plain, noisy = (read_manifest(path) for path in ensure_sentences(names).values())
    assert [(u.text, u.extra) for u in plain] == [(u.text, u.extra) for u in noisy]
    # The first 50 ms are noise alone.
    floors = [[rms(load_audio(u)[:800]) / rms(load_audio(u)) for u in utterances] for utterances in (plain, noisy)]
    assert all(low < high for low, high in zip(*floors, strict=True))


def rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(samples**2)))


def test_careless_references_are_of_the_labelled_audio(tiny_sets: Path) -> None:
    careless = read_manifest(ensure_sentences(["sentences_noisy_references"])["sentences_noisy_references"])
    assert made(tiny_sets) == ["sentences_labelled", "sentences_noisy_references"]
    clean = read_manifest(ensure_sentences(["sentences_labelled"])["sentences_labelled"])
    assert [Path(u.audio).resolve() for u in careless] == [Path(u.audio) for u in clean]
    assert [u.text for u in careless] != [u.text for u in clean]
    moved = tiny_sets.rename(tiny_sets.with_name("moved"))
    manifest = moved / "sentences_noisy_references" / "sentences_noisy_references.jsonl"
    assert len(load_audio(read_manifest(manifest)[0])) > 16_000


def test_two_fresh_builds_give_the_same_bytes(tiny_sets: Path, tmp_path: Path) -> None:
    names = ["sentences_labelled"]
    first, second = (ensure_sentences(names, tmp_path / home)["sentences_labelled"].parent for home in ("a", "b"))
    contents = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (first, second)
    ]
    assert len(contents[0]) == 8 + 2
    assert contents[0] == contents[1]


def test_names_of_recipes_are_resolved(tiny_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve_manifests(["synthetic:sentences_unseen_voices", "other.jsonl"])
    expected = tiny_sets / "sentences_unseen_voices" / "sentences_unseen_voices.jsonl"
    assert resolved == {"synthetic:sentences_unseen_voices": str(expected), "other.jsonl": "other.jsonl"}
    monkeypatch.setattr(synthetic, "SETS", {"few_labels": DigitSet(seed=1, num_utterances=2)})
    both = resolve_manifests(["synthetic:few_labels", "synthetic:sentences_unseen_voices"])
    digits, spoken = (read_manifest(path) for path in both.values())
    assert (len(digits), len(spoken)) == (2, 6)
    with pytest.raises(
        ValueError, match="synthetic:sentences: there is no such synthetic set; there are few_labels, .*"
    ):
        resolve_manifests(["synthetic:sentences"])
    with pytest.raises(ValueError, match="no set of sentences 'nothing'; there are sentences_labelled"):
        ensure_sentences(["nothing"])
