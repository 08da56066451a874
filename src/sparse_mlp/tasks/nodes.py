"""Node classification by Graph-MLP: few labelled nodes; the graph is used by the loss, not by the model.

total = cross entropy of the labelled nodes + alpha * NContrast + distill * cross entropy with a teacher's probabilities
(the last term, knowledge distillation, is not in the paper: experiments/graphs/README.md)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_mlp.distributed import all_gather, broadcast, rank, world_size
from sparse_mlp.engine import Batch, Evaluation, Task
from sparse_mlp.errors import UserError
from sparse_mlp.models.graph_mlp import Form, GraphMlp, cosine_scale, n_contrast
from sparse_mlp.tasks.metrics import gather_columns

__all__ = ["NodeClassify", "NodeLossConfig"]


@dataclass(frozen=True)
class NodeLossConfig:
    """What a node classifier learns from; the defaults are the published ones for Cora."""

    alpha: float = 10.0
    """Weight of NContrast; 0 is a plain MLP."""

    tau: float = 2.0
    """Scale of the similarities: multiplies them in the published form, divides them in the paper's."""

    form: Form = "published"
    """published: what the authors' code computes; paper: the formula. See experiments/graphs/README.md."""

    distill: float = 0.0
    """Weight of the cross entropy with the probabilities of a teacher that passes messages; see TeacherConfig."""

    similarity: Literal["float32", "bfloat16"] = "float32"
    """Type of the similarities of NContrast."""

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < float("inf") and 0 <= self.distill < float("inf")):
            raise UserError(f"alpha and distill must be at least 0 and finite, got {self.alpha} and {self.distill}")
        cosine_scale(self.tau, self.form)
        if self.similarity not in ("float32", "bfloat16"):
            raise UserError(f"similarity must be 'float32' or 'bfloat16', got {self.similarity!r}")
        if not self.alpha and (self.form, self.similarity) != ("published", "float32"):
            raise UserError("form and similarity would be ignored: alpha is 0, there is no NContrast")


class NodeClassify(Task):
    """A Graph-MLP that learns the classes of nodes. Under torch.distributed every rank holds a slice of each batch.

    Batches are those of `data.node_batches`: `NodeBatches` to train on, `eval_batches` to evaluate.
    """

    items = "nodes"

    def __init__(self, model: GraphMlp, config: NodeLossConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def backbone(self) -> nn.Module:
        return self.model

    def param_groups(self, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
        """All parameters decay, biases and norms too, as in the published runs."""
        if layer_decay is not None:
            raise UserError(f"optim.layer_decay {layer_decay} has no meaning for a Graph-MLP; leave it out")
        return [{"params": list(self.parameters()), "weight_decay": weight_decay}]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss with a graph; `nll`, `contrast`, `distill` and `accuracy` (of the labelled nodes) detached."""
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
                embedding, *pairs, config.tau, form=config.form, gather=all_gather, offset=offset, dtype=dtype
            )
            out["contrast"] = contrast.detach()
            # Already the whole batch's loss, but its gradient is that of this rank's embeddings only.
            loss = loss + config.alpha * (contrast * ranks - out["contrast"] * (ranks - 1))
        if config.distill:
            distill = F.cross_entropy(logits, batch["teacher"])
            loss = loss + config.distill * distill
            out["distill"] = distill.detach()
        return {"loss": loss, **out}

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> Evaluation:
        """`loss`, `top1` and `nodes` of the labelled test nodes, `val_top1`; predictions of all test nodes."""
        training = self.training
        self.eval()
        try:
            parts = [
                (b["val"], b["index"], b["target"], self.model(b["features"].to(device)).float().cpu()) for b in loader
            ]
        finally:
            self.train(training)
        columns = gather_columns(parts)
        if columns is None:
            return Evaluation(broadcast(dict[str, float]()))
        if not columns:
            raise UserError("there are no validation or test nodes to evaluate on")
        val, index, target, logits = columns
        order = np.argsort(index[~val])
        test = {"index": index[~val][order], "target": target[~val][order], "logits": logits[~val][order]}
        labelled = test["target"] >= 0
        metrics = {"nodes": float(labelled.sum())}
        if labelled.any():
            scores, classes = test["logits"][labelled], test["target"][labelled]
            metrics["loss"] = F.cross_entropy(torch.from_numpy(scores), torch.from_numpy(classes)).item()
            metrics["top1"] = float((scores.argmax(1) == classes).mean())
        if val.any():
            metrics["val_top1"] = float((logits[val].argmax(1) == target[val]).mean())
        return Evaluation(broadcast(metrics), test)
