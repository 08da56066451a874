"""Heads for semantic segmentation over the feature maps of any timm model.

Both are as in mmsegmentation, which the papers used: UPerNet (Xiao et al., "Unified perceptual parsing for scene
understanding", arXiv 1807.10221) with an auxiliary FCN head, and Semantic FPN (Kirillov et al., "Panoptic feature
pyramid networks", arXiv 1901.02446).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from sparse_mlp.models.feature_maps import FeatureMaps

__all__ = ["FcnHead", "Norm", "Segmenter", "SemanticFpn", "UperNet"]

Norm = Literal["batch", "group"]
POOLS = (1, 2, 3, 6)


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """Batch norm, or group norm with 32 groups (fewer where the channels do not divide)."""
    if norm == "batch":
        return nn.BatchNorm2d
    return lambda channels: nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0), channels)


def conv_norm_relu(channels: int, width: int, kernel: int, norm: Norm) -> nn.Module:
    return Conv2dNormActivation(channels, width, kernel, norm_layer=norm_layer(norm), inplace=True)


def resize_to(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear resize to the height and width of another map."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """Pyramid pooling of the last map, a top-down path, all levels fused at the first one's size.

    Maps (B, C_i, H_i, W_i), fine to coarse, -> logits (B, classes, H_0, W_0).
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 512,
        pools: Sequence[int] = POOLS,
        dropout: float = 0.1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), conv_norm_relu(channels[-1], width, 1, norm)) for pool in pools
        )
        self.bottleneck = conv_norm_relu(channels[-1] + len(pools) * width, width, 3, norm)
        self.laterals = nn.ModuleList(conv_norm_relu(c, width, 1, norm) for c in channels[:-1])
        self.smooths = nn.ModuleList(conv_norm_relu(width, width, 3, norm) for _ in channels[:-1])
        self.fuse = conv_norm_relu(len(channels) * width, width, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = maps[-1]
        pooled = [resize_to(pool(last), last) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize_to(levels[i], levels[i - 1])
        smoothed = [smooth(x) for smooth, x in zip(self.smooths, levels[:-1], strict=True)]
        fused = torch.cat([resize_to(x, levels[0]) for x in [*smoothed, levels[-1]]], dim=1)
        return self.classify(self.dropout(self.fuse(fused)))


class SemanticFpn(nn.Module):
    """A feature pyramid network, each level brought to the first one's size by convolutions and doublings, summed.

    Maps (B, C_i, H_i, W_i) at strides 4, 8, 16, 32 -> logits (B, classes, H_0, W_0). The pyramid has twice the width.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 128,
        dropout: float = 0.1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(list(channels), 2 * width)
        self.scales = nn.ModuleList(_scale_head(2 * width, width, level, norm) for level in range(len(channels)))
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        pyramid = self.pyramid(OrderedDict((str(level), x) for level, x in enumerate(maps)))
        levels = [scale(x) for scale, x in zip(self.scales, pyramid.values(), strict=True)]
        total = levels[0]
        for x in levels[1:]:
            total = total + resize_to(x, total)
        return self.classify(self.dropout(total))


def _scale_head(channels: int, width: int, doublings: int, norm: Norm) -> nn.Sequential:
    """One convolution for a level at the finest size, else a convolution and a doubling for each step up to it."""
    layers: list[nn.Module] = []
    for step in range(max(1, doublings)):
        layers.append(conv_norm_relu(channels if step == 0 else width, width, 3, norm))
        if doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)


class FcnHead(nn.Module):
    """The auxiliary head: one 3x3 convolution and the classifier, on the map of stage 3 (stride 16)."""

    def __init__(
        self, channels: int, num_classes: int, width: int = 256, dropout: float = 0.1, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        self.conv = conv_norm_relu(channels, width, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classify(self.dropout(self.conv(maps[-2])))


class Segmenter(nn.Module):
    """Feature maps and a head: images (B, C, H, W) -> logits (B, classes, H, W) of every pixel.

    With `auxiliary=True` in the call, a pair: these logits and those of the auxiliary head (None without one).
    """

    def __init__(self, maps: FeatureMaps, head: nn.Module, auxiliary: FcnHead | None = None) -> None:
        super().__init__()
        self.maps, self.head, self.auxiliary = maps, head, auxiliary

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width of the only images that the model takes; None for a model that takes any."""
        return self.maps.fixed_size

    @property
    def model(self) -> nn.Module:
        """The bare timm model."""
        return self.maps.model

    def forward(self, x: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        maps = self.maps(x)
        logits = resize_to(self.head(maps), x)
        if not auxiliary:
            return logits
        return logits, None if self.auxiliary is None else resize_to(self.auxiliary(maps), x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the backbone in the backward pass."""
        self.maps.set_grad_checkpointing(enable)
