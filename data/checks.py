"""What can be wrong with one utterance: its audio, as training reads it, and its transcript."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import regex

from data.audio import BadAudio, audio_info, load_audio
from opd.text import Language, resolve_language
from opd.types import Utterance

# Kind of finding: its level. An error stops training or makes a result wrong; a warning is worth a look.
LEVELS: dict[str, str] = {
    "bad_line": "error",
    "empty_manifest": "error",
    "duplicate_id": "error",
    "shared_id": "warning",
    "repeated_audio": "warning",
    "shared_audio": "error",
    "missing_file": "error",
    "unreadable_audio": "error",
    "empty_audio": "error",
    "cut_short": "error",
    "outside_file": "error",
    "not_finite": "error",
    "too_short": "error",
    "too_long": "error",
    "silent": "warning",
    "clipped": "warning",
    "low_sampling_rate": "warning",
    "several_channels": "warning",
    "wrong_duration": "warning",
    "unknown_language": "error",
    "empty_text": "error",
    "missing_text": "warning",
    "no_letter": "warning",
    "unexpected_script": "warning",
    "control_character": "warning",
    "markup": "warning",
    "tag": "warning",
    "fast_speech": "warning",
    "slow_speech": "warning",
}

SILENT_PEAK = 10 ** (-60 / 20)
FULL_SCALE = 1 - 2 / 2**15  # the largest sample of 16 bits is 1 - 1 / 2**15
MAX_CLIPPED_SHARE = 0.01
MIN_SAMPLING_RATE = 8_000
MAX_DURATION_ERROR = 0.1  # seconds
# Fast speakers stay below 6 words or 25 letters a second, or 10 characters of Chinese, Japanese or Korean.
MAX_WORDS_PER_SECOND = 7.0
MAX_CHARACTERS_PER_SECOND = {"wer": 35.0, "cer": 20.0}
MIN_CHARACTERS_PER_SECOND = {"wer": 1.0, "cer": 0.4}
MIN_SECONDS_FOR_SLOW = 3.0

# Scripts (ISO 15924) of letters in texts whose script `opd.text.Language` gives: some must occur, the others may.
_SCRIPTS = {"Hans": ("Hani",), "Hant": ("Hani",), "Jpan": ("Hani", "Hira", "Kana"), "Kore": ("Hang",)}
_ALSO_ALLOWED = {"Kore": ("Hani",)}
# Foreign names are written in Latin letters anywhere; the other two are letters of no script.
_ALLOWED_ANYWHERE = ("Latn", "Common", "Inherited")
# Bidirectional marks, zero-width spaces and the replacement character are as invisible or wrong as control characters.
_CONTROL = regex.compile(r"[\p{Cc}\p{Cs}\p{Co}\p{Cn}\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffd]")
_LETTER = regex.compile(r"\p{L}")
_MARKUP = regex.compile(
    r"&(?:#\d+|#x[0-9a-f]+|[a-z]{2,}\d*);"
    r"|</[^<>]*>|<!--|<[a-z]\w*\s[^<>]*>|<[a-z]\w*/>|<(?:a|b|i|u|s|br|p|q|em|li|ul|ol|td|tr|div|sub|sup|font|span|strong)>",
    regex.IGNORECASE,
)
_TAG = regex.compile(r"<[^<>\s][^<>]*>|\[[^\[\]]+\]|\{[^{}]+\}")


@dataclass(frozen=True)
class Limits:
    """Seconds that an utterance's audio may last."""

    min_seconds: float = 0.1
    max_seconds: float = 30.0


@dataclass
class Checked:
    """What the checks of an utterance brought.

    findings       (kind, message) of each
    seconds        length of the audio; None where it could not be read
    sampling_rate  of the file, Hz
    language       ISO code, or as it is written where it is not known
    segment        the file and the times, the same for every way to write a path
    content        digest of the samples; None where they were not read or are silent
    """

    findings: list[tuple[str, str]] = field(default_factory=list)
    seconds: float | None = None
    sampling_rate: int | None = None
    language: str | None = None
    segment: tuple[str, float, float] | None = None
    content: bytes | None = None


def check_utterance(utterance: Utterance, limits: Limits) -> Checked:
    """All that can be found without looking at other utterances."""
    checked = Checked()
    try:
        _check_audio(utterance, limits, checked)
    except BadAudio as error:
        checked.findings.append((error.kind, f"{utterance.audio} {error.reason}"))
    language = None
    if utterance.language:
        checked.language = utterance.language
        try:
            language = resolve_language(utterance.language)
            checked.language = language.iso
        except ValueError as error:
            checked.findings.append(("unknown_language", str(error)))
    if utterance.text is not None:
        is_usable = all(LEVELS[kind] != "error" for kind, _ in checked.findings)
        checked.findings += check_text(utterance.text, language, checked.seconds if is_usable else None)
    return checked


def _check_audio(utterance: Utterance, limits: Limits, checked: Checked) -> None:
    seconds, sampling_rate, channels = audio_info(utterance)
    checked.seconds, checked.sampling_rate = seconds, sampling_rate
    checked.segment = (os.path.realpath(utterance.audio), max(0.0, utterance.begin_time), utterance.end_time)
    found = checked.findings
    if sampling_rate < MIN_SAMPLING_RATE:
        found.append(("low_sampling_rate", f"{sampling_rate} Hz: speech needs at least {MIN_SAMPLING_RATE}"))
    if channels > 1:
        found.append(("several_channels", f"{channels} channels, which are averaged"))
    duration = utterance.extra.get("duration")
    if isinstance(duration, int | float) and abs(duration - seconds) > MAX_DURATION_ERROR:
        found.append(("wrong_duration", f"`duration` says {duration:g} s, the audio has {seconds:.3f} s"))
    samples = load_audio(utterance, max_seconds=limits.max_seconds)
    if seconds < limits.min_seconds:
        found.append(
            ("too_short", f"{utterance.audio} has {seconds:.3f} s, at least {limits.min_seconds:g} s are wanted")
        )
    peak = float(np.abs(samples).max())
    if peak < SILENT_PEAK:
        level = f"{20 * np.log10(peak):.0f} dBFS" if peak else "digital silence"
        found.append(("silent", f"nothing to hear: the peak is {level}"))
        return
    checked.content = hashlib.blake2b(samples.tobytes(), digest_size=16).digest()
    clipped = float((np.abs(samples) >= FULL_SCALE).mean())
    if clipped > MAX_CLIPPED_SHARE:
        found.append(("clipped", f"{clipped:.1%} of the samples are at full scale"))


def check_text(text: str, language: Language | None, seconds: float | None) -> list[tuple[str, str]]:
    """(kind, message) of each finding in a transcript of audio of `seconds`; None where either is not known."""
    if not text.strip():
        return [("empty_text", "the text is empty")]
    found = []
    if controls := _CONTROL.findall(text):
        found.append(("control_character", f"{_list(controls, ascii)} in {_excerpt(text)}"))
    if markup := _MARKUP.findall(text):
        found.append(("markup", f"{_list(markup)} in {_excerpt(text)}"))
    spoken = _MARKUP.sub("", text)
    if tags := _TAG.findall(spoken):
        found.append(("tag", f"{_list(tags)} in {_excerpt(text)}"))
    spoken = _TAG.sub("", spoken)
    if not _LETTER.search(spoken):
        found.append(("no_letter", f"no letter in {_excerpt(text)}"))
    elif language is not None:
        found += _check_script(spoken, language)
    if seconds:
        found += _check_rate(spoken, language.metric if language else "wer", seconds)
    return found


def _check_script(text: str, language: Language) -> list[tuple[str, str]]:
    own, foreign = _script_patterns(language.script)
    if letters := foreign.findall(text):
        return [("unexpected_script", f"letters that {language.name} is not written in: {_list(letters)}")]
    if not own.search(text):
        return [("unexpected_script", f"no letter that is {language.name}'s own in {_excerpt(text)}")]
    return []


@lru_cache
def _script_patterns(script: str) -> tuple[regex.Pattern, regex.Pattern]:
    """(a letter of the script, a letter that texts in the script do not have)."""
    own = _SCRIPTS.get(script, (script,))
    letters_of = [rf"\p{{Script={name}}}" for name in (*own, *_ALSO_ALLOWED.get(script, ()), *_ALLOWED_ANYWHERE)]
    foreign = rf"[\p{{L}}--[{''.join(letters_of)}]]"
    return regex.compile(f"[{''.join(letters_of[: len(own)])}]"), regex.compile(foreign, regex.VERSION1)


def _check_rate(text: str, metric: str, seconds: float) -> list[tuple[str, str]]:
    words, characters = len(text.split()), sum(map(len, text.split()))
    said = f"{words} words, {characters} characters in {seconds:.2f} s"
    too_many_words = metric == "wer" and words / seconds > MAX_WORDS_PER_SECOND
    if too_many_words or characters / seconds > MAX_CHARACTERS_PER_SECOND[metric]:
        return [("fast_speech", f"more text than can be said: {said}")]
    if seconds >= MIN_SECONDS_FOR_SLOW and characters / seconds < MIN_CHARACTERS_PER_SECOND[metric]:
        return [("slow_speech", f"little text for the audio: {said}")]
    return []


def _list(found: list[str], show: type | object = repr) -> str:
    """The first few of what was found, each once."""
    distinct = list(dict.fromkeys(found))
    return ", ".join(map(show, distinct[:5])) + (", ..." if len(distinct) > 5 else "")  # type: ignore[arg-type]


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
