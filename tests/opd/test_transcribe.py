"""Transcription of waveforms and of manifests, by the library and by the command lines of the model card."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import psutil
import pytest
import soundfile
import torch

from data.audio import load_audio
from data.manifest import read_manifest, read_rows
from opd.arkasr import cut_at_silences
from opd.batch_transcribe import Journal, ManifestJob, ModelSettings, Outcome, plan_batches
from opd.results import average, score_leaderboard_file, script_language, summarise, write_leaderboard_file
from opd.transcribe import DecodeSettings, Transcriber
from opd.transcribe_cli import evaluate_main, transcribe_main
from opd.types import Utterance

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "seeds" / "tiny_teacher"
INFER = ROOT / "scripts" / "infer" / "ark_asr_transformers.py"
EVALUATE = ROOT / "scripts" / "eval" / "eval_jwer_ark_asr_transformers.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    return Transcriber(TEACHER)


@pytest.fixture(scope="module")
def alone(transcriber: Transcriber, speech: dict[str, Path]) -> list[str]:
    """What each utterance of the evaluation set gives by itself."""
    return [transcriber.transcribe([load_audio(u)])[0].text for u in read_manifest(speech["eval"])]


def command(script: Path, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, "--model_path", TEACHER, *arguments], capture_output=True, text=True, **options
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- waveforms ---------------------------------------------------------------------------------------------------------


def test_the_teacher_recognises_digits(alone: list[str], speech: dict[str, Path]) -> None:
    references = [u.text for u in read_manifest(speech["eval"])]
    assert sum(a == b for a, b in zip(alone, references, strict=True)) >= 8


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_batches_give_what_single_clips_give(
    transcriber: Transcriber, speech: dict[str, Path], alone: list[str], batch_size: int
) -> None:
    waveforms = [load_audio(u) for u in read_manifest(speech["eval"])]
    assert [t.text for t in transcriber.transcribe(waveforms, batch_size)] == alone


def test_raw_text_ends_with_the_end_token(transcriber: Transcriber, waveforms: list[np.ndarray]) -> None:
    for transcript in transcriber.transcribe(waveforms):
        assert transcript.raw == transcript.text + "<|im_end|>"


def test_long_audio_is_transcribed_in_windows(transcriber: Transcriber, speech: dict[str, Path]) -> None:
    """Known text: one utterance to a window, each word of each once and in order, up to the model's own errors."""
    half_pause = np.zeros(2400, dtype=np.float32)
    utterances = [*read_manifest(speech["train"]), *read_manifest(speech["eval"])]
    padded = {u.text: np.concatenate([half_pause, load_audio(u), half_pause]) for u in utterances}
    clips = {text: samples for text, samples in padded.items() if 1.3 < len(samples) / 16000 < 2.3}
    assert len(clips) >= 15
    whole = np.concatenate(list(clips.values()))
    bounds = cut_at_silences(whole, 16000, 2.4)
    ends = np.cumsum([len(samples) for samples in clips.values()])
    assert len(bounds) == len(clips)
    assert all(abs(stop - end) < 2400 for (_, stop), end in zip(bounds, ends, strict=True))
    alone = [transcriber.transcribe([whole[start:stop]])[0] for start, stop in bounds]
    windows = Transcriber(TEACHER, settings=DecodeSettings(max_audio_seconds=2.4))
    (transcript,) = windows.transcribe([whole])
    assert transcript.text == " ".join(part.text for part in alone)
    assert transcript.raw == "".join(part.raw for part in alone)
    assert jiwer.wer(" ".join(clips), transcript.text) < 0.4


def test_settings_reach_generation(waveforms: list[np.ndarray], transcriber: Transcriber) -> None:
    usual = [t.text for t in transcriber.transcribe(waveforms)]

    def with_settings(**settings: Any) -> list[str]:
        return [t.text for t in Transcriber(TEACHER, settings=DecodeSettings(**settings)).transcribe(waveforms)]

    assert all(len(text.split()) <= 2 for text in with_settings(max_new_tokens=2))
    assert with_settings(repetition_penalty=0.01) != usual
    assert with_settings(audio_gain=0.0005) != usual
    assert with_settings(block_token_id_from=100) != usual
    hot = with_settings(do_sample=True, temperature=3.0)
    assert hot == with_settings(do_sample=True, temperature=3.0)
    assert hot != with_settings(do_sample=True, temperature=3.0, seed=1)
    assert len(with_settings(num_beams=3)) == len(usual)


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "audio_gain", "max_audio_seconds"])
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: must be"):
        DecodeSettings(**{name: 0})


def test_dtype_and_attention() -> None:
    assert Transcriber(TEACHER, dtype="bfloat16").model.dtype == torch.bfloat16
    assert Transcriber(TEACHER, dtype="auto").model.dtype == torch.float32
    assert Transcriber(TEACHER, attn_implementation="eager").model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="dtype='int8': must be"):
        Transcriber(TEACHER, dtype="int8")
    with pytest.raises(ValueError, match="attn_implementation='fast': must be"):
        Transcriber(TEACHER, attn_implementation="fast")


# -- manifests ---------------------------------------------------------------------------------------------------------


def test_batches_hold_like_lengths_and_bounded_audio() -> None:
    clips = [(line, Utterance(str(line), f"{line}.wav")) for line in range(7)]
    seconds = dict(enumerate([1.0, 9.0, 2.0, 100.0, 3.0, 2.0]))  # line 6 could not be read
    batches = plan_batches(clips, seconds, batch_size=3, max_audio_seconds=10)
    assert [[line for line, _ in batch] for batch in batches] == [[3], [1, 4, 2], [5, 0]]


def test_rows_keep_every_field_and_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    line = {"wav": "a.wav", "words": "one", "from": 1, "to": 2, "speaker": {"name": "x"}, "audio": 7}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line) + "\n")
    names = {"audio": "wav", "text": "words", "begin_time": "from", "end_time": "to"}
    (fields, utterance), (_, twin) = read_rows(tmp_path / "m.jsonl", names, "en")
    assert fields == line
    assert twin == utterance
    assert (utterance.audio, utterance.text, utterance.begin_time, utterance.end_time, utterance.language) == (
        str(tmp_path / "a.wav"), "one", 1.0, 2.0, "en",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"m.jsonl:1: lacks `path`"):
        read_rows(tmp_path / "m.jsonl", {"audio": "path"})


def test_audio_is_looked_for_in_the_working_directory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "a.wav").touch()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "m.jsonl").write_text('{"audio": "assets/a.wav"}\n')
    monkeypatch.chdir(tmp_path)
    ((_, utterance),) = read_rows("lists/m.jsonl")
    assert utterance.audio == str(tmp_path / "assets" / "a.wav")


def make_job(tmp_path: Path, num_rows: int = 4, **decode: Any) -> ManifestJob:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"audio": "{n}.wav", "id": "u{n}"}}\n' for n in range(num_rows)))
    settings = ModelSettings(str(TEACHER), decode=DecodeSettings(**decode))
    return ManifestJob.open(source, tmp_path / "out.jsonl", settings)


def test_journal_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    journal = Journal(job)
    journal.add([Outcome(2, "two", "two"), Outcome(0, error="no such file")])
    with job.journal.open("a") as file:
        file.write('{"line": 3, "pred_te')  # a torn line
    again = Journal(job)
    assert again.remaining() == [0, 1, 3]
    again.add([Outcome(line, str(line), str(line)) for line in again.remaining()])
    rows = Journal(job).rows()
    assert [row["pred_text"] for row in rows] == ["0", "1", "two", "3"]
    assert all("error" not in row for row in rows)
    journal.write_result(rows, summarise("in", rows))
    assert rows_of(job.output) == rows
    assert json.loads(job.summary.read_text())["settings"] == job.settings


def test_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    Journal(make_job(tmp_path)).add([Outcome(0, "one", "one")])
    with pytest.raises(ValueError, match=r"another run \(max_new_tokens differ\)"):
        Journal(make_job(tmp_path, max_new_tokens=5))
    with pytest.raises(ValueError, match=r"another run \(manifest differ\)"):
        Journal(make_job(tmp_path, num_rows=3))
    assert Journal(make_job(tmp_path, max_new_tokens=5), overwrite=True).remaining() == [0, 1, 2, 3]


@pytest.mark.parametrize("left", [None, b"", b'{"settings": {"manif'])
def test_a_run_that_did_nothing_is_in_nobodys_way(tmp_path: Path, left: bytes | None) -> None:
    """As after a model that could not be loaded."""
    job = Journal(make_job(tmp_path)).job
    if left is not None:
        job.journal.write_bytes(left)
    Journal(make_job(tmp_path, max_new_tokens=5)).add([Outcome(0, "one", "one")])
    assert Journal(make_job(tmp_path, max_new_tokens=5)).remaining() == [1, 2, 3]


def test_a_file_of_another_origin_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious\n")
    with pytest.raises(ValueError, match="exists and is no result of this command"):
        Journal(make_job(tmp_path))
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


# -- command lines -----------------------------------------------------------------------------------------------------


def test_infer_command_of_the_model_card(tmp_path: Path, speech: dict[str, Path], alone: list[str]) -> None:
    """The card's flags; a bad file gives a row with an error, exit status 1, and is tried again by itself."""
    source = speech["eval"].with_name("with_bad.jsonl")
    lines = speech["eval"].read_text().splitlines()
    lines.insert(3, json.dumps({"audio": "missing.wav", "id": "bad", "note": "kept"}))
    source.write_text("\n".join(lines) + "\n")
    output = tmp_path / "runs" / "predictions.jsonl"
    arguments = ["--input", source, "--output", output, "--processor_path", TEACHER, "--batch_size", "5"]
    arguments += ["--dtype", "float32", "--attn_impl", "sdpa", "--padding_side", "left", "--target_sr", "16000"]
    ended = command(INFER, *arguments)
    assert ended.returncode == 1
    assert ended.stderr.count("error:") == 1
    assert "1 utterances could not be transcribed" in ended.stderr
    rows = rows_of(output)
    bad = rows.pop(3)
    assert bad["note"] == "kept"
    assert "missing.wav" in bad["error"]
    assert bad["pred_text"] == ""
    assert [row["pred_text"] for row in rows] == alone
    for row, written in zip(rows, read_rows(speech["eval"]), strict=True):
        assert written[0].items() <= row.items()
        assert row["pred_text_raw"].startswith(row["pred_text"])
    soundfile.write(source.with_name("missing.wav"), np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    ended = command(INFER, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "12 of 13 utterances are done already" in ended.stderr
    assert "error" not in rows_of(output)[3]


def test_killed_inference_goes_on(tmp_path: Path, speech: dict[str, Path], alone: list[str]) -> None:
    """SIGKILL half-way; the workers end too; run again, the output is complete, and nothing was decoded twice."""
    source = tmp_path / "many.jsonl"
    rows = [row | {"audio": utterance.audio} for row, utterance in read_rows(speech["eval"])]
    source.write_text("".join(json.dumps(row | {"id": f"{n}/{row['id']}"}) + "\n" for n in range(20) for row in rows))
    output = tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.journal"
    arguments = [str(a) for a in (INFER, "--model_path", TEACHER, "--input", source, "--output", output)]
    arguments += ["--batch_size", "4", "--devices", "cpu,cpu"]
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 40):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert not output.exists()
    kept = journal.read_bytes().rpartition(b"\n")[0]
    ended = command(INFER, "--input", source, "--output", output)
    assert ended.returncode == 0, ended.stderr
    assert journal.read_bytes().startswith(kept)
    lines = [json.loads(line)["line"] for line in journal.read_bytes().splitlines()[1:]]
    assert sorted(lines) == list(range(240))
    assert [row["pred_text"] for row in rows_of(output)] == alone * 20
    assert [row["id"] for row in rows_of(output)] == [f"{n}/{row['id']}" for n in range(20) for row in rows]


def test_evaluate_command_scores_several_manifests(
    tmp_path: Path, speech: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sets in one call and one table, two workers, the leaderboard's files; scored anew without decoding."""
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(
            json.dumps({"audio": u.audio, "words": u.text, "language": "en"}) + "\n"
            for u in read_manifest(speech["train"])[:5]
        )
    )
    first = tmp_path / "eval.jsonl"
    first.write_text(
        "".join(json.dumps({"audio": u.audio, "words": u.text}) + "\n" for u in read_manifest(speech["eval"]))
    )
    arguments = ["--input", first, other, "--output", tmp_path / "results", "--text_field", "words"]
    arguments += ["--batch_size", "3", "--devices", "cpu,cpu", "--language", "en", "--leaderboard", tmp_path / "board"]
    arguments += ["--model_id", "org/tiny", "--disable_text_normalize"]
    ended = command(EVALUATE, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "average" in ended.stdout
    assert "opd-basic-1" in ended.stdout
    for name, size in (("eval", 12), ("other", 5)):
        rows = rows_of(tmp_path / "results" / f"{name}.jsonl")
        assert len(rows) == size
        assert [r["cer_errors"] for r in rows] == sorted((r["cer_errors"] for r in rows), reverse=True)
        summary = json.loads((tmp_path / "results" / f"{name}.jsonl.summary.json").read_text())
        words = sum(r["ref_words"] for r in rows)
        assert words == sum(len(r["words"].split()) for r in rows)
        assert summary["wer"] == pytest.approx(sum(r["wer_errors"] for r in rows) / words)
        assert summary["wer"] < 0.2
        assert {r["normaliser"] for r in rows} == {summary["normaliser"]} == {"opd-basic-1"}
        assert all(r["ref_text"] == r["ref_text_clean"] == r["words"] for r in rows)
        board = rows_of(tmp_path / "board" / f"MODEL_org-tiny_DATASET_{name}.jsonl")
        assert [set(row) for row in board] == [{"audio_filepath", "duration", "time", "text", "pred_text"}] * size
    journal = (tmp_path / "results" / "eval.jsonl.journal").read_bytes()
    arguments = ["--model_path", TEACHER, *[a for a in arguments if a != "--disable_text_normalize"]]
    assert evaluate_main([str(a) for a in arguments]) == 0
    assert "12 of 12 utterances are done already" in capsys.readouterr().err
    assert (tmp_path / "results" / "eval.jsonl.journal").read_bytes() == journal
    summary = json.loads((tmp_path / "results" / "eval.jsonl.summary.json").read_text())
    assert summary["normaliser"].startswith("whisper-english")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none.jsonl", "--output", "o.jsonl"], "none.jsonl cannot be read"),
        (["--input", "m.jsonl", "--output", "m.jsonl"], "is the input itself"),
        (["--input", "m.jsonl", "n.jsonl", "--output", "o.jsonl"], "several manifests need a folder"),
        (["--input", "m.jsonl", "--output", "o.jsonl", "--target_sr", "8000"], "--target_sr 8000"),
        (["--input", "m.jsonl", "--output", "o.jsonl", "--padding_side", "right"], "--padding_side right"),
        (["--input", "m.jsonl", "--output", "o.jsonl", "--batch_size", "0"], "--batch_size 0"),
        (["--input", "m.jsonl", "--output", "o.jsonl", "--devices", "cuda:9"], "--devices cuda:9"),
        (["--input", "m.jsonl", "--output", "o.jsonl", "--language", "xx"], "--language xx: unknown language 'xx'"),
        (
            ["--input", "m.jsonl", "--output", "o.jsonl", "--temperature", "0.3"],
            "--temperature 0.3: only draws have one",
        ),
        (["--input", "m.jsonl", "n.jsonl", "--output", "m.jsonl"], "several manifests need a folder"),
        (["--input", "m.jsonl", "--output", "o.jsonl", "--leaderboard", "/proc/b"], "--leaderboard /proc/b: cannot be"),
        (
            ["--input", "m.jsonl", "--output", "o.jsonl", "--model_path", "./none"],
            "--model_path ./none: neither a folder",
        ),
        (["--input", "m.jsonl", "--output", "o.jsonl", "--audio_field", "wav"], "m.jsonl:1: lacks `wav`"),
        (["--input", "m.jsonl", "--output", "o.jsonl", "--normaliser", "x"], "unknown normaliser 'x'"),
        (["--input", "m.jsonl", "--output", "o.jsonl"], "utterance 1 has no `text`"),
    ],
)
def test_bad_input_gives_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    for name in ("m.jsonl", "n.jsonl"):
        (tmp_path / name).write_text('{"audio": "a.wav"}\n')
    monkeypatch.chdir(tmp_path)
    assert evaluate_main(["--model_path", str(TEACHER), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.jsonl", "n.jsonl"]


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav"}\n')
    arguments = ["--input", str(tmp_path / "m.jsonl"), "--output", "/proc/o.jsonl", "--model_path", str(TEACHER)]
    assert transcribe_main(arguments) == 1
    assert "error: --output /proc/o.jsonl: cannot be written (/proc" in capsys.readouterr().err


# -- results -----------------------------------------------------------------------------------------------------------


def leaderboard_row(pred_text: str, seconds: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"pred_text": pred_text, "audio_seconds": 2.0, "transcription_seconds": seconds, **more}


def test_leaderboard_counts_a_split_compound_as_right(tmp_path: Path) -> None:
    rows = [leaderboard_row("whitepaper here"), leaderboard_row("a bat"), leaderboard_row("x", error="gone")]
    rows.append(leaderboard_row("hmm"))
    path = write_leaderboard_file(
        tmp_path, "org/m", "org/d_n_test", rows, ["White paper, here!", "A cat.", "x", "Hmm."]
    )
    assert path.name == "MODEL_org-m_DATASET_org-d_n_test.jsonl"
    assert [row["text"] for row in rows_of(path)] == ["White paper, here!", "A cat."]
    result = score_leaderboard_file(path)
    assert (result.name, result.utterances, result.rtfx) == ("org-d_n_test", 2, 2.0)
    assert result.wer == pytest.approx(1 / 5)  # a bat for a cat, of five words
    several = average([result, result])
    assert several.wer == result.wer
    assert several.audio_seconds == 8.0


@pytest.mark.parametrize(
    ("text", "language"),
    [("今日はカラオケ", "ja"), ("안녕", "ko"), ("你好 hello", "zh"), ("grüß Gott", None), ("", None)],
)
def test_script_tells_the_language(text: str, language: str | None) -> None:
    assert script_language(text) == language
