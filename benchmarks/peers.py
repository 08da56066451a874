"""MoE layers of other packages, set to drop nothing; each from (dim, hidden, num_experts, top_k).

Gated (SwiGLU) experts get two thirds of the hidden width: the same multiply-adds.
"""

from __future__ import annotations

from torch import Tensor, nn


class _First(nn.Module):
    """Call a layer and keep the first of what it returns, the output."""

    def __init__(self, layer: nn.Module, batch: bool = False) -> None:
        super().__init__()
        self.layer, self.batch = layer, batch

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.unsqueeze(0) if self.batch else x)
        out = out[0] if isinstance(out, tuple) else out
        return out.view_as(x)


def deepspeed(dim: int, hidden: int, num_experts: int, top_k: int) -> nn.Module:
    from deepspeed.moe.layer import MoE

    expert = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
    layer = MoE(dim, expert, num_experts=num_experts, ep_size=1, k=top_k, drop_tokens=False, use_rts=False)
    layer.deepspeed_moe._set_ep_group(None)
    return _First(layer)


def _mixtral(dim: int, hidden: int, num_experts: int, top_k: int, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=dim,
        intermediate_size=hidden * 2 // 3 // 16 * 16,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = implementation
    layer = MixtralSparseMoeBlock(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)  # made empty; a model of theirs would fill it
    return _First(layer, batch=True)


def transformers_grouped(dim: int, hidden: int, num_experts: int, top_k: int) -> nn.Module:
    return _mixtral(dim, hidden, num_experts, top_k, "grouped_mm")


def transformers_eager(dim: int, hidden: int, num_experts: int, top_k: int) -> nn.Module:
    return _mixtral(dim, hidden, num_experts, top_k, "eager")


PEERS = {
    "deepspeed": deepspeed,
    "transformers grouped_mm": transformers_grouped,
    "transformers eager": transformers_eager,
}
