"""CycleMLP: an MLP-like architecture for dense prediction.

Paper: "CycleMLP: A MLP-like Architecture for Dense Prediction", Chen, Xie, Ge, Chen, Liang, Luo, ICLR 2022,
https://arxiv.org/abs/2107.10224. Code and weights of the authors: https://github.com/ShoufaChen/CycleMLP (MIT).

Cycle FC mixes channels like a plain channel FC and at its cost, but reads each input channel at another position of a
short staircase, so that a stack of them has a spatial receptive field at any image size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from sparse_mlp.mixing.cycle_fc import CycleFC, cycle_offsets
from sparse_mlp.mixing.linear import Device, DType, Linear, Mlp
from sparse_mlp.mixing.reweight import Reweight
from sparse_mlp.models._checkpoint import StateDict, unwrap_checkpoint, upcycle
from sparse_mlp.models._pyramid import SPARSE, Pyramid, Stage, create_pyramid, init_normal, to_nchw, to_nhwc

__all__ = ["CycleMlp"]


class CycleMixer(nn.Module):
    """Three channel maps (along width, along height, in place), reweighted, summed, projected. Paper, figure 3."""

    def __init__(self, dim: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mlp_c = Linear(dim, dim, bias=False, **dd)
        self.sfc_h = CycleFC(dim, dim, axis=2, **dd)  # the published names: sfc_h has the kernel (1, 3)
        self.sfc_w = CycleFC(dim, dim, axis=1, **dd)
        self.reweight = Reweight(dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.reweight(self.sfc_h(x), self.sfc_w(x), self.mlp_c(x)))


class CycleBlock(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)). (B, H, W, C) -> the same."""

    def __init__(
        self, dim: int, mlp_ratio: float, drop_path: float = 0.0, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = CycleMixer(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Overlapping patches: a 7x7 convolution with stride 4. (B, in_chans, H, W) -> (B, H / 4, W / 4, dim)."""

    def __init__(self, in_chans: int, dim: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=7, stride=4, padding=2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return to_nhwc(self.proj(x.contiguous(memory_format=torch.channels_last))).contiguous()


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2. (B, H, W, in) -> (B, ceil(H / 2), ceil(W / 2), out)."""

    def __init__(self, in_dim: int, out_dim: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, out_dim, kernel_size=3, stride=2, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return to_nhwc(self.proj(to_nchw(x))).contiguous()


class CycleMlp(Pyramid):
    """CycleMLP of any depths and widths; see `Pyramid` for the arguments that all pyramids share.

    `depths`, `dims`, `mlp_ratios`: blocks, width and hidden ratio of each of the four stages. `drop_path_rate` is that
    of the last block; it grows linearly from 0.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
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
            stages.append(Stage(downsample, [CycleBlock(dim, mlp_ratios[i], rate, **dd) for rate in rates[i]]))
        stem = PatchEmbed(in_chans, dims[0], **dd)
        super().__init__(stem, stages, partial(nn.LayerNorm, **dd), dims, in_chans=in_chans, **dd, **kwargs)
        self.apply_initialisation()

    def apply_initialisation(self) -> None:
        self.apply(init_normal)  # linear maps; the convolutions keep torch's values


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
        if key.endswith(".offset"):
            _check_offset(key, value)
            continue
        for pattern, replacement in _KEY_RULES:
            key = re.sub(pattern, replacement, key)
        is_map = re.search(r"\.sfc_[hw]\.weight$", key)
        ours[key] = value.flatten(1) if is_map and value.shape[2:] == (1, 1) else value
    return ours


def _check_offset(key: str, offset: Tensor) -> None:
    """The offsets are constants of the published operator: pairs (dy, dx) per input channel, one of them always 0."""
    pairs = offset.flatten().view(-1, 2)
    expected = torch.tensor(cycle_offsets(len(pairs), 3), dtype=offset.dtype, device=offset.device)
    along, across = (pairs[:, 1], pairs[:, 0]) if "sfc_h" in key else (pairs[:, 0], pairs[:, 1])
    if not torch.equal(along, expected) or across.any():
        raise ValueError(f"{key}: not the offsets 0, +1, -1, ... of the published cycle FC with three steps")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "min_input_size": (3, 32, 32),
        "crop_pct": 0.875, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj", "classifier": "head", "license": "mit", "paper_ids": "arXiv:2107.10224",
        "paper_name": "CycleMLP: A MLP-like Architecture for Dense Prediction",
        "origin_url": "https://github.com/ShoufaChen/CycleMLP", **kwargs,
    }  # fmt: skip


_RELEASE = "https://github.com/ShoufaChen/CycleMLP/releases/download/v0.1/"  # the names hold no hash to check
default_cfgs = generate_default_cfgs(
    {
        f"{kind}cycle_mlp_b{i}.in1k": _cfg(url=f"{_RELEASE}CycleMLP_B{i}.pth")
        for kind in ("", "sparse_")
        for i in range(1, 6)
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    return create_pyramid(CycleMlp, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def cycle_mlp_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CycleMLP-B1: 15 M parameters, 2.1 GMACs."""
    return _create("cycle_mlp_b1", pretrained, {"depths": (2, 2, 4, 2), **kwargs})


@register_model
def cycle_mlp_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CycleMLP-B2: 27 M parameters, 3.9 GMACs."""
    return _create("cycle_mlp_b2", pretrained, {"depths": (2, 3, 10, 3), **kwargs})


@register_model
def cycle_mlp_b3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CycleMLP-B3: 38 M parameters, 6.8 GMACs."""
    args = {"depths": (3, 4, 18, 3), "mlp_ratios": (8, 8, 4, 4)}
    return _create("cycle_mlp_b3", pretrained, {**args, **kwargs})


@register_model
def cycle_mlp_b4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CycleMLP-B4: 52 M parameters, 10.0 GMACs."""
    args = {"depths": (3, 8, 27, 3), "mlp_ratios": (8, 8, 4, 4)}
    return _create("cycle_mlp_b4", pretrained, {**args, **kwargs})


@register_model
def cycle_mlp_b5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CycleMLP-B5: 76 M parameters, 12.2 GMACs."""
    args = {"depths": (3, 4, 24, 3), "dims": (96, 192, 384, 768)}
    return _create("cycle_mlp_b5", pretrained, {**args, **kwargs})


@register_model
def sparse_cycle_mlp_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CycleMLP-B1 with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 36 M parameters, 2.1 GMACs."""
    return _create("sparse_cycle_mlp_b1", pretrained, {"depths": (2, 2, 4, 2), **SPARSE, **kwargs})


@register_model
def sparse_cycle_mlp_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CycleMLP-B2 with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 47 M parameters, 3.9 GMACs."""
    return _create("sparse_cycle_mlp_b2", pretrained, {"depths": (2, 3, 10, 3), **SPARSE, **kwargs})


@register_model
def sparse_cycle_mlp_b3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CycleMLP-B3 with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 59 M parameters, 6.8 GMACs."""
    args = {"depths": (3, 4, 18, 3), "mlp_ratios": (8, 8, 4, 4)}
    return _create("sparse_cycle_mlp_b3", pretrained, {**args, **SPARSE, **kwargs})


@register_model
def sparse_cycle_mlp_b4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CycleMLP-B4 with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 72 M parameters, 10.0 GMACs."""
    args = {"depths": (3, 8, 27, 3), "mlp_ratios": (8, 8, 4, 4)}
    return _create("sparse_cycle_mlp_b4", pretrained, {**args, **SPARSE, **kwargs})


@register_model
def sparse_cycle_mlp_b5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CycleMLP-B5 with 8 experts, one an item, in stages 3 and 4 (`SPARSE`): 117 M parameters, 12.2 GMACs."""
    args = {"depths": (3, 4, 24, 3), "dims": (96, 192, 384, 768)}
    return _create("sparse_cycle_mlp_b5", pretrained, {**args, **SPARSE, **kwargs})
