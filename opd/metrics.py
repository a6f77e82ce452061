"""One flat dictionary per step -> a line on the terminal, metrics.jsonl and W&B; and the timer of the phases.

metrics.jsonl is the record. It is written first, and nothing that happens to W&B can keep a step out of it.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.live import Live
from rich.text import Text

SAMPLE_COLUMNS = ["id", "reference", "hypothesis", "wer"]
_TIMED_PHASES = ("rollout", "teacher", "update")
_WANDB_HOST, _WANDB_FORMER_HOST = "api.forge.coreweave.com", "api.wandb.ai"  # one service, two names in .netrc files


class PhaseTimer:
    """Seconds per phase: `with timer("rollout"): ...`. A phase may run several times in a step.

    before: the `seconds()` of the run up to its checkpoint, so that a resumed run sums up like an unbroken one.
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self._totals = dict(before or {})
        self._step: dict[str, float] = {}
        self._start = time.perf_counter() - self._totals.pop("total", 0.0)
        self._step_began = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._totals[phase] = self._totals.get(phase, 0.0) + elapsed
            self._step[phase] = self._step.get(phase, 0.0) + elapsed

    def take_step(self) -> dict[str, float]:
        """`{"time/<phase>": seconds}` since the last call, for the step's metrics; `time/step` is all the time since then."""
        now = time.perf_counter()
        taken = {f"time/{phase}": seconds for phase, seconds in self._step.items()} | {
            "time/step": now - self._step_began
        }
        self._step, self._step_began = {}, now
        return taken

    def seconds(self) -> dict[str, float]:
        """`{"total": ..., "<phase>": ...}` since the start of the run, for summary.json and the loop state."""
        return {"total": time.perf_counter() - self._start, **self._totals}


class MetricsLog:
    """Where the metrics of a run go. Keys are `group/name`, values numbers; NaN and infinity become null in the file.

    Make it after `RunDir.truncate_metrics`. wandb_mode is online, offline or disabled; online without an API key or
    network falls back to offline with one printed line, and WANDB_MODE=offline|disabled in the environment wins over
    online.
    """

    def __init__(
        self,
        run_dir_path: str | Path,
        config_dict: Mapping[str, Any],
        wandb_mode: str,
        wandb_project: str,
        num_steps: int,
        log_every: int,
    ) -> None:
        run_dir = Path(run_dir_path)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._terminal = _Terminal(num_steps, log_every)
        self._wandb = _Wandb(run_dir, config_dict, wandb_mode, wandb_project, self._terminal.say)

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records optimizer step `step` (the first is 1)."""
        numbers = {key: _number(key, value) for key, value in metrics.items()}
        self._write(step, numbers)
        self._wandb.log(step, numbers)
        self._terminal.step(step, numbers)

    def log_eval(self, step: int, set_name: str, result: Any, samples: Sequence[Sequence[Any]] = ()) -> None:
        """Records an evaluation after `step`: numbers under `eval/<name>/<set>`, samples as a W&B table.

        result is an `evaluate.EvalResult` or its dictionary; samples are rows of SAMPLE_COLUMNS.
        """
        values = result if isinstance(result, Mapping) else result.to_dict()
        numbers = {
            f"eval/{name}/{set_name}": _number(name, value)
            for name, value in values.items()
            if not isinstance(value, str)
        }
        self._write(step, numbers)
        self._wandb.log(step, numbers)
        if samples:
            self._wandb.log_table(step, f"eval/samples/{set_name}", samples)
        self._terminal.evaluation(step, set_name, values)

    def close(self) -> None:
        """Ends the progress line, the file and the W&B run. A second call does nothing."""
        self._terminal.close()
        self._file.close()
        self._wandb.close()

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in sorted(numbers.items())}
        self._file.write(json.dumps({"step": step, **finite}, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()


class _Terminal:
    """A live line where a person watches, else a plain line every `log_every` steps (and for the first and last)."""

    def __init__(self, num_steps: int, log_every: int) -> None:
        self._num_steps, self._log_every = num_steps, log_every
        self._durations: deque[float] = deque(maxlen=50)
        self._step_began: float | None = None  # unknown before the first step: start-up is no part of it
        self._first = True
        self._live: Live | None = None
        if sys.stdout.isatty():
            self._live = Live(auto_refresh=False)
            self._live.start()

    def say(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(Text(line))
        else:
            print(line, flush=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.perf_counter()
        timed = sum(metrics.get(f"time/{phase}", 0.0) for phase in _TIMED_PHASES)
        self._durations.append(timed if self._step_began is None else now - self._step_began)
        self._step_began = now
        line = progress_line(step, self._num_steps, metrics, sum(self._durations) / len(self._durations))
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif self._first or step % self._log_every == 0 or step == self._num_steps:
            print(line, flush=True)
        self._first = False

    def evaluation(self, step: int, set_name: str, values: Mapping[str, Any]) -> None:
        parts = [f"{name.upper()} {values[name]:.2%}" for name in ("wer", "cer") if name in values]
        count = f" ({values['num_utterances']} utterances)" if "num_utterances" in values else ""
        self.say(f"step {step}/{self._num_steps}  eval {set_name}: {'  '.join(parts)}{count}")
        if self._step_began is not None:
            self._step_began = time.perf_counter()  # an evaluation is no part of the next step's time

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def progress_line(step: int, num_steps: int, metrics: Mapping[str, float], step_seconds: float) -> str:
    """`step 12/300  loss 0.1234  VUSS 0.93  WER 21.4%  rollout 0.8s  teacher 0.3s  update 0.5s  left 7m40s`.

    step_seconds is the duration of a step that the time left is reckoned with. What a step lacks is left out.
    """
    parts = [f"step {step}/{num_steps}"]
    losses = sorted(key for key in metrics if key.startswith("loss/"))
    if losses:
        loss = next((key for key in ("loss/total", "loss/kl") if key in metrics), losses[0])
        parts.append(f"loss {metrics[loss]:.4f}")
    if "support/vuss" in metrics:
        parts.append(f"VUSS {metrics['support/vuss']:.3f}")
    if "rollout/wer" in metrics:
        parts.append(f"WER {metrics['rollout/wer']:.1%}")
    parts += [f"{phase} {metrics[f'time/{phase}']:.2f}s" for phase in _TIMED_PHASES if f"time/{phase}" in metrics]
    minutes, seconds = divmod(round((num_steps - step) * step_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f"left {hours}h{minutes:02d}m" if hours else f"left {minutes}m{seconds:02d}s")
    return "  ".join(parts)


class _Wandb:
    """The W&B run. Whatever fails in it is said once; the training goes on without it."""

    def __init__(
        self, run_dir: Path, config: Mapping[str, Any], mode: str, project: str, say: Callable[[str], None]
    ) -> None:
        self._run: Any = None
        self._say = say
        environment_mode = os.environ.get("WANDB_MODE")
        if mode == "online" and environment_mode in ("offline", "disabled"):
            mode = environment_mode
        if mode == "disabled":
            return
        arguments = {
            "project": project,
            "name": run_dir.name,
            "dir": str(run_dir),
            "config": dict(config),
            "id": _wandb_run_id(run_dir),
        }
        why = "no API key"
        try:
            if mode == "online" and has_wandb_key():
                try:
                    self._run = _start_wandb("online", arguments)
                    return
                except Exception as error:  # whatever the library raises: no network, a refused key
                    why = f"online did not start: {_one_line(error)}"
                    _forget_wandb()
            if mode == "online":
                say(f"wandb: {why}; logging offline, upload later by: wandb sync {run_dir}/wandb/offline-run-*")
            self._run = _start_wandb("offline", arguments)
        except Exception as error:
            self._failed("could not start", error)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:
            self._failed("stopped logging", error)

    def log_table(self, step: int, key: str, rows: Sequence[Sequence[Any]]) -> None:
        if self._run is None:
            return
        try:
            import wandb

            table = wandb.Table(columns=SAMPLE_COLUMNS, data=[list(row) for row in rows])
            self._run.log({key: table}, step=step)
        except Exception as error:
            self._failed("stopped logging", error)

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._failed("could not finish", error)
        self._run = None

    def _failed(self, what: str, error: Exception) -> None:
        self._run = None
        self._say(f"wandb: {what} ({_one_line(error)}); the metrics go on in metrics.jsonl")


def _start_wandb(mode: str, arguments: dict[str, Any]) -> Any:
    import wandb

    if mode == "online":
        # A replayed step is already on the server and is dropped there; a resumed run is bit-equal, so nothing is lost.
        # An explicit setting hides wandb's own variable, so it is read here; wandb's default of 90 s is a long silence.
        timeout_s = float(os.environ.get("WANDB_INIT_TIMEOUT", 30))
        settings = wandb.Settings(console="off", init_timeout=timeout_s)
        return wandb.init(mode="online", resume="allow", settings=settings, **arguments)
    # Offline the id alone joins the parts of a run when they are synced; `resume` would only print that it is ignored.
    return wandb.init(mode="offline", settings=wandb.Settings(console="off", silent=True), **arguments)


def _forget_wandb() -> None:
    """Ends wandb's background process, which would hold the run id of a start that failed."""
    import wandb

    wandb.teardown()


def _wandb_run_id(run_dir: Path) -> str:
    """The W&B id of this run directory, made at its first use, so that a resumed run continues the same W&B run."""
    path = run_dir / "wandb_run_id"
    if path.exists() and (run_id := path.read_text(encoding="utf-8").strip()):
        return run_id
    run_id = secrets.token_hex(4)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def has_wandb_key() -> bool:
    """Whether wandb can log in without asking: a key in the environment, or one in .netrc for its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    host = urlsplit(wandb.setup().settings.base_url).netloc
    hosts = [host, _WANDB_FORMER_HOST] if host == _WANDB_HOST else [host]
    home = Path.home()
    default = home / ".netrc" if (home / ".netrc").exists() else home / "_netrc"
    try:
        entries = netrc.netrc(Path(os.environ.get("NETRC") or default).expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    found = [entries.authenticators(name) for name in hosts]
    return any(entry is not None and entry[2] for entry in found)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _number(key: str, value: Any) -> float | int:
    if hasattr(value, "item"):  # a zero-dimensional tensor or array
        value = value.item()
    assert isinstance(value, int | float), f"metric {key} is a {type(value).__name__}, not a number"
    return value
