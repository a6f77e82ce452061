"""ARK-ASR teaching ARK-ASR: one teacher-forced forward over prompt + response, in the teacher's own ids."""

from __future__ import annotations

from typing import Any

import torch

from data.collate import Collator
from opd.arkasr import ArkasrConfig, blocked_token_ids, load_model, load_processor
from opd.rollout.decode import decode
from opd.support import candidate_ids, score_support
from opd.types import DTYPES, Batch, Rollout, TeacherScore
from opd.vocab import TokenMap, blocked_mask


class ArkasrTeacher:
    """An ARK-ASR checkpoint as the teacher. `student_path` is the folder with the student's tokenizer and config."""

    def __init__(self, config: dict[str, Any], student_path: str) -> None:
        teacher = config["teacher"]
        self.config = config
        self.device = torch.device("cuda" if config["cluster"]["use_gpu"] else "cpu")
        self.processor = load_processor(teacher["path"])
        model = load_model(
            teacher["path"], dtype=DTYPES[teacher["dtype"]], attn_implementation=teacher["attn_implementation"]
        )
        self.model = model.to(self.device).eval()
        tokenizer = self.processor.tokenizer
        student = load_processor(student_path)
        student_vocab_size = ArkasrConfig.from_pretrained(student_path).vocab_size
        vocab_size = self.model.config.vocab_size
        self.eos_id = tokenizer.eos_token_id
        self.student_eos_id = student.tokenizer.eos_token_id
        blocked = blocked_token_ids(tokenizer, vocab_size, self.eos_id)
        student_blocked = blocked_token_ids(student.tokenizer, student_vocab_size, self.student_eos_id)
        self.blocked_V = blocked_mask(blocked, vocab_size).to(self.device)
        self.token_map = TokenMap.build(
            student.tokenizer, tokenizer, student_vocab_size, vocab_size,
            student_eos_id=self.student_eos_id, teacher_eos_id=self.eos_id,
            student_blocked=student_blocked, teacher_blocked=blocked,
        )  # fmt: skip
        # The policy for bad audio is the student's: what it could not read comes here as an empty row.
        self.collator = Collator(max_seconds=config["data"]["max_seconds"], on_bad_audio="skip")

    def facts(self) -> dict[str, Any]:
        return {
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "vocab_coverage": self.token_map.coverage,
        }

    def _prompts(self, utterances: Batch) -> dict[str, torch.Tensor]:
        waveforms, _ = self.collator.collate(utterances)
        return {name: tensor.to(self.device) for name, tensor in self.processor.build_inputs(waveforms).items()}

    @torch.no_grad()
    def score(self, utterances: Batch, rollout: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`TeacherScore` of a `Rollout`: the same ids, mapped one to one, never re-tokenised."""
        written = Rollout.from_dict(rollout)
        mask_BT = written.response_mask_BT
        mapped_BT = self.token_map.student_to_teacher[written.response_ids_BT]
        # After an id the teacher does not know it would be conditioned on something else than the student was.
        aligned_BT = mask_BT & ((mapped_BT >= 0) | ~mask_BT).long().cumprod(1).bool()
        logits_BTV = self._response_logits(utterances, mapped_BT.clamp(min=0), mask_BT)
        candidates_BTC = candidate_ids(written.topk_ids_BTK, written.response_ids_BT, self.student_eos_id)
        loss = self.config["loss"]
        fields = score_support(
            logits_BTV[aligned_BT.to(self.device)].float().masked_fill(self.blocked_V, float("-inf")),
            candidates_BTC[aligned_BT].to(self.device),
            self.token_map,
            top_k=loss["top_k"],
            temperature=loss["temperature"],
            support=loss["support"],
            full=loss["kind"] == "full_kl",
        )
        return _unflatten(fields, aligned_BT).to_dict()

    def _response_logits(self, utterances: Batch, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Logits that predict each response position: (B, T, V)."""
        inputs = self._prompts(utterances)
        length = ids_BT.shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids_BT.to(self.device)], dim=1)
        mask = mask_BT.to(self.device, inputs["attention_mask"].dtype)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
        out = self.model(**inputs, use_cache=False, logits_to_keep=length + 1)
        return out.logits[:, :-1]

    def transcribe(self, utterances: Batch) -> list[str]:
        """Greedy transcripts, cleaned of control tokens."""
        rollout = decode(
            self.model,
            self._prompts(utterances),
            eos_id=self.eos_id,
            pad_id=self.processor.tokenizer.pad_token_id,
            blocked_V=self.blocked_V,
            max_new_tokens=self.config["rollout"]["max_new_tokens"],
            top_k=1,
        )
        rows = zip(rollout.response_ids_BT, rollout.response_mask_BT, strict=True)
        return [self.processor.clean_text(ids[mask].tolist()) for ids, mask in rows]


def _unflatten(fields: dict[str, torch.Tensor], aligned_BT: torch.Tensor) -> TeacherScore:
    """Scores of N aligned positions -> (B, T, ...) tensors on the CPU; zeros where nothing was scored."""
    tensors: dict[str, torch.Tensor] = {"aligned_mask_BT": aligned_BT}
    for name, value in fields.items():
        dense = torch.zeros((*aligned_BT.shape, *value.shape[1:]), dtype=value.dtype)
        dense[aligned_BT] = value.cpu()
        tensors[name] = dense
    return TeacherScore.from_dict(tensors)
