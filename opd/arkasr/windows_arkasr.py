"""Long audio: windows whose borders lie in pauses, and one transcript from those of the windows.

Shape suffixes: S samples, F frames of 20 ms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

FRAME_SECONDS = 0.02
MIN_WINDOW_SECONDS = 0.3  # what is left at the end is never shorter
MIN_MAX_SECONDS = 1.0
QUIET_PERCENTILE, LOUD_PERCENTILE = 1, 95  # of a window's frames
PAUSE_LEVEL = 0.2  # of the way from quiet to loud
MAX_DEPTH = 40.0  # dB below speech; a pause that is quieter is not a better one
# Scripts that are written without spaces, and their punctuation; Korean has spaces.
UNSPACED = re.compile("[\u2e80-\u312f\u31a0-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f\U00020000-\U0003ffff]")


def cut_at_silences(samples: np.ndarray, rate: int = 16000, max_seconds: float = 30.0) -> list[tuple[int, int]]:
    """(first sample, one after the last) of windows of at most max_seconds: in order, without gap or overlap.

    samples  mono (S,) at `rate`

    A window ends in the middle of the pause in its second half that is longest and quietest: the one with the largest
    area under a level a fifth of the way, in dB, from quiet to loud. Where nothing is quieter than the rest it ends at
    max_seconds. A clip that fits is one window, and no other window is shorter than 0.3 s.
    Raises ValueError for max_seconds below 1.
    """
    if not max_seconds >= MIN_MAX_SECONDS:
        raise ValueError(f"max_seconds={max_seconds}: windows need at least {MIN_MAX_SECONDS:g} s")
    num_samples, limit, shortest = len(samples), int(max_seconds * rate), round(MIN_WINDOW_SECONDS * rate)
    frame = max(1, round(FRAME_SECONDS * rate))
    windows, start = [], 0
    while num_samples - start > limit:
        latest = min(start + limit, num_samples - shortest)
        levels_F = _levels(samples[start : start + limit + rate], frame)  # a second more: where a late pause ends
        cut = _middle_of_pause(levels_F, limit // 2 // frame, (latest - start) // frame)
        stop = latest if cut is None else start + round(cut * frame)
        windows.append((start, stop))
        start = stop
    return [*windows, (start, num_samples)]


def _levels(samples: np.ndarray, frame: int) -> np.ndarray:
    """Power of each frame in dB, averaged over it and its two neighbours."""
    whole = np.asarray(samples[: len(samples) // frame * frame], dtype=np.float64).reshape(-1, frame)
    power_F = np.pad(np.square(whole).mean(axis=1), 1, mode="edge")
    return 10 * np.log10(np.convolve(power_F, np.ones(3) / 3, mode="valid") + 1e-10)


def _middle_of_pause(levels_F: np.ndarray, first: int, last: int) -> float | None:
    """Where to cut, in frames, between frames `first` and `last`; None where there is no pause.

    A pause counts by its part between the two, but is cut as near to its own middle as they allow.
    """
    quiet, loud = np.percentile(levels_F, (QUIET_PERCENTILE, LOUD_PERCENTILE))
    quiet = max(quiet, loud - MAX_DEPTH)
    depths_F = (quiet + PAUSE_LEVEL * (loud - quiet) - np.maximum(levels_F, quiet)).clip(min=0)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], depths_F > 0, [0]))))  # begin, end, begin, end, ...
    depths_F[:first], depths_F[last:] = 0, 0
    if not depths_F.any():
        return None
    areas = np.add.reduceat(np.append(depths_F, 0.0), edges)[::2]
    pause = 2 * (len(areas) - 1 - int(np.argmax(areas[::-1])))  # of equal ones the last: fewer windows
    return float(np.clip((edges[pause] + edges[pause + 1]) / 2, first, last))


def join_transcripts(texts: Sequence[str]) -> str:
    """The transcripts of a clip's windows as one: a space at each joint, but none between two CJK characters."""
    joined = ""
    for text in filter(None, (text.strip() for text in texts)):
        joint = "" if not joined or UNSPACED.fullmatch(joined[-1]) and UNSPACED.fullmatch(text[0]) else " "
        joined += joint + text
    return joined


__all__ = ["cut_at_silences", "join_transcripts"]
