"""Feature maps at strides 4, 8, 16 and 32 from any timm model: what detectors and segmentation heads stand on."""

from __future__ import annotations

import math
from typing import Any, cast

from timm.layers import LayerNorm2d
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from sparse_mlp.models._pyramid import Pyramid

__all__ = ["STRIDES", "FeatureMaps"]

STRIDES = (4, 8, 16, 32)


class FeatureMaps(nn.Module):
    """Maps of a timm model, (B, C, H, W) -> four maps (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])).

    A pyramid model gives the last map that it has at each stride. A model with one stride throughout (Mixer,
    Sparse-MLP, a ViT) gives its last map, from which a simple feature pyramid makes the others (Li et al., "Exploring
    plain vision transformer backbones for object detection", arXiv 2203.16527, section 3): transposed convolutions to
    the finer strides, the map itself, max pooling to the coarser ones.

    `model` becomes the bare timm model without what the maps do not need: its classifier and, for most, its last norm.
    Our pyramids get one norm for each map instead, as the authors' backbones for dense prediction have.
    """

    def __init__(self, model: nn.Module) -> None:
        """ValueError if the model has no feature maps, or not at these strides."""
        super().__init__()
        name = type(model).__name__
        infos: list[dict[str, Any]] = list(getattr(model, "feature_info", None) or [])
        if not infos or not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{name} gives no feature maps")
        reductions = [int(info["reduction"]) for info in infos]
        isotropic = len(set(reductions)) == 1
        missing = [stride for stride in STRIDES if stride not in reductions]
        if missing and not isotropic:
            raise ValueError(f"{name} gives maps at strides {sorted(set(reductions))}, none at {missing}")
        self.strides = STRIDES
        self.fixed_size = _fixed_size(model)
        if isinstance(model, Pyramid):
            model.add_output_norms()
        last = {stride: index for index, stride in enumerate(reductions)}
        indices = [len(infos) - 1] if isotropic else [last[stride] for stride in STRIDES]
        self.getter = FeatureGetterNet(model, tuple(indices))
        widths = [int(channels) for channels in self.getter.feature_info.channels()]
        self.scales: nn.ModuleList | None = None
        if isotropic:
            self.scales = nn.ModuleList(_scale(widths[0], reductions[0], stride) for stride in STRIDES)
            widths = [_scaled_width(widths[0], reductions[0], stride) for stride in STRIDES]
        self.channels: tuple[int, ...] = tuple(widths)

    @property
    def model(self) -> nn.Module:
        """The bare timm model."""
        return cast(nn.Module, self.getter["model"])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.getter(x)
        return maps if self.scales is None else [scale(maps[-1]) for scale in self.scales]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the model in the backward pass."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the only images that a model takes; None for a model that takes any."""
    embed = getattr(model, "patch_embed", None) or getattr(model, "stem", None)
    size = getattr(embed, "img_size", None)
    if size is None or not getattr(embed, "strict_img_size", True):
        return None
    return (int(size[0]), int(size[1]))


def _steps(stride: int, target: int) -> int:
    """How often a map at `stride` is doubled (positive) or halved (negative) to be at `target`."""
    return round(math.log2(stride / target))


def _scaled_width(width: int, stride: int, target: int) -> int:
    """Each transposed convolution halves the channels, of which 64 stay at least."""
    return max(width >> max(0, _steps(stride, target)), min(width, 64))


def _scale(width: int, stride: int, target: int) -> nn.Sequential:
    """From a map at `stride` to one at `target`, normed."""
    steps = _steps(stride, target)
    layers: list[nn.Module] = []
    for step in range(steps):
        narrower = max(width // 2, min(width, 64))
        layers.append(nn.ConvTranspose2d(width, narrower, 2, stride=2))
        if step < steps - 1:
            layers += [LayerNorm2d(narrower), nn.GELU()]
        width = narrower
    if steps < 0:
        # A map of an odd side keeps its last row, as the maps of a pyramid do.
        layers.append(nn.MaxPool2d(2**-steps, ceil_mode=True))
    return nn.Sequential(*layers, LayerNorm2d(width))
