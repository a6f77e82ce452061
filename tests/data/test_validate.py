"""Validation: every kind of finding has data that triggers it, and clean data, real speech too, triggers none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data.checks import LEVELS, Limits, check_text
from data.validate import Validation, main, validate
from opd.text import resolve_language

RATE = 16_000
ROOT = Path(__file__).resolve().parents[2]


def sound(seed: int = 0, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    """float64 [samples] of noise, another one for each seed."""
    return np.random.default_rng(seed).normal(scale=0.1, size=round(rate * seconds))


def write_sound(path: Path, samples: np.ndarray | None = None, rate: int = RATE, **options: str) -> str:
    soundfile.write(path, sound() if samples is None else samples, rate, **options)
    return path.name


def write_lines(path: Path, *lines: dict[str, Any] | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def kinds(validation: Validation) -> list[tuple[int, str]]:
    return [(finding.line, finding.kind) for finding in validation.findings]


Maker = Callable[[Path], dict[str, Any] | str]


def with_audio(samples: Callable[[], np.ndarray], rate: int = RATE, **options: str) -> Maker:
    return lambda folder: {"audio": write_sound(folder / "x.wav", samples(), rate, **options)}


def with_file(name: str, content: bytes) -> Maker:
    def make(folder: Path) -> dict[str, Any]:
        (folder / name).write_bytes(content)
        return {"audio": name}

    return make


def with_fields(**fields: Any) -> Maker:
    return lambda folder: {"audio": write_sound(folder / "x.wav", sound(9)), **fields}


def half_of(name: str) -> Maker:
    def make(folder: Path) -> dict[str, Any]:
        write_sound(folder / name, sound(9, 2.0))
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        return {"audio": name}

    return make


def not_finite() -> np.ndarray:
    return np.where(np.arange(RATE) == 500, np.nan, sound())


def with_clipping(share: float) -> Callable[[], np.ndarray]:
    return lambda: np.where(np.arange(RATE) < share * RATE, 1.0, sound(9))


ONE_BAD_LINE: dict[str, list[Maker]] = {
    "bad_line": [
        lambda folder: '{"audio": "x.wav"',
        lambda folder: '{"text": "one"}',
        lambda folder: '{"audio": "good.wav", "begin_time": 2, "end_time": 1}',
        lambda folder: '{"audio": "good.wav", "id": 7}',
    ],
    "missing_file": [lambda folder: {"audio": "nowhere.wav"}],
    "unreadable_audio": [
        with_file("x.wav", b"no sound"),
        with_file("x.raw", bytes(100)),
        lambda folder: {"audio": "."},
    ],
    "empty_audio": [with_file("x.wav", b""), with_audio(lambda: np.empty(0))],
    "cut_short": [half_of("x.mp3")],
    "outside_file": [with_fields(begin_time=1.0), with_fields(begin_time=0.5, end_time=1.2), with_fields(begin_time=9)],
    "not_finite": [with_audio(not_finite, subtype="FLOAT")],
    "too_short": [
        with_audio(lambda: sound(9, 0.09)),
        with_audio(lambda: sound(9, 0.01)),
        with_fields(begin_time=0.5, end_time=0.55),
        with_fields(begin_time=0.5, end_time=0.50001),
    ],
    "too_long": [with_audio(lambda: sound(9, 30.1))],
    "silent": [
        with_audio(lambda: np.zeros(RATE)),
        with_audio(lambda: sound(9) / np.abs(sound(9)).max() * 9e-4, subtype="FLOAT"),
    ],
    "clipped": [with_audio(with_clipping(0.011)), with_audio(lambda: -with_clipping(0.011)())],
    "low_sampling_rate": [with_audio(lambda: sound(9, rate=4_000), 4_000)],
    "several_channels": [with_audio(lambda: np.stack([sound(8), sound(9)], axis=1))],
    "wrong_duration": [with_fields(duration=1.2), with_fields(duration=1, end_time=0.5)],
    "unknown_language": [with_fields(language="Klingon")],
    "empty_text": [with_fields(text=""), with_fields(text=" \n")],
    "no_letter": [with_fields(text="1 2 3"), with_fields(text="?!"), with_fields(text="[noise] <b></b> 12")],
    "unexpected_script": [
        with_fields(text="ein Жук", language="de"),
        with_fields(text="hello", language="zh"),
        with_fields(text="こんにちは", language="zh"),
        with_fields(text="你好", language="ko"),
        with_fields(text="eins 二", language="German"),
    ],
    "control_character": [with_fields(text=f"one{mark}two") for mark in "\0\t\n\x85\u200b\u202e\ufeff\ufffd\ud800"],
    "markup": [
        with_fields(text=text)
        for text in (
            "a <b>bold</b> word",
            "one &amp; two",
            "it&#39;s",
            "x<br/>y",
            '<font size="2">one',
            "<!-- x --> one",
        )
    ],
    "tag": [with_fields(text=text) for text in ("<unk> one", "one [noise]", "<|en|>one", "one {laugh}", "a <NOISE> b")],
    "fast_speech": [
        with_fields(text="one two three four five six seven eight"),
        with_fields(text="Donaudampfschifffahrtsgesellschaft", begin_time=0.0, end_time=0.9),
        with_fields(text="一二三四五六七八九十" * 3, language="zh"),
    ],
    "slow_speech": [
        lambda folder: {"audio": write_sound(folder / "x.wav", sound(9, 4.0)), "text": "yes"},
        lambda folder: {"audio": write_sound(folder / "x.wav", sound(9, 4.0)), "text": "一", "language": "zh"},
    ],
}
# These need another line, and have tests of their own below.
OF_SEVERAL_LINES = {"empty_manifest", "duplicate_id", "shared_id", "repeated_audio", "shared_audio", "missing_text"}
CASES = [(kind, number, make) for kind, makers in ONE_BAD_LINE.items() for number, make in enumerate(makers)]


def test_every_kind_of_finding_has_a_test() -> None:
    assert set(LEVELS) == set(ONE_BAD_LINE) | OF_SEVERAL_LINES
    assert set(LEVELS.values()) == {"error", "warning"}


@pytest.mark.parametrize(
    ("kind", "make"), [(kind, make) for kind, _, make in CASES], ids=[f"{k}{n}" for k, n, _ in CASES]
)
def test_finding(tmp_path: Path, kind: str, make: Maker) -> None:
    write_sound(tmp_path / "good.wav", sound(1))
    good: dict[str, Any] = {"audio": "good.wav", "id": "good", "text": "one two", "language": "en"}
    bad = make(tmp_path)
    if isinstance(bad, dict):
        bad = {"id": "bad", "text": "two", **bad}
    validation = validate([write_lines(tmp_path / "set.jsonl", good, "", bad, {**good, "id": "last"})])
    found = [finding for finding in validation.findings if finding.line == 3]
    (finding,) = [finding for finding in found if finding.kind == kind]
    assert (finding.file, finding.level) == (str(tmp_path / "set.jsonl"), LEVELS[kind])
    assert finding.id == (None if isinstance(bad, str) else "bad")
    assert finding.message
    if kind != "no_letter":  # where a tag is all there is, the tag is found, too
        assert len(found) == 1, found
    assert [finding.kind for finding in validation.findings if finding.line != 3] == ["repeated_audio"], (
        "line 4 is read"
    )


def test_all_bad_lines_are_listed(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav")
    path = write_lines(
        tmp_path / "set.jsonl",
        "{",
        {"audio": "a.wav"},
        "",
        {"audio": 3},
        {"audio": "b.wav"},
        "null",
        {"audio": "c.wav"},
    )
    validation = validate([path])
    assert kinds(validation) == [
        (1, "bad_line"),
        (4, "bad_line"),
        (5, "missing_file"),
        (6, "bad_line"),
        (7, "missing_file"),
    ]
    assert validation.findings[1].message.startswith("`audio` must be a string"), "the place is not said twice"
    assert validation.totals.utterances == 3


def clean_lines(folder: Path) -> list[dict[str, Any]]:
    """One line of each kind that must not be taken for a mistake."""
    texts = {
        "en": ["Twenty-one, isn't it? It's 5 o'clock.", "e.g. 3 < 4 & 5 > 2 (laughs) at AT&T; fine"],
        "de": ["Ein Café an der Straße", "Grüße von Zoë ﬁx"],
        "pl": ["zażółć gęślą jaźń"],
        "zh": ["我用 iPhone 上网", "你好。"],
        "ja": ["コーヒーを飲む", "東京タワー", "ＡＢＣです"],
        "ko": ["안녕하세요 OK"],
    }
    lines: list[dict[str, Any]] = []
    for language, of_language in texts.items():
        for text in of_language:
            name = write_sound(folder / f"{len(lines)}.wav", sound(len(lines), 2.5))
            lines.append({"audio": name, "text": text, "language": language, "duration": 2.45})
    write_sound(folder / "long.flac", sound(99, 3.0, 44_100), 44_100)
    lines.append({"audio": "long.flac", "text": "one", "begin_time": 0.0, "end_time": 1.0, "duration": "unknown"})
    lines.append({"audio": "long.flac", "text": "two", "begin_time": 1.0})
    write_sound(folder / "loud.wav", with_clipping(0.009)())
    lines.append({"audio": "loud.wav", "text": "three"})
    write_sound(folder / "quiet.wav", sound(98) / np.abs(sound(98)).max() * 1.1e-3)
    lines.append({"audio": "quiet.wav", "text": "three"})
    return lines


def test_clean_manifest(tmp_path: Path) -> None:
    lines = clean_lines(tmp_path)
    validation = validate([write_lines(tmp_path / "set.jsonl", *lines)])
    assert validation.findings == []
    totals = validation.totals.to_dict()
    assert totals["utterances"] == len(lines)
    assert totals["languages"]["ja"] == {"utterances": 3, "hours": round(7.5 / 3600, 4)}
    assert totals["languages"]["none"]["utterances"] == totals["without_language"] == 4
    assert totals["sampling_rates"] == {"16000": len(lines) - 2, "44100": 2}
    assert totals["repeated_texts"] == 1
    assert totals["without_text"] == 0
    seconds = totals["duration_seconds"]
    assert (seconds["min"], seconds["p50"], seconds["max"]) == (1.0, 2.5, 2.5)
    assert totals["hours"] == pytest.approx((2.5 * 11 + 5) / 3600, abs=1e-4)


def test_real_speech_is_clean(speech: dict[str, Path]) -> None:
    validation = validate([speech["train"], speech["eval"]], workers=1)
    assert validation.findings == []
    assert validation.totals.utterances == 60
    # The same audio with and without text is what a labelled and an unlabelled stage have in common.
    shared = validate([speech["train"], speech["unlabelled"]])
    assert {finding.kind for finding in shared.findings} == {"shared_audio", "shared_id"}
    assert len(shared.findings) == 2 * 24


def test_empty_manifest(tmp_path: Path) -> None:
    assert kinds(validate([write_lines(tmp_path / "set.jsonl", "", " ")])) == [(1, "empty_manifest")]


def test_ids(tmp_path: Path) -> None:
    for number in range(4):
        write_sound(tmp_path / f"{number}.wav", sound(number))
    train = write_lines(
        tmp_path / "train.jsonl",
        {"audio": "0.wav", "id": "a"},
        {"audio": "1.wav", "id": "b"},
        {"audio": "2.wav", "id": "a"},
    )
    test = write_lines(tmp_path / "test.jsonl", {"audio": "3.wav", "id": "b"})
    validation = validate([train, test])
    assert [(Path(f.file).name, f.line, f.kind, f.id) for f in validation.findings] == [
        ("train.jsonl", 3, "duplicate_id", "a"),
        ("test.jsonl", 1, "shared_id", "b"),
    ]
    assert validation.findings[0].message.endswith(f"{train}:1")
    assert validation.findings[1].message.endswith(f"{train}:2")


def test_audio_that_sets_share(tmp_path: Path) -> None:
    """By file and times however the path is written, and by samples whatever the file."""
    write_sound(tmp_path / "a.wav", sound(1, 2.0))
    write_sound(tmp_path / "b.wav", sound(2))
    write_sound(tmp_path / "copy.flac", soundfile.read(tmp_path / "b.wav")[0])
    (tmp_path / "link.wav").symlink_to(tmp_path / "a.wav")
    for name in ("s1.wav", "s2.wav"):
        write_sound(tmp_path / name, np.zeros(RATE))
    segment = {"begin_time": 0.0, "end_time": 1.0}
    train = write_lines(
        tmp_path / "train.jsonl",
        {"id": "1", "audio": "a.wav", **segment},
        {"id": "2", "audio": "b.wav"},
        {"id": "3", "audio": "a.wav", "end_time": 1.0},
        {"id": "4", "audio": "a.wav", "begin_time": 1.0},
        {"id": "5", "audio": "s1.wav"},
        {"id": "6", "audio": "s2.wav"},
    )
    test = write_lines(
        tmp_path / "test.jsonl",
        {"id": "7", "audio": str(tmp_path / "link.wav"), **segment},
        {"id": "8", "audio": "copy.flac"},
        {"id": "9", "audio": "a.wav", "begin_time": 0.5, "end_time": 1.0},
    )
    validation = validate([train, test])
    found = [(f.id, f.kind, f.message) for f in validation.findings if f.kind != "silent"]
    assert found == [
        ("3", "repeated_audio", f"the same audio as {train}:1 (the same segment of the same file)"),
        ("7", "shared_audio", f"the same audio as {train}:1 (the same segment of the same file)"),
        ("8", "shared_audio", f"the same audio as {train}:2 (the same samples, in another file or segment)"),
    ]


def test_texts_in_some_lines_only(tmp_path: Path) -> None:
    for number in range(4):
        write_sound(tmp_path / f"{number}.wav", sound(number))
    lines = [{"audio": f"{number}.wav"} for number in range(4)]
    assert validate([write_lines(tmp_path / "none.jsonl", *lines)]).findings == []
    lines[0]["text"] = lines[2]["text"] = "one"
    (finding,) = validate([write_lines(tmp_path / "some.jsonl", *lines)]).findings
    assert (finding.line, finding.kind, finding.level) == (2, "missing_text", "warning")
    assert finding.message == "2 utterances have no text, this one first, though 2 have one"


def test_limits_can_be_moved(tmp_path: Path) -> None:
    for number, seconds in enumerate((0.2, 1.0, 3.0)):
        write_sound(tmp_path / f"{number}.wav", sound(number, seconds))
    path = write_lines(tmp_path / "set.jsonl", *({"audio": f"{number}.wav"} for number in range(3)))
    assert kinds(validate([path], Limits(0.5, 2.0))) == [(1, "too_short"), (3, "too_long")]
    assert kinds(validate([path], Limits(0.2, 3.0))) == []


@pytest.mark.parametrize("workers", [1, 7])
def test_findings_come_in_the_order_of_the_lines(tmp_path: Path, workers: int) -> None:
    lines: list[dict[str, Any] | str] = []
    for number in range(40):  # long files among short ones, which take less time
        write_sound(tmp_path / f"{number}.wav", sound(number, 20.0 if number % 7 == 0 else 0.05))
        lines.append({"audio": f"{number}.wav"} if number % 3 else "{")
    findings = kinds(validate([write_lines(tmp_path / "set.jsonl", *lines)], workers=workers))
    expected = [(n + 1, "too_short" if n % 3 else "bad_line") for n in range(40) if n % 3 == 0 or n % 7]
    assert findings == expected


def test_rates_follow_the_language() -> None:
    chinese, english = resolve_language("zh"), resolve_language("en")
    assert check_text("我们今天去北京大学看朋友", chinese, 1.0) == []
    assert [kind for kind, _ in check_text("我们今天去北京大学看朋友" * 2, chinese, 1.0)] == ["fast_speech"]
    assert check_text("one two three four five six", english, 1.0) == []
    assert check_text("one " * 100, english, None) == [], "nothing is said of audio that cannot be read"
    assert check_text("no", english, 2.9) == [], "a short answer between short pauses"


# -- Command line ------------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data.validate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_exit_status_of_clean_data(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "set.jsonl", *clean_lines(tmp_path))
    done = run(path, "fail_on=warning", "workers=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors, 0 warnings" in done.stdout
    assert "15 utterances, 0.01 h" in done.stdout
    assert "Findings" not in done.stdout
    assert done.stderr == "", "no progress bar where there is no terminal"


def test_progress_is_shown_on_a_terminal(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "set.jsonl", {"audio": write_sound(tmp_path / "a.wav")})
    terminal, standard_error = os.openpty()
    with open(tmp_path / "out", "w") as standard_output:
        command = [sys.executable, "-m", "data.validate", str(path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=standard_output, stderr=standard_error)
    os.close(standard_error)
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other side has been closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    assert b"set.jsonl" in shown
    assert b"1/1" in shown
    assert "1 utterances" in (tmp_path / "out").read_text()


def test_report_of_bad_data(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav")
    lines = [{"audio": "a.wav", "text": "[noise] \ud800 one"}, "{"] + [{"audio": f"{n}.wav"} for n in range(5)]
    path = write_lines(tmp_path / "set.jsonl", *lines)
    done = run(path, f"report={tmp_path}/new/report.json")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    table = " ".join(done.stdout.replace("│", " ").split())
    assert "error missing_file 5" in table
    assert "error bad_line 1" in table
    assert "'[noise]'" in table, "brackets are no markup of the table"
    assert "6 errors, 3 warnings" in table
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["counts"] == {
        "bad_line": 1,
        "missing_file": 5,
        "missing_text": 1,
        "control_character": 1,
        "tag": 1,
    }
    assert report["manifests"] == [str(path)]
    assert report["totals"]["utterances"] == 6
    assert len(report["findings"]) == 9
    assert {
        "file": str(path),
        "line": 4,
        "id": "1.wav",
        "level": "error",
        "kind": "missing_file",
        "message": f"{tmp_path}/1.wav cannot be read (No such file or directory): check the path and the file",
    } in report["findings"]
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["report.json"]


def test_warnings_fail_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sound(tmp_path / "a.wav")
    path = str(write_lines(tmp_path / "set.jsonl", {"audio": "a.wav", "text": "one [noise]"}))
    assert main([path]) == 0
    assert main([path, "fail_on=error"]) == 0
    assert main([path, "fail_on=warning"]) == 1
    assert "0 errors, 1 warnings" in capsys.readouterr().out
    assert main([path, "min_seconds=1.5"]) == 1
    assert main([path, "max_seconds=0.5"]) == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set.jsonl", "-h"]) == 0
    assert "python -m data.validate manifest.jsonl [more.jsonl ...]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no manifest is given"),
        (["nowhere.jsonl"], "manifest nowhere.jsonl cannot be read"),
        (["{good}", "nowhere.jsonl"], "manifest nowhere.jsonl cannot be read"),
        (["{good}", "{good}"], "a manifest is given twice"),
        (["{good}", "fail_on=all"], "fail_on=all: must be one of error, warning"),
        (["{good}", "speed=3"], "unknown argument 'speed=3'; there are report=..."),
        (["{good}", "workers=0"], "workers=0: must be a whole number from 1 on"),
        (["{good}", "workers=1.5"], "workers=1.5: must be a whole number"),
        (["{good}", "max_seconds=long"], "max_seconds=long: must be a number of seconds"),
        (["{good}", "min_seconds=-1"], "min_seconds=-1: must be a number of seconds"),
        (["{good}", "report={folder}"], "report="),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_sound(tmp_path / "a.wav")
    good = write_lines(tmp_path / "set.jsonl", {"audio": "a.wav"})
    assert main([argument.format(good=good, folder=tmp_path) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


def test_wrong_usage_in_a_shell() -> None:
    done = run("workers=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: workers=0: must be a whole number from 1 on\n"
