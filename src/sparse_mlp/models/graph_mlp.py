"""Graph-MLP: node classification by a plain MLP; the graph is used in the training loss only.

Paper: Hu et al., "Graph-MLP: Node Classification without Message Passing in Graph", https://arxiv.org/abs/2106.04051
Published code: https://github.com/yanghu819/Graph-MLP

The model sees rows of features and nothing else. `n_contrast` pulls together the embeddings of nodes that are a few
edges apart; it works on any batch of nodes, in blocks, and never holds a matrix over the whole graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["GraphMlp", "SparseLinear", "checkpoint_filter_fn", "cosine_scale", "drop_features", "n_contrast"]

Form = Literal["published", "paper"]

LOG_EPS = 1e-8  # inside the logarithm, as in the published code
MAX_SCALE = 40.0  # exp(-40) .. exp(40) and their products with the slopes fit float32
BLOCK_ELEMENTS = 2**23  # similarities held at once: 32 MB in float32


class SparseLinear(nn.Linear):
    """A linear layer that also takes sparse rows (torch CSR): bags of words cost what their words cost."""

    def forward(self, input: Tensor) -> Tensor:
        if input.layout != torch.sparse_csr:
            return super().forward(input)
        columns, offsets, values = input.col_indices(), input.crow_indices(), input.values()
        table = self.weight.t().contiguous()
        rows = F.embedding_bag(
            columns, table, offsets, mode="sum", per_sample_weights=values.to(table.dtype), include_last_offset=True
        )
        return rows if self.bias is None else rows + self.bias


class Mlp(nn.Module):
    """Features to embedding: fc1, GELU, LayerNorm, dropout, fc2 (GELU comes before LayerNorm, as published)."""

    def __init__(self, in_features: int, hidden_dim: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = SparseLinear(in_features, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.act = nn.GELU()
        self.layernorm = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.layernorm(self.act(self.fc1(x)))))


class SparseMixer(nn.Module):
    """The same, its second layer a `MoeMlp` of top-k experts: x -> fc1, GELU, LayerNorm, dropout, experts, residual."""

    def __init__(
        self, in_features: int, hidden_dim: int, drop_rate: float, num_experts: int, top_k: int, expert_dim: int
    ) -> None:
        super().__init__()
        from sparse_mlp.moe import MoeMlp

        self.fc1 = SparseLinear(in_features, hidden_dim)
        self.act = nn.GELU()
        self.layernorm = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.experts = MoeMlp(hidden_dim, expert_dim, num_experts, top_k)
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.normal_(self.fc1.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.layernorm(self.act(self.fc1(x))))
        return x + self.experts(x)


class GraphMlp(nn.Module):
    """Features of nodes (N, F), dense or torch CSR, to class logits (N, C). Needs no edges.

    Args:
        in_features: F, the number of features of a node.
        num_classes: C.
        hidden_dim: width of the hidden layer and of the embedding (256 in the paper).
        drop_rate: dropout on the hidden layer (0.6 in the published runs).
        input_drop_rate: dropout on the features; 0 in the published runs.
        num_experts, top_k, expert_dim: a sparse Graph-MLP: experts of width `expert_dim` in place of the second layer.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden_dim: int = 256,
        drop_rate: float = 0.6,
        input_drop_rate: float = 0.0,
        num_experts: int = 0,
        top_k: int = 1,
        expert_dim: int = 128,
    ) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
        for name, rate in (("drop_rate", drop_rate), ("input_drop_rate", input_drop_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
        self.in_features, self.num_classes = in_features, num_classes
        self.input_drop_rate = input_drop_rate
        if num_experts:
            self.mlp: nn.Module = SparseMixer(in_features, hidden_dim, drop_rate, num_experts, top_k, expert_dim)
        else:
            self.mlp = Mlp(in_features, hidden_dim, drop_rate)
        self.classifier = nn.Linear(hidden_dim, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (N, F) to embeddings (N, hidden_dim)."""
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"features of shape (N, {self.in_features}) expected, got {tuple(x.shape)}")
        if self.training and self.input_drop_rate:
            x = drop_features(x, self.input_drop_rate)
        return self.mlp(x)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def drop_features(x: Tensor, rate: float) -> Tensor:
    """Dropout of dense features, or of the stored values of sparse ones (their zeros would stay zero anyway)."""
    if x.layout != torch.sparse_csr:
        return F.dropout(x, rate)
    values = F.dropout(x.values(), rate)
    return torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape, check_invariants=False)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """The authors' keys are ours (mlp.fc1, mlp.fc2, mlp.layernorm, classifier); unwrap `state_dict` and `module.`."""
    inner: Any = state_dict.get("state_dict", state_dict)
    return {key.removeprefix("module."): value for key, value in inner.items()}


def _only_process(values: Tensor) -> Tensor:
    return values


def cosine_scale(tau: float, form: Form) -> float:
    """What cosines are multiplied by: tau in the published form, 1 / tau in the paper's. ValueError out of range."""
    if form not in ("published", "paper"):
        raise ValueError(f"form must be 'published' or 'paper', got {form!r}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    scale = tau if form == "published" else 1 / tau
    if scale > MAX_SCALE:
        raise ValueError(f"tau {tau} scales cosines by {scale:g}; above {MAX_SCALE} float32 runs out of range")
    return scale


def n_contrast(
    embedding: Tensor,
    rows: Tensor,
    cols: Tensor,
    weights: Tensor,
    tau: float,
    *,
    form: Form = "published",
    gather: Callable[[Tensor], Tensor] = _only_process,
    offset: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Neighbouring-contrastive loss of a batch of B nodes.

    mean over i of -log(sum_j P_ij e_ij / sum_j e_ij), e_ij = exp(similarity of i and j). P is the r-th power of the
    normalised adjacency at the batch's rows and columns, as its non-zeros, and must be symmetric.

    form="published" is what the published code computes and what its results need: e = exp(tau * cosine), the
    similarity of a node with itself is *set to 0*, so that 1 stays in the denominator and P_ii in the numerator, and
    1e-8 is added inside the logarithm. form="paper" is the formula (eq. 1 of "Graph-MLP Sampling"): e = exp(cosine /
    tau), j = i left out of both sums, nodes without a positive left out of the mean.

    Args:
        embedding: (b, D), the embeddings of positions offset .. offset + b of the batch (all B of them on one process).
        rows, cols, weights: non-zeros of P, each once, sorted by row; positions 0 to B, the rows being the local ones.
        gather: turns a local tensor into the whole batch's, in the order of ranks; no gradient need pass through it.
        dtype: of similarities, their exponentials and both matrix products; sums and logarithms keep the embedding's.
            torch.bfloat16 takes half the memory and, on CPUs that multiply in it, a fraction of the time.

    The gradient is that of the whole batch's loss with respect to the local embeddings: nothing else is exchanged.
    """
    scale = cosine_scale(tau, form)
    unit = F.normalize(embedding, dim=1)
    if form == "paper":
        other = rows != cols
        rows, cols, weights = rows[other], cols[other], weights[other]
    return _NContrast.apply(unit, rows, cols, weights, scale, form == "published", gather, offset, dtype)


def _exponentials(
    local: Tensor, everyone: Tensor, first: int, scale: float, with_self: bool, dtype: torch.dtype
) -> Tensor:
    """exp(scale * similarity), rows = local nodes; a node's similarity with itself is 0, or its term left out."""
    block = local.to(dtype) @ everyone.to(dtype).t()
    block.mul_(scale).exp_()
    block.diagonal(first).fill_(1.0 if with_self else 0.0)
    return block


class _NContrast(torch.autograd.Function):
    """Blocks of rows; a single block is kept for the backward pass, several are computed again there."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        rows: Tensor,
        cols: Tensor,
        weights: Tensor,
        scale: float,
        with_self: bool,
        gather: Callable[[Tensor], Tensor],
        offset: int,
        dtype: torch.dtype | None,
    ) -> Tensor:
        dtype = dtype or unit.dtype
        everyone = gather(unit)
        height = max(1, BLOCK_ELEMENTS // len(everyone))
        local_rows = rows - offset
        starts = list(range(0, len(unit), height))
        bounds = torch.searchsorted(local_rows, torch.tensor([*starts, len(unit)], device=rows.device)).tolist()
        numerator, denominator = unit.new_zeros(len(unit)), unit.new_zeros(len(unit))
        kept, pair_values = None, torch.empty_like(weights)
        for start, low, high in zip(starts, bounds[:-1], bounds[1:], strict=True):
            block = _exponentials(unit[start : start + height], everyone, offset + start, scale, with_self, dtype)
            denominator[start : start + height] = block.sum(1, dtype=unit.dtype)
            pair_values[low:high] = block[local_rows[low:high] - start, cols[low:high]].to(unit.dtype)
            kept = block if len(starts) == 1 else None
        numerator.index_add_(0, local_rows, weights * pair_values)
        numerators, denominators = gather(numerator), gather(denominator)
        valid = numerators > 0 if not with_self else torch.ones_like(numerators, dtype=torch.bool)
        count = valid.sum().clamp(min=1)
        ratio = numerators / denominators.clamp(min=torch.finfo(unit.dtype).tiny)
        loss = -torch.where(valid, torch.log(ratio + LOG_EPS), 0.0).sum() / count
        slope = torch.where(valid, -1 / (count * (ratio + LOG_EPS)), 0.0)
        on_pairs = slope / denominators.clamp(min=torch.finfo(unit.dtype).tiny)
        ctx.save_for_backward(unit, everyone, local_rows, cols, weights, on_pairs, -on_pairs * ratio, kept, pair_values)
        ctx.settings = scale, height, starts, bounds, offset, dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The similarity of i and j enters row i and row j; P is symmetric, so their gradients add up to one matrix
        # W_ij = scale e_ij ((on_all_i + on_all_j) + (on_pairs_i + on_pairs_j) P_ij), and the gradient is W @ unit.
        unit, everyone, rows, cols, weights, on_pairs, on_all, kept, pair_values = ctx.saved_tensors
        scale, height, starts, bounds, offset, dtype = ctx.settings
        extra = weights * pair_values * (on_pairs[rows + offset] + on_pairs[cols])
        extra = torch.where(rows + offset == cols, 0.0, extra)
        out = torch.empty_like(unit)
        for start, low, high in zip(starts, bounds[:-1], bounds[1:], strict=True):
            piece = slice(start, start + height)
            block = (
                kept if kept is not None else _exponentials(unit[piece], everyone, offset + start, scale, False, dtype)
            )
            mine = on_all[offset + start : offset + start + len(unit[piece])]
            slopes = (mine.to(dtype)[:, None] + on_all.to(dtype)[None, :]).mul_(block)
            slopes.diagonal(offset + start).fill_(0)
            pairs = rows[low:high] - start, cols[low:high]
            slopes.index_put_(pairs, slopes[pairs] + extra[low:high].to(dtype))
            out[piece] = (slopes @ everyone.to(dtype)).to(unit.dtype)
        return (out * (scale * grad), *[None] * 8)
