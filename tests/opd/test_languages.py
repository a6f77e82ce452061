"""All 19 languages of ARK-ASR: speech in each goes through processor, prompt, model, transcription files and scoring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.espeak import synthesise
from data.manifest import read_manifest
from opd.results import score_rows
from opd.text import LANGUAGES, normaliser_name, resolve_language
from opd.transcribe_cli import evaluate_main

# eSpeak voice, what is said and its transcript; the transcripts come with what scoring should not count.
SPOKEN = {
    "zh": ("cmn", "今天天气很好", "今天，天气很好。"),
    "en": ("en-us", "the colour of the sky", "The color of the sky!"),
    "de": ("de", "die schöne Straße", "Die schöne Straße."),
    "ja": ("ja", "おはようございます", "おはよう ございます。"),
    "fr": ("fr", "l'eau est très froide", "L’eau est très froide."),
    "ko": ("ko", "안녕하세요 여러분", "안녕하세요, 여러분!"),
    "es": ("es", "el niño está aquí", "¿El niño está aquí?"),
    "pl": ("pl", "dziękuję za książkę", "Dziękuję za książkę."),
    "it": ("it", "dell'arte è così", "Dell’arte è così!"),
    "ro": ("ro", "știința și viața", "Ştiinţa şi viaţa."),
    "hu": ("hu", "őszi gyümölcs", "Őszi gyümölcs…"),
    "cs": ("cs", "příliš žluťoučký kůň", "Příliš žluťoučký kůň."),
    "nl": ("nl", "de zon schijnt vandaag", "De zon schijnt vandaag."),
    "fi": ("fi", "hyvää päivää", "Hyvää päivää!"),
    "hr": ("hr", "čovjek i žena", "Čovjek i žena."),
    "sk": ("sk", "ďakujem pekne", "Ďakujem pekne."),
    "sl": ("sl", "dober dan želim", "Dober dan želim."),
    "et": ("et", "tere õhtust sõber", "Tere õhtust, sõber!"),
    "lt": ("lt", "ačiū labai gražu", "Ačiū, labai gražu."),
}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of one utterance per language, named in turn by English name and ISO code."""
    folder = tmp_path_factory.mktemp("languages")
    lines = []
    for index, (iso, (voice, said, transcript)) in enumerate(SPOKEN.items()):
        samples, rate = synthesise(said, voice, 160, 50)
        soundfile.write(folder / f"{iso}.wav", samples, rate)
        language = iso if index % 2 else LANGUAGES[iso].name
        lines.append({"id": iso, "audio": f"{iso}.wav", "text": transcript, "language": language})
    manifest = folder / "all.jsonl"
    manifest.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return manifest


def test_every_language_is_there() -> None:
    assert SPOKEN.keys() == LANGUAGES.keys()


def test_speech_goes_through_the_model_and_scoring(tmp_path: Path, spoken: Path, tiny_dir: Path) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ["--input", spoken, "--output", output, "--model_path", tiny_dir, "--max_new_tokens", "8"]
    assert evaluate_main([str(argument) for argument in arguments]) == 0
    rows = {row["id"]: row for row in map(json.loads, output.read_text(encoding="utf-8").splitlines())}
    assert rows.keys() == LANGUAGES.keys()
    for iso, row in rows.items():
        assert row["text"] == SPOKEN[iso][2]
        assert row["audio_seconds"] > 0.3
        assert row["normaliser"] == normaliser_name(iso)
        assert row["ref_chars"] >= 6
        by_characters = LANGUAGES[iso].metric == "cer"
        assert row["ref_words"] == (
            row["ref_chars"] if by_characters else len(SPOKEN[iso][1].replace("'", " ").split())
        )


@pytest.mark.parametrize("iso", SPOKEN)
def test_what_was_said_scores_as_right(spoken: Path, iso: str) -> None:
    """Punctuation, case, typographic apostrophes and spelling variants cost nothing; another word does."""
    said = SPOKEN[iso][1]
    reference = next(u.text for u in read_manifest(spoken) if u.id == iso)
    row = {"pred_text": said, "audio_seconds": 1.0, "transcription_seconds": 1.0}
    (scored,), result = score_rows("set", [row], [reference], [resolve_language(iso).name])
    assert (scored["wer_errors"], scored["cer_errors"], result.wer, result.cer) == (0, 0, 0, 0), scored
    assert result.normaliser == normaliser_name(iso)
    (_, wrong) = score_rows("set", [row | {"pred_text": said[:-2] + "x"}], [reference], [iso])
    assert wrong.cer > 0
    assert wrong.wer > 0


@pytest.mark.parametrize("iso", SPOKEN)
def test_prompt_and_text_survive_the_tokenizer(spoken: Path, tiny_dir: Path, iso: str) -> None:
    from opd.arkasr import load_processor

    processor = load_processor(tiny_dir)
    samples, _ = soundfile.read(spoken.with_name(f"{iso}.wav"), dtype="float32")
    inputs = processor.build_inputs([np.asarray(samples)])
    num_slots = int((inputs["input_ids"] == processor.audio_token_id).sum())
    assert num_slots == processor.num_audio_tokens(len(samples) // 160)
    ids = processor.tokenizer(SPOKEN[iso][2], add_special_tokens=False)["input_ids"]
    assert processor.clean_text(ids) == SPOKEN[iso][2]
