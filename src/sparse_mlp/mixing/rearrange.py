"""Hierarchical rearrangement of Hire-MLP (Guo et al., CVPR 2022, sections 3.1 and 3.2).

Cross-region: positions move `step` places around the circle, so that regions of different blocks overlap. Inner-region:
the `region` neighbouring positions of an axis become one token of `region` times the channels. Both together are one
gather of rows (or columns), because row i of the padded and rolled map is row (i - step) mod H of the map itself.

Layout is (B, H, W, C) and a token's channels are ordered position-major, k * C + c for position k of the region. The
published order is c * region + k; the checkpoint filter reorders the weights.
"""

from __future__ import annotations

import torch
from timm.layers import register_notrace_function
from torch import Tensor

__all__ = ["merge_regions", "split_regions"]


def _take(x: Tensor, axis: int, start: int, length: int, size: int) -> Tensor:
    """Read `length` of the first `size` positions along `axis` from `start` on, going round the circle as often as
    needed."""
    # an exported program is for sizes that are whole regions and for those that are not
    if start == 0 and not torch.compiler.is_exporting() and length == size == x.shape[axis]:
        return x
    index = torch.arange(length, device=x.device) + start
    # the divisor as a tensor: torch's ONNX exporter takes no size that varies as a number there
    return x.index_select(axis, index.remainder(torch.full((), size, device=x.device)))


@register_notrace_function
def merge_regions(x: Tensor, region: int, step: int, axis: int) -> Tensor:
    """Turn regions of `region` positions along `axis` into tokens, after moving all positions `step` places on.

    x (B, H, W, C) -> (B, ceil(H / region), W, region * C) for axis 1, (B, H, ceil(W / region), region * C) for axis 2.
    """
    batch, height, width, dim = x.shape
    # not -(-n // region): a converter that traces may round a negative quotient towards zero
    count = (x.shape[axis] + region - 1) // region
    x = _take(x, axis, -step, count * region, x.shape[axis])
    if axis == 1:
        x = x.reshape(batch, count, region, width, dim).transpose(2, 3)
        return x.reshape(batch, count, width, region * dim)
    return x.reshape(batch, height, count, region * dim)


@register_notrace_function
def split_regions(x: Tensor, region: int, step: int, axis: int, size: int) -> Tensor:
    """Undo `merge_regions`: back to `size` positions along `axis`, moved `step` places back. -> (B, H, W, C)."""
    batch, height, width, dim = x.shape
    dim = dim // region
    if axis == 1:
        x = x.reshape(batch, height, width, region, dim).transpose(2, 3).reshape(batch, height * region, width, dim)
    else:
        x = x.reshape(batch, height, width * region, dim)
    return _take(x, axis, step, size, size)
