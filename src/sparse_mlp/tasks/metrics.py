"""What the evaluations of several tasks share: rows of all ranks, and accuracies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_stat_scores

from sparse_mlp.distributed import gather

__all__ = ["gather_columns", "sorted_by_index", "top_accuracies"]


def gather_columns(batches: Sequence[tuple[Tensor, ...]]) -> list[np.ndarray] | None:
    """Concatenate the columns of all ranks' batches on rank 0; None on the other ranks; collective.

    The list is empty if no rank has a batch.
    """
    ranks = gather([torch.cat(column).numpy() for column in zip(*batches, strict=True)])
    if ranks is None:
        return None
    return [np.concatenate(column) for column in zip(*(columns for columns in ranks if columns), strict=True)]


def sorted_by_index(index: np.ndarray) -> np.ndarray:
    """Row numbers that sort by `index` (N,), each index once; rows of streams, which have index -1, all stay."""
    first = np.unique(index, return_index=True)[1]
    return np.concatenate([first[index[first] >= 0], np.flatnonzero(index < 0)])


def top_accuracies(scores: Tensor, target: Tensor) -> dict[str, float]:
    """`top1` and `top5` of scores (N, C) against classes (N,); with five classes or fewer `top5` is 1."""
    return {"top1": _share(scores, target, 1), "top5": _share(scores, target, 5)}


def _share(scores: Tensor, target: Tensor, k: int) -> float:
    classes = scores.shape[1]
    found = multiclass_stat_scores(scores, target, classes, top_k=min(k, classes), average="micro").tolist()
    right, support = found[0], found[-1]
    return right / support  # of counts: torchmetrics' own share has single precision
