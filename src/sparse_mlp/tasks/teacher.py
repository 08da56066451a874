"""A teacher for a Graph-MLP: a graph network, which is trained before the student and used only in training.

GRAND (Feng et al., "Graph Random Neural Networks", https://arxiv.org/abs/2005.11079) learns the labelled nodes, and
consistent predictions for a node when random nodes around it are dropped; the student, which sees no edges, learns the
teacher's probabilities of all nodes, as in GLNN (Zhang et al., "Graph-less Neural Networks",
https://arxiv.org/abs/2110.08727).

One thing is done in another order: the first layer comes before the propagation and not after it. Both are linear, so
without dropout of features the network is the same, but it is `hidden_dim` numbers a node that travel along the edges.

Legend: N nodes, F features, S samples, D hidden, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.preprocessing import normalize
from torch import Tensor, nn

from sparse_mlp import distributed
from sparse_mlp.data.graphs import Graph, feature_rows
from sparse_mlp.data.node_batches import normalized_adjacency
from sparse_mlp.engine import (
    Batch,
    Evaluation,
    Loaders,
    OptimConfig,
    RunFolder,
    ScheduleConfig,
    Task,
    TrainConfig,
    Trainer,
    TrainingStopped,
)
from sparse_mlp.errors import UserError
from sparse_mlp.models.graph_mlp import SparseLinear, drop_features

__all__ = ["RandomPropagation", "Teacher", "TeacherConfig", "disagreement", "train_teacher"]

_log = logging.getLogger(__name__)

_DENSE_FROM = 0.05  # share of features that are not zero; from there on a dense product is the faster one
_SAVE_EVERY = 100  # steps: seconds


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher whose probabilities are distilled; the defaults are GRAND's for Cora (Feng et al., appendix)."""

    hops: int = 8
    """Order of the propagation: the mean over neighbourhoods of 0 to this many hops."""

    samples: int = 4
    """Random node dropouts in a step, whose predictions the consistency loss compares."""

    node_drop_rate: float = 0.5
    """Share of the nodes left out of a sample."""

    input_drop_rate: float = 0.5
    """Dropout on the features."""

    drop_rate: float = 0.5
    """Dropout on the hidden layer."""

    consistency: float = 1.0
    """Weight of the agreement: squared distance of each sample's probabilities from the sharpened mean of all."""

    temperature: float = 0.5
    """Sharpening of that mean; 1 leaves it as it is."""

    unit_rows: bool = False
    """Scale the features of a node to length 1."""

    hidden_dim: int = 32
    """Width of the hidden layer."""

    lr: float = 0.01
    """Learning rate of Adam."""

    weight_decay: float = 5e-4
    """As L2, on all parameters."""

    epochs: int = 300
    """Steps over the whole graph; the weights of the first one of best validation accuracy are the teacher."""

    starts: int = 1
    """Number of random initialisations; the one with the best validation accuracy is the teacher."""

    def __post_init__(self) -> None:
        for name in ("hops", "samples", "hidden_dim", "epochs", "starts"):
            if getattr(self, name) < 1:
                raise UserError(f"teacher.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("node_drop_rate", "input_drop_rate", "drop_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"teacher.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("temperature", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"teacher.{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("consistency", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"teacher.{name} must be at least 0 and finite, got {getattr(self, name)}")


class RandomPropagation(nn.Module):
    """A two-layer MLP over the mean of a node's 0 to `hops` step neighbourhoods; in training, of random subsets."""

    def __init__(self, features: int, classes: int, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1 = SparseLinear(features, config.hidden_dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.hidden_dim))  # of the first layer, after the propagation
        self.fc2 = nn.Linear(config.hidden_dim, classes)
        nn.init.xavier_uniform_(self.fc1.weight)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Features (N, F) and the normalised adjacency (N, N, CSR) to logits (S, N, C); S is 1 in evaluation."""
        samples = self.sample(x) if self.training else [self.fc1(x)]
        hidden = self.propagate(torch.cat(samples, 1), adjacency)
        hidden_SND = hidden.unflatten(1, (len(samples), -1)).transpose(0, 1) + self.bias
        return self.fc2(F.dropout(hidden_SND.relu(), self.config.drop_rate, self.training))

    def sample(self, x: Tensor) -> list[Tensor]:
        """The first layer's outputs (N, D), `samples` times, each time without other features and other nodes."""
        config, count = self.config, self.config.samples
        if config.input_drop_rate:
            outputs = [self.fc1(drop_features(x, config.input_drop_rate)) for _ in range(count)]
        else:
            outputs = [self.fc1(x)] * count
        return [output * F.dropout(output.new_ones(len(output), 1), config.node_drop_rate) for output in outputs]

    def propagate(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Mean over k = 0 .. hops of A^k x."""
        total = x
        for _ in range(self.config.hops):
            x = adjacency @ x
            total = total + x
        return total / (self.config.hops + 1)


def disagreement(logits_SNC: Tensor, temperature: float) -> Tensor:
    """Mean squared distance of the samples' probabilities from their sharpened mean, which gets no gradient."""
    probabilities = logits_SNC.softmax(-1)
    sharp = (probabilities.detach().mean(0).log() / temperature).softmax(-1)
    return (probabilities - sharp).square().sum(-1).mean()


class Teacher(Task):
    """Trains a `RandomPropagation` on the whole graph and keeps its probabilities at the best validation accuracy.

    Each batch is the whole graph (see `_loaders`), on every rank the same one with the same seed: the ranks' gradients
    are equal. The weights are scored where the next update begins, so that what is kept is in the next checkpoint.
    """

    items = "nodes"
    score: Tensor
    probabilities: Tensor

    def __init__(self, model: RandomPropagation, nodes: int, classes: int) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.register_buffer("score", torch.tensor([-1.0, 0.0]))
        self.register_buffer("probabilities", torch.zeros(nodes, classes))

    def backbone(self) -> nn.Module:
        return self.model

    def param_groups(self, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "weight_decay": weight_decay}]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of the training nodes and disagreement of the samples; `val_top1` is the best one so far."""
        config, train = self.config, batch["train"]
        self._keep_best(batch)
        torch.manual_seed(batch["seed"])  # the engine's seed is another one on each rank
        logits_SNC = self.model(batch["features"], batch["adjacency"])
        target = batch["target"][train].repeat(config.samples)
        nll = F.cross_entropy(logits_SNC[:, train].flatten(0, 1), target)
        agreement = disagreement(logits_SNC, config.temperature)
        out = {"loss": nll + config.consistency * agreement, "nll": nll.detach(), "disagreement": agreement.detach()}
        return out | ({"val_top1": self.score[0].clone()} if len(batch["val"]) else {})

    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> Evaluation:
        """`val_top1`, the best one; `probabilities` (N, C) on every rank. Without validation nodes the last ones."""
        (batch,) = loader
        self._keep_best({name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)})
        metrics = {"val_top1": self.score[0].item()} if len(batch["val"]) else {}
        return Evaluation(metrics, {"probabilities": self.probabilities.cpu().numpy()})

    @torch.no_grad()
    def _keep_best(self, batch: Batch) -> None:
        """Compare by accuracy on the validation nodes, then by low loss; of equal weights the first stay."""
        training, val = self.training, batch["val"]
        logits = self.eval().model(batch["features"], batch["adjacency"])[0]
        self.train(training)
        if len(val):
            target = batch["target"][val]
            accuracy = (logits[val].argmax(1) == target).float().mean()
            score = torch.stack([accuracy, -F.cross_entropy(logits[val], target)])
            if score.tolist() <= self.score.tolist():
                return
            self.score.copy_(score)
        self.probabilities.copy_(logits.softmax(1))


def train_teacher(
    graph: Graph,
    config: TeacherConfig,
    train: TrainConfig,
    run: RunFolder,
    device: torch.device,
    *,
    resume: bool = False,
    show: bool = True,
) -> np.ndarray:
    """Probabilities (N, C), float32, of the teacher of a run, on every rank; collective.

    The teacher is a function of the graph, its configuration and train.seed, whatever the number of ranks; of `train`
    it also takes how torch is set. Each start is trained in a folder of its own, RUN/teacher/1, 2, ..., from which
    `resume` goes on. UserError for several starts without validation nodes to choose by.
    """
    check_teacher(graph, config)
    settings = TrainConfig(
        steps=config.epochs,
        seed=train.seed,
        eval_every=0,
        save_every=_SAVE_EVERY,
        keep=1,
        device=train.device,
        threads=train.threads,
        deterministic=train.deterministic,
    )
    best, probabilities = (-1.0, 0.0), np.empty(0, np.float32)
    for start in range(config.starts):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(train.seed, start))
            model = RandomPropagation(graph.features.shape[1], graph.num_classes, config)
        task = Teacher(model, graph.num_nodes, graph.num_classes)
        folder = RunFolder(run.path / "teacher" / str(start + 1))
        distributed.on_main(lambda path=folder.path: path.mkdir(parents=True, exist_ok=True))  # type: ignore[misc]
        trainer = Trainer(
            task,
            _loaders(graph, config, train.seed, start),
            optim=OptimConfig(opt="adam", lr=config.lr, weight_decay=config.weight_decay),
            schedule=ScheduleConfig(sched="constant"),
            train=settings,
            run=folder,
            device=device,
        )
        _log.info(f"training the teacher, start {start + 1} of {config.starts}")
        try:
            evaluation = trainer.fit(resume=resume, show=show)
        except TrainingStopped as stopped:
            message = f"stopped while the teacher was trained, and saved; go on with --resume {run.path}"
            raise TrainingStopped(message, stopped.exit_code - 128) from None
        score = tuple(task.score.tolist())
        if score > best or start == 0:
            best, probabilities = score, evaluation.predictions["probabilities"]
    return probabilities


def check_teacher(graph: Graph, config: TeacherConfig) -> None:
    """UserError for several starts without validation nodes to choose by."""
    if config.starts > 1 and not len(graph.splits.get("val", ())):
        raise UserError(f"{graph.name}: teacher.starts {config.starts} needs validation nodes to choose by")


def _loaders(graph: Graph, config: TeacherConfig, seed: int, start: int) -> Loaders:
    """The whole graph in every batch, on every rank; only the seed changes with the step."""
    x = feature_rows(normalize(graph.features) if config.unit_rows else graph.features)
    if x.layout != torch.strided and len(x.values()) >= _DENSE_FROM * x.numel():
        x = x.to_dense()
    whole = {
        "features": x,
        "adjacency": feature_rows(normalized_adjacency(graph.adjacency)),
        "target": torch.from_numpy(graph.labels),
        "train": torch.from_numpy(graph.labelled("train")),
        "val": torch.from_numpy(graph.labelled("val")),
    }

    def train(*, start_step: int, steps: int, rank: int, world_size: int) -> Iterable[Batch]:
        return ({**whole, "seed": _seed(seed, start, step)} for step in range(start_step, start_step + steps))

    def evaluate(*, rank: int, world_size: int) -> Iterable[Batch]:
        return [whole]

    return Loaders(train, evaluate, batch_size=graph.num_nodes, steps_per_epoch=1, replicated=True)


def _seed(*key: int) -> int:
    return int(np.random.default_rng(key).integers(2**63))
