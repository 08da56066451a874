"""Image classification: cross-entropy, or sigmoids as the Mixer's pre-training has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_mlp.distributed import broadcast
from sparse_mlp.engine import Batch, Evaluation, Task
from sparse_mlp.errors import UserError
from sparse_mlp.tasks.metrics import gather_columns, sorted_by_index, top_accuracies


@dataclass(frozen=True)
class ClassifyConfig:
    """What a classifier learns from."""

    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """cross_entropy, or bce: one sigmoid a class, summed over the classes."""

    smoothing: float = 0.0
    """Share of every target that is spread evenly over the classes."""

    frozen: bool = False
    """Train only the classifier; the backbone is frozen and in evaluation mode: a linear probe."""


class Classify(Task):
    """A timm model that learns the classes of images.

    Batches hold `image` (B, C, H, W), `target` (B,) class numbers or (B, classes) shares, and `index` (B,).
    """

    items = "images"

    def __init__(
        self,
        model: nn.Module,
        config: ClassifyConfig | None = None,
        *,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """UserError if the model's classes are not as many as `class_names`, for one class, or for an unknown loss."""
        super().__init__()
        config = config or ClassifyConfig()
        self.num_classes = int(model.num_classes)  # type: ignore[arg-type]
        if class_names is not None and len(class_names) != self.num_classes:
            raise UserError(f"the model has {self.num_classes} classes, the data have {len(class_names)}")
        if self.num_classes < 2:
            raise UserError(f"there is nothing to tell apart: {', '.join(class_names or ()) or 'it'} is the only class")
        if not 0 <= config.smoothing < 1:
            raise UserError(f"task.smoothing {config.smoothing} is not in [0, 1)")
        self.model, self.smoothing = model, config.smoothing
        self.class_names = list(class_names) if class_names is not None else None
        self.criterion = _criterion(config.loss)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.score(self.model(batch["image"]), batch["target"])

    def score(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and accuracy of logits (B, classes) against class numbers (B,) or shares (B, classes)."""
        loss = self.criterion(logits.float(), self._shares(target))
        best = target if target.ndim == 1 else target.argmax(dim=1)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == best).float().mean()}

    def backbone(self) -> nn.Module:
        return self.model

    def param_groups(self, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()  # type: ignore[operator]
        no_decay = {*names, "*.bias"}  # stacked experts have biases of two dimensions
        if layer_decay is None:
            return param_groups_weight_decay(self.model, weight_decay, no_weight_decay_list=no_decay)
        return param_groups_layer_decay(self.model, weight_decay, no_decay, layer_decay=layer_decay)

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> Evaluation:
        """`loss` (without smoothing), `top1`, `top5`, `images` over all ranks; predictions `index`, `target`, `logits`.

        In float32; an image that two ranks saw, or one rank twice, counts once.
        """
        training = self.training
        self.eval()
        try:
            rows = [(batch["index"], batch["target"], self._logits(batch["image"].to(device))) for batch in loader]
        finally:
            self.train(training)
        columns = gather_columns(rows)
        if columns is None:
            return Evaluation(broadcast(dict[str, float]()))
        if not columns:
            raise UserError("there are no images to evaluate on")
        order = sorted_by_index(columns[0])
        index, target, logits = (column[order] for column in columns)
        metrics = self._metrics(torch.from_numpy(target), torch.from_numpy(logits))
        return Evaluation(broadcast(metrics), {"index": index, "target": target, "logits": logits})

    def _logits(self, image: Tensor) -> Tensor:
        return self.model(image).float().cpu()

    def _metrics(self, target: Tensor, logits: Tensor) -> dict[str, float]:
        loss = self.criterion(logits.double(), F.one_hot(target, self.num_classes).double())
        return {"loss": float(loss), **top_accuracies(logits, target), "images": len(target)}

    def _shares(self, target: Tensor) -> Tensor:
        """Smoothed targets (B, classes) from class numbers or shares."""
        if target.ndim == 1:
            target = F.one_hot(target, self.num_classes).float()
        return target * (1 - self.smoothing) + self.smoothing / self.num_classes


def _criterion(loss: str) -> nn.Module:
    if loss == "cross_entropy":
        return nn.CrossEntropyLoss()
    if loss == "bce":
        return BinaryCrossEntropy(smoothing=0.0, sum_classes=True)
    raise UserError(f"unknown task.loss {loss!r}; allowed are cross_entropy and bce")
