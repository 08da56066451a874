"""Graph-MLP on the papers' graphs: complete configurations.

Accuracy over ten seeds, hardware and the search behind these numbers: experiments/graphs/README.md.
"""

from __future__ import annotations

from sparse_mlp.data.graph_config import GraphConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig
from sparse_mlp.jobs.nodes import NodesRecipe
from sparse_mlp.tasks.nodes import NodeLossConfig
from sparse_mlp.tasks.teacher import TeacherConfig


def cora() -> NodesRecipe:
    """Cora: the published losses, and the probabilities of a teacher to learn. sparse-mlp train cora"""
    return _distilled("cora", NodeLossConfig(distill=10.0), TeacherConfig())


def citeseer() -> NodesRecipe:
    """Citeseer: the published losses, and the probabilities of a teacher to learn. sparse-mlp train citeseer"""
    # GRAND's for Citeseer
    teacher = TeacherConfig(hops=2, samples=2, input_drop_rate=0.0, drop_rate=0.2, consistency=0.7, temperature=0.3)
    return _distilled("citeseer", NodeLossConfig(alpha=1.0, tau=0.5, distill=10.0), teacher)


def pubmed() -> NodesRecipe:
    """Pubmed: the published losses, and the probabilities of a teacher to learn. sparse-mlp train pubmed"""
    teacher = TeacherConfig(
        hops=5, samples=2, input_drop_rate=0.0, temperature=0.2, unit_rows=True, weight_decay=2e-3, epochs=120, starts=4
    )
    return _distilled("pubmed", NodeLossConfig(alpha=100.0, tau=1.0, distill=10.0), teacher, lr=0.01)


def photo() -> NodesRecipe:
    """Amazon Photo: as Cora, its teacher with fewer hops. sparse-mlp train photo"""
    return _fewer_hops("photo")


def computers() -> NodesRecipe:
    """Amazon Computers: as Cora, its teacher with fewer hops. sparse-mlp train computers"""
    return _fewer_hops("computers")


def cs() -> NodesRecipe:
    """Coauthor CS: as Cora, its teacher with fewer hops. sparse-mlp train cs"""
    return _fewer_hops("cs")


def physics() -> NodesRecipe:
    """Coauthor Physics: as Cora, its teacher with fewer hops. sparse-mlp train physics"""
    return _fewer_hops("physics")


def graph() -> NodesRecipe:
    """A graph of your own, by Cora's published setting without a teacher. sparse-mlp train graph --data.source FILE"""
    return NodesRecipe("graph", data=GraphConfig(""))


def _fewer_hops(name: str) -> NodesRecipe:
    teacher = TeacherConfig(hops=2, samples=2, input_drop_rate=0.0, unit_rows=True, epochs=150)
    return _distilled(name, NodeLossConfig(distill=10.0), teacher, lr=0.01)


def _distilled(name: str, task: NodeLossConfig, teacher: TeacherConfig, lr: float = 1e-3) -> NodesRecipe:
    """Distillation beside the published losses. The learning rate decays to 0, as the last weights are kept."""
    optim, schedule = OptimConfig(opt="adam", lr=lr, weight_decay=5e-4), ScheduleConfig(sched="cosine")
    return NodesRecipe(name, GraphConfig(name), task=task, teacher=teacher, optim=optim, schedule=schedule)
