"""AS-MLP: an axial shifted MLP architecture for vision.

Paper: "AS-MLP: An Axial Shifted MLP Architecture for Vision", Lian, Yu, Sun, Gao, ICLR 2022,
https://arxiv.org/abs/2107.08391. Code of the authors: https://github.com/svip-lab/AS-MLP (MIT).

Groups of channels are displaced along the height and along the width, so that the channel maps that follow mix a cross
of neighbouring positions. The skeleton is Swin's: patches of 4, merging of 2x2 patches, depths 2-2-6-2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, register_notrace_function
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from sparse_mlp.mixing.axial_shift import axial_offsets
from sparse_mlp.mixing.channel_shift import shift_channels
from sparse_mlp.mixing.linear import Device, DType, Linear, Mlp
from sparse_mlp.models._checkpoint import StateDict, unwrap_checkpoint, upcycle
from sparse_mlp.models._pyramid import SPARSE, Pyramid, Stage, create_pyramid, init_normal, norm_nchw, to_nhwc

__all__ = ["AsMlp"]


# The norm has one group: statistics over all positions and channels of an image.
ImageNorm = partial(nn.GroupNorm, 1)


class AxialShift(nn.Module):
    """The axial shifted block of the paper's figure 2: a horizontal and a vertical branch, both from the same map."""

    def __init__(self, dim: int, shift_size: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.offsets = axial_offsets(dim, shift_size)
        self.conv1 = Linear(dim, dim, **dd)
        self.conv2_1 = Linear(dim, dim, gelu=True, **dd)
        self.conv2_2 = Linear(dim, dim, gelu=True, **dd)
        self.conv3 = Linear(dim, dim, **dd)
        self.norm1 = ImageNorm(dim, **dd)
        self.norm2 = ImageNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(norm_nchw(self.norm1, self.conv1(x)))
        horizontal = self.conv2_1(shift_channels(x, self.offsets, axis=2))
        vertical = self.conv2_2(shift_channels(x, self.offsets, axis=1))
        return self.conv3(norm_nchw(self.norm2, horizontal + vertical))


class AsBlock(nn.Module):
    """x + axial_shift(norm1(x)), then x + mlp(norm2(x)). (B, H, W, C) -> the same."""

    def __init__(
        self,
        dim: int,
        shift_size: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = ImageNorm(dim, **dd)
        self.axial_shift = AxialShift(dim, shift_size, **dd)
        self.norm2 = ImageNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.axial_shift(norm_nchw(self.norm1, x)))
        return x + self.drop_path(self.mlp(norm_nchw(self.norm2, x)))


@register_notrace_function
def pad_to_multiple(x: Tensor, multiple: int, axes: tuple[int, int]) -> Tensor:
    """Zeros at the bottom and right, as the published dense-prediction code pads."""
    height, width = (-x.shape[axis] % multiple for axis in axes)
    if height == 0 and width == 0:
        return x
    return F.pad(x, (0, width, 0, height) if axes == (2, 3) else (0, 0, 0, width, 0, height))


class PatchEmbed(nn.Module):
    """Patches of 4x4 and a norm. (B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim)."""

    def __init__(self, in_chans: int, dim: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=4, stride=4, device=device, dtype=dtype)
        self.norm = ImageNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 4, axes=(2, 3)).contiguous(memory_format=torch.channels_last)
        return norm_nchw(self.norm, to_nhwc(self.proj(x)).contiguous())


class PatchMerging(nn.Module):
    """2x2 neighbours become one position, then norm and projection. (B, H, W, in) -> (B, ceil(H/2), ceil(W/2), out)."""

    def __init__(self, in_dim: int, out_dim: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.norm = ImageNorm(4 * in_dim, device=device, dtype=dtype)
        self.reduction = Linear(4 * in_dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 2, axes=(1, 2))
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, dim)
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * dim)  # rows run fastest, as in Swin
        return self.reduction(norm_nchw(self.norm, x))


class AsMlp(Pyramid):
    """AS-MLP of any depths and widths; see `Pyramid` for the arguments that all pyramids share.

    `depths`, `embed_dim`: blocks per stage, and the first stage's width, which doubles from stage to stage.
    `shift_size`: the number of channel groups and of positions they are spread over. `drop_path_rate` is that of the
    last block; it grows from 0.
    """

    norms_nchw = True

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dim: int = 96,
        shift_size: int = 5,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: Device = None,
        dtype: DType = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            downsample = PatchMerging(dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(Stage(downsample, [AsBlock(dim, shift_size, mlp_ratio, rate, **dd) for rate in rates[i]]))
        stem = PatchEmbed(in_chans, embed_dim, **dd)
        super().__init__(stem, stages, partial(ImageNorm, **dd), dims, in_chans=in_chans, **dd, **kwargs)
        self.apply_initialisation()

    def apply_initialisation(self) -> None:
        init_normal(self.head)  # the channel maps, convolutions in the authors' code, keep torch's values


_KEY_RULES = (
    (r"^patch_embed\.", "stem."),
    (r"^norm([0-3])\.", r"output_norms.\1."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module | None = None) -> StateDict:
    """Bring the authors' layout (wrapped or not, classifier or dense backbone) into ours; ours passes unchanged.

    In a model with experts each of them begins as the MLP of the dense weights.
    """
    return upcycle(_rename(checkpoint), model)


def _rename(checkpoint: Mapping[str, Any]) -> StateDict:
    published = unwrap_checkpoint(checkpoint)
    if not any(key.startswith("layers.") for key in published):
        return published
    ours: StateDict = {}
    for key, value in published.items():
        for pattern, replacement in _KEY_RULES:
            key = re.sub(pattern, replacement, key)
        is_map = value.dim() == 4 and not key.startswith("stem.") and value.shape[2:] == (1, 1)
        ours[key] = value.flatten(1) if is_map else value
    return ours


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "min_input_size": (3, 32, 32),
        "crop_pct": 0.875, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj", "classifier": "head", "license": "mit", "paper_ids": "arXiv:2107.08391",
        "paper_name": "AS-MLP: An Axial Shifted MLP Architecture for Vision",
        "origin_url": "https://github.com/svip-lab/AS-MLP", **kwargs,
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {f"{kind}as_mlp_{name}.untrained": _cfg() for kind in ("", "sparse_") for name in ("tiny", "small", "base")}
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    return create_pyramid(AsMlp, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def as_mlp_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AS-MLP-T: 28 M parameters, 4.4 GMACs."""
    return _create("as_mlp_tiny", pretrained, {"depths": (2, 2, 6, 2), **kwargs})


@register_model
def as_mlp_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AS-MLP-S: 50 M parameters, 8.5 GMACs."""
    return _create("as_mlp_small", pretrained, {"depths": (2, 2, 18, 2), **kwargs})


@register_model
def as_mlp_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AS-MLP-B: 88 M parameters, 15.1 GMACs."""
    return _create("as_mlp_base", pretrained, {"depths": (2, 2, 18, 2), "embed_dim": 128, **kwargs})


@register_model
def sparse_as_mlp_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AS-MLP-T with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 70 M parameters, 4.4 GMACs."""
    return _create("sparse_as_mlp_tiny", pretrained, {"depths": (2, 2, 6, 2), **SPARSE, **kwargs})


@register_model
def sparse_as_mlp_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AS-MLP-S with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 91 M parameters, 8.5 GMACs."""
    return _create("sparse_as_mlp_small", pretrained, {"depths": (2, 2, 18, 2), **SPARSE, **kwargs})


@register_model
def sparse_as_mlp_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AS-MLP-B with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 161 M parameters, 15.1 GMACs."""
    return _create("sparse_as_mlp_base", pretrained, {"depths": (2, 2, 18, 2), "embed_dim": 128, **SPARSE, **kwargs})
