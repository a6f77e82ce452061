"""The run directory: resolved config, complete checkpoints, metrics, summary; one driver at a time.

    config.yaml  metrics.jsonl  summary.json  bad_audio.jsonl  export/  .lock
    checkpoints/step-000500/{what the workers wrote, loop_state.json, config.yaml, COMPLETE}  checkpoints/{latest,best}.json

A checkpoint is written beside its place and renamed when whole, so whatever is called `step-N` was whole once; the
marker lists its files with sizes and checksums, so that one damaged later is noticed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
from pathlib import Path
from typing import Any

import yaml

from opd.checkpoint_files import atomic_write_text, damage, fsync, write_marker
from opd.saved_config import CONFIG_FILE, changes, load_saved_config, with_defaults

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
LOOP_STATE = "loop_state.json"
_STEP_NAME = re.compile(r"step-(\d{6,})")


class RunDir:
    """Everything that one run leaves on disk. Made by `RunDir.open`; holds the run's lock until `close`.

    Made with lock_fd=None, it is for reading only.

    Steps are counts of finished optimizer steps: checkpoint 500 is the state after step 500.
    """

    def __init__(self, path: Path, config: dict[str, Any], keep_last: int, lock_fd: int | None) -> None:
        assert keep_last >= 1, "the newest checkpoint is always kept"
        self.path = path
        self.config = config
        self.keep_last = keep_last
        self.checkpoints_dir = path / "checkpoints"
        self._best_path = self.checkpoints_dir / "best.json"
        self.metrics_path = path / "metrics.jsonl"
        self.summary_path = path / "summary.json"
        self.bad_audio_path = path / "bad_audio.jsonl"
        self.export_dir = path / "export"
        self._lock_fd = lock_fd
        self._pending: dict[int, Path] = {}
        self._reported: set[str] = set()
        self._sound: set[int] = set()  # checkpoints whose contents were checked, or written here

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: dict[str, Any],
        resume: str = "auto",
        frozen_keys: list[str] | None = None,
        in_ray_job: bool = False,
        defaults: dict[str, Any] | None = None,
    ) -> RunDir:
        """Makes or reopens a run directory, takes its lock and saves the resolved config there.

        config is plain and nested (`Config.to_dict()`); its `checkpoint.keep_last` says how many of the newest
        checkpoints are kept, beside the best by evaluation. frozen_keys are dotted keys or whole sections that may not
        differ from the saved config once there is a checkpoint to resume; defaults, in the same form, are what keys had that
        the version which saved it did not know.

        Raises ValueError for a relative path inside a Ray job, a path that cannot be written, a directory that is
        not a run directory or belongs to another recipe, a run that another driver is writing, checkpoints in the way
        of resume=never, changed frozen keys under resume=auto, and checkpoints of which none is undamaged.
        """
        if resume not in ("auto", "never"):
            raise ValueError(f"resume={resume}: use auto (continue where there is a checkpoint) or never")
        path = Path(path).expanduser()
        if in_ray_job and not path.is_absolute():
            raise ValueError(
                f"run_dir={path}: a relative run_dir inside a Ray job would be lost with the job's temporary working "
                "directory; give an absolute path on storage that outlives the job"
            )
        path = path.absolute()
        lock_fd = _make_and_lock(path)
        try:
            run = cls(path, config, config.get("checkpoint", {}).get("keep_last", 2), lock_fd)
            run.check_saved_config(resume, frozen_keys or [], defaults)
            newest = run.latest()
            run._write(CONFIG_FILE, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            run._remove_leftovers()
            run._point_latest(newest)
        except OSError as error:
            os.close(lock_fd)
            raise _not_writable(path, error) from error
        except BaseException:
            os.close(lock_fd)
            raise
        return run

    def close(self) -> None:
        """Gives the lock back. The operating system does the same when the driver dies."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    # -- saving

    def begin_save(self, step: int) -> Path:
        """An empty directory for the workers to write checkpoint `step` into; nothing counts before `commit_save`.

        Its name is new each time: a worker that outlived a killed driver cannot write into a later save.
        """
        self._remove_leftovers()
        temp = self.checkpoints_dir / f".tmp-{_step_name(step)}-{secrets.token_hex(4)}"
        temp.mkdir(parents=True)
        self._pending[step] = temp
        return temp

    def commit_save(self, step: int, loop_state: dict[str, Any]) -> Path:
        """Completes the checkpoint begun by `begin_save`: loop_state.json, config, marker, rename, `latest`, retention.

        loop_state is JSON-able. Raises OSError (a full disk, say) with the earlier checkpoints untouched.
        """
        assert step in self._pending, f"commit_save({step}) without begin_save({step})"
        temp, target = self._pending[step], self.checkpoint_path(step)
        (temp / LOOP_STATE).write_text(json.dumps(loop_state), encoding="utf-8")
        shutil.copyfile(self.path / CONFIG_FILE, temp / CONFIG_FILE)
        # The data must be on disk before the marker that vouches for it, and the marker before the name.
        write_marker(temp, step)
        if target.exists():  # a damaged checkpoint, or one of an earlier, longer run
            os.rename(target, self.checkpoints_dir / f".old-{target.name}-{secrets.token_hex(4)}")
        os.rename(temp, target)
        fsync(self.checkpoints_dir)
        self._sound.add(step)
        del self._pending[step]
        self._point_latest(step)
        self._apply_retention()
        return target

    def abandon_save(self, step: int) -> None:
        """Removes what was written of a checkpoint that was begun and cannot be completed."""
        temp = self._pending.pop(step, None)
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)

    def record_eval(self, step: int, wer: float) -> bool:
        """Notes the WER (a fraction) after `step` in best.json and says whether it is the best so far.

        Call it before `commit_save(step)`. Steps at or beyond `step` that were noted earlier belong to a part of the
        run that was lost in a crash, and are forgotten. A WER that is not finite is never the best.
        """
        evals = {earlier: value for earlier, value in self._evals().items() if earlier < step}
        is_best = math.isfinite(wer) and all(wer < value for value in evals.values())
        if math.isfinite(wer):
            evals[step] = wer
        best_step = min(evals, key=lambda candidate: (evals[candidate], candidate), default=None)
        best = {"step": best_step, "wer": None if best_step is None else evals[best_step]}
        self.checkpoints_dir.mkdir(exist_ok=True)
        atomic_write_text(self._best_path, json.dumps({**best, "evals": sorted(evals.items())}) + "\n")
        return is_best

    # -- reading, and the other files

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint whose checksums are right, None where there is no checkpoint at all.

        Damaged ones are skipped with a warning. Raises ValueError where there is none but damaged ones: to begin from
        the first step again would overwrite what the run has measured.
        """
        problems = []
        for step in reversed(self._saved_steps()):
            if step in self._sound and damage(self.checkpoint_path(step)) is None:
                return step
            problem = damage(self.checkpoint_path(step), contents=True)
            if problem is None:
                self._sound.add(step)
                return step
            self._report(step, problem)
            problems.append(f"{_step_name(step)}: {problem}")
        if problems:
            raise ValueError(
                f"run_dir={self.path}: every checkpoint is damaged ({'; '.join(problems)}); restore the files of one, or "
                "choose a new run_dir"
            )
        return None

    def complete_steps(self) -> list[int]:
        """Steps of the checkpoints whose files are all there and as long as they were; the others are warned of."""
        complete = []
        for step in self._saved_steps():
            path = self.checkpoint_path(step)
            problem = damage(path)
            if problem is None:
                complete.append(step)
            else:
                self._report(step, problem)
        return complete

    def best(self) -> tuple[int, float] | None:
        """(step, wer) of the complete checkpoint with the lowest evaluation WER, the earliest of equals, or None."""
        evals = self._evals()
        saved = [(evals[step], step) for step in self.complete_steps() if step in evals]
        if not saved:
            return None
        wer, step = min(saved)
        return step, wer

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints_dir / _step_name(step)

    def load_loop_state(self, step: int) -> dict[str, Any]:
        """What `commit_save` was given. Raises ValueError where checkpoint `step` is not there or damaged."""
        path = self.checkpoint_path(step)
        problem = damage(path, contents=step not in self._sound)
        if problem:
            raise ValueError(f"{path}: checkpoint {step} cannot be loaded: {problem}")
        return json.loads((path / LOOP_STATE).read_text(encoding="utf-8"))

    def truncate_metrics(self, step: int | None, unevaluated: bool = False) -> None:
        """Drops the lines of metrics.jsonl beyond `step`; all lines for 0 or None (nothing to resume).

        unevaluated  the step is evaluated again: lines of its evaluations go too

        After it a resumed run's file continues like an unbroken run's. Broken lines (a crash in mid-write) go too.
        Call it before the file is opened for writing.
        """
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_text(encoding="utf-8", errors="replace").split("\n")
        # A fresh start evaluates before its first step again, so step 0 is not kept for it.
        kept = [line for line in lines if step and (at := _line_step(line)) is not None and at <= step]
        if unevaluated:
            kept = [line for line in kept if _line_step(line) != step or '"eval/' not in line]
        self._write("metrics.jsonl", "".join(line + "\n" for line in kept))

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")

    # -- inside

    def _write(self, name: str, text: str) -> None:
        atomic_write_text(self.path / name, text)

    def _evals(self) -> dict[int, float]:
        if not self._best_path.exists():
            return {}
        return dict(json.loads(self._best_path.read_text(encoding="utf-8"))["evals"])

    def _saved_steps(self) -> list[int]:
        matches = (_STEP_NAME.fullmatch(entry.name) for entry in self.checkpoints_dir.glob("step-*"))
        return sorted(int(match[1]) for match in matches if match)

    def _report(self, step: int, problem: str) -> None:
        path = self.checkpoint_path(step)
        if path.name not in self._reported:
            self._reported.add(path.name)
            logger.warning("%s: checkpoint skipped, it is damaged: %s", path, problem)

    def check_saved_config(self, resume: str, frozen_keys: list[str], defaults: dict[str, Any] | None = None) -> None:
        config_path = self.path / CONFIG_FILE
        if not config_path.exists():
            return
        saved = with_defaults(load_saved_config(config_path), defaults or {})
        now = yaml.safe_load(yaml.safe_dump(self.config))  # tuples and the like, as they come back from a file
        if saved.get("recipe") != now.get("recipe"):
            raise ValueError(
                f"run_dir={self.path}: this run belongs to recipe {saved.get('recipe')!r}, not to "
                f"{now.get('recipe')!r}; choose another run_dir"
            )
        steps = self._saved_steps()
        if not steps:
            return
        if resume == "never":
            raise ValueError(
                f"run_dir={self.path}: resume=never, but there are checkpoints (the newest is step {steps[-1]}); "
                "choose another run_dir, or continue with resume=auto"
            )
        if changed := changes(saved, now, frozen_keys):
            raise ValueError(
                f"run_dir={self.path}: this run cannot be resumed with a changed configuration: {'; '.join(changed)}; "
                "restore these values or choose another run_dir"
            )

    def _remove_leftovers(self) -> None:
        for pattern in (".tmp-step-*", ".old-step-*"):
            for leftover in self.checkpoints_dir.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        self._pending.clear()

    def _point_latest(self, step: int | None) -> None:
        pointer = self.checkpoints_dir / "latest.json"
        if step is not None:
            atomic_write_text(pointer, json.dumps({"step": step, "path": _step_name(step)}) + "\n")
        else:
            pointer.unlink(missing_ok=True)

    def _apply_retention(self) -> None:
        steps = self.complete_steps()
        kept = set(steps[-self.keep_last :])
        best = self.best()
        if best is not None:
            kept.add(best[0])
        for step in set(steps) - kept:
            # Renamed first: a crash in mid-removal leaves a leftover, not a damaged checkpoint.
            doomed = self.checkpoints_dir / f".old-{_step_name(step)}-{secrets.token_hex(4)}"
            os.rename(self.checkpoint_path(step), doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _make_and_lock(path: Path) -> int:
    """Makes the directory and takes the lock; the descriptor that holds it. Raises ValueError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        ours = (path / CONFIG_FILE).exists()
        # A driver killed before it could write config.yaml leaves these two.
        foreign = [
            entry.name
            for entry in path.iterdir()
            if entry.name != LOCK_FILE and not entry.name.startswith(f".{CONFIG_FILE}.tmp-")
        ]
        if foreign and not ours:
            raise ValueError(
                f"run_dir={path}: the directory is not empty and is no run directory (it holds {min(foreign)} but no "
                f"{CONFIG_FILE}); choose an empty or new directory"
            )
        lock_fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _not_writable(path, error) from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock_fd, 200, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock_fd)
        raise ValueError(
            f"run_dir={path}: another driver ({holder}) is writing this run; end it first, or choose another run_dir"
        ) from error
    except OSError as error:  # some network file systems know no locks
        logger.warning("%s: no lock on this file system (%s); do not start two drivers here", path, error.strerror)
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock_fd


def _not_writable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"run_dir={path}: it cannot be made or written ({error.strerror}); choose a writable place")


def _step_name(step: int) -> str:
    return f"step-{step:06d}"


def _line_step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
