"""The weighted sum with which CycleMLP and Hire-MLP add their three branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_mlp.mixing.linear import Device, DType

__all__ = ["Reweight"]


class Reweight(nn.Module):
    """Sum three branches with weights per image and channel that are a softmax over the branches.

    The weights come from a two-layer MLP on the mean of h + w + c over all positions. Three (B, H, W, C) -> (B, H, W,
    C).
    """

    def __init__(self, dim: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 4, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(dim // 4, dim * 3, device=device, dtype=dtype)

    def forward(self, h: Tensor, w: Tensor, c: Tensor) -> Tensor:
        pooled = h.mean((1, 2)) + w.mean((1, 2)) + c.mean((1, 2))
        # outputs 3k, 3k + 1, 3k + 2 belong to channel k
        logits = self.fc2(self.act(self.fc1(pooled))).unflatten(-1, (-1, 3))
        of_h, of_w, of_c = logits.softmax(-1)[:, None, None].unbind(-1)
        return torch.addcmul(torch.addcmul(h * of_h, w, of_w), c, of_c)
