"""Accuracies that several tasks report."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.classification import multiclass_stat_scores

__all__ = ["top_accuracies"]


def top_accuracies(scores: Tensor, target: Tensor) -> dict[str, float]:
    """`top1` and `top5` of scores (N, C) against classes (N,); with five classes or fewer `top5` is 1."""
    return {"top1": _share(scores, target, 1), "top5": _share(scores, target, 5)}


def _share(scores: Tensor, target: Tensor, k: int) -> float:
    classes = scores.shape[1]
    found = multiclass_stat_scores(scores, target, classes, top_k=min(k, classes), average="micro").tolist()
    right, support = found[0], found[-1]
    return right / support  # of counts: torchmetrics' own share has single precision
