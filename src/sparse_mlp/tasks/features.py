"""The features of a backbone, before any classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_mlp.engine import Batch
from sparse_mlp.errors import UserError

__all__ = ["evaluating", "extract_features", "pooled_features", "skip_final_norm"]


def pooled_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Pooled features (B, D) of a timm model with any or no classifier: timm's `pre_logits`."""
    return backbone.forward_head(backbone.forward_features(images), pre_logits=True)  # type: ignore[operator]


@torch.no_grad()
def extract_features(
    backbone: nn.Module, loader: Iterable[Batch], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D) float32, class numbers (N,) and indices (N,) of the loader's images, on the CPU, in its order.

    The backbone runs in evaluation mode without gradient; afterwards each of its modules is in the mode it was in.
    UserError if the loader has no images.
    """
    rows = []
    with evaluating(backbone):
        for batch in loader:
            features = pooled_features(backbone, batch["image"].to(device)).float().cpu()
            rows.append((features, batch["target"], batch["index"]))
    if not rows:
        raise UserError("there are no images to take features of")
    features, labels, index = (torch.cat(column) for column in zip(*rows, strict=True))
    return features, labels, index


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule has its previous mode again."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


class SkippedNorm(nn.Module):
    """An identity in place of a norm, with the state dict of that norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            self.register_buffer(name, tensor.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x


def skip_final_norm(model: nn.Module) -> None:
    """Remove the norm before the pooling and the classifier of a timm model; its state dict keeps its keys.

    UserError if the model has none under timm's usual names.
    """
    found = [name for name in ("norm", "fc_norm") if list(getattr(model, name, nn.Identity()).state_dict())]
    if not found:
        raise UserError(f"model.final_norm is off, but {type(model).__name__} has no final norm to leave out")
    for name in found:
        setattr(model, name, SkippedNorm(getattr(model, name)))
