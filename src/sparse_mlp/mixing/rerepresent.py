"""Re-represent layers: rescale (tokens, channels) around the experts so that routing is cheap (Sparse-MLP)."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from sparse_mlp.mixing.linear import Linear


class Rerepresent(nn.Module):
    """(B, S, C) -> (B, S1, C1): LayerNorm, linear, GELU along one axis, then along the other.

    On the way into the experts tokens come first, on the way out channels do, so that the wide token projection
    always works at the outer width C.

    Args:
        tokens: (S, S1), tokens before and after.
        dims: (C, C1), channels before and after.
        tokens_first: order of the two projections.
    """

    def __init__(
        self,
        tokens: tuple[int, int],
        dims: tuple[int, int],
        tokens_first: bool,
        norm_layer: type[nn.Module] = LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tokens_first = tokens_first
        self.token_norm = norm_layer(dims[0] if tokens_first else dims[1], device=device, dtype=dtype)
        self.token_proj = Linear(*tokens, device=device, dtype=dtype)
        self.channel_norm = norm_layer(dims[0], device=device, dtype=dtype)
        self.channel_proj = Linear(*dims, device=device, dtype=dtype)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens_first:
            return self._channels(self._tokens(x))
        return self._tokens(self._channels(x))

    def _tokens(self, x: Tensor) -> Tensor:
        return self.act(self.token_proj(self.token_norm(x).transpose(1, 2))).transpose(1, 2)

    def _channels(self, x: Tensor) -> Tensor:
        return self.act(self.channel_proj(self.channel_norm(x)))
