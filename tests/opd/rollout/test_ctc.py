"""Drafts that the encoder hears."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_steps import make_config, start
from ranks import run_ranks

from data.audio import load_audio
from data.manifest import read_manifest
from data.sentences import sentences
from data.synthetic import TRAINING_VOICES, make_set
from opd.arkasr import blocked_token_ids, load_processor
from opd.rollout.ctc import CTC_FILE, CtcHead, save_ctc_head
from opd.rollout.speculative import speculate
from opd.vocab import blocked_mask
from trainers.worker import StudentWorker

SEED = Path(__file__).resolve().parents[3] / "seeds" / "sentence_student"


def test_runs_are_one_token_and_blanks_none(tmp_path: Path) -> None:
    save_ctc_head(tmp_path, torch.eye(4), torch.zeros(4), torch.float16)
    head = CtcHead.load(tmp_path, 0, torch.device("cpu"))
    assert head is not None
    heard = torch.tensor([[1, 1, 0, 1, 2, 2], [3, 0, 0, 3, 1, 1]])
    frames_BED = torch.nn.functional.one_hot(heard, 4).float()
    mask_BE = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    assert head.drafts(frames_BED, mask_BE) == [[1, 1, 2], [3, 3]]


def test_no_head_and_no_head_at_all(tmp_path: Path) -> None:
    assert CtcHead.load(tmp_path, 0, torch.device("cpu")) is None
    (tmp_path / CTC_FILE).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"ctc_head\.safetensors: no CTC head .* set rollout\.draft=earlier"):
        CtcHead.load(tmp_path, 0, torch.device("cpu"))


def test_a_head_of_another_model_is_refused(tmp_path: Path) -> None:
    save_ctc_head(tmp_path, torch.zeros(4, 3), torch.zeros(4), torch.float16)
    assert CtcHead.load(tmp_path, 0, torch.device("cpu"), (4, 3)) is not None
    for shape in ((5, 3), (4, 2)):
        with pytest.raises(ValueError, match=r"no CTC head of this model \(shapes \[4, 3\] and \[4\], the model has"):
            CtcHead.load(tmp_path, 0, torch.device("cpu"), shape)


def load_head(folder: Path) -> None:
    """As a rank does at start."""
    worker = StudentWorker.__new__(StudentWorker)  # without a Ray group around it
    worker.config, worker.path, worker.pad_id = make_config(folder, "opd", rollout={"draft": "ctc"}), str(folder), 0
    worker.engine = start(worker.config)
    worker._load_ctc_head(worker.engine.model_config.vocab_size)


def test_a_head_that_is_asked_for_must_be_there() -> None:
    run_ranks(1, load_head, SEED)
    without = SEED.with_name("tiny_student")
    with pytest.raises(Exception, match=r"rollout\.draft=ctc: .*tiny_student has no ctc_head\.safetensors; start from"):
        run_ranks(1, load_head, without)


def rollouts(manifest: Path) -> list[tuple[list, int, int, int]]:
    """Without drafts and with what the encoder hears: ids, forwards, drafted and accepted tokens."""
    config = make_config(SEED, "opd")
    worker = StudentWorker.__new__(StudentWorker)  # without a Ray group around it
    worker.config, worker.engine, worker.processor = config, start(config), load_processor(SEED)
    tokenizer, vocab_size = worker.processor.tokenizer, worker.engine.model_config.vocab_size
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    blocked_V = blocked_mask(blocked_token_ids(tokenizer, vocab_size, eos_id), vocab_size)
    inputs = worker.processor.build_inputs([load_audio(u) for u in read_manifest(manifest)])
    found = []
    for head in (None, CtcHead.load(SEED, pad_id, torch.device("cpu"))):
        worker.ctc_head = head
        with worker.engine.generation_mode():
            prompts = worker.engine.encode(inputs)
            drafts = worker._draft_ids(prompts, [None] * 6)
            rollout, counts = speculate(
                worker.engine.generate_forward, prompts, steps=worker.engine.decoder_steps(), drafts=drafts, eos_id=eos_id,
                pad_id=pad_id, blocked_V=blocked_V, max_new_tokens=40, top_k=8,
            )  # fmt: skip
        ids = rollout.response_ids_BT.masked_fill(~rollout.response_mask_BT, -1).tolist()
        found.append((ids, *(int(n.sum()) for n in (counts.forwards_B, counts.drafted_B, counts.accepted_B))))
    return found


def test_what_the_encoder_hears_saves_forwards_and_changes_nothing(tmp_path: Path) -> None:
    """The shipped student of sentences, with the CTC head that its fine-tuning left, on sentences without a text."""
    manifest = make_set(tmp_path, "set", 6, 31, voices=TRAINING_VOICES[:6], texts=sentences("evaluation", 6, 31))
    plain, drafted = run_ranks(1, rollouts, manifest)[0]
    print(plain[1:], drafted[1:])
    assert drafted[0] == plain[0]
    assert plain[2] == 0
    assert drafted[3] > 0
    assert drafted[1] < plain[1]
