"""Node classification: labels of a few nodes, the graph as a loss between embeddings, nothing of it in the model.

total = cross entropy of the labelled nodes + alpha * NContrast (+ consistency * agreement, ours; see docs/graph.md)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_mlp.distributed import broadcast, gather, rank, world_size
from sparse_mlp.engine import Batch, Evaluation, Task
from sparse_mlp.models.graph_mlp import Form, GraphMlp, n_contrast

__all__ = ["NodeClassify", "NodeLossConfig"]


@dataclass(frozen=True)
class NodeLossConfig:
    """What a node classifier learns from; the defaults are the published ones for Cora."""

    alpha: float = 10.0
    """Weight of NContrast; 0 is a plain MLP."""

    tau: float = 2.0
    """Scale of the similarities: multiplies them in the published form, divides them in the paper's."""

    form: Form = "published"
    """published: what the authors' code computes; paper: the formula. See docs/graph.md."""

    consistency: float = 0.0
    """Weight of the agreement of a node's prediction with the mean of its r-hop neighbours' in the batch (ours)."""

    temperature: float = 0.5
    """That mean is sharpened: raised to the power 1 / temperature. Labelled neighbours count with their label."""

    ramp: float = 0.25
    """Share of the run over which `consistency` rises from 0; agreement of random predictions would be a collapse."""

    similarity: Literal["float32", "bfloat16"] = "float32"
    """Type of the similarities of NContrast."""

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.consistency < 0:
            raise ValueError(f"alpha and consistency must not be negative, got {self.alpha} and {self.consistency}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp must be between 0 and 1, got {self.ramp}")
        if self.similarity not in ("float32", "bfloat16"):
            raise ValueError(f"similarity must be 'float32' or 'bfloat16', got {self.similarity!r}")


class NodeClassify(Task):
    """A Graph-MLP that learns the classes of nodes. Under torch.distributed every rank holds a slice of each batch.

    Training batches are those of `data.graphs.NodeBatches`; evaluation ones hold `features`, `target`, `index`, `val`.
    """

    def __init__(self, model: GraphMlp, config: NodeLossConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.consistency = config.consistency

    def before_step(self, step: int, steps: int) -> None:
        self.consistency = self.config.consistency * min(1.0, step / max(1.0, self.config.ramp * steps))

    def backbone(self) -> nn.Module:
        return self.model

    def param_groups(self, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
        """All parameters decay, biases and norms too, as in the published runs."""
        if layer_decay is not None:
            raise ValueError(f"optim.layer_decay {layer_decay} has no meaning for a Graph-MLP; leave it out")
        return [{"params": list(self.parameters()), "weight_decay": weight_decay}]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss with a graph; `nll`, `contrast`, `consistency` and `accuracy` (of the labelled nodes) detached."""
        config, target, ranks = self.config, batch["target"], world_size()
        embedding = self.model.forward_features(batch["features"])
        logits = self.model.forward_head(embedding)
        # The engine takes means over the ranks, of gradients and of metrics. A rank's labelled nodes are few or none:
        # its sum over the whole batch's number, times the number of ranks, has the right mean.
        part = ranks / batch["labelled"]
        loss = nll = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum") * part
        out = {"nll": nll.detach(), "accuracy": (logits.argmax(1) == target).sum() * part}
        pairs = batch["rows"], batch["cols"], batch["weights"]
        offset = rank() * len(target)
        if config.alpha:
            dtype = torch.bfloat16 if config.similarity == "bfloat16" else None
            contrast = n_contrast(
                embedding, *pairs, config.tau, form=config.form, gather=_everyone, offset=offset, dtype=dtype
            )
            out["contrast"] = contrast.detach()
            # already the whole batch's loss, but its gradient only that of this rank's embeddings
            loss = loss + config.alpha * (contrast * ranks - out["contrast"] * (ranks - 1))
        if self.consistency:
            agreement = _agreement(logits, target, *pairs, offset, config.temperature)
            loss = loss + self.consistency * agreement
            out["consistency"] = agreement.detach()
        return {"loss": loss, **out}

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> Evaluation:
        """`loss`, `top1` and `nodes` of the test nodes, `val_top1`; predictions of the test nodes. Needs no edges."""
        training = self.training
        self.eval()
        try:
            parts = [
                (b["val"], b["index"], b["target"], self.model(b["features"].to(device)).float().cpu()) for b in loader
            ]
        finally:
            self.train(training)
        ranks = gather([torch.cat(column).numpy() for column in zip(*parts, strict=True)])
        if ranks is None:
            return Evaluation(broadcast(dict[str, float]()))
        found = [columns for columns in ranks if columns]
        if not found:
            raise ValueError("there are no validation or test nodes to evaluate on")
        val, index, target, logits = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(index[~val])
        test = {"index": index[~val][order], "target": target[~val][order], "logits": logits[~val][order]}
        metrics = {"nodes": float(len(order))}
        if len(order):
            scores = torch.from_numpy(test["logits"])
            metrics["loss"] = F.cross_entropy(scores, torch.from_numpy(test["target"]), ignore_index=-1).item()
            metrics["top1"] = float((test["logits"].argmax(1) == test["target"]).mean())
        if val.any():
            metrics["val_top1"] = float((logits[val].argmax(1) == target[val]).mean())
        return Evaluation(broadcast(metrics), test)


def _agreement(
    logits: Tensor, target: Tensor, rows: Tensor, cols: Tensor, weights: Tensor, offset: int, temperature: float
) -> Tensor:
    """Cross entropy between a node's prediction and the sharpened mean of its neighbours' (itself included)."""
    with torch.no_grad():
        belief = logits.softmax(1)
        known = target >= 0
        belief[known] = F.one_hot(target[known], logits.shape[1]).to(belief.dtype)
        everyone = _everyone(belief)
        local = rows - offset
        mean = torch.zeros_like(belief).index_add_(0, local, weights[:, None] * everyone[cols])
        wanted = mean.clamp(min=1e-12).pow(1 / temperature)
        wanted = wanted / wanted.sum(1, keepdim=True)
    return F.cross_entropy(logits, wanted)


def _everyone(local: Tensor) -> Tensor:
    """The whole batch's tensor, in the order of ranks; no gradient goes through."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)
