"""Conditional computation: knows nothing of images or of torch.distributed.

`MoeMlp` is the layer; `router`, `dispatch`, `experts` and `balance` are its four parts, `telemetry` shows what it does.
The operators of `kernels` are registered with torch here, so that a counter of multiply-adds knows them from the start.
"""

from sparse_mlp.moe import telemetry
from sparse_mlp.moe.balance import collect_balance_loss, set_balance_scale
from sparse_mlp.moe.kernels import cpu as _cpu  # noqa: F401
from sparse_mlp.moe.kernels import grouped as _grouped  # noqa: F401
from sparse_mlp.moe.layer import MoeMlp
from sparse_mlp.moe.router import NoisyTopKRouter, Routing

__all__ = ["MoeMlp", "NoisyTopKRouter", "Routing", "collect_balance_loss", "set_balance_scale", "telemetry"]
