"""A teacher for a Graph-MLP: it passes messages, before the training and never after it.

APPNP (Gasteiger et al., "Predict then Propagate", https://arxiv.org/abs/1810.05997) learns the labelled nodes; the
student, which sees no edges, learns the teacher's probabilities of all nodes, as in GLNN (Zhang et al., "Graph-less
Neural Networks", https://arxiv.org/abs/2110.08727).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_mlp.data.graphs import Graph, feature_rows
from sparse_mlp.models.graph_mlp import SparseLinear, drop_features

__all__ = ["teach"]

# Gasteiger et al., section 5 and appendix B: the setting of all their citation graphs
HIDDEN, DROP_RATE, HOPS, TELEPORT = 64, 0.5, 10, 0.1
LR, WEIGHT_DECAY = 0.01, 5e-3
EPOCHS = 200  # their patience stops there or later; the first best validation epoch is taken


class Appnp(nn.Module):
    """Two layers, then ten steps of personalised PageRank over the logits (PyG's, normalisation cached)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        from torch_geometric.nn import APPNP

        self.fc1, self.fc2 = SparseLinear(features, HIDDEN), nn.Linear(HIDDEN, classes)
        nn.init.xavier_uniform_(self.fc1.weight)
        self.propagate = APPNP(HOPS, TELEPORT, cached=True)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = drop_features(x, DROP_RATE) if self.training else x
        x = F.dropout(self.fc1(x).relu(), DROP_RATE, self.training)
        return self.propagate(self.fc2(x), edge_index)


def teach(graph: Graph, seed: int) -> np.ndarray:
    """Probabilities (N, C), float32, of a teacher trained on the graph; a pure function of both arguments.

    They are those of the first epoch of best validation accuracy, of the last one where there are no validation nodes.
    The random state of the caller stays as it is. ValueError without torch_geometric.
    """
    coo = graph.adjacency.tocoo()
    edges = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    x, labels = feature_rows(graph.features), torch.from_numpy(graph.labels)
    train, val = (torch.from_numpy(graph.splits.get(split, np.empty(0, np.int64))) for split in ("train", "val"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = Appnp(x.shape[1], graph.num_classes)
        except ImportError as error:
            raise ValueError("task.distill needs torch_geometric: pip install 'sparse-mlp[graph]'") from error
        optimizer = torch.optim.Adam(model.fc1.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        optimizer.add_param_group({"params": model.fc2.parameters(), "weight_decay": 0.0})
        best, taught = -1.0, torch.empty(0)
        for _ in range(EPOCHS):
            model.train()
            loss = F.cross_entropy(model(x, edges)[train], labels[train])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                logits = model(x, edges)
            right = (logits[val].argmax(1) == labels[val]).float().mean().item() if len(val) else 0.0
            if right > best or not len(val):
                best, taught = right, logits.softmax(1)
    return taught.numpy()
