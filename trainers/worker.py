"""The student's worker: one rank of a verl worker group. Reads its own audio, writes rollouts, trains, saves.

Rollouts and scores come and go as references to dictionaries of tensors; the driver never holds a tensor.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.base import EngineRegistry

import trainers.fsdp2  # noqa: F401  registers the engine
from data.collate import Collator
from opd.arkasr import blocked_token_ids, load_processor
from opd.arkasr.loading import named_by
from opd.config import config_from_dict
from opd.export import save_arkasr
from opd.peak_memory import peak_memory
from opd.rollout.ctc import CTC_FILE, CtcHead, save_ctc_head
from opd.rollout.decode import split, uniforms
from opd.rollout.forced import forced
from opd.rollout.speculative import RolloutCounts, forward_cost, speculate
from opd.support import check_top_k
from opd.types import DTYPES, Batch, Rollout, TeacherScore
from opd.vocab import blocked_mask
from trainers.base_engine import init_process_group, num_elements
from trainers.cluster import check_interface
from trainers.fsdp2 import MODEL_TYPE
from trainers.loader import PromptLoader
from trainers.objectives import (
    MicroBatch,
    micro_batch_rows,
    opd_micro_batch,
    opd_objective,
    response_ids,
    sft_micro_batch,
    sft_objective,
)


class StudentWorker(Worker):
    """One rank of the student. Methods that take lists of length world_size get their own element of each list."""

    def __init__(self, config: dict[str, Any], path: str) -> None:
        super().__init__()
        self.config = config_from_dict(config)
        self.path = path
        self._saving: Future[Any] | None = None
        # Prompts of rollouts that are not trained yet, oldest first, and the rows of each of their micro-batches.
        self._kept: deque[tuple[list[str], dict[str, torch.Tensor], list[list[int]]]] = deque()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def setup(self) -> dict[str, Any]:
        """Joins the other ranks and builds the student. Returns facts for the log, among them where the time went."""
        began = time.perf_counter()
        torch.set_num_threads(self.config.cluster.threads_per_rank)
        np.random.seed(self.config.seed)
        check_interface(self.config.cluster)
        init_process_group(self.config.cluster.collective_timeout_s, self.config.cluster.use_gpu)
        joined = time.perf_counter()
        if self.config.engine == "deepspeed":
            import trainers.zero  # noqa: F401  registers the engine; DeepSpeed takes seconds to import
        with named_by("student.path=", self.path):
            self.processor = load_processor(self.path)
            self.engine = EngineRegistry.new(MODEL_TYPE, self.config.engine, config=self.config, path=self.path)
            self.engine.initialize()
        tokenizer = self.processor.tokenizer
        vocab_size = self.engine.model_config.vocab_size
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.blocked_V = blocked_mask(blocked_token_ids(tokenizer, vocab_size, self.eos_id), vocab_size).to(self.device)
        if self.config.stage == "opd":
            check_top_k(self.config.loss.top_k, self.blocked_V)
        collator = Collator(max_seconds=self.config.data.max_seconds, on_bad_audio=self.config.data.on_bad_audio)
        self.loader = PromptLoader(
            collator, self.processor, self.config.data.num_threads, self.config.data.read_timeout_s
        )
        decoder_size = sum(map(num_elements, self.engine.module.model.model.parameters()))
        self.forward_cost = forward_cost(
            decoder_size,
            self.engine.model_config.num_hidden_layers,
            self.device.type,
            self.config.cluster.threads_per_rank,
        )
        self.ctc_head = self._load_ctc_head(vocab_size)
        parameters = list(self.engine.module.parameters())
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "node": socket.gethostname(),
            "num_parameters": sum(map(num_elements, parameters)),
            "num_trained": sum(num_elements(p) for p in parameters if p.requires_grad),
            "seconds_join": joined - began,
            "seconds_build": time.perf_counter() - joined,
        }

    def _load_ctc_head(self, vocab_size: int) -> CtcHead | None:
        """What drafts are heard with, where the student's folder has it. Raises ValueError where it is missing and asked for."""
        draft = self.config.rollout.draft
        if self.config.stage != "opd" or draft not in ("auto", "ctc"):
            return None
        width = self.engine.model_config.whisper_config.d_model
        head = CtcHead.load(self.path, self.pad_id, self.device, (vocab_size, width))
        if head is None and draft == "ctc":
            raise ValueError(
                f"rollout.draft=ctc: {self.path} has no {CTC_FILE}; start from a student that stage=sft trained with "
                "loss.ctc_weight above 0 and export.ctc_head=true, or set rollout.draft=auto"
            )
        return head

    @property
    def device(self) -> torch.device:
        name = get_device_name()
        return torch.device(name) if name == "cpu" else torch.device(name, get_device_id())

    @register(dispatch_mode=Dispatch.ALL_TO_ALL, blocking=False)
    def prefetch(self, shard: Batch) -> None:
        """Begins to read the audio of this rank's shard of the next batch."""
        self.loader.prefetch(shard)

    # -- rollout ---------------------------------------------------------------------------------------------------

    @register(dispatch_mode=Dispatch.ALL_TO_ALL, blocking=False)
    def generate(self, shard: Batch, step: int, drafts: list[str | None]) -> dict[str, Any]:
        """The student writes a response to each utterance of its shard, or reads the manifest's (rollout.source).

        drafts: a text that the response may be like, or None; how much it is decides how many forwards are needed.

        Returns references to micro-batches of the rollout, the texts, what audio was bad, and the seconds it took.
        """
        began = time.perf_counter()
        inputs, bad = self._prompts(shard)
        config, encoded_once = self.config.rollout, self.engine.encodes_once(len(shard))
        with self.engine.generation_mode():
            prompts = self.engine.encode(inputs, with_graph=encoded_once)
            if config.source == "manifest":
                rollout, counts = self._forced(prompts, shard, bad), None
            else:
                given = self._draft_ids(prompts, drafts)
                rollout, counts = self._decode(prompts, shard, bad, config.temperature, step, given)
        if encoded_once:
            inputs = prompts  # the update goes on from the same frames
        lengths_B = inputs["attention_mask"].sum(1).cpu() + rollout.response_mask_BT.sum(1)
        micro_rows = micro_batch_rows(lengths_B.tolist(), self.config.train)
        self._kept.append(([u.id for u in shard], inputs, micro_rows))
        parts = split(rollout, micro_rows)
        texts = self._texts(rollout)
        busy_s = time.perf_counter() - began  # what follows hands the rollout over
        return {
            "micro_rows": micro_rows,
            "refs": [ray.put(part.to_dict()) for part in parts],
            "texts": texts,
            "busy_s": busy_s,
            "bad": [(error.utterance_id, error.path, error.reason) for error in bad],
            "waited_s": self.loader.take_waited_s(),
            "sums": {
                "tokens": int(rollout.response_mask_BT.sum()),
                "forwards": int(counts.forwards_B.sum()) if counts else len(shard),
                "drafted": int(counts.drafted_B.sum()) if counts else 0,
                "accepted": int(counts.accepted_B.sum()) if counts else 0,
                "finished": int(rollout.finished_B.sum()),
                "looped": int((rollout.loop_start_B < rollout.response_ids_BT.shape[1]).sum()),
                "empty": int((rollout.response_mask_BT.sum(1) == 1).logical_and(rollout.finished_B).sum()),
            },
        }

    def _draft_ids(self, prompts: dict[str, torch.Tensor], drafts: list[str | None]) -> list[list[int] | None]:
        """Ids of each draft: of the text, else what the CTC head hears."""
        tokenizer = self.processor.tokenizer
        given = [tokenizer(text, add_special_tokens=False)["input_ids"] if text else None for text in drafts]
        if self.ctc_head is None or all(given):
            return given
        frames_BED = self.engine.generation_module.model.audio_encoder.layer_norm(prompts["encoded_BED"])
        heard = self.ctc_head.drafts(frames_BED, prompts["encoded_mask_BE"])
        return [ids or ctc_ids for ids, ctc_ids in zip(given, heard, strict=True)]

    @register(dispatch_mode=Dispatch.ALL_TO_ALL, blocking=False)
    def transcribe(self, shard: Batch) -> list[str | None]:
        """Greedy transcripts in the order of the shard; None where the audio is bad and the policy is to skip it."""
        texts: list[str | None] = []
        size = self.config.eval.batch_size
        with self.engine.generation_mode():
            for start in range(0, len(shard), size):
                batch = shard[start : start + size]
                inputs, bad = self._prompts(batch)
                rollout, _ = self._decode(inputs, batch, bad, 0.0, 0, [None] * len(batch))
                skipped = rollout.bad_audio_B.tolist()
                texts += [None if s else text for s, text in zip(skipped, self._texts(rollout), strict=True)]
        return texts

    def _decode(
        self, inputs: dict, shard: Batch, bad: list, temperature: float, step: int, drafts: list[list[int] | None]
    ) -> tuple[Rollout, RolloutCounts]:
        bad_ids = {error.utterance_id for error in bad}
        config = self.config.rollout
        arguments = {
            "steps": self.engine.decoder_steps(),
            "drafts": drafts,
            "forward_cost": self.forward_cost,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "blocked_V": self.blocked_V,
            "max_new_tokens": config.max_new_tokens,
            "top_k": self.config.loss.top_k,
            "temperature": temperature,
            "max_repeats": config.max_repeats,
            "bad_audio_B": torch.tensor([u.id in bad_ids for u in shard], dtype=torch.bool),
        }
        if temperature > 0:
            ids = [u.id for u in shard]
            arguments["uniforms_BT"] = uniforms(self.config.seed, step, ids, config.max_new_tokens)
        return speculate(self.engine.generate_forward, inputs, **arguments)

    def _forced(self, inputs: dict, shard: Batch, bad: list) -> Rollout:
        """The manifest's texts as a rollout."""
        bad_ids = {error.utterance_id for error in bad}
        given = [response_ids(None if u.id in bad_ids else u.text, self.processor.tokenizer) for u in shard]
        return forced(
            self.engine.generate_forward, inputs, given, eos_id=self.eos_id, pad_id=self.pad_id,
            blocked_V=self.blocked_V, top_k=self.config.loss.top_k, max_repeats=self.config.rollout.max_repeats,
        )  # fmt: skip

    def _prompts(self, shard: Batch) -> tuple[dict[str, torch.Tensor], list]:
        """Model inputs of the shard's prompts, left-padded, and the audio that was bad."""
        inputs, bad = self.loader.take(shard)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}, bad

    def _texts(self, rollout: Rollout) -> list[str]:
        rows = zip(rollout.response_ids_BT.tolist(), rollout.response_mask_BT.tolist(), strict=True)
        return [self.processor.clean_text([i for i, kept in zip(ids, mask, strict=True) if kept]) for ids, mask in rows]

    # -- update ----------------------------------------------------------------------------------------------------

    @register(dispatch_mode=Dispatch.ALL_TO_ALL, blocking=False)
    def update_opd(self, shard: Batch, rollouts: list, scores: list) -> dict[str, float]:
        """One optimizer step on the rollouts that this rank wrote and the teacher scored (lists of references)."""
        ids, inputs, micro_rows = self._kept.popleft()
        assert ids == [u.id for u in shard], "rollouts are trained in the order in which they were made"
        micros = []
        limit = self.config.cluster.call_timeout_s
        parts = list(zip(ray.get(rollouts, timeout=limit), ray.get(scores, timeout=limit), strict=True))
        began = time.perf_counter()
        for rows, (rollout, score) in zip(micro_rows, parts, strict=True):
            micros.append(
                opd_micro_batch(
                    inputs,
                    rows,
                    Rollout.from_dict(rollout),
                    TeacherScore.from_dict(score),
                    self.config.rollout,
                    self.device,
                )  # fmt: skip
            )
        return self._step(micros, opd_objective(self.config.loss, self.blocked_V, self.eos_id), began)

    @register(dispatch_mode=Dispatch.ALL_TO_ALL, blocking=False)
    def update_sft(self, shard: Batch) -> dict[str, Any]:
        """One optimizer step on the references of the shard."""
        began = time.perf_counter()
        inputs, bad = self._prompts(shard)
        bad_ids = {error.utterance_id for error in bad}
        ids = [response_ids(None if u.id in bad_ids else u.text, self.processor.tokenizer) for u in shard]
        lengths = inputs["attention_mask"].sum(1).tolist()
        micro_rows = micro_batch_rows(
            [int(n) + len(row) for n, row in zip(lengths, ids, strict=True)], self.config.train
        )
        micros = [sft_micro_batch(inputs, rows, [ids[row] for row in rows], self.pad_id) for rows in micro_rows]
        objective = sft_objective(self.config.loss, self.blocked_V, self.pad_id)
        metrics: dict[str, Any] = self._step(micros, objective, began)
        metrics["bad"] = [(error.utterance_id, error.path, error.reason) for error in bad]
        metrics["waited_s"] = self.loader.take_waited_s()
        return metrics

    def _step(self, micros: list[MicroBatch], objective: Any, began: float) -> dict[str, float]:
        with self.engine.train_mode():
            totals = self.engine.train_batch(micros, objective)
        return totals | {"busy_s": time.perf_counter() - began}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def cpu_seconds(self) -> float:
        """Processor time of this process so far, all threads."""
        return time.process_time()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def peak_memory(self) -> dict[str, float]:
        """See `opd.peak_memory.peak_memory`."""
        return peak_memory()

    # -- state -----------------------------------------------------------------------------------------------------

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def start_save(self, path: str) -> None:
        """Copies the state and begins to write this rank's part into a folder that the driver commits afterwards."""
        assert self._saving is None or self._saving.done(), "one checkpoint at a time"
        self._saving = self.engine.start_saving(path)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def is_saved(self, wait: bool) -> bool:
        """Whether what `start_save` began is written; raises what went wrong there."""
        assert self._saving is not None, "start_save comes first"
        if not wait and not self._saving.done():
            return False
        self._saving.result()
        return True

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def load(self, path: str) -> None:
        """Restores model, optimizer, schedule and random state."""
        self.engine.load_checkpoint(path)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def export(self, out_dir: str) -> None:
        """Rank 0 writes the student as a Hugging Face folder in export.dtype."""
        state = self.engine.full_state_dict()
        if self.rank == 0:
            save_arkasr(
                state, self.engine.model_config, self.processor, Path(out_dir),
                dtype=self.config.export.dtype, with_code=self.config.export.code,
            )  # fmt: skip
        if self.config.stage != "opd" and self.config.export.ctc_head:
            self._export_ctc_head(Path(out_dir))
        dist.barrier()

    def _export_ctc_head(self, out_dir: Path) -> None:
        """The CTC head that was trained, else the one that the student came with: what it hears is a draft still."""
        if self.engine.module.ctc_head is not None:
            with self.engine.generation_mode():
                weight, bias = (
                    p.detach().float().cpu().clone() for p in self.engine.generation_module.ctc_head.parameters()
                )
            if self.rank == 0:
                save_ctc_head(out_dir, weight, bias, DTYPES[self.config.export.dtype])
        elif self.rank == 0 and (Path(self.path) / CTC_FILE).is_file():
            shutil.copy(Path(self.path) / CTC_FILE, out_dir)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def round_weights(self) -> None:
        """Rounds the weights to export.dtype, for the final evaluation. No training after this."""
        self.engine.round_weights(self.config.export.dtype)
