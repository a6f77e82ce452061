"""The student's rollout against transformers' own generate: the same tokens, side by side in one run.

    python -m bench.rollout [--json FILE] [--model seeds/sentence_student] [--batches 4] [--large 1] [--runs 5] [--threads 2]

Greedy, float32, batches of 16 spoken sentences whose transcripts have at least 20 tokens, EOS not counted. The drafts are
the model's own transcripts with word errors (a substitution, deletion or insertion, each as often), or random words
(useless_draft). Ours also returns top-k ids and log-probabilities, which generate does not. Both sides are checked to
write the same tokens before anything is timed; then they take turns, batch by batch. Encoder and prompt prefill are
timed apart: both sides start from the encoder's frames, and each side's prefill is taken off it; the end-to-end ratio, with
all of it, stands beside. rollout_large/* is a decoder 512 wide with 8 layers that computes the same function at its own
cost (bench/drafts.py).
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kaldialign import edit_distance

from bench.command import Parser, command, count, positive, report_missed
from bench.drafts import widen, with_errors
from bench.tables import Row, print_rows, write_json
from data.audio import load_audio
from data.manifest import read_manifest
from data.sentence_sets import ensure_sentences
from opd.arkasr import blocked_token_ids, load_model, load_processor
from opd.cpu_linear import use_faster_linears
from opd.rollout.decode import decode
from opd.rollout.speculative import RolloutCounts, forward_cost, speculate
from opd.rollout.steps import DecoderSteps
from opd.types import Rollout
from opd.vocab import blocked_mask

ROOT = Path(__file__).parent.parent
OTHER = "hf_generate"
BATCH_SIZE = 16
MIN_TOKENS, MAX_NEW_TOKENS, TOP_K = 20, 64, 32
CASES = {"wer10": 0.10, "wer25": 0.25, "useless_draft": None}
TARGETS = {"rollout/wer10": 3.0, "rollout/wer25": 1.8}
LEAST = 0.95  # every case
MAX_FORWARDS = 0.25  # of plain decoding's, at rollout/wer10


@dataclass
class Scene:
    """A model with batches of inputs, what it writes for them, and what both sides are called with."""

    model: Any
    processor: Any
    batches: list[dict[str, torch.Tensor]]
    responses: list[list[list[int]]]  # per batch and row, EOS left out
    arguments: dict[str, Any]


def decoding_arguments(model: Any, processor: Any) -> dict[str, Any]:
    tokenizer, vocab_size = processor.tokenizer, model.config.vocab_size
    blocked = blocked_token_ids(tokenizer, vocab_size, tokenizer.eos_token_id)
    return {
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "blocked_V": blocked_mask(blocked, vocab_size),
        "max_new_tokens": MAX_NEW_TOKENS,
        "top_k": TOP_K,
    }


def responses_of(rollout: Rollout) -> list[list[int] | None]:
    """Ids of each row without EOS; None where the length limit cut it."""
    rows = zip(rollout.response_ids_BT, rollout.response_mask_BT, rollout.finished_B.tolist(), strict=True)
    return [ids[mask].tolist()[:-1] if finished else None for ids, mask, finished in rows]


def make_scene(path: str, num_batches: int) -> Scene:
    """Batches of sentences that the model transcribes with MIN_TOKENS and more; the longest clips are tried first."""
    model, processor = load_model(path), load_processor(path)
    arguments = decoding_arguments(model, processor)
    utterances = read_manifest(ensure_sentences(["sentences_unlabelled"])["sentences_unlabelled"])
    utterances.sort(key=lambda u: -float(u.extra["duration"]))
    chosen: list = []
    for start in range(0, len(utterances), BATCH_SIZE):
        tried = utterances[start : start + BATCH_SIZE]
        rollout = decode(model, processor.build_inputs([load_audio(u) for u in tried]), **arguments)
        chosen += [
            (utterance, ids)
            for utterance, ids in zip(tried, responses_of(rollout), strict=True)
            if ids is not None and len(ids) >= MIN_TOKENS
        ]
        if len(chosen) >= num_batches * BATCH_SIZE:
            break
    else:
        raise SystemExit(f"only {len(chosen)} of the sentences are transcribed with {MIN_TOKENS} tokens or more")
    chosen = chosen[: num_batches * BATCH_SIZE]
    random.Random(0).shuffle(chosen)
    parts = [chosen[i : i + BATCH_SIZE] for i in range(0, len(chosen), BATCH_SIZE)]
    batches = [processor.build_inputs([load_audio(u) for u, _ in part]) for part in parts]
    describe(path, model, processor, chosen)
    return Scene(model, processor, batches, [[ids for _, ids in part] for part in parts], arguments)


def describe(path: str, model: Any, processor: Any, chosen: list) -> None:
    seconds = sum(float(u.extra["duration"]) for u, _ in chosen)
    tokens = [len(ids) for _, ids in chosen]
    words = sum(len(processor.clean_text(ids).split()) for _, ids in chosen)
    print(
        f"{Path(path).name}: {sum(p.numel() for p in model.parameters()):,} parameters; {len(chosen)} clips of sentences, "
        f"{seconds:.0f} s of audio ({seconds / len(chosen):.1f} s each); byte-level BPE of {model.config.vocab_size} ids, "
        f"{min(tokens)} to {max(tokens)} tokens a transcript, {sum(tokens) / words:.2f} a word"
    )


def make_drafts(scene: Scene, rate: float | None) -> tuple[list[list[list[int]]], float]:
    """Token ids of a draft for each row of each batch, and the word error rate of the drafts against the transcripts."""
    rng, clean = random.Random(1), scene.processor.clean_text
    texts = [[clean(ids) for ids in rows] for rows in scene.responses]
    words = sorted({word for rows in texts for text in rows for word in text.split()})
    errors = total = 0
    drafts = []
    for rows in texts:
        drafts.append([])
        for text in rows:
            random_words = " ".join(rng.choice(words) for _ in text.split())
            draft = random_words if rate is None else with_errors(text, rate, words, rng)
            errors += edit_distance(text.split(), draft.split())["total"]
            total += len(text.split())
            drafts[-1].append(scene.processor.tokenizer(draft, add_special_tokens=False)["input_ids"])
    return drafts, errors / total


def sides(scene: Scene) -> dict[str, Callable]:
    """What is timed: each takes the inputs of a batch, the encoder's frames in place of the audio, and its drafts."""
    model, arguments = scene.model, scene.arguments
    decoder_size = sum(p.numel() for p in model.model.parameters())
    cost = forward_cost(decoder_size, model.config.num_hidden_layers, "cpu", torch.get_num_threads())

    student = copy.deepcopy(model)  # as the workers have it
    use_faster_linears(student)

    def prefill(inputs: dict, drafts: Any) -> None:
        student(**inputs, use_cache=True, logits_to_keep=1)

    def other_prefill(inputs: dict, drafts: Any) -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    def generate(inputs: dict, drafts: Any) -> torch.Tensor:
        return model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
            eos_token_id=arguments["eos_id"], pad_token_id=arguments["pad_id"],
        )[:, inputs["input_ids"].shape[1] :]  # fmt: skip

    def ours(inputs: dict, drafts: Any) -> tuple[Rollout, RolloutCounts]:
        return speculate(student, inputs, steps=DecoderSteps(student), drafts=drafts, forward_cost=cost, **arguments)

    def generate_record(inputs: dict, drafts: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, top-k ids and log-probabilities, as a `Rollout` has them."""
        out = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=arguments["eos_id"], pad_token_id=arguments["pad_id"],
        )  # fmt: skip
        ids_BT = out.sequences[:, inputs["input_ids"].shape[1] :]
        logits_BTV = torch.stack(out.logits, 1).masked_fill(arguments["blocked_V"], float("-inf"))
        logprobs_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[..., None])[..., 0]
        return ids_BT, logits_BTV.topk(TOP_K, dim=-1).indices, logprobs_BT

    return {
        "prefill": prefill, "other_prefill": other_prefill, "other": generate, "record": generate_record,
        "plain": lambda inputs, _: ours(inputs, None), "ours": ours,
    }  # fmt: skip


def encoded(scene: Scene) -> tuple[list[dict], list[Callable]]:
    """The batches with the encoder's frames in place of the audio, and what makes the frames of each."""
    encode = scene.model.audio_encoder.encode_frames
    calls = [partial(encode, inputs["audios"], inputs["audio_mask"]) for inputs in scene.batches]
    rest = [{n: t for n, t in inputs.items() if not n.startswith("audio")} for inputs in scene.batches]
    return [inputs | {"audio_frames": call()} for inputs, call in zip(rest, calls, strict=True)], calls


def check(scene: Scene, batches: list[dict], drafts: list) -> list[RolloutCounts]:
    """Both sides write the same tokens. Also warms both up."""
    functions = sides(scene)
    counts = []
    for inputs, rows in zip(batches, drafts, strict=True):
        rollout, count = functions["ours"](inputs, rows)
        written = rollout.response_ids_BT
        if not torch.equal(functions["other"](inputs, None), written):
            raise SystemExit("the two sides wrote different tokens; nothing was timed")
        plain = functions["plain"](inputs, None)[0]
        assert torch.equal(plain.response_ids_BT, written), "plain decoding writes something else"
        _, topk_ids_BTK, logprobs_BT = functions["record"](inputs, None)
        mask_BT = rollout.response_mask_BT
        same = (topk_ids_BTK[mask_BT] == rollout.topk_ids_BTK[mask_BT]).float().mean()
        assert same > 0.99, "other top-k ids"  # where two are equally likely, rounding may exchange them
        torch.testing.assert_close(logprobs_BT[mask_BT], rollout.logprobs_BT[mask_BT], atol=1e-4, rtol=0)
        counts.append(count)
    return counts


def timed(function: Callable, *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def measure(case: str, scene: Scene, rate: float | None, runs: int) -> tuple[Row, str, float]:
    """The row of a case, the rest of its figures in words, and the share of plain decoding's forwards that were taken."""
    drafts, wer = make_drafts(scene, rate)
    batches, encoders = encoded(scene)
    counts = check(scene, batches, drafts)
    functions = sides(scene)
    seconds = dict.fromkeys(["encoder", *functions], 0.0)  # sums over batches of the median over runs
    for inputs, rows, encoder in zip(batches, drafts, encoders, strict=True):
        runs_of: dict[str, list[float]] = {name: [] for name in seconds}
        for _ in range(runs):
            runs_of["encoder"].append(timed(encoder))
            for name, function in functions.items():
                runs_of[name].append(timed(function, inputs, rows))
        for name, values in runs_of.items():
            seconds[name] += statistics.median(values)
    after = {name: seconds[name] - seconds["prefill"] for name in ("ours", "plain")}
    after |= {name: seconds[name] - seconds["other_prefill"] for name in ("other", "record")}
    end_to_end = (seconds["encoder"] + seconds["other"]) / (seconds["encoder"] + seconds["ours"])
    num_rows = sum(len(rows) for rows in scene.responses)
    tokens = sum(len(ids) + 1 for rows in scene.responses for ids in rows)
    forwards, accepted, drafted = (
        sum(int(getattr(count, f"{name}_B").sum()) for count in counts) for name in ("forwards", "accepted", "drafted")
    )
    note = (
        f"drafts' WER {wer:.1%}; {forwards / num_rows:.2f} forwards an utterance instead of {tokens / num_rows:.2f} "
        f"({forwards / tokens:.1%}); {accepted / max(1, drafted):.0%} of drafted tokens accepted; end to end "
        f"{end_to_end:.2f} times as fast, with {seconds['encoder']:.2f} s of encoder and prefills of "
        f"{seconds['prefill']:.2f} and {seconds['other_prefill']:.2f} s; generate with top-k and log-probabilities "
        f"{after['record'] / after['ours']:.2f} times as long, our plain decoding {after['plain'] / after['ours']:.2f}"
    )
    row = Row(case, after["ours"], OTHER, after["other"], after["other"] / after["ours"])
    return row, note, forwards / tokens


@command
def main(argv: list[str]) -> int:
    parser = Parser("rollout", __doc__)
    parser.add_argument("--model", default=str(ROOT / "seeds" / "sentence_student"), help="an ARK-ASR folder")
    parser.add_argument("--batches", type=positive, default=4, help="batches of 16")
    parser.add_argument("--large", type=count, default=1, help="batches of the large model; 0 leaves it out")
    parser.add_argument("--runs", type=positive, default=5, help="runs of which the median is taken")
    parser.add_argument("--threads", type=positive, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows, notes, failed = [], {}, []
    with torch.inference_mode():
        small = make_scene(options.model, options.batches)
        scenes = {"rollout": small}
        if options.large:
            model = widen(small.model, 512, 8)
            decoder_size = sum(p.numel() for p in model.model.parameters())
            print(f"large: {decoder_size:,} parameters in the decoder")
            part = small.batches[: options.large], small.responses[: options.large]
            scenes["rollout_large"] = Scene(model, small.processor, *part, small.arguments)
        for prefix, scene in scenes.items():
            for name, rate in CASES.items():
                case = f"{prefix}/{name}"
                row, notes[case], forwards = measure(case, scene, rate, options.runs)
                rows.append(row)
                if row.ratio < TARGETS.get(case, LEAST):
                    failed.append(f"{case}: {row.ratio:.2f} times as fast, target {TARGETS.get(case, LEAST):g}")
                if case == "rollout/wer10" and forwards > MAX_FORWARDS:
                    failed.append(f"{case}: {forwards:.1%} of plain decoding's forwards, target {MAX_FORWARDS:.0%}")
    print(f"seconds after encoder and prefill, {options.threads} threads, median of {options.runs} runs")
    print_rows(rows, notes)
    if options.json:
        write_json(rows, options.json)
    return report_missed(failed)


if __name__ == "__main__":
    raise SystemExit(main(None))
