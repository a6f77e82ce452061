"""The teacher's score of a rollout, against full logits at all positions.

    python -m bench.teacher [--json FILE] [--runs 7] [--threads 1]

Ours runs the output layer at response positions only and keeps, in the student's ids, the teacher's top-k, what it says
of the student's top-k, the mass beyond both, entropy and unmapped mass. The other side is the plain way: the model's
logits at all positions of the padded batch, their log-softmax, top-k and gather. Both are checked to give the same
numbers, then take turns. Megabytes are peak resident memory over that at the start, each side in a process of its own.

Exit status 1 where ours is less than 0.9 times as fast (teacher/large_vocab: 1.5 times), or needs more than a quarter of
the memory at the large vocabulary.

teacher/tiny          seeds/tiny_teacher on what seeds/tiny_student writes for 32 utterances of synthetic speech
teacher/large_vocab   a random decoder 512 wide with 8 layers and 151,936 ids: 4 utterances of 10 s with 40 tokens each
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from bench.command import Parser, command, positive, report_missed
from bench.loss import peak_bytes, reset_peak
from bench.plain_step import logprobs, token_tables
from bench.tables import Row, print_rows, write_json
from data.audio import BadAudio, load_audio
from data.manifest import read_manifest
from data.synthetic import ensure_digits
from opd.arkasr import blocked_token_ids, load_model, load_processor
from opd.config import PROJECT_ROOT, load_config
from opd.rollout.decode import decode
from opd.seed import create_seed
from opd.support import candidate_ids
from opd.teachers.arkasr import ArkasrTeacher
from opd.types import Rollout, Utterance
from opd.vocab import blocked_mask

OTHER = "full_logits"
TOP_K = 32
LEAST = {"teacher/tiny": 0.9, "teacher/large_vocab": 1.5}  # times as fast as the other side
MAX_MEMORY = {"teacher/large_vocab": 0.25}  # of the other side's
Scores = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of the random teacher: rows and seconds of audio, tokens of a response, vocabulary, width, layers."""

    rows: int = 4
    seconds: float = 10.0
    tokens: int = 40
    vocab_size: int = 151_936
    width: int = 512
    num_layers: int = 8


class HeardTeacher(ArkasrTeacher):
    """A teacher whose prompts have their features already: reading audio is no part of what is measured."""

    heard: dict[str, torch.Tensor]

    def read(self, utterances: list[Utterance]) -> tuple[list[np.ndarray], list[BadAudio]]:
        return [], []

    def prompts_of(
        self, utterances: list[Utterance], waveforms: list
    ) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
        return [(list(range(len(utterances))), self.heard)]


@dataclass
class Scene:
    teacher: HeardTeacher
    utterances: list[Utterance]
    rollout: Rollout
    tables: tuple[torch.Tensor, torch.Tensor]  # to the teacher's ids, and back


def make_scene(student_path: str, teacher_path: str, waveforms: list[np.ndarray], rollout: Rollout | None) -> Scene:
    """rollout: what the student wrote; None: it writes."""
    config = load_config(["recipe=tiny", f"student.path={student_path}", f"teacher.path={teacher_path}"])
    teacher = HeardTeacher(config.to_dict(), student_path)
    teacher.heard = teacher.processor.build_inputs(waveforms)
    processor = load_processor(student_path)
    tokenizer = processor.tokenizer
    if rollout is None:
        model = load_model(student_path)
        vocab_size = model.config.vocab_size
    else:
        vocab_size = teacher.model.config.vocab_size
    blocked_V = blocked_mask(blocked_token_ids(tokenizer, vocab_size, tokenizer.eos_token_id), vocab_size)
    if rollout is None:
        rollout = decode(
            model, processor.build_inputs(waveforms), eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
            blocked_V=blocked_V, max_new_tokens=config.rollout.max_new_tokens, top_k=TOP_K,
        )  # fmt: skip
    tables = token_tables(tokenizer, teacher.tokenizer, blocked_V, teacher.blocked_V)
    utterances = [Utterance(f"u{index}", "") for index in range(len(waveforms))]
    return Scene(teacher, utterances, rollout, tables)


def tiny_scene(_: str) -> Scene:
    utterances = read_manifest(ensure_digits()["unlabelled"])[:32]
    seeds = PROJECT_ROOT / "seeds"
    return make_scene(
        str(seeds / "tiny_student"), str(seeds / "tiny_teacher"), [load_audio(u) for u in utterances], None
    )


def random_scene(folder: str, sizes: Sizes = Sizes()) -> Scene:
    """Scene with the model of `make_random_teacher` and responses of random ids."""
    generator = torch.Generator().manual_seed(0)
    noise = np.random.default_rng(0).standard_normal((sizes.rows, int(sizes.seconds * 16_000))).astype(np.float32)
    eos_id = load_processor(folder).tokenizer.eos_token_id
    shape = (sizes.rows, sizes.tokens)
    first_id = max(load_processor(folder).tokenizer.added_tokens_decoder) + 1  # behind it all ids are ordinary ones
    room = (sizes.vocab_size - first_id) // TOP_K
    topk_ids = torch.randint(room, (*shape, TOP_K), generator=generator) + first_id + torch.arange(TOP_K) * room
    response_ids = topk_ids[..., 0].clone()
    response_ids[:, -1] = eos_id
    rollout = Rollout(
        response_ids_BT=response_ids,
        response_mask_BT=torch.ones(shape, dtype=torch.bool),
        topk_ids_BTK=topk_ids,
        logprobs_BT=torch.zeros(shape),
        finished_B=torch.ones(sizes.rows, dtype=torch.bool),
        loop_start_B=torch.full((sizes.rows,), sizes.tokens),
        bad_audio_B=torch.zeros(sizes.rows, dtype=torch.bool),
    )
    return make_scene(folder, folder, list(noise), rollout)


def make_random_teacher(folder: Path, sizes: Sizes = Sizes()) -> None:
    """Random weights, with a tokenizer that has a token for every id."""
    create_seed(
        folder,
        sizes={
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.width // 64,
            "num_key_value_heads": sizes.width // 64,
            "intermediate_size": 3 * sizes.width,
            "initializer_range": 2 * sizes.width**-0.5,
            "whisper": {
                "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128,
                "num_mel_bins": 80, "max_source_positions": 1500,
            },
        },
        corpus=["one two three"],
        vocab_size=sizes.vocab_size,
        seed=0,
    )  # fmt: skip
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    used = set(vocabulary.values())
    vocabulary |= {f"Ġw{index}": index for index in range(sizes.vocab_size) if index not in used}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


SCENES: dict[str, Callable[[str], Scene]] = {"teacher/tiny": tiny_scene, "teacher/large_vocab": random_scene}


# -- the sides --


def ours(scene: Scene) -> Scores:
    return scene.teacher.score(scene.utterances, scene.rollout.to_dict())


@torch.no_grad()
def plain(scene: Scene) -> Scores:
    """Over the whole padded batch. Responses that do not map into the teacher's vocabulary end the program."""
    teacher, rollout = scene.teacher, scene.rollout
    to_teacher_V, to_student_V = scene.tables
    mask_BT = rollout.response_mask_BT
    ids_BT = to_teacher_V[rollout.response_ids_BT].masked_fill(~mask_BT, 0)
    if bool((ids_BT < 0).any()):
        raise SystemExit("a response does not map into the teacher's vocabulary")
    logprobs_BTV = logprobs(teacher.model, teacher.heard, ids_BT, mask_BT, teacher.blocked_V, all_positions=True)
    top_BTK = logprobs_BTV.topk(TOP_K, dim=-1)
    candidates_BTC = candidate_ids(rollout.topk_ids_BTK, rollout.response_ids_BT, teacher.student_eos_id)
    theirs_BTC = to_teacher_V[candidates_BTC]
    asked_BTC = logprobs_BTV.gather(-1, theirs_BTC.clamp(min=0)).masked_fill(theirs_BTC < 0, float("-inf"))
    return {
        "topk_ids_BTK": to_student_V[top_BTK.indices],
        "topk_logprobs_BTK": top_BTK.values,
        "candidate_logprobs_BTC": asked_BTC,
    }


SIDES: dict[str, Callable[[Scene], Scores]] = {"ours": ours, OTHER: plain}


def check(scene: Scene) -> None:
    """Raises SystemExit where the two sides give other numbers. Also warms both up."""
    mine, theirs = ours(scene), plain(scene)
    mask_BT = scene.rollout.response_mask_BT
    if not torch.equal(mine["aligned_mask_BT"], mask_BT):
        raise SystemExit("not all positions were scored")
    for name in ("topk_logprobs_BTK", "candidate_logprobs_BTC"):
        own, other = mine[name][mask_BT], theirs[name][mask_BT]
        if not torch.allclose(own, other, atol=1e-4, rtol=0):
            raise SystemExit(f"{name} differs by {float((own - other).abs().nan_to_num().max()):.1e}")
    same = float((mine["topk_ids_BTK"] == theirs["topk_ids_BTK"])[mask_BT].double().mean())
    if same < 0.99:  # two ids that are equally likely may change places
        raise SystemExit(f"only {same:.1%} of the top-k ids are the same")


def peak_mb(case: str, side: str, folder: str, threads: int) -> float:
    """Megabytes that a side needs; in a process that is new."""
    torch.set_num_threads(threads)
    scene = SCENES[case](folder)
    for parameter in scene.teacher.model.parameters():
        parameter.sum()  # loaded weights are pages of a file until they are read
    before = reset_peak()
    SIDES[side](scene)
    return (peak_bytes() - before) / 1e6


def compare(case: str, scene: Scene, runs: int) -> tuple[Row, str]:
    """Medians of both sides' seconds; no memory yet."""
    check(scene)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu_seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(runs):
        for side, function in SIDES.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            function(scene)
            seconds[side].append(time.perf_counter() - began)
            cpu_seconds[side].append(time.process_time() - cpu_began)
    (own_s, other_s), (own_cpu_s, other_cpu_s) = (map(statistics.median, s.values()) for s in (seconds, cpu_seconds))
    prompt = scene.teacher.heard["input_ids"].shape[1]
    rows, length = scene.rollout.response_ids_BT.shape
    note = (
        f"processor time {other_cpu_s / own_cpu_s:.2f} times as much; {int(scene.rollout.response_mask_BT.sum())} positions "
        f"scored of {rows * (prompt + length)} in the batch"
    )
    return Row(case, own_s, OTHER, other_s, other_s / own_s), note


@command
def main(argv: list[str]) -> int:
    parser = Parser("teacher", __doc__)
    parser.add_argument("--runs", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=1, help="as a teacher of the tiny recipe has")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, float32, load {os.getloadavg()[0]:.1f}")
    rows, notes = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "teacher"
        make_random_teacher(folder)
        for case, make in SCENES.items():
            row, notes[case] = compare(case, make(str(folder)), options.runs)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
                calls = [pool.submit(peak_mb, case, side, str(folder), options.threads) for side in SIDES]
                own_mb, other_mb = (call.result() for call in calls)
            rows.append(Row(row.case, row.ours_s, row.other, row.other_s, row.ratio, own_mb, other_mb))
    print_rows(rows, notes)
    if options.json:
        write_json(rows, options.json)
    return report_missed(missed_targets(rows))


def missed_targets(rows: list[Row]) -> list[str]:
    """What is slower or larger than it should be, in words."""
    missed = []
    for row in rows:
        assert row.ratio is not None and row.ours_mb is not None and row.other_mb is not None, "all is measured"
        if row.ratio < LEAST[row.case]:
            missed.append(f"{row.case}: {row.ratio:.2f} times as fast, target {LEAST[row.case]:g}")
        if row.case in MAX_MEMORY and row.ours_mb > MAX_MEMORY[row.case] * row.other_mb:
            missed.append(
                f"{row.case}: {row.ours_mb:,.0f} MB, target {MAX_MEMORY[row.case]:g} of {row.other_mb:,.0f} MB"
            )
    return missed


if __name__ == "__main__":
    raise SystemExit(main(None))
