"""Hire-MLP: vision MLP via hierarchical rearrangement.

Paper: "Hire-MLP: Vision MLP via Hierarchical Rearrangement", Guo, Tang, Han, Chen, Wu, Xu, Xu, Wang, CVPR 2022,
https://arxiv.org/abs/2108.13341. Code and weights of the authors: https://github.com/ggjy/Hire-Wave-MLP.pytorch.

Neighbouring rows (or columns) of a region become channels, which a bottleneck of two channel maps mixes; every other
block moves the map around the circle first, so that information crosses the regions' borders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from sparse_mlp.mixing.linear import Device, DType, Linear, Mlp
from sparse_mlp.mixing.rearrange import merge_regions, split_regions
from sparse_mlp.mixing.reweight import Reweight
from sparse_mlp.models._checkpoint import StateDict, unwrap_checkpoint, upcycle
from sparse_mlp.models._pyramid import SPARSE, Pyramid, Stage, create_pyramid, init_normal, norm_nchw, to_nchw, to_nhwc

__all__ = ["HireMlp"]

# per stage: positions in a region, length of the cycle of steps, positions per step (the authors' code; all variants)
REGIONS = (4, 3, 3, 2)
STEP_CYCLES = (2, 2, 3, 2)
STEP_DILATIONS = (2, 2, 1, 1)


@register_notrace_module
class BatchNorm(nn.BatchNorm2d):
    """Batch norm of a (B, C, H, W) map that also trains on a single position.

    One position of one image (the last stage of a 32 px image alone in its batch) has no statistics, and torch refuses
    to train on it; the running ones are used there, and left as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class HireMixer(nn.Module):
    """A branch along the height, one along the width, one in place, reweighted, summed, projected. Paper, figure 2."""

    def __init__(self, dim: int, region: int, step: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.region, self.step = region, step
        self.mlp_h1 = Linear(dim * region, dim // 2, bias=False, **dd)
        self.mlp_h1_norm = BatchNorm(dim // 2, **dd)
        self.mlp_h2 = Linear(dim // 2, dim * region, **dd)
        self.mlp_w1 = Linear(dim * region, dim // 2, bias=False, **dd)
        self.mlp_w1_norm = BatchNorm(dim // 2, **dd)
        self.mlp_w2 = Linear(dim // 2, dim * region, **dd)
        self.mlp_c = Linear(dim, dim, **dd)
        self.reweight = Reweight(dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        h = merge_regions(x, self.region, self.step, axis=1)
        h = self.mlp_h2(F.relu(norm_nchw(self.mlp_h1_norm, self.mlp_h1(h))))
        h = split_regions(h, self.region, self.step, axis=1, size=x.shape[1])
        w = merge_regions(x, self.region, self.step, axis=2)
        w = self.mlp_w2(F.relu(norm_nchw(self.mlp_w1_norm, self.mlp_w1(w))))
        w = split_regions(w, self.region, self.step, axis=2, size=x.shape[2])
        return self.proj(self.reweight(h, w, self.mlp_c(x)))


class HireBlock(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)). (B, H, W, C) -> the same."""

    def __init__(
        self,
        dim: int,
        region: int,
        step: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = BatchNorm(dim, **dd)
        self.attn = HireMixer(dim, region, step, **dd)
        self.norm2 = BatchNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(norm_nchw(self.norm1, x)))
        return x + self.drop_path(self.mlp(norm_nchw(self.norm2, x)))


class ConvNormRelu(nn.Module):
    """A strided convolution, batch norm and ReLU on a (B, C, H, W) map; the result is (B, H, W, C)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int,
        stride: int,
        padding: int,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding, **dd)
        self.norm = BatchNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return F.relu(norm_nchw(self.norm, to_nhwc(x).contiguous()))


class Downsample(ConvNormRelu):
    """Half the size by a 3x3 convolution. (B, H, W, in) -> (B, ceil(H / 2), ceil(W / 2), out)."""

    def __init__(self, in_dim: int, out_dim: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__(in_dim, out_dim, kernel_size=3, stride=2, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(to_nchw(x))


class HireMlp(Pyramid):
    """Hire-MLP of any depths and widths; see `Pyramid` for the arguments that all pyramids share.

    `depths`, `dims`, `mlp_ratio`: blocks and width of each of the four stages, hidden ratio. `drop_path_rate` is that
    of the last block; it grows linearly from 0.
    """

    norms_nchw = True

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: Device = None,
        dtype: DType = None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            downsample = Downsample(dims[i - 1], dim, **dd) if i else nn.Identity()
            steps = [k % STEP_CYCLES[i] * STEP_DILATIONS[i] for k in range(depths[i])]
            blocks = [
                HireBlock(dim, REGIONS[i], step, mlp_ratio, rate, **dd)
                for step, rate in zip(steps, rates[i], strict=True)
            ]
            stages.append(Stage(downsample, blocks))
        stem = ConvNormRelu(in_chans, dims[0], kernel_size=7, stride=4, padding=2, **dd)
        super().__init__(stem, stages, partial(BatchNorm, **dd), dims, in_chans=in_chans, **dd, **kwargs)
        self.apply_initialisation()

    def apply_initialisation(self) -> None:
        self.apply(partial(init_normal, kinds=(nn.Linear, nn.Conv2d)))


_KEY_RULES = (
    (r"^patch_embed\.", "stem."),
    (r"^norm([0246])\.", lambda m: f"output_norms.{int(m[1]) // 2}."),
    (r"^network\.([0246])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"^network\.([135])\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample."),
)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module | None = None) -> StateDict:
    """Bring the authors' layout (wrapped or not, classifier or dense backbone) into ours; ours passes unchanged.

    In a model with experts each of them begins as the MLP of the dense weights.
    """
    return upcycle(_rename(checkpoint), model)


def _rename(checkpoint: Mapping[str, Any]) -> StateDict:
    published = unwrap_checkpoint(checkpoint)
    if not any(key.startswith("network.") for key in published):
        return published
    ours: StateDict = {}
    for key, value in published.items():
        for pattern, replacement in _KEY_RULES:
            key = re.sub(pattern, replacement, key)
        if value.dim() == 4 and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        if branch := re.match(r"stages\.(\d)\.blocks\.\d+\.attn\.mlp_[hw](1\.weight|2\.weight|2\.bias)$", key):
            value = _position_major(value, REGIONS[int(branch[1])], dim=1 if branch[2] == "1.weight" else 0)
        ours[key] = value
    return ours


def _position_major(value: Tensor, region: int, dim: int) -> Tensor:
    """Reorder channels from the published c * region + k to k * C + c (see `mixing.rearrange`)."""
    return value.unflatten(dim, (-1, region)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "min_input_size": (3, 32, 32),
        "crop_pct": 0.875, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj", "classifier": "head", "paper_ids": "arXiv:2108.13341",
        "paper_name": "Hire-MLP: Vision MLP via Hierarchical Rearrangement",
        "origin_url": "https://github.com/ggjy/Hire-Wave-MLP.pytorch", **kwargs,
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        f"{kind}hire_mlp_{name}.untrained": _cfg()
        for kind in ("", "sparse_")
        for name in ("tiny", "small", "base", "large")
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    return create_pyramid(HireMlp, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def hire_mlp_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hire-MLP-Tiny: 18 M parameters, 2.1 GMACs."""
    return _create("hire_mlp_tiny", pretrained, {"depths": (2, 2, 4, 2), **kwargs})


@register_model
def hire_mlp_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hire-MLP-Small: 33 M parameters, 4.2 GMACs."""
    return _create("hire_mlp_small", pretrained, {"depths": (3, 4, 10, 3), **kwargs})


@register_model
def hire_mlp_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hire-MLP-Base: 58 M parameters, 8.1 GMACs."""
    return _create("hire_mlp_base", pretrained, {"depths": (4, 6, 24, 3), **kwargs})


@register_model
def hire_mlp_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hire-MLP-Large: 96 M parameters, 13.4 GMACs."""
    args = {"depths": (4, 6, 24, 3), "dims": (96, 192, 384, 768)}
    return _create("hire_mlp_large", pretrained, {**args, **kwargs})


@register_model
def sparse_hire_mlp_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hire-MLP-Tiny with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 38 M parameters, 2.1 GMACs."""
    return _create("sparse_hire_mlp_tiny", pretrained, {"depths": (2, 2, 4, 2), **SPARSE, **kwargs})


@register_model
def sparse_hire_mlp_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hire-MLP-Small with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 54 M parameters, 4.2 GMACs."""
    return _create("sparse_hire_mlp_small", pretrained, {"depths": (3, 4, 10, 3), **SPARSE, **kwargs})


@register_model
def sparse_hire_mlp_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hire-MLP-Base with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 79 M parameters, 8.1 GMACs."""
    return _create("sparse_hire_mlp_base", pretrained, {"depths": (4, 6, 24, 3), **SPARSE, **kwargs})


@register_model
def sparse_hire_mlp_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hire-MLP-Large with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 137 M parameters, 13.4 GMACs."""
    args = {"depths": (4, 6, 24, 3), "dims": (96, 192, 384, 768)}
    return _create("sparse_hire_mlp_large", pretrained, {**args, **SPARSE, **kwargs})
