"""Cycle FC (Chen et al., ICLR 2022, section 3.2): a channel map whose inputs are read along a staircase of positions.

The published operator is a deformable convolution with integer offsets, one per input channel. Integer offsets make it
a shift of channels followed by a plain linear map, which is how it is computed here. Layout is (B, H, W, C).
"""

from __future__ import annotations

from torch import Tensor

from sparse_mlp.mixing.channel_shift import shift_channels
from sparse_mlp.mixing.linear import Device, DType, Linear

__all__ = ["CycleFC", "cycle_offsets"]


def cycle_offsets(dim: int, kernel_size: int) -> tuple[int, ...]:
    """Return where each of `dim` input channels reads: 0, +1, -1, 0, +1, -1, ... for kernel size 3."""
    start = kernel_size // 2
    return tuple((channel + start) % kernel_size - start for channel in range(dim))


class CycleFC(Linear):
    """out[b, y, x] = W in + b where input channel i is read `cycle_offsets[i]` positions further along `axis`; 0
    outside.

    (B, H, W, in) -> (B, H, W, out). axis 2 (along the width) is the published kernel (1, 3), axis 1 is (3, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: int,
        kernel_size: int = 3,
        bias: bool = True,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if axis not in (1, 2):
            raise ValueError(f"axis must be 1 (along the height) or 2 (along the width), got {axis}")
        self.axis, self.kernel_size, self.offsets = axis, kernel_size, cycle_offsets(in_features, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(shift_channels(x, self.offsets, self.axis))
