"""What teachers of all kinds share: one teacher-forced forward over prompt + response, in the teacher's own ids.

A kind says how its model is loaded, what its prompt is, what ends a response and how ids become text.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from data.audio import BadAudio
from data.collate import Collator
from data.timed import within
from opd.arkasr import ArkasrConfig, load_processor
from opd.arkasr.loading import named_by
from opd.cpu_linear import use_faster_linears
from opd.rollout.decode import decode
from opd.support import candidate_ids, score_support
from opd.teachers.mapping import MappedRollout, ResponseMapper, control_ids
from opd.teachers.output import OutputLayer
from opd.types import DTYPES, Batch, Rollout, TeacherScore, TeacherTranscript
from opd.vocab import blocked_mask

Inputs = dict[str, torch.Tensor]
CHUNK_SIZE = 256  # most positions whose logits are held at a time
CHUNK_LOGITS = 1 << 24  # most logits, 64 MB in float32


class CausalTeacher(ABC):
    """A causal decoder that hears audio through its prompt. `student_path` has the student's tokenizer and config."""

    def __init__(self, config: dict[str, Any], student_path: str) -> None:
        self.config = config
        self.section: dict[str, Any] = config["teacher"]
        self.device = torch.device("cuda" if config["cluster"]["use_gpu"] else "cpu")
        model, self.processor = self.load(
            self.section["path"], DTYPES[self.section["dtype"]], self.section["attn_implementation"]
        )
        self.model = model.to(self.device).eval()
        use_faster_linears(self.model)
        self.tokenizer = self.processor.tokenizer
        self.output = OutputLayer(self.model)
        self.taken = set(inspect.signature(self.model.forward).parameters)
        # What the student could not read comes here as an empty row; `_heard` says what becomes of the rest.
        self.collator = Collator(max_seconds=config["data"]["max_seconds"], on_bad_audio="skip")

        with named_by("student.path=", student_path):
            student = load_processor(student_path).tokenizer
        student_vocab_size = ArkasrConfig.from_pretrained(student_path).vocab_size
        vocab_size = self.model.get_output_embeddings().weight.shape[0]
        self.ends = self.end_ids()
        self.eos_id, self.student_eos_id = self.ends[0], student.eos_token_id
        blocked = sorted({*control_ids(self.tokenizer, vocab_size, self.eos_id), *self.ends[1:]})
        self.blocked_V = blocked_mask(blocked, vocab_size).to(self.device)
        self.mapper = ResponseMapper(
            student, self.tokenizer, student_vocab_size, vocab_size,
            student_eos_id=self.student_eos_id, teacher_eos_id=self.eos_id,
            student_blocked=control_ids(student, student_vocab_size, self.student_eos_id), teacher_blocked=blocked,
        )  # fmt: skip
        self.token_map = self.mapper.token_map

    # -- what a kind says --------------------------------------------------------------------------------------------

    @abstractmethod
    def load(self, path: str, dtype: torch.dtype, attn_implementation: str) -> tuple[Any, Any]:
        """(model, processor). The processor has a `tokenizer`."""

    @abstractmethod
    def prompts_of(self, utterances: Batch, waveforms: list[np.ndarray]) -> list[tuple[list[int], Inputs]]:
        """Rows and their model inputs: input_ids and attention_mask left-padded, ready for a response to be appended.

        waveforms are the utterances' audio, float32 [samples] at 16 kHz. One group where the model masks padded audio;
        several where rows of other lengths would change a row's result.
        """

    @abstractmethod
    def read_text(self, ids: list[int]) -> str:
        """The transcript in the ids of a response."""

    def end_ids(self) -> list[int]:
        """Ids that end a response; the first is the one that the student's EOS maps to."""
        return [self.tokenizer.eos_token_id]

    def prompts(self, utterances: Batch) -> list[tuple[list[int], Inputs]]:
        """`prompts_of` utterances whose audio is still to be read; what cannot be read is heard as silence."""
        return self.prompts_of(utterances, self.read(utterances)[0])

    def read(self, utterances: Batch) -> tuple[list[np.ndarray], list[BadAudio]]:
        """What the collator reads. Raises ValueError, with the file, where it takes longer than data.read_timeout_s."""
        limit_s = self.config["data"]["read_timeout_s"]
        return within(limit_s, lambda: self.collator.collate(utterances), self.collator.reading)

    # -- scoring -----------------------------------------------------------------------------------------------------

    def score(self, utterances: Batch, rollout: Inputs) -> Inputs:
        """`TeacherScore` of a `Rollout`, both as dictionaries: the student's very ids, mapped one to one where they map."""
        return self.score_and_count(utterances, rollout)[0]

    @torch.no_grad()
    def score_and_count(self, utterances: Batch, rollout: Inputs) -> tuple[Inputs, dict[str, Any]]:
        """`score`, and counts: positions (written), aligned, responses, retokenised (responses that did not map).

        `bad_audio` among them lists (utterance id, path, reason) of what the teacher could not read and the student could:
        no position of it is aligned or counted. Raises ValueError for the first one with data.on_bad_audio=stop.
        """
        waveforms, errors = self.read(utterances)
        written, bad = self._heard(utterances, Rollout.from_dict(rollout), errors)
        mapped = self.mapper.map_rollout(written)
        aligned_BT = mapped.position_BT >= 0
        candidates_BTC = candidate_ids(written.topk_ids_BTK, written.response_ids_BT, self.student_eos_id)
        dense: Inputs = {"aligned_mask_BT": aligned_BT}
        for rows, inputs in self.prompts_of(utterances, waveforms):
            in_group_BT = torch.zeros_like(aligned_BT)
            in_group_BT[rows] = aligned_BT[rows]
            states_BLD, to_logits = self._response_states(inputs, mapped, rows)
            fields = self._score_positions(states_BLD, to_logits, mapped.position_BT[rows], candidates_BTC[in_group_BT])
            for name, value in fields.items():
                dense.setdefault(name, torch.zeros((*aligned_BT.shape, *value.shape[1:]), dtype=value.dtype))
                dense[name][in_group_BT] = value.cpu()
        counts = {
            "positions": int(written.response_mask_BT.sum()),
            "aligned": int(aligned_BT.sum()),
            "responses": int(written.response_mask_BT.any(1).sum()),
            "retokenised": mapped.num_retokenised,
            "bad_audio": [(error.utterance_id, error.path, error.reason) for error in bad],
        }
        return TeacherScore.from_dict(dense).to_dict(), counts

    def _heard(self, utterances: Batch, written: Rollout, errors: list[BadAudio]) -> tuple[Rollout, list[BadAudio]]:
        """The rollout without the responses to audio that could not be read here, and the errors that the student did not meet."""
        known = {u.id for u, is_bad in zip(utterances, written.bad_audio_B.tolist(), strict=True) if is_bad}
        bad = [error for error in errors if error.utterance_id not in known]
        if bad and self.config["data"]["on_bad_audio"] == "stop":
            raise ValueError(
                f"the teacher {self.section['path']} cannot hear what the student heard: {bad[0]}; the teacher's node needs "
                "the same files at the same paths; or set data.on_bad_audio=skip to leave such utterances out"
            )
        lost = {error.utterance_id for error in bad}
        heard_B = torch.tensor([utterance.id not in lost for utterance in utterances])
        return replace(written, response_mask_BT=written.response_mask_BT & heard_B[:, None]), bad

    def _response_states(
        self, inputs: Inputs, mapped: MappedRollout, rows: list[int]
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """What predicts each teacher position of these rows' responses (rows, L, ...), and its way to logits."""
        mask_BL = mapped.mask_BL[rows]
        length = max(1, int(mask_BL.sum(1).max()))
        ids_BL = mapped.ids_BL[rows, :length].to(self.device)
        mask_BL = mask_BL[:, :length].to(self.device, inputs["attention_mask"].dtype)
        joined = dict(inputs)
        joined["input_ids"] = torch.cat([inputs["input_ids"], ids_BL], dim=1)
        joined["attention_mask"] = torch.cat([inputs["attention_mask"], mask_BL], dim=1)
        states_BLD, to_logits = self.output.states(self.forward, joined | {"logits_to_keep": length + 1})
        return states_BLD[:, -length - 1 : -1], to_logits

    def _score_positions(
        self,
        states_BLD: torch.Tensor,
        to_logits: Callable[[torch.Tensor], torch.Tensor],
        position_BT: torch.Tensor,
        candidates_NC: torch.Tensor,
    ) -> Inputs:
        """Fields of the score at the N aligned positions, row by row."""
        row_N, column_N = (position_BT >= 0).nonzero(as_tuple=True)
        position_N = position_BT[row_N, column_N].to(self.device)
        row_N, candidates_NC = row_N.to(self.device), candidates_NC.to(self.device)
        loss = self.config["loss"]
        size = min(CHUNK_SIZE, max(1, CHUNK_LOGITS // len(self.blocked_V)))
        parts = [
            score_support(
                self._allowed(to_logits(states_BLD[row_N[chunk], position_N[chunk]])),
                candidates_NC[chunk],
                self.token_map,
                top_k=loss["top_k"],
                temperature=loss["temperature"],
                support=loss["support"],
                full=loss["kind"] == "full_kl",
            )
            for start in range(0, max(1, len(row_N)), size)
            for chunk in [slice(start, start + size)]
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _allowed(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Logits over what may be written, at least in float32: control tokens are -inf, all ends are one. May be in place."""
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        if len(self.ends) > 1:
            logits_NV[..., self.eos_id] = logits_NV[..., self.ends].logsumexp(-1)
        return logits_NV.masked_fill_(self.blocked_V, float("-inf"))

    def forward(self, **inputs: Any) -> Any:
        """The model's forward, with positions counted from each row's first real token (a prompt is padded on the left)."""
        if "position_ids" in self.taken:
            positions_BL = (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_BL[:, -inputs["input_ids"].shape[1] :]
        if "logits_to_keep" not in self.taken:
            inputs.pop("logits_to_keep", None)
        return self.model(**inputs)

    def _forward_allowed(self, **inputs: Any) -> Any:
        out = self.forward(**inputs)
        out.logits = self._allowed(out.logits[:, -1:])
        return out

    # -- transcribing ------------------------------------------------------------------------------------------------

    def transcribe(self, utterances: Batch) -> list[TeacherTranscript]:
        """Greedy transcripts, cleaned of control tokens, in order."""
        transcripts: dict[int, TeacherTranscript] = {}
        waveforms, errors = self.read(utterances)
        bad = {error.utterance_id: error.reason for error in errors}
        for rows, inputs in self.prompts_of(utterances, waveforms):
            rollout = decode(
                self._forward_allowed,
                inputs,
                eos_id=self.eos_id,
                pad_id=self.pad_id,
                blocked_V=self.blocked_V,
                max_new_tokens=self.config["rollout"]["max_new_tokens"],
                max_repeats=self.config["rollout"]["max_repeats"],
                top_k=1,
            )
            for index, row in enumerate(rows):
                transcripts[row] = self._transcript(rollout, index, bad.get(utterances[row].id))
        return [transcripts[row] for row in range(len(utterances))]

    def _transcript(self, rollout: Rollout, row: int, error: str | None) -> TeacherTranscript:
        if error is not None:
            return TeacherTranscript("", 0.0, 0, finished=False, looped=False, error=error)
        mask_T = rollout.response_mask_BT[row]
        return TeacherTranscript(
            text=self.read_text(rollout.response_ids_BT[row][mask_T].tolist()),
            avg_logprob=float(rollout.logprobs_BT[row][mask_T].mean()),
            num_tokens=int(mask_T.sum()),
            finished=bool(rollout.finished_B[row]),
            looped=int(rollout.loop_start_B[row]) < mask_T.shape[0],
        )

    @property
    def pad_id(self) -> int:
        """What stands where the attention mask is 0."""
        return self.eos_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def facts(self) -> dict[str, Any]:
        return {
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "vocab_coverage": self.token_map.coverage,
            "languages": None,
        }

    def to_model(self, inputs: Inputs) -> Inputs:
        """Inputs on the model's device, audio in the model's type."""
        return {
            name: tensor.to(self.device, self.model.dtype) if tensor.is_floating_point() else tensor.to(self.device)
            for name, tensor in inputs.items()
        }
