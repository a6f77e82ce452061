"""One run of one stage, as the driver holds it: run directory, data position, workers, metrics, results."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from typing import Any

import psutil

from data.index import open_manifest
from opd.bad_audio import BadAudioList
from opd.batches import Batches, BatchLog
from opd.card import write_model_card
from opd.checkpoint import RunDir
from opd.evaluate import score_transcripts
from opd.evaluation import Evaluation, note_wer
from opd.gate import TeacherGate
from opd.hub import check_push, push
from opd.metrics import MetricsLog, PhaseTimer
from opd.resolve import in_ray_job, portable, resolve
from opd.rollout.texts import DraftTexts
from opd.saving import Saver
from opd.schedule import RolloutLine, ScoredRollout
from opd.schema import FROZEN_KEYS, Config
from opd.seed import fresh_student
from opd.step_metrics import opd_metrics, overhead_seconds, sft_metrics, start_seconds
from opd.summary import summary_of
from opd.survival import STOP
from opd.tables import print_table
from opd.teacher_data import TeacherData, transcript_settings
from opd.teachers.cache import KeptTexts
from opd.teachers.environment import check_environments
from opd.teachers.routing import Router
from opd.text import scored_language
from opd.training_data import TrainingData
from opd.types import Batch
from opd.workers import Workers


class Run:
    """Everything between the lines of the main flow in opd/train.py."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        self.config = config
        self.dir = run_dir
        self.step = run_dir.latest() or 0
        self.state: dict[str, Any] = {
            "eval_before": {}, "bad_audio": 0, "seen": 0, "no_better": 0, "seconds": {},
            "cpu_seconds": {"student": 0.0, "teacher": 0.0},
        }  # fmt: skip
        if self.step:
            self.state = run_dir.load_loop_state(self.step)
        self.timer = PhaseTimer(self.state["seconds"])
        self.history: dict[str, Any] = {"seconds": dict(self.state["seconds"])}
        self.workers = Workers(config, run_dir.path, self.timer, self.state["cpu_seconds"])
        self.gate: TeacherGate | None = None
        self.line = RolloutLine(config)
        self.saver = Saver(run_dir)
        self.drafts = DraftTexts(config.rollout.draft, self.state.setdefault("drafts", {}), KeptTexts(config))
        with self.timer("data"):
            self._read_data()
        if self.step:
            self.data.feed.load_state_dict(self.state["sampler"])
            self._say_batch_size()
        self.batch_log = BatchLog(run_dir.path / "batches.jsonl", self.step, config.data.log_batches)
        run_dir.truncate_metrics(self.step, unevaluated=self.state.get("unevaluated") == self.step)
        self.bad_audio = BadAudioList(run_dir.bad_audio_path, self.state, config.data.max_bad_share)
        self.bad_audio.truncate(self.step)
        self.log = MetricsLog(
            run_dir.path, config.to_dict(), config.wandb.mode, config.wandb.project, config.train.num_steps,
            config.train.log_every,
        )  # fmt: skip

    def _read_data(self) -> None:
        config = self.config
        self.data = TrainingData(config)
        self.evaluate = Evaluation(config)
        self.router = Router(config) if config.stage != "sft" else None
        if self.router is not None:
            for warning in self.data.check_routes(self.router, is_new=not self.step):
                print(f"warning: {warning}")
            if self.router.has_gate:
                self.data.check_gate()
            if config.stage == "opd" and config.eval.teacher:
                self.router.check([u for utterances in self.evaluate.sets.values() for u in utterances])
        if config.stage == "td":
            assert self.router is not None, "stage td has teachers"
            self.teacher_data = TeacherData(
                self.dir.path / "td", config.td, self.router.path_of, config.eval.normaliser, config.data.max_bad_share,
                config.data.read_timeout_s,
            )  # fmt: skip
            self.teacher_data.check_settings(portable(transcript_settings(config)))
            if self.teacher_data.is_complete():
                self.data.use(open_manifest(self.teacher_data.manifest, require_text=True))

    def _say_batch_size(self) -> None:
        before, now = self.state.get("batch_size"), self.config.train.batch_size
        if before not in (None, now):
            print(f"train.batch_size was {before} and is now {now}: going on with the utterance that comes next")

    @classmethod
    def open(cls, config: Config, *, is_restart: bool = False) -> Run:
        """Checks everything that can be checked before a worker starts.

        is_restart   the run has lost workers: the cluster may need a while until it has room for new ones
        """
        import ray

        # A stage of a ladder begins here; the first of a process has begun with the process.
        opened = time.time() if ray.is_initialized() else 0.0
        if config.stage != "sft":
            check_environments(config.teacher.by_route())
        if config.export.push:
            check_push(config.export.push, config.export.private)
        began = time.perf_counter()
        config = resolve(config)
        synthesis = time.perf_counter() - began  # all of it is that, or next to nothing
        run_dir = RunDir.open(
            str(config.run_dir), portable(config.to_dict()), config.resume, FROZEN_KEYS, in_ray_job=in_ray_job(),
            defaults=Config().to_dict(),
        )  # fmt: skip
        run = cls(config, run_dir)
        run.history["synthesis"] = synthesis
        run.history["opened"] = opened
        run.workers.wait_for_room_s = config.cluster.placement_timeout_s if is_restart else 0.0
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.saver.close()
        self.log.close()
        self.dir.close()
        if error[0] is None:  # else the driver ends, and Ray ends its workers; a dead one could not be asked anything
            self.workers.close()

    @property
    def progress(self) -> int:
        """What has been done and is kept: steps, and transcripts of stage td."""
        return self.step + (self.teacher_data.num_transcribed if self.config.stage == "td" else 0)

    def note_restart(self, message: str) -> None:
        """Says why the run begins again, on the terminal and in restarts.jsonl."""
        print(message, flush=True)
        with open(self.dir.path / "restarts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "step": self.step + 1, "reason": message}) + "\n")

    # -- workers -----------------------------------------------------------------------------------------------------

    def write_teacher_data(self) -> None:
        """Stage td: the teacher transcribes the training set, once; what passes the filters is what is trained on."""
        data = self.teacher_data
        if data.is_complete():
            return
        utterances = self.data.utterances()
        if data.num_transcribed < len(utterances):
            self.workers.start_teacher(self._student_path())
            teacher, size = self.workers.teacher, self.config.eval.batch_size
            with self.timer("transcribe"):
                data.transcribe(
                    utterances, teacher.transcribe, size * teacher.num_workers, self.config.data.on_bad_audio
                )
            self.state["cpu_seconds"]["teacher"] += teacher.cpu_seconds()
            self.workers.close()
        print(data.write(utterances))
        self.data.use(open_manifest(data.manifest, require_text=True))

    def start_workers(self) -> None:
        """Ray, the student's ranks and the teacher's workers; then the newest checkpoint, if there is one."""
        self.workers.start(self._student_path(), with_teacher=self.config.stage == "opd")
        if self.router is not None and self.router.has_gate:
            self.gate = TeacherGate(self.router.gate_of, self.teacher.transcribe, self.config.eval.normaliser)
        self.batches = Batches(self.config, self.data.feed, self.gate, self.student.prefetch, self.batch_log)
        if self.step:
            self.student.load(self.dir.checkpoint_path(self.step))
            print(f"going on after step {self.step} of {self.config.train.num_steps}")

    @property
    def student(self) -> Any:
        return self.workers.student

    @property
    def teacher(self) -> Any:
        return self.workers.teacher

    def _student_path(self) -> str:
        """The arkasr folder that the student starts from; made from `student.init` where that is asked for."""
        student = self.config.student
        if student.path:
            return student.path
        return fresh_student(self.dir.path / "init", student.init, self.data.texts(), self.config.seed)

    # -- steps -------------------------------------------------------------------------------------------------------

    def steps_left(self) -> range:
        """The steps that are still to be done: none where the newest checkpoint is that of an early stop."""
        last = self.step if self.state.get("finished") else self.config.train.num_steps
        return range(self.step + 1, last + 1)

    def next_batch(self) -> Batch:
        """The next global batch. Those of a stream are checked here, since it cannot be looked through before."""
        with self.timer("gate") if self.gate is not None else nullcontext():
            batch = self.batches.next()
        if self.router is not None:
            self.data.check_streamed(self.router, batch)
        return batch

    def score(self, rollout: Any, number: int) -> Any:
        """The teacher begins to score a rollout."""
        return self.teacher.start_score(rollout.micro_batches, rollout.refs, number)

    def log_opd(self, step: int, scored: ScoredRollout, sums: dict[str, float]) -> None:
        """Metrics of an OPD step, from sums over all ranks."""
        self.step = step
        batch, rollout = scored.batch, scored.rollout
        metrics = opd_metrics(sums, rollout.sums, len(batch), scored.coverage)
        metrics |= {"rollout/staleness": scored.staleness, "time/data": rollout.waited_s}
        metrics |= self.teacher.metrics()
        if self.gate is not None:
            metrics["gate/left_out_share"] = self.gate.num_left_out / max(1, self.gate.num_checked)
        bad_ids = self.bad_audio.note(step, rollout.bad + self.teacher.bad_audio, len(batch))
        pairs = zip(batch, rollout.texts, strict=True)
        known = [(u, text) for u, text in pairs if u.text is not None and u.id not in bad_ids]
        if known and self.config.rollout.source == "student":
            references, languages = [str(u.text) for u, _ in known], [scored_language(u.language) for u, _ in known]
            texts = [text for _, text in known]
            metrics["rollout/wer"] = score_transcripts(references, texts, languages, self.config.eval.normaliser).wer
        self._log(step, metrics)

    def log_sft(self, step: int, sums: dict[str, Any]) -> None:
        """Metrics of a step on texts, from sums over all ranks."""
        self.step = step
        self.bad_audio.note(step, sums["bad"], self.config.train.batch_size)
        self._log(step, sft_metrics(sums) | {"time/data": sums["waited_s"]})

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        metrics["data/bad_audio"] = self.state["bad_audio"]
        metrics |= {f"data/share/{name}": share for name, share in self.data.feed.shares().items()}
        metrics |= self.timer.take_step()
        metrics["time/overhead"] = overhead_seconds(metrics, self.workers.take_busy_s(), self.config.schedule)
        self.log.log_step(step, metrics)
        if "first_step" not in self.history:
            self.history["first_step"] = True
            self._report_start(metrics)

    def _report_start(self, metrics: dict[str, float]) -> None:
        """Where the time from the command to the first training step went, evaluation and synthesis apart."""
        total = time.time() - max(psutil.Process().create_time(), self.history["opened"]) - self.history["synthesis"]
        before = self.history["seconds"]  # of the run up to its checkpoint, and of attempts before this one
        seconds = {name: value - before.get(name, 0.0) for name, value in self.timer.seconds().items()}
        start = start_seconds(total, seconds, metrics)
        self.history["start"] = start
        listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.items() if name != "total")
        print(f"first step {start['total']:.1f} s after the command: {listed}")

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate_before(self) -> None:
        """WER of the student as it starts and, once, of the teacher."""
        self._stop_if_asked()
        self.timer.take_step()  # what went into the start is not the first step's
        if self.state["eval_before"] or not self.evaluate.sets:
            self.workers.start_clocks()
            return
        with self.timer("eval"):
            before = self.evaluate(0, self.student.transcribe, self.log)
            teacher = {}
            if self.config.stage == "opd" and self.config.eval.teacher:
                self._stop_if_asked()
                teacher = self.evaluate(0, self.workers.teacher_texts, None)
        self._stop_if_asked()
        self.timer.take_step()
        self.workers.start_clocks()
        self.state["eval_before"] = before
        self.state["eval_teacher"] = teacher
        for name, result in before.items():
            extra = f", teacher {teacher[name]['wer']:.2%}" if name in teacher else ""
            print(f"{name}: WER {result['wer']:.2%} before the first step{extra}")

    def evaluate_if_due(self, step: int) -> bool:
        """Evaluates every eval_every steps; True where the run should stop early.

        Raises Stopped where the run was asked to stop: the step is saved, and evaluated when the run goes on.
        """
        every, last = self.config.eval.eval_every, step == self.config.train.num_steps
        if not every or not self.evaluate.sets:
            return False
        # After the last step the export is evaluated anyway; with early stopping it must first compete with the best.
        if (last and not self.config.eval.patience) or (not last and step % every):
            return False
        if STOP.asked:
            self.state["unevaluated"] = step
            self._save(step, last=False, wait=True)
            self._stop_if_asked()
        self.workers.stop_clocks()
        with self.timer("eval"):
            results = self.evaluate(step, self.student.transcribe, self.log)
        self.timer.take_step()
        self.workers.start_clocks()
        wer = results[str(self.config.best_eval_set())]["wer"]
        return note_wer(self.state, step, wer, self.config.eval.patience)

    def evaluate_late(self) -> None:
        """The evaluation of the checkpoint that the run goes on from, where a request to stop came before it."""
        if self.state.pop("unevaluated", None) == self.step:
            stop = self.evaluate_if_due(self.step)
            self.save_if_due(self.step, last=stop or self.step == self.config.train.num_steps)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_if_due(self, step: int, last: bool) -> None:
        """A complete, resumable checkpoint every checkpoint_every steps, at each best evaluation and after the last.

        Raises Stopped, after one, where the run was asked to stop.
        """
        is_best = self._evaluated(step) is not None and self.state["no_better"] == 0
        self.saver.poll(self.student)
        stop = STOP.asked and not last
        if step % self.config.checkpoint.checkpoint_every and not last and not is_best and not stop:
            return
        self._save(step, last=last, wait=last or stop or not self.config.checkpoint.background)
        if stop:
            self._stop_if_asked()
        self.timer.take_step()
        self.workers.start_clocks()

    def _save(self, step: int, *, last: bool, wait: bool) -> None:
        self.workers.stop_clocks()
        with self.timer("checkpoint"):
            self.state["sampler"] = self.batches.state_dict(is_waiting=not self.line.is_empty)
            self.state["batch_size"] = self.config.train.batch_size
            self.state["seconds"] = self.timer.seconds()
            self.state["finished"] = last
            if (wer := self._evaluated(step)) is not None:
                self.dir.record_eval(step, wer)
            self.saver.begin(self.student, step, self.state)
            if wait:
                self.saver.finish(self.student)

    def _evaluated(self, step: int) -> float | None:
        """The WER after this very step, None where it was not measured."""
        evaluated = self.state.get("last_wer") or {"step": None}
        return evaluated["wer"] if evaluated["step"] == step else None

    def _stop_if_asked(self) -> None:
        """Raises Stopped where the run was asked to stop. For where everything up to `self.step` is saved."""
        STOP.check(f"after step {self.step}, which is saved" if self.step else "before the first step")

    # -- the end -----------------------------------------------------------------------------------------------------

    def is_finished(self) -> bool:
        """Whether an earlier call already brought this run to its end."""
        return self.step > 0 and (self.dir.path / "summary.json").is_file() and bool(self.state.get("finished"))

    def finish(self) -> dict[str, Any]:
        """Exports, evaluates the exported (rounded) weights, writes summary.json and prints the table."""
        export_dir = self.dir.path / "export"
        exported_step = self._best_step()
        with self.timer("export"):
            self.saver.finish(self.student)
            self._stop_if_asked()
            if exported_step != self.step:
                self.student.load(self.dir.checkpoint_path(exported_step))
            self.student.export(export_dir)
            self.student.round_weights()
        self._stop_if_asked()
        with self.timer("eval"):
            after = self.evaluate(self.step, self.student.transcribe, self.log)
        summary = summary_of(self, exported_step, export_dir, after)
        export = self.config.export
        write_model_card(export_dir, {**summary, "license": export.license, "config": self.config.to_dict()})
        self.evaluate.write_transcripts(self.dir.path)
        self.dir.write_summary(summary)
        if export.push:  # after the summary: a push that fails loses nothing and can be repeated
            print(f"push: {push(export_dir, export.push, export.private, export.revision)}")
        return self.print_summary()

    def _best_step(self) -> int:
        """The step that is exported: the last one; with early stopping the best by evaluation."""
        best = self.dir.best()
        return best[0] if self.config.eval.patience and best else self.step

    def print_summary(self) -> dict[str, Any]:
        """Prints the table of summary.json and hands the summary back."""
        summary = json.loads((self.dir.path / "summary.json").read_text(encoding="utf-8"))
        print_table(summary)
        print(f"run: {self.dir.path}\nexport: {summary['export_dir']}")
        return summary
