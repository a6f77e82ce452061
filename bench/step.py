"""A whole step of on-policy distillation on the tiny task, against the same step made of plain parts.

    python -m bench.step [--json FILE] [--steps 16] [--epoch 0] [--overhead_steps 60] [--threads 1] [section.key=value ...]

Both sides start from mel features of real synthetic speech and end with updated weights, in one process. The other side
is what one would write with transformers: greedy `generate` with its KV cache, both models' logits at all positions of
one padded batch, log-softmax, and the divergence gathered on the same support; the same AdamW.

step/first_epoch   the recipe's audio has no text, so there is no draft yet: the rollout is plain decoding
step/later_epoch   the student was trained for an epoch; the draft is what it wrote for the utterance then
step/tiny          the mean of both as the recipe's steps fall into them
step/overhead      a real run (Ray, verl, driver): seconds a step against those that its workers were at work

Before a side's step is timed the weights of both are made equal; tokens, loss and gradient are compared at the first
step of a case, tokens and loss at all of them. The sides take turns.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.command import Parser, command, count, positive, report_missed
from bench.plain_step import PlainSide
from bench.tables import Row, print_rows, write_json
from data.audio import BadAudio, load_audio
from data.buckets import spread_by_length
from data.manifest import read_manifest
from data.sampler import EpochSampler
from opd.config import load_config
from opd.cpu_linear import use_faster_linears
from opd.encoding import encode_by_length, serves_update
from opd.resolve import resolve
from opd.rollout.decode import split
from opd.rollout.speculative import forward_cost, speculate
from opd.rollout.steps import DecoderSteps
from opd.rollout.texts import DraftTexts
from opd.schema import Config
from opd.teachers.arkasr import ArkasrTeacher
from opd.trainable import choose_trained
from opd.types import Batch, TeacherScore
from trainers.env import set_verl_env

OTHER, OVERHEAD_OTHER = "plain_step", "workers_busy"
TARGET = 2.0
MAX_OVERHEAD_S, MAX_OVERHEAD_SHARE = 0.080, 0.15  # either is enough
WARM_UP = 5  # first steps of a real run: imports, first calls
Inputs = dict[str, torch.Tensor]
PHASES = ("rollout", "teacher", "update")


class HeardTeacher(ArkasrTeacher):
    """The teacher of a run; its features are there already, as the other side's are."""

    heard: Inputs
    rows: dict[str, int]

    def read(self, utterances: Batch) -> tuple[list[np.ndarray], list[BadAudio]]:
        return [], []

    def prompts_of(self, utterances: Batch, waveforms: list[np.ndarray]) -> list[tuple[list[int], Inputs]]:
        """Without the padding that other utterances of the batch need, as if the audio had been read for these alone."""
        index = torch.tensor([self.rows[u.id] for u in utterances])
        part = {name: tensor[index] for name, tensor in self.heard.items()}
        first = int((part["attention_mask"].sum(0) > 0).long().argmax())
        part |= {name: part[name][:, first:] for name in ("input_ids", "attention_mask")}
        return [(list(range(len(utterances))), self.encoded(part))]


@dataclass
class Step:
    """What a side computed in a step, and the seconds of its phases."""

    ids_BT: torch.Tensor  # padding where nothing was written
    loss: float
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_cpu_s(self) -> float:
        return sum(self.cpu_seconds.values())


class OurSide:
    """A step as the workers compute it, without Ray and the driver."""

    def __init__(self, config: Config) -> None:
        set_verl_env(use_gpu=False)  # the engine's parts are imported under verl
        from opd.arkasr import blocked_token_ids, load_model, load_processor
        from opd.vocab import blocked_mask
        from trainers import objectives, trained_student

        self.config, self.parts = config, objectives
        model = load_model(config.student.path, attn_implementation=config.student.attn_implementation)
        use_faster_linears(model)
        choose_trained(model, config.student.freeze, config.lora)
        self.module = trained_student.TrainedStudent(model)
        self.processor = load_processor(config.student.path)
        tokenizer, vocab_size = self.processor.tokenizer, model.config.vocab_size
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.blocked_V = blocked_mask(blocked_token_ids(tokenizer, vocab_size, self.eos_id), vocab_size)
        self.optimizer, self.scheduler = make_optimizer(self.module, config)
        self.teacher = HeardTeacher(config.to_dict(), str(config.student.path))
        self.drafts = DraftTexts(config.rollout.draft, {})
        decoder_size = sum(p.numel() for p in model.model.parameters())
        self.cost = forward_cost(decoder_size, model.config.num_hidden_layers, "cpu", torch.get_num_threads())
        self.objective = objectives.opd_objective(config.loss, self.blocked_V, self.eos_id)

    def encode(self, audios: torch.Tensor, audio_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded, _, mask = self.module(encode_only=True, audios=audios, audio_mask=audio_mask)
        return encoded, mask

    def prepare(self, batch: Batch) -> tuple[Inputs, Inputs]:
        """Prompts of a batch with their features, for student and teacher; not timed."""
        waveforms = [load_audio(u) for u in batch]
        self.teacher.heard = self.teacher.processor.build_inputs(waveforms)
        self.teacher.rows = {u.id: row for row, u in enumerate(batch)}
        return self.processor.build_inputs(waveforms), self.teacher.heard

    def step(self, batch: Batch, inputs: Inputs, drafts: list[str | None], update: bool) -> Step:
        """One step; without `update` it ends with the gradients."""
        config, clock = self.config, Clock()
        tokenizer = self.processor.tokenizer
        self.module.eval()
        prompts = {name: value for name, value in inputs.items() if name not in ("audios", "audio_mask")}
        once = serves_update(config, len(batch))
        with torch.set_grad_enabled(once):
            encoded = encode_by_length(self.encode, inputs["audios"], inputs["audio_mask"])
        prompts |= dict(zip(("encoded_BED", "encoded_mask_BE"), encoded, strict=True))
        with torch.no_grad():
            rollout, counts = speculate(
                lambda **kwargs: self.module(**kwargs)[0], prompts, steps=DecoderSteps(self.module.model),
                drafts=[d and tokenizer(d, add_special_tokens=False)["input_ids"] for d in drafts],
                forward_cost=self.cost, eos_id=self.eos_id, pad_id=self.pad_id, blocked_V=self.blocked_V,
                max_new_tokens=config.rollout.max_new_tokens, top_k=config.loss.top_k,
                max_repeats=config.rollout.max_repeats,
            )  # fmt: skip
        rows = zip(rollout.response_ids_BT, rollout.response_mask_BT, strict=True)
        self.drafts.keep(batch, [self.processor.clean_text(ids[mask].tolist()) for ids, mask in rows])
        self.forwards = int(counts.forwards_B.sum()) / len(batch)
        lengths_B = inputs["attention_mask"].sum(1) + rollout.response_mask_BT.sum(1)
        micro_rows = self.parts.micro_batch_rows(lengths_B.tolist(), config.train)
        parts = split(rollout, micro_rows)
        clock.lap("rollout")
        scores = [
            self.teacher.score([batch[row] for row in rows], part.to_dict())
            for rows, part in zip(micro_rows, parts, strict=True)
        ]
        clock.lap("teacher")
        self.optimizer.zero_grad(set_to_none=True)
        self.module.train()
        micros = [
            self.parts.opd_micro_batch(
                prompts if once else inputs,
                rows,
                part,
                TeacherScore.from_dict(score),
                config.rollout,
                torch.device("cpu"),
            )
            for rows, part, score in zip(micro_rows, parts, scores, strict=True)
        ]
        positions = sum(micro.num_positions for micro in micros)
        loss = 0.0
        for micro in micros:
            total, _ = self.objective(self.module, micro)
            (total / positions).backward()
            loss += float(total.detach()) / positions
        if update:
            apply_update(self.module, self.optimizer, self.scheduler, config)
        clock.lap("update")
        return Step(rollout.response_ids_BT, loss, clock.seconds, clock.cpu_seconds)


class Clock:
    """Seconds of one phase after the other, and this process's processor time in them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._began = time.perf_counter(), time.process_time()

    def lap(self, phase: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds[phase], self.cpu_seconds[phase] = (b - a for a, b in zip(self._began, now, strict=True))
        self._began = now


def make_optimizer(module: torch.nn.Module, config: Config) -> tuple[Any, Any]:
    from trainers.base_engine import learning_rate_factor, parameter_groups

    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameter_groups(module, optim.weight_decay), lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, foreach=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, optim, config.train.num_steps)
    )
    return optimizer, scheduler


def apply_update(module: torch.nn.Module, optimizer: Any, scheduler: Any, config: Config) -> None:
    trained = [p for p in module.parameters() if p.requires_grad and p.grad is not None]
    torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
    optimizer.step()
    scheduler.step()


# -- the two sides in turns --


def check_gradients(ours: OurSide, other: PlainSide) -> None:
    """Raises SystemExit where the gradients of the last step differ."""
    theirs = dict(other.model.named_parameters())
    difference = norm = 0.0
    for name, parameter in ours.module.model.named_parameters():
        if parameter.grad is not None:
            difference += float((parameter.grad - theirs[name].grad).double().square().sum())
            norm += float(theirs[name].grad.double().square().sum())
    relative = (difference / norm) ** 0.5
    print(f"the gradients differ by {relative:.1e} of their norm")
    if not relative < 1e-4:
        raise SystemExit("the two sides have different gradients; nothing was timed")


def check_steps(mine: Step, theirs: Step) -> None:
    if not torch.equal(mine.ids_BT, theirs.ids_BT):
        raise SystemExit("the two sides wrote different tokens")
    if not math.isclose(mine.loss, theirs.loss, rel_tol=1e-5):
        raise SystemExit(f"the two sides have different losses: {mine.loss} and {theirs.loss}")


def compare(
    case: str, ours: OurSide, other: PlainSide, batches: Callable[[], Batch], num_steps: int
) -> tuple[Row, str]:
    """Times `num_steps` steps of both sides, after one that is compared to its gradients."""
    mine: list[Step] = []
    theirs: list[Step] = []
    forwards = []
    for index in range(num_steps + 1):
        batch = batches()
        (inputs, teacher_inputs), drafts = ours.prepare(batch), ours.drafts.of(batch)
        other.copy_weights(ours.module.model)
        update = index > 0  # the first is for the check, and warms both up
        steps: dict[str, Callable[[], Step]] = {
            "mine": lambda: ours.step(batch, inputs, drafts, update),  # noqa: B023  called at once
            "theirs": lambda: other.step(inputs, teacher_inputs, update),  # noqa: B023
        }
        order = ("mine", "theirs") if index % 2 else ("theirs", "mine")
        done = {name: steps[name]() for name in order}
        check_steps(done["mine"], done["theirs"])
        if update:
            mine.append(done["mine"])
            theirs.append(done["theirs"])
            forwards.append(ours.forwards)
        else:
            check_gradients(ours, other)
    own_s, other_s = (statistics.median(step.total_s for step in steps) for steps in (mine, theirs))
    by_phase = ", ".join(
        f"{phase} {milliseconds(mine, phase):.0f} against {milliseconds(theirs, phase):.0f}" for phase in PHASES
    )
    cpu = [statistics.median(step.total_cpu_s for step in steps) for steps in (mine, theirs)]
    tokens = statistics.mean(float((s.ids_BT != other.pad_id).sum()) / len(s.ids_BT) for s in theirs)
    note = (
        f"processor time {cpu[1] / cpu[0]:.2f} times as much; its milliseconds: {by_phase}; "
        f"{statistics.mean(forwards):.1f} forwards for {tokens:.1f} tokens an utterance"
    )
    return Row(case, own_s, OTHER, other_s, other_s / own_s), note


def milliseconds(steps: list[Step], phase: str) -> float:
    return 1e3 * statistics.median(step.cpu_seconds[phase] for step in steps)


def overhead(prefix: str, num_steps: int, keys: list[str]) -> tuple[Row, str]:
    """A real run of the recipe; the rest of a step beside what its workers were at work."""
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name) / "run"
        command = [
            sys.executable, "-m", "opd.train", "recipe=tiny", f"run_dir={run_dir}", f"train.num_steps={num_steps}",
            "data.eval_manifests={}", "wandb.mode=disabled", *keys,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the run failed: {done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/overhead" in line][WARM_UP:]
    median = {key: statistics.median(step[key] for step in steps) for key in ("time/step", "time/overhead")}
    busy_s = statistics.median(step["time/step"] - step["time/overhead"] for step in steps)
    row = Row(f"{prefix}/overhead", median["time/step"], OVERHEAD_OTHER, busy_s, busy_s / median["time/step"])
    share = median["time/overhead"] / median["time/step"]
    return (
        row,
        f"{median['time/overhead'] * 1e3:.0f} ms a step, {share:.1%} of it; {len(steps)} steps, two ranks, two teachers",
    )


@command
def main(argv: list[str]) -> int:
    parser = Parser("step", __doc__)
    parser.add_argument("keys", nargs="*", metavar="section.key=value", help="what differs from recipe=tiny")
    parser.add_argument("--prefix", default="step", help="of the cases' names; another one for another task")
    parser.add_argument("--steps", type=positive, default=16, help="timed steps of a case")
    parser.add_argument("--epoch", type=count, default=0, help="batches of an epoch; 0 = all utterances of the recipe")
    parser.add_argument("--overhead_steps", type=count, default=60, help="steps of the real run; 0 = leave it out")
    parser.add_argument("--threads", type=positive, default=1, help="as a rank of the recipe has")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    config = resolve(load_config(["recipe=tiny", *options.keys]))
    # As on a rank of the recipe, whose share of a batch is one micro-batch: the encoder is asked once.
    config = replace(config, train=replace(config.train, micro_batch_size=config.train.batch_size))
    utterances = read_manifest(str(config.data.train_manifest))
    size = config.train.batch_size
    per_epoch = options.epoch or len(utterances) // size
    utterances = utterances[: per_epoch * size]
    sampler = EpochSampler(len(utterances), seed=config.seed)

    def batches() -> Batch:
        return spread_by_length([utterances[index] for index in sampler.next_batch(size)], 1)

    ours = OurSide(config)
    other = PlainSide(config, ours.blocked_V, ours.teacher.blocked_V)
    print(f"batches of {size}, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    rows, notes = [], {}

    def add(row: Row, note: str) -> None:
        rows.append(row)
        notes[row.case] = note

    add(*compare(f"{options.prefix}/first_epoch", ours, other, batches, options.steps))
    for _ in range(per_epoch - options.steps - 1):
        batch = batches()
        ours.step(batch, ours.prepare(batch)[0], ours.drafts.of(batch), update=True)
    add(*compare(f"{options.prefix}/later_epoch", ours, other, batches, options.steps))
    first = min(1.0, per_epoch / config.train.num_steps)
    own_s, other_s = (first * getattr(rows[0], n) + (1 - first) * getattr(rows[1], n) for n in ("ours_s", "other_s"))
    add(
        Row(f"{options.prefix}/tiny", own_s, OTHER, other_s, other_s / own_s),
        f"{first:.0%} of the steps are of the first epoch",
    )
    failed = [f"{row.case}: {row.ratio:.2f} times as fast, target {TARGET:g}" for row in rows if row.ratio < TARGET]
    if options.overhead_steps:
        add(*overhead(options.prefix, options.overhead_steps, options.keys))
        beyond = rows[-1].ours_s - rows[-1].other_s
        if beyond > MAX_OVERHEAD_S and beyond > MAX_OVERHEAD_SHARE * rows[-1].ours_s:
            failed.append(f"{rows[-1].case}: {beyond * 1e3:.0f} ms, target {MAX_OVERHEAD_S * 1e3:.0f} ms or 15 %")
    print_rows(rows, notes)
    if options.json:
        write_json(rows, options.json)
    return report_missed(failed)


if __name__ == "__main__":
    raise SystemExit(main(None))
