"""The axial shift of AS-MLP (Lian et al., ICLR 2022, section 3.2): channel groups displaced along one axis.

Layout here is (B, H, W, C); the published one is (B, C, H, W).
"""

from __future__ import annotations

import math

from torch import Tensor

from sparse_mlp.mixing.channel_shift import shift_channels

__all__ = ["axial_offsets", "axial_shift"]


def axial_offsets(dim: int, shift_size: int) -> tuple[int, ...]:
    """Return where each of `dim` channels reads: group j of ceil(dim / k) channels is displaced by j - k // 2
    positions.

    A displacement of d towards larger indices means reading at i - d. The last group is the short one. Raises
    ValueError for a shift size that is not odd and positive.
    """
    if shift_size < 1 or shift_size % 2 == 0:
        raise ValueError(f"shift_size must be odd and positive, got {shift_size}")
    group = math.ceil(dim / shift_size)
    return tuple(shift_size // 2 - channel // group for channel in range(dim))


def axial_shift(x: Tensor, shift_size: int, axis: int) -> Tensor:
    """Displace the channel groups of x (B, H, W, C) along `axis`: 1 is vertical, 2 horizontal; zeros move in."""
    return shift_channels(x, axial_offsets(x.shape[-1], shift_size), axis)
