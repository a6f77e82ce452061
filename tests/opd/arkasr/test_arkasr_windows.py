"""Windows of long audio: they cover it, end in pauses, and are never too long or too short."""

from __future__ import annotations

import numpy as np
import pytest

from opd.arkasr import cut_at_silences, join_transcripts

RATE = 16000


def voice(seconds: float, seed: int = 0, level: float = 0.1, rate: int = RATE) -> np.ndarray:
    """Noise whose loudness changes 20 times a second, as speech does."""
    generator = np.random.default_rng(seed)
    samples = generator.standard_normal(round(seconds * rate))
    steps = generator.uniform(0.3, 1.0, len(samples) // (rate // 20) + 1)
    return (level * samples * np.repeat(steps, rate // 20)[: len(samples)]).astype(np.float32)


def quiet(seconds: float, level: float = 0.0) -> np.ndarray:
    return (level * np.random.default_rng(9).standard_normal(round(seconds * RATE))).astype(np.float32)


def check_cover(windows: list[tuple[int, int]], num_samples: int, limit: int) -> None:
    assert windows[0][0] == 0
    assert windows[-1][1] == num_samples
    assert all(stop == start for (_, stop), (start, _) in zip(windows, windows[1:], strict=False))
    assert all(0 < stop - start <= limit for start, stop in windows)
    assert all(stop - start >= 0.3 * RATE for start, stop in windows)


@pytest.mark.parametrize("noise", [0.0, 1e-4, 5e-3])
@pytest.mark.parametrize("max_seconds", [4.0, 6.5, 30.0])
def test_windows_end_in_pauses(noise, max_seconds):
    """Phrases of 1.2 to 1.9 s with pauses of 0.3 to 0.6 s: each second half of a window has a pause."""
    generator = np.random.default_rng(1)
    parts, pauses, end = [], [], 0
    for phrase in range(30):
        parts += [voice(generator.uniform(1.2, 1.9), seed=phrase), quiet(generator.uniform(0.3, 0.6))]
        end += len(parts[-2]) + len(parts[-1])
        pauses.append((end - len(parts[-1]), end))
    samples = np.concatenate(parts) + quiet(end / RATE, noise)[:end]
    windows = cut_at_silences(samples, RATE, max_seconds)
    check_cover(windows, len(samples), int(max_seconds * RATE))
    cuts = [stop for _, stop in windows[:-1]]
    assert len(cuts) >= end / (max_seconds * RATE) - 1
    margins = [max(min(cut - first, last - cut) for first, last in pauses) for cut in cuts]
    assert (
        min(margins) >= 0.06 * RATE
    )  # from the speech on either side; no middle where a pause begins in the first half
    assert cut_at_silences(samples, RATE, max_seconds) == windows


def test_the_longer_and_the_quieter_pause_is_taken():
    head, tail = voice(6, seed=1), voice(12, seed=2)
    for first, second in ((quiet(0.2), quiet(0.5)), (quiet(0.3, 0.01), quiet(0.3, 0.0001))):
        for swap in (False, True):
            pauses = [second, first] if swap else [first, second]
            samples = np.concatenate([head, pauses[0], voice(1, seed=3), pauses[1], tail])
            better = len(head) if swap else len(head) + len(pauses[0]) + RATE
            (_, cut), *_ = cut_at_silences(samples, RATE, 10.0)
            assert abs(cut - better - len(second) / 2) <= 0.04 * RATE


def test_a_pause_in_the_first_half_of_a_window_is_left_alone():
    samples = np.concatenate([voice(3), quiet(1.0), voice(4, seed=1), quiet(0.2), voice(8, seed=2)])
    (_, cut), *_ = cut_at_silences(samples, RATE, 10.0)
    assert abs(cut / RATE - 8.1) <= 0.04


@pytest.mark.parametrize(("first", "expected"), [(9.7, 10.0), (9.5, 9.8), (4.8, 5.1), (4.6, 5.0)])
def test_a_pause_at_a_border_of_the_search_is_cut_near_its_own_middle(first, expected):
    samples = np.concatenate([voice(first), quiet(0.6), voice(8, seed=1)])
    (_, cut), *_ = cut_at_silences(samples, RATE, 10.0)
    assert abs(cut / RATE - expected) <= 0.04


def test_of_equal_pauses_the_last_is_taken():
    word, pause = voice(1), quiet(0.4)
    samples = np.concatenate([word, pause] * 10)
    (_, cut), *_ = cut_at_silences(samples, RATE, 7.0)
    assert abs(cut / RATE - 6.8) <= 0.04


def test_without_pauses_windows_are_full():
    constant = np.full(50 * RATE, 0.1, dtype=np.float32)
    assert cut_at_silences(constant, RATE, 20.0) == [(0, 20 * RATE), (20 * RATE, 40 * RATE), (40 * RATE, 50 * RATE)]
    silent = np.zeros(31 * RATE, dtype=np.float32)
    check_cover(cut_at_silences(silent, RATE), len(silent), 30 * RATE)


def test_what_fits_is_one_window():
    assert cut_at_silences(voice(30)) == [(0, 30 * RATE)]
    assert cut_at_silences(voice(2), RATE, 2.0) == [(0, 2 * RATE)]
    assert cut_at_silences(np.zeros(150, dtype=np.float32)) == [(0, 150)]


@pytest.mark.parametrize("rest", [1, 150, 3000, 4799, 4800, 9000])
def test_no_window_is_too_short_for_a_mel_frame(rest):
    for samples in (np.full(4 * RATE + rest, 0.1, dtype=np.float32), voice(4 + rest / RATE)):
        windows = cut_at_silences(samples, RATE, 2.0)
        check_cover(windows, len(samples), 2 * RATE)


def test_other_rates():
    samples = np.concatenate([voice(3, rate=8000), np.zeros(4000, dtype=np.float32), voice(3, rate=8000)])
    ((_, cut), _) = cut_at_silences(samples, 8000, 5.0)
    assert abs(cut - 26_000) <= 0.04 * 8000


@pytest.mark.parametrize("max_seconds", [0.5, 0, -1, float("nan")])
def test_windows_below_a_second_are_refused(max_seconds):
    with pytest.raises(ValueError, match="max_seconds"):
        cut_at_silences(voice(2), RATE, max_seconds)


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["one two", "three"], "one two three"),
        ([" one ", "", "  ", "two"], "one two"),
        ([], ""),
        (["", ""], ""),
        (["今天天气", "很好"], "今天天气很好"),
        (["今天,天气。", "很 好"], "今天,天气。很 好"),
        (["これは", "テストです"], "これはテストです"),
        (["今天 ok", "很好"], "今天 ok 很好"),
        (["很好", "ok"], "很好 ok"),
        (["안녕", "하세요"], "안녕 하세요"),
        (["𠀀", "𠀁"], "𠀀𠀁"),
    ],
)
def test_transcripts_are_joined(texts, joined):
    assert join_transcripts(texts) == joined
