"""python -m opd.train recipe=NAME [section.key=value ...]

The main flow on one page: the student writes, the teacher scores those very tokens, the student learns from the
difference. The driver moves utterance records and references; tensors stay with the workers.

Left out of this page on purpose: how ranks share parameters (trainers/), what the loss is (opd/losses.py), how a
checkpoint becomes complete (opd/checkpoint.py).
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from opd.config import describe, load_config, take_flag
from opd.schema import Config
from opd.survival import LOST, STOP, STOPPED_STATUS, Restarts, Stopped
from opd.validate import doubts

if TYPE_CHECKING:
    from opd.run import Run


HELP = """python -m opd.train recipe=NAME [section.key=value ...]

NAME is a file of recipes/ without .yaml, or a path to one. Every key of a recipe can be given on the command line.
  recipe=NAME print_config=true   shows all keys with their values and meanings, without running
  run_dir=DIR                     where the run goes; with the same one an interrupted run goes on
python -m opd.doctor recipe=NAME  says whether the run can work here; python -m opd.memory recipe=NAME what it takes of memory"""


def train(config: Config) -> dict:
    """Runs one stage from start (or the newest checkpoint) to export; returns the summary.

    Where a worker or its node is lost, it begins again from the newest checkpoint, train.max_restarts times.
    """
    from opd.resolve import with_run_dir
    from opd.run import Run  # imports Ray and verl: seconds that print_config and a wrong key need not wait for

    for doubt in doubts(config):
        logging.getLogger(__name__).warning(doubt)
    config = with_run_dir(config)
    restarts = Restarts(config.train.max_restarts)
    STOP.check("before the next stage")
    while True:
        # Run directory, data, last complete checkpoint or a fresh start.
        with Run.open(config, is_restart=restarts.used > 0) as run:
            try:
                return run_stage(run, config)
            except LOST as error:
                STOP.check(f"in step {run.step + 1} ({error})")  # what is preempted loses its workers too
                run.note_restart(restarts.allow(error, run.step + 1, run.progress))  # raises where the run is to stop
        STOP.pause(restarts.pause_s, "before lost workers were replaced")


def run_stage(run: Run, config: Config) -> dict:
    """From the run as it was opened to its summary."""
    if run.is_finished():
        return run.print_summary()
    if config.stage == "td":
        run.write_teacher_data()  # the teacher transcribes; the student is then tuned on what passes the filters
    with run.timer("start"):
        run.start_workers()  # student: a verl RayWorkerGroup; teacher: plain Ray actors; both load at the same time
    run.evaluate_before()
    run.evaluate_late()  # what a request to stop left out

    for step in run.steps_left():
        if config.stage == "opd":
            while run.line.wants_rollout(step):  # one; with one_step_off the next one too, before this one trains
                batch = run.next_batch()  # list of Utterance records
                number = run.line.rollout_step(step)
                with run.timer("rollout"):
                    rollout = run.student.generate(batch, number, run.drafts.of(batch))
                run.drafts.keep(batch, rollout.texts)
                run.line.add(step, batch, rollout, run.score(rollout, number))
            with run.timer("teacher"):
                scored = run.line.take(step)
            with run.timer("update"):
                sums = run.student.update(scored.rollout, scored.scores, step)
            run.log_opd(step, scored, sums)
        else:
            batch = run.next_batch()
            with run.timer("update"):
                sums = run.student.update_sft(batch, step)
            run.log_sft(step, sums)
        stop = run.evaluate_if_due(step)
        run.save_if_due(step, last=stop or step == config.train.num_steps)
        if stop:
            break

    return run.finish()  # export, evaluation of the exported weights, summary.json


def run_all(config: Config) -> dict:
    """One run, or all runs of a ladder (`stages`) or of a comparison (`compare`), one after the other."""
    from opd.resolve import with_run_dir

    if not config.run_dir:
        config = with_run_dir(config)
        print(f"run_dir={config.run_dir}")  # what goes on after an interruption needs it
    if config.compare:
        from opd.compare import run_comparison

        return run_comparison(config, train)
    if config.stages:
        from opd.ladder import run_ladder

        return run_ladder(config, train)
    return train(config)


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 0; 1 after one line that says what went wrong; 143 where SIGTERM asked it to stop."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    # When several workers fail of one cause, the first is reported below; Ray would print the others after it.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("data").setLevel(logging.INFO)  # making speech takes a minute: say so
    try:
        print_config, arguments = take_flag(arguments, "print_config")
        config = load_config(arguments)
        if print_config:
            print(describe(config))
            return 0
        run_all(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED_STATUS
    except KeyboardInterrupt:
        print("interrupted; start again with the same run_dir to go on from the newest checkpoint", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, TimeoutError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}{_advice(error)}", file=sys.stderr)
        if os.environ.get("OPD_TRACEBACK"):
            raise
        return 1
    return 0


def _advice(error: Exception) -> str:
    """What to do about an error of the machine that does not say so itself."""
    # The second is what torch says of a disk that becomes full within a file.
    for words, meaning in (("No space left on device", ""), ("inline_container.cc", "the disk is probably full; ")):
        if words in str(error):
            return f"; {meaning}complete checkpoints are untouched: make room, and the same command and run_dir go on"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
