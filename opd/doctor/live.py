"""What only the running workers can tell: Ray, the teacher's scores, one step of the student that is kept nowhere.

The workers are those of the run itself. The learning rate is 0, so a step does all that it does in training and leaves the
weights as they are.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opd.doctor.cost import check_expected_memory, check_memory, check_time
from opd.doctor.report import Check, Finding
from opd.doctor.static import Examined, standing
from opd.remote import wait
from opd.resolve import resolve_teachers, with_run_dir
from opd.rollout.texts import DraftTexts
from opd.schema import Config
from opd.seed import fresh_student
from opd.teachers.actor import TeacherGroup
from opd.types import Batch, TeacherScore
from trainers.env import set_verl_env

JOIN_LIMIT_S = 20.0
PLACEMENT_LIMIT_S = 30.0
CALL_LIMIT_S = 100.0
SAME = 1e-3  # nats a position: a student against itself, computed twice; with less than float32
SAME_FLOAT32 = 1e-5
TIMED_STEPS, TIMED_FOR_S = 5, 8.0


class Live:
    """What was started, and what it took. Seconds are of a whole batch of `size` utterances."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.student: Any = None
        self.teacher: Any = None
        self.launched = False
        self.errors: dict[str, Exception] = {}
        self.rollout: Any = None
        self.scores: Any = None
        self.teacher_facts: list[dict[str, Any]] = []
        self.batch: Batch = []
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    def close(self) -> None:
        for group in (self.student, self.teacher):
            if group is not None:
                group.close()
        self.student = self.teacher = None


def trial_config(config: Config) -> Config:
    """The config of a trial: nothing is learned or kept, and nobody waits for long."""
    cluster = config.cluster
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, lr=0.0),
        teacher=dataclasses.replace(config.teacher, cache_dir=None),
        cluster=dataclasses.replace(
            cluster,
            placement_timeout_s=min(cluster.placement_timeout_s, PLACEMENT_LIMIT_S),
            start_timeout_s=min(cluster.start_timeout_s, CALL_LIMIT_S),
            call_timeout_s=min(cluster.call_timeout_s, CALL_LIMIT_S),
        ),
    )


# -- the cluster -------------------------------------------------------------------------------------------------------


def check_ray(examined: Examined) -> Finding | str:
    """Starts or joins Ray, as the run does."""
    config = examined.config
    set_verl_env(config.cluster.use_gpu)
    from trainers.cluster import check_head, connect

    check_head(JOIN_LIMIT_S)
    examined.live = Live(trial_config(config))
    connect(examined.live.config.cluster)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    have = ray.cluster_resources()
    said = f"{len(nodes)} node(s), {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
    if len(nodes) < config.cluster.num_nodes:
        return Finding(
            "warning", f"{said}; cluster.num_nodes={config.cluster.num_nodes}, so ranks of several would share one",
            "start Ray on the other nodes (docs/cluster.md) and set RAY_ADDRESS, or lower cluster.num_nodes",
        )  # fmt: skip
    return said


def check_resources(examined: Examined) -> str:
    """CPUs and GPUs for all workers."""
    from trainers.cluster import check_resources as check

    config = examined.config
    teachers = config.num_teachers if examined.with_teacher else 0
    check(config.cluster, config.num_ranks, teachers)
    return f"enough for {config.num_ranks} student ranks and {teachers} teacher workers"


@ray.remote(num_cpus=0)
def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


def check_shared_paths(examined: Examined) -> Finding | str | None:
    """What all nodes must see under one name: run directory, models, manifests."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return None
    config = with_run_dir(examined.config)
    place = standing(Path(str(config.run_dir)))
    # A file of its own: a folder of this name may be on every node and yet not be the same one.
    probe = place / f".opd-doctor-{time.time_ns()}"
    paths = [str(probe), examined.student_path, *examined.teacher_paths.values()]
    if examined.data is not None:
        paths += [str(getattr(u, "audio", "")) for u in examined.good[:1]]
    paths = [path for path in paths if path.startswith("/")]
    probe.touch()
    try:
        calls = {
            node["NodeManagerAddress"]: _missing.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(paths)
            for node in nodes
        }
        lacking = {address: wait(call, f"node {address}", CALL_LIMIT_S) for address, call in calls.items()}
    finally:
        probe.unlink()
    wrong = {address: paths for address, paths in lacking.items() if paths}
    if wrong:
        listed = "; ".join(
            f"{address}: {', '.join(str(place) if path == str(probe) else path for path in paths)}"
            for address, paths in wrong.items()
        )
        return Finding(
            "fail", f"not there, or not the same folder, on {listed}",
            "put run_dir, models and audio on storage that all nodes share under one path",
        )  # fmt: skip
    return f"run_dir, models and audio are seen from all {len(nodes)} nodes"


# -- the workers -------------------------------------------------------------------------------------------------------


def _launch(examined: Examined) -> None:
    """Starts the workers of both sides, once: they load at the same time. Errors wait for the side's own check."""
    live = examined.live
    if live.launched:
        return
    live.launched = True
    from trainers.student import Student

    try:
        examined.student_path = examined.student_path or _fresh(examined)
        live.student = Student(live.config, examined.student_path)
    except Exception as error:
        live.errors["student"] = error
    # After the student, as in the run (opd/workers.py).
    if examined.with_teacher and all(examined.passed(name) for name in TEACHER_NEEDS):
        try:
            run_dir = Path(str(with_run_dir(live.config).run_dir))
            teacher = resolve_teachers(live.config.teacher, run_dir)
            live.teacher = TeacherGroup(dataclasses.replace(live.config, teacher=teacher), examined.student_path)
        except Exception as error:
            live.errors["teacher"] = error


def _fresh(examined: Examined) -> str:
    """A student made of `student.init`, for this look only."""
    if examined.data is None:
        raise ValueError("student.init: its tokenizer needs the texts of the training manifest, which failed above")
    config = examined.config
    return fresh_student(examined.scratch / "init", config.student.init, examined.data.texts(), config.seed)


def check_student(examined: Examined) -> str:
    """The student's ranks have met and built their model."""
    live = examined.live
    _launch(examined)
    if "student" in live.errors:
        raise live.errors["student"]
    facts = live.student.wait_ready()
    return f"{len(facts)} ranks, {facts[0]['num_parameters']:,} parameters, {facts[0]['num_trained']:,} of them trained"


def check_teacher(examined: Examined) -> str | None:
    """The teacher's workers have loaded it."""
    if not examined.with_teacher:
        return None
    live = examined.live
    _launch(examined)
    if "teacher" in live.errors:
        raise live.errors["teacher"]
    live.teacher_facts = live.teacher.wait_ready()
    live.seconds["start"] = time.perf_counter() - live.began
    kinds = {
        fact["route"]: f"{fact['num_parameters']:,} parameters, transformers {fact['versions']['transformers']}"
        for fact in live.teacher_facts
    }
    shown = "; ".join(f"{name}: {said}" if name else said for name, said in kinds.items())
    return f"{len(live.teacher_facts)} workers; {shown}"


def trial_batch(examined: Examined) -> Batch:
    """One micro-batch a rank, of utterances that were decoded; with text where the stage needs it."""
    config = examined.config
    needs_text = config.stage == "sft" or (config.stage == "opd" and config.rollout.source == "manifest")
    pool = [u for u in examined.good if u.text or not needs_text]
    if not pool:
        raise ValueError("of the sample of the training set, no utterance can be used")
    size = min(config.train.batch_size, config.num_ranks * config.train.micro_batch_size)
    size = max(1, size // config.num_ranks) * config.num_ranks
    return [
        dataclasses.replace(pool[i % len(pool)], id=f"{i // len(pool)}:{pool[i % len(pool)].id}") for i in range(size)
    ]


def check_scores(examined: Examined) -> str | None:
    """The student writes, the teacher scores those very tokens; stage td: the teacher transcribes."""
    if not examined.with_teacher:
        return None
    live = examined.live
    live.batch = trial_batch(examined)
    if examined.config.stage == "td":
        written = live.teacher.transcribe(live.batch)
        live.batch = [dataclasses.replace(u, text=w.text) for u, w in zip(live.batch, written, strict=True)]
        logprobs = [w.avg_logprob for w in written if w.error is None]
        if not np.isfinite(logprobs).all():
            raise ValueError("log-probabilities of the teacher's transcripts are not finite")
        return f"{len(written)} transcripts, log-probability {np.mean(logprobs):.2f} a token; the first: {written[0].text!r}"
    live.rollout, live.scores = _written_and_scored(live, 1)
    scores = wait([ref for refs in live.scores.refs for ref in refs], "the teacher's scores", CALL_LIMIT_S)
    positions, total = 0, 0.0
    for score in map(TeacherScore.from_dict, scores):
        aligned_BT, known_BTK = score.aligned_mask_BT, score.topk_ids_BTK >= 0
        top_NK = score.topk_logprobs_BTK.masked_fill(~known_BTK, float("-inf"))[aligned_BT]
        mass_N = top_NK.logsumexp(-1)
        written_N = score.candidate_logprobs_BTC[..., -2][aligned_BT]  # the written id stands before EOS
        if top_NK.isnan().any() or written_N.isnan().any() or (mass_N > 1e-3).any():
            raise ValueError("the teacher's scores are no log-probabilities: not a number, or a mass above 1")
        positions += len(written_N)
        total += float(written_N.clamp(min=-50.0).sum())
    if not positions:
        raise ValueError("the teacher could score no position of the student's responses")
    return (
        f"{positions} positions of {len(live.batch)} responses, log-probability {total / positions:.2f} a token; the first "
        f"response: {live.rollout.texts[0]!r}"
    )


def _written_and_scored(live: Live, step: int) -> tuple[Any, Any]:
    """A rollout of the batch, and its scores as they are being made."""
    drafts = DraftTexts(live.config.rollout.draft, {}).of(live.batch)
    rollout = live.student.generate(live.batch, step, drafts)
    return rollout, live.teacher.start_score(rollout.micro_batches, rollout.refs, step)


def check_vocabulary(examined: Examined) -> Finding | str | None:
    """How much of the student's vocabulary, and of what it wrote, the teacher has."""
    if not examined.with_teacher:
        return None
    live = examined.live
    share = min(fact["vocab_coverage"] for fact in live.teacher_facts)
    said = f"{share:.1%} of the student's vocabulary maps into the teacher's"
    if examined.config.stage == "td":
        return said
    coverage = live.scores.wait()[1]
    return f"{said}, {coverage:.1%} of the response positions"


def check_step(examined: Examined) -> Finding | str:
    """One optimizer step at learning rate 0; then more of them, on warm workers, by the clock."""
    live, config = examined.live, examined.config
    live.batch = live.batch or trial_batch(examined)
    if config.stage == "opd":
        sums = live.student.update(live.rollout, live.scores.refs, 1)
    else:
        sums = live.student.update_sft(live.batch, 1)
    began = time.perf_counter()
    timed: list[dict[str, float]] = []
    while not timed or (len(timed) < TIMED_STEPS and time.perf_counter() - began < TIMED_FOR_S):
        timed.append(_timed_step(live, 2 + len(timed)))
    live.seconds |= {name: float(np.median([one[name] for one in timed])) for name in timed[0]}
    if not sums["positions"]:
        return Finding(
            "fail", "no position of the responses was trained on", "look at the student and the teacher above"
        )
    return (
        f"{len(live.batch)} utterances, {sums['positions']:.0f} positions: loss {sums['loss']:.4g}, gradient norm "
        f"{sums['grad_norm']:.3g}; nothing was changed or saved"
    )


def _timed_step(live: Live, step: int) -> dict[str, float]:
    """Seconds of each phase of a step."""
    times = [time.perf_counter()]
    if live.config.stage != "opd":
        live.student.update_sft(live.batch, step)
        return {"update": time.perf_counter() - times[0]}
    rollout, scores = _written_and_scored(live, step)
    times.append(time.perf_counter())
    wait([ref for refs in scores.refs for ref in refs], "the teacher's scores", CALL_LIMIT_S)
    times.append(time.perf_counter())
    live.student.update(rollout, scores.refs, step)
    times.append(time.perf_counter())
    return dict(zip(("rollout", "teacher", "update"), np.diff(times).tolist(), strict=True))


def check_identity(examined: Examined) -> Finding | str | None:
    """The student as its own teacher: any divergence between the two is 0."""
    live, config = examined.live, examined.config
    if config.stage != "opd":
        return None
    if live.teacher is not None:
        live.teacher.close()  # makes room
        live.teacher = None
    itself = dataclasses.replace(
        live.config.teacher, kind="arkasr", path=examined.student_path, python_path=None, prompt={}, routes={},
        dtype=config.student.dtype, attn_implementation=config.student.attn_implementation,
    )  # fmt: skip
    cluster = dataclasses.replace(live.config.cluster, num_teachers=1)
    live.batch = live.batch or trial_batch(examined)
    live.teacher = TeacherGroup(
        dataclasses.replace(live.config, teacher=itself, cluster=cluster), examined.student_path
    )
    live.teacher.wait_ready()
    rollout, scores = _written_and_scored(live, 99)
    loss = live.student.update(rollout, scores.wait()[0], 99)["loss"]
    limit = SAME_FLOAT32 if config.student.dtype == "float32" and not config.cluster.use_gpu else SAME
    if not abs(loss) <= limit:
        return Finding(
            "fail", f"{config.loss.kind} of the student against itself is {loss:.3g}, above {limit:g}",
            "try student.attn_implementation=sdpa and dtype=float32; both sides must compute the same model",
        )  # fmt: skip
    return f"{config.loss.kind} of the student against itself is {loss:.2g}"


TEACHER_NEEDS = ("config", "resources", "student's path", "teacher's environment", "teacher's path")
SLOW = f"; a model that takes longer than {CALL_LIMIT_S:g} s to load is no fault, the run waits cluster.start_timeout_s"
RAY_FIX = "start Ray (docs/cluster.md) or correct RAY_ADDRESS; or unset RAY_ADDRESS to start one here"
LIVE_CHECKS = [
    Check("expected memory", check_expected_memory, ("config", "student's path")),
    Check("Ray", check_ray, ("config",), RAY_FIX),
    Check("resources", check_resources, ("Ray",), "a larger cluster, or fewer or smaller workers"),
    Check("shared storage", check_shared_paths, ("Ray", "run directory")),
    Check("student", check_student, ("config", "resources", "student's path"), f"mend what the rank says{SLOW}"),
    Check("teacher", check_teacher, TEACHER_NEEDS, f"see the teacher's path, kind and environment{SLOW}"),
    Check("teacher's scores", check_scores, ("student", "teacher", "training manifest")),
    Check("vocabulary", check_vocabulary, ("teacher's scores",), "a teacher with a closer tokenizer, or a lower teacher.min_coverage"),
    Check("a step", check_step, ("student", "teacher's scores", "training manifest")),
    Check("time", check_time, ("a step",)),
    Check("measured memory", check_memory, ("a step",)),
    Check("identity", check_identity, ("student", "training manifest")),
]  # fmt: skip
