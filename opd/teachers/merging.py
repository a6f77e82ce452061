"""Scores of some rows each as one score of all rows."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]
EMPTY = {"topk_ids_BTK": -1, "topk_logprobs_BTK": float("-inf"), "candidate_logprobs_BTC": float("-inf")}


def merge_scores(rows: list[list[int]], scores: list[Tensors]) -> Tensors:
    """`TeacherScore` dictionaries of disjoint rows as one. A teacher with a small vocabulary may have a smaller top-k."""
    merged: Tensors = {}
    for name in scores[0]:
        parts = [score[name] for score in scores]
        shape = [sum(map(len, rows)), *(max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True))]
        whole = torch.full(shape, EMPTY.get(name, 0), dtype=parts[0].dtype)
        for members, part in zip(rows, parts, strict=True):
            place = (torch.tensor(members), *(slice(size) for size in part.shape[1:]))
            whole[place] = part
        merged[name] = whole
    return merged
