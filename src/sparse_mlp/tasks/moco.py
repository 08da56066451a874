"""MoCo v3: contrastive pre-training on two views of each image.

Paper: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv 2104.02057; algorithm
1 and section 4. Mixtures of experts with it are not described anywhere; ours is stated at `Moco`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_mlp.distributed import all_gather, broadcast, by_mesh, rank, sync_batch_norm, world_size
from sparse_mlp.engine import Batch, Evaluation, Task
from sparse_mlp.errors import UserError
from sparse_mlp.tasks.features import evaluating
from sparse_mlp.tasks.knn import weighted_knn
from sparse_mlp.tasks.metrics import gather_columns, sorted_by_index, top_accuracies

__all__ = ["Moco", "MocoConfig", "contrast", "feature_rank", "feature_std", "momentum_at"]


@dataclass(frozen=True)
class MocoConfig:
    """The MoCo v3 loss, its networks and the kNN that monitors it; the defaults are the published ones."""

    temperature: float = 0.2
    """Scale of the similarities; the loss is multiplied by twice its value."""

    momentum: float = 0.99
    """Share of itself that the momentum encoder keeps in the first update; it rises to 1 along a cosine."""

    momentum_sched: bool = True
    """Raise the momentum over the run; off, it is constant."""

    hidden_dim: int = 4096
    """Width of the hidden layers of projector and predictor."""

    out_dim: int = 256
    """Width of the projections that the loss compares."""

    projector_layers: int = 3
    """Layers of the projector."""

    predictor_layers: int = 2
    """Layers of the predictor."""

    freeze_patch_embed: bool | None = None
    """Leave the patch embedding at its random start, which keeps training stable (section 4.3). Left out: where the
    model has one, that is a convolution whose patches do not overlap."""

    decay_all: bool = False
    """Apply weight decay to biases and norms too, as the published code does with AdamW (not with LARS)."""

    knn_images: int = 10_000
    """Training images that the weighted kNN of an evaluation compares with; 0 leaves it out."""

    knn_k: int = 20
    """Neighbours that vote."""

    knn_temperature: float = 0.07
    """A neighbour's vote is exp(cosine / temperature)."""

    def __post_init__(self) -> None:
        for name in ("temperature", "knn_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"task.{name} {getattr(self, name)} is not positive")
        if not 0 <= self.momentum <= 1:
            raise UserError(f"task.momentum {self.momentum} is not in [0, 1]")
        for name in ("hidden_dim", "out_dim", "projector_layers", "predictor_layers", "knn_k"):
            if getattr(self, name) < 1:
                raise UserError(f"task.{name} {getattr(self, name)} is below 1")
        if self.knn_images < 0:
            raise UserError(f"task.knn_images {self.knn_images} is below 0")


class Moco(Task):
    """Pre-trains any timm model, whose classifier is removed.

    Batches hold `view1` and `view2` (B, C, H, W); a `target` is not used. Evaluation batches hold `image`,
    `target`, `index` and `bank` (B,), True for training images that the kNN compares with.

    Only the online encoder has a balance loss for its experts, the mean over both views. The momentum encoder runs in
    evaluation mode except for its batch norms, which use the batch's statistics as published: its router has no noise,
    adds no gradient and drops nothing.
    """

    model_passes = 2
    items = "images"

    def __init__(self, model: nn.Module, config: MocoConfig | None = None, num_classes: int = 0) -> None:
        """UserError for a model that lacks what an option requires. Create it after the process group."""
        super().__init__()
        self.config = config = config or MocoConfig()
        self.num_classes = num_classes
        model.reset_classifier(0)  # type: ignore[operator]
        if config.freeze_patch_embed is not False:
            _freeze_patch_embed(model, needed=config.freeze_patch_embed is True)
        dim = int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]
        self.encoder = model
        self.projector = mlp(config.projector_layers, dim, config.hidden_dim, config.out_dim)
        self.predictor = mlp(config.predictor_layers, config.out_dim, config.hidden_dim, config.out_dim)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.momentum = config.momentum
        self.schedules_over_run = config.momentum_sched
        sync_batch_norm(self)
        self.train()

    def train(self, mode: bool = True) -> Moco:
        super().train(mode)
        for module in (*self.momentum_encoder.modules(), *self.momentum_projector.modules()):
            module.training = mode and isinstance(module, _BatchNorm)
        return self

    def before_step(self, step: int, steps: int) -> None:
        """Move the momentum encoder towards the online one, once a step. No forward of it comes in between.

        Not within `forward`, where weights that are split over ranks may be whole copies, whose changes are lost.
        """
        if self.config.momentum_sched:
            self.momentum = momentum_at(step, steps, self.config.momentum)
        self._update_momentum_encoder()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`; `contrast_acc` (how often the other view is the nearest key), `feature_std` and `momentum`."""
        views = batch["view1"], batch["view2"]
        if len(views[0]) * world_size() < 2:
            raise UserError("a batch of one image has nothing to contrast, and batch norm no statistics")
        features = [self.encoder(view) for view in views]
        queries = [self.predictor(self.projector(feature)) for feature in features]
        with torch.no_grad():
            keys = [self.momentum_projector(self.momentum_encoder(view)) for view in views]
        loss1, accuracy1 = contrast(queries[0], keys[1], self.config.temperature)
        loss2, accuracy2 = contrast(queries[1], keys[0], self.config.temperature)
        return {
            "loss": loss1 + loss2,
            "contrast_acc": (accuracy1 + accuracy2) / 2,
            "feature_std": feature_std(features[0].detach()),
            "momentum": features[0].new_tensor(self.momentum),
        }

    @torch.no_grad()
    def _update_momentum_encoder(self) -> None:
        """Move the momentum encoder's parameters towards the online ones; its buffers are its own."""
        momentum = [*self.momentum_encoder.parameters(), *self.momentum_projector.parameters()]
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        for old, new in zip(by_mesh(momentum), by_mesh(online), strict=True):
            torch._foreach_lerp_(old, new, 1 - self.momentum)

    def backbone(self) -> nn.Module:
        return self.encoder

    def param_groups(self, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        if layer_decay is not None:
            raise UserError(f"optim.layer_decay {layer_decay} is for fine-tuning; pre-training has no such thing")
        if self.config.decay_all:
            return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]
        names = self.encoder.no_weight_decay() if hasattr(self.encoder, "no_weight_decay") else set()  # type: ignore[operator]
        no_decay = {*(f"encoder.{name}" for name in names), "*.bias"}  # stacked experts have biases of two dimensions
        return param_groups_weight_decay(self, weight_decay, no_weight_decay_list=no_decay)

    def gradient_metrics(self) -> dict[str, Tensor]:
        """`first_grad_norm`: of the first trainable weight matrix, where instability shows first (section 4.2)."""
        first = next(p for p in self.encoder.parameters() if p.requires_grad and p.ndim > 1)
        return {} if first.grad is None else {"first_grad_norm": first.grad.norm()}

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> Evaluation:
        """`feature_std` and `feature_rank` of the test images; where there is a bank `knn_top1` and `knn_top5`.

        Predictions are `index`, `target` and `logits`, the logarithms of the classes' shares of the votes.
        """
        rows = []
        with evaluating(self.encoder):
            for batch in loader:
                features = self.encoder(batch["image"].to(device)).float().cpu()
                rows.append((batch["bank"], batch["index"], batch["target"], features))
        columns = gather_columns(rows)
        if columns is None:
            return Evaluation(broadcast(dict[str, float]()))
        if not columns or columns[0].all():
            raise UserError("there are no images to evaluate on")
        in_bank, *rest = columns
        bank, test = (_select(rest, in_bank == kind) for kind in (True, False))
        index, target, features = test
        metrics = {"feature_std": float(feature_std(features)), "feature_rank": feature_rank(features)}
        predictions = {"index": index.numpy(), "target": target.numpy()}
        if len(bank[0]):
            votes = self._vote(bank, features.to(device)).cpu()
            metrics |= {f"knn_{name}": value for name, value in top_accuracies(votes, target).items()}
            predictions["logits"] = (votes / votes.sum(1, keepdim=True)).clamp(min=1e-6).log().numpy()
        return Evaluation(broadcast(metrics | {"images": len(target)}), predictions)

    def _vote(self, bank: list[Tensor], features: Tensor) -> Tensor:
        _, labels, known = (column.to(features.device) for column in bank)
        classes = self.num_classes or int(labels.max()) + 1
        return weighted_knn(known, labels, features, classes, self.config.knn_k, self.config.knn_temperature)


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE x 2T of queries (B, D) against the keys (B, D) of all ranks, and the share of queries that find theirs.

    Algorithm 1, `ctr`: cosines / T, cross-entropy with a query's own key as the class, times 2T. In float32.
    """
    queries, keys = F.normalize(queries.float(), dim=1), all_gather(F.normalize(keys.float(), dim=1))
    logits = queries @ keys.T / temperature
    own = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    accuracy = (logits.detach().argmax(1) == own).float().mean()
    return 2 * temperature * F.cross_entropy(logits, own), accuracy


def mlp(layers: int, dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear layers without bias, batch norm and ReLU between them, a batch norm without weights after the last."""
    widths = [dim, *[hidden_dim] * (layers - 1), out_dim]
    modules: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        modules += [nn.Linear(widths[i], widths[i + 1], bias=False), nn.BatchNorm1d(widths[i + 1], affine=not last)]
        modules += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*modules)


def momentum_at(step: int, steps: int, start: float) -> float:
    """1 - (1 - start)(1 + cos(pi step / steps)) / 2: from `start` at the first step towards 1."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / steps)) / 2


def feature_std(features: Tensor) -> Tensor:
    """Mean standard deviation of the l2-normalised features (N, D), times sqrt(D).

    1 where they lie all over the sphere (a standard deviation of 1 / sqrt(D)); 0 where all are one: collapse.
    """
    return F.normalize(features.float(), dim=1).std(dim=0, correction=0).mean() * features.shape[1] ** 0.5


def feature_rank(features: Tensor) -> float:
    """exp of the entropy of the features' (N, D) normalised singular values: in how many directions they vary.

    RankMe (Garrido et al., arXiv 2210.02885), here of the centred l2-normalised features; at most D.
    """
    normal = F.normalize(features.double(), dim=1)
    centred = normal - normal.mean(dim=0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum().exp())


def _freeze_patch_embed(model: nn.Module, needed: bool) -> None:
    """Freeze the model's first convolution if its patches do not overlap; else UserError where it is `needed`."""
    name = getattr(model, "pretrained_cfg", {}).get("first_conv")
    first = model.get_submodule(name) if isinstance(name, str) else None
    if isinstance(first, nn.Conv2d) and first.kernel_size == first.stride:
        first.requires_grad_(False)
    elif needed:
        raise UserError(
            f"task.freeze_patch_embed is set, but {type(model).__name__} has no patch embedding: patches of its first "
            "convolution overlap"
        )


def _select(columns: list[np.ndarray], chosen: np.ndarray) -> list[Tensor]:
    """The chosen rows of index, target and features, sorted by index."""
    selected = [column[chosen] for column in columns]
    order = sorted_by_index(selected[0])
    return [torch.from_numpy(column[order]) for column in selected]
