"""The weighted k-nearest-neighbour classifier, which evaluates features without training on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_mlp.errors import UserError

__all__ = ["nearest", "weighted_knn"]

_CHUNK = 1024  # test rows at a time: with 50,000 training rows 200 MB of similarities


def weighted_knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Votes (M, num_classes) of the k nearest training rows (Wu et al. 2018, "InstDisc", section 3.4; DINO, MoCo).

    Features (N, D) and (M, D) are compared by cosine; a neighbour votes for its class with exp(cosine / temperature).
    A k above N is N. The class of a row is its argmax.

    UserError for k or temperature out of range, labels that are no classes or all of one class, or shapes that do not
    fit.
    """
    if temperature <= 0:
        raise UserError(f"the kNN temperature {temperature} is not positive")
    labels = train_labels.long()
    if labels.shape != train_features.shape[:1]:
        raise UserError(f"kNN has labels {tuple(labels.shape)} for features {tuple(train_features.shape)}")
    if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"kNN needs labels in 0..{num_classes - 1} for its {len(labels)} training images")
    if (labels == labels[0]).all():
        raise UserError(f"kNN needs two classes, but all {len(labels)} training images are of class {int(labels[0])}")
    cosines, rows = nearest(train_features, test_features, k)
    # Against the nearest of all, so that small temperatures do not overflow; a row's votes keep their ratios.
    weights = ((cosines - cosines[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(test_features), num_classes)
    return votes.scatter_add_(1, labels[rows], weights)


def nearest(train_features: Tensor, test_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (M, K), descending, of the K = min(k, N) training rows nearest to each test row, and their indices."""
    if k < 1:
        raise UserError(f"kNN needs at least one neighbour, got k = {k}")
    if train_features.ndim != 2 or test_features.ndim != 2 or train_features.shape[1] != test_features.shape[1]:
        shapes = f"{tuple(train_features.shape)} and {tuple(test_features.shape)}"
        raise UserError(f"kNN compares features (N, D) with (M, D), got {shapes}")
    train = F.normalize(train_features.float(), dim=1)
    test = F.normalize(test_features.float(), dim=1)
    k = min(k, len(train))
    found = [(part @ train.T).topk(k, dim=1) for part in test.split(_CHUNK)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
