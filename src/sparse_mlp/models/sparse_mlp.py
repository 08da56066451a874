"""Sparse-MLP: an MLP-Mixer whose last blocks mix along patches and along channels by mixtures of experts.

Papers:
  Sparse-MLP: A Fully-MLP Architecture with Conditional Computation, https://arxiv.org/abs/2109.02008
    (v3 is titled "Cross-token Modeling with Conditional Computation"; the authors published no code)
  MLP-Mixer: An all-MLP Architecture for Vision, https://arxiv.org/abs/2105.01601

The model is timm's `MlpMixer` with other blocks at some places, so that without sparse blocks it *is* timm's Mixer.
Our reconstruction, where the paper leaves a choice: the channel MoE is pre-norm (the figure draws its skip after the
norm), Sparse-L is read from its parameter count alone, and there is no skip around a whole sparse block.

Shapes: B images, S tokens, C channels outside the sparse blocks; S1 tokens, C1 channels inside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp, get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import Tensor, nn

from sparse_mlp.mixing.linear import Linear
from sparse_mlp.mixing.rerepresent import Rerepresent
from sparse_mlp.models._checkpoint import names_weights, no_published_weights, unwrap_checkpoint
from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.experts import GELU

__all__ = ["SparseBlock", "SparseMlp", "checkpoint_filter_fn"]


class DenseMlp(Mlp):
    """timm's Mlp with the fastest product there is for its input in both layers; same parameters, same function."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.fc1, nn.Linear) and isinstance(self.fc2, nn.Linear)
        self.fc1, self.fc2 = Linear.of(self.fc1), Linear.of(self.fc2)


class RowMajor(nn.Identity):
    """Tokens as rows in memory. A convolution gives them as columns, a layout that every block would pass on: each norm
    then copies its input. A training step of a Mixer of width 32 takes a sixth longer without this (one CPU thread)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


class SparseBlock(nn.Module):
    """Re-represent, token-mixing MoE, channel-mixing MoE, Re-represent back; no skip around the whole.

    (B, S, C) -> (B, S, C). The items of `mlp_tokens` are the C1 channels, vectors of length S1; those of
    `mlp_channels` are the S1 tokens, vectors of length C1. Pairs are (token mixing, channel mixing).

    Args:
        dim: C.
        seq_len: S.
        mlp_ratio: expert widths: hidden of the token experts = ratio x C x S1/S, of the channel experts = ratio x C1.
        num_experts: E. top_k: K. expert_hidden: hidden widths, in place of `mlp_ratio`.
        rerepresent: False leaves the Re-represent layers out (S1 = S, C1 = C).
        scale: (S1/S, C1/C).
        moe_layer: builds each MoE from (dim, hidden_dim, num_experts, top_k).
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: tuple[float, float] = (0.5, 4.0),
        num_experts: tuple[int, int] = (8, 4),
        top_k: tuple[int, int] = (1, 2),
        expert_hidden: tuple[int, int] | None = None,
        rerepresent: bool = True,
        scale: tuple[float, float] = (2.0, 0.5),
        moe_layer: Callable[..., MoeMlp] = MoeMlp,
        mlp_layer: type[nn.Module] = DenseMlp,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        tokens, channels = seq_len, dim
        self.rerepresent_in: Rerepresent | None = None
        self.rerepresent_out: Rerepresent | None = None
        if rerepresent:
            tokens, channels = round(seq_len * scale[0]), round(dim * scale[1])
            layers = {"norm_layer": norm_layer, "act_layer": act_layer, **dd}
            self.rerepresent_in = Rerepresent((seq_len, tokens), (dim, channels), tokens_first=True, **layers)
        token_hidden, channel_hidden = expert_hidden or (
            round(mlp_ratio[0] * dim * tokens / seq_len),
            round(mlp_ratio[1] * channels),
        )
        self.norm1 = norm_layer(channels, **dd)
        self.mlp_tokens = moe_layer(tokens, token_hidden, num_experts[0], top_k[0], **dd)
        self.norm2 = norm_layer(channels, **dd)
        self.mlp_channels = moe_layer(channels, channel_hidden, num_experts[1], top_k[1], **dd)
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        if rerepresent:
            self.rerepresent_out = Rerepresent((tokens, seq_len), (channels, dim), tokens_first=False, **layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.rerepresent_in is not None:
            x = self.rerepresent_in(x)
        x = x + self.drop_path(self.drop(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)))
        x = x + self.drop_path(self.drop(self.mlp_channels(self.norm2(x))))
        if self.rerepresent_out is not None:
            x = self.rerepresent_out(x)
        return x


class SparseMlp(MlpMixer):
    """MLP-Mixer with sparse blocks. Input (B, in_chans, img_size, img_size), output (B, num_classes).

    Each row of the paper's ablation tables is an argument. Pairs are (token mixing, channel mixing).

    Args:
        img_size: pixels, a number or (height, width); must be divisible by `patch_size`.
        patch_size: pixels of a patch's side.
        embed_dim: C.
        num_blocks: dense and sparse blocks together.
        mlp_ratio: hidden widths over C, of the dense blocks; see `SparseBlock` for the experts.
        sparse_blocks: which blocks are sparse: a number n for the last n, or their indices; 0 or () for none.
        num_experts: E of each kind. top_k: K of each kind. expert_hidden: hidden width of each kind of expert.
        rerepresent: with or without Re-represent layers. rerepresent_scale: (S1/S, C1/C).
        capacity_ratio, eval_capacity_ratio, capacity_group, prioritized, noise_std, balance_weight: see `MoeMlp`.
        act_layer: "gelu" (timm's) or "gelu_tanh" (the published Mixer weights').
        The rest is timm's `MlpMixer`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int = 16,
        num_blocks: int = 12,
        embed_dim: int = 768,
        mlp_ratio: tuple[float, float] = (0.5, 4.0),
        sparse_blocks: int | Sequence[int] = 2,
        num_experts: tuple[int, int] = (8, 4),
        top_k: tuple[int, int] = (1, 2),
        expert_hidden: tuple[int, int] | None = None,
        rerepresent: bool = True,
        rerepresent_scale: tuple[float, float] = (2.0, 0.5),
        capacity_ratio: float | None = None,
        eval_capacity_ratio: float | None = None,
        capacity_group: str = "image",
        prioritized: bool = False,
        noise_std: float | None = None,
        balance_weight: float = 0.01,
        act_layer: str = "gelu",
        **kwargs: Any,
    ) -> None:
        _check_counts(patch_size=patch_size, num_blocks=num_blocks, embed_dim=embed_dim)
        _check_finite(
            capacity_ratio=capacity_ratio,
            eval_capacity_ratio=eval_capacity_ratio,
            noise_std=noise_std,
            balance_weight=balance_weight,
        )
        if act_layer not in GELU:
            raise ValueError(f"act_layer must be one of {', '.join(GELU)}; got {act_layer!r}")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}")
        sparse = _sparse_indices(sparse_blocks, num_blocks)
        if not rerepresent and tuple(rerepresent_scale) != (2.0, 0.5):
            raise ValueError("rerepresent_scale has no effect with rerepresent=False")
        moe_layer = partial(
            MoeMlp,
            capacity_ratio=capacity_ratio,
            eval_capacity_ratio=eval_capacity_ratio,
            capacity_group=capacity_group,
            prioritized=prioritized,
            noise_std=noise_std,
            balance_weight=balance_weight,
            act=act_layer,
        )
        sparse_block = partial(
            SparseBlock,
            num_experts=_pair("num_experts", num_experts, int),
            top_k=_pair("top_k", top_k, int),
            expert_hidden=None if expert_hidden is None else _pair("expert_hidden", expert_hidden, int),
            rerepresent=rerepresent,
            scale=_pair("rerepresent_scale", rerepresent_scale, (int, float)),
            moe_layer=moe_layer,
        )
        index = iter(range(num_blocks))
        super().__init__(
            num_classes=num_classes,
            img_size=img_size,  # type: ignore[arg-type]
            in_chans=in_chans,
            patch_size=patch_size,
            num_blocks=num_blocks,
            embed_dim=embed_dim,
            mlp_ratio=_pair("mlp_ratio", mlp_ratio, (int, float)),
            # MlpMixer builds its blocks in order: each asks whether it is a sparse one
            block_layer=lambda *a, **k: (sparse_block if next(index) in sparse else MixerBlock)(*a, **k),  # type: ignore[arg-type]
            mlp_layer=DenseMlp,
            act_layer=get_act_layer(act_layer),
            **kwargs,
        )
        if isinstance(self.stem.norm, nn.Identity):
            self.stem.norm = RowMajor()

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches along height and width; their product is S."""
        return self.stem.grid_size

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """None by name: biases, those of the experts too, and norms are recognised by timm's rule."""
        return set()

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load Google's published Mixer weights (`.npz`); timm calls this for `checkpoint_path=*.npz`."""
        with np.load(Path(checkpoint_path), allow_pickle=False) as arrays:
            state_dict = from_google({key.removeprefix(prefix): arrays[key] for key in arrays.files})
        self.load_state_dict(checkpoint_filter_fn(state_dict, self))


def _check_counts(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")


def _check_finite(**values: Any) -> None:
    for name, value in values.items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number; got {value!r}")


def _sparse_indices(sparse_blocks: int | Sequence[int], num_blocks: int) -> set[int]:
    last = isinstance(sparse_blocks, int)
    if isinstance(sparse_blocks, int) and sparse_blocks < 0:
        raise ValueError(f"sparse_blocks {sparse_blocks} must not be negative; ({sparse_blocks},) names one block")
    wanted = range(num_blocks - sparse_blocks, num_blocks) if isinstance(sparse_blocks, int) else sparse_blocks
    indices = {i if last or i >= 0 else i + num_blocks for i in wanted}
    if not indices <= set(range(num_blocks)):
        raise ValueError(f"sparse_blocks {sparse_blocks} does not fit a model of {num_blocks} blocks")
    return indices


def _pair(name: str, value: Any, kind: type | tuple[type, ...]) -> tuple[Any, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(one, kind) for one in value):
        raise ValueError(f"{name} must be a pair of numbers (token mixing, channel mixing); got {value!r}")
    if min(value) <= 0:
        raise ValueError(f"{name} must be above 0; got {value!r}")
    return value[0], value[1]


# Checkpoints


def from_google(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Google's Mixer layout (`MixerBlock_0/token_mixing/Dense_0/kernel`, kernels in x out) -> timm's."""
    state_dict = {}
    for key, array in arrays.items():
        name = key
        for pattern, replacement in _GOOGLE_NAMES:
            name = re.sub(pattern, replacement, name)
        if "/" in name:
            raise ValueError(f"unexpected entry {key!r} in a Mixer .npz checkpoint")
        value = torch.from_numpy(np.array(array, dtype=np.float32))
        if key.endswith("kernel"):
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.t()
        state_dict[name] = value.contiguous()
    return state_dict


_GOOGLE_NAMES = (
    (r"^stem/", "stem.proj."),
    (r"^MixerBlock_(\d+)/", r"blocks.\1."),
    (r"LayerNorm_0/", "norm1."),
    (r"LayerNorm_1/", "norm2."),
    (r"token_mixing/", "mlp_tokens."),
    (r"channel_mixing/", "mlp_channels."),
    (r"Dense_0/", "fc1."),
    (r"Dense_1/", "fc2."),
    (r"^pre_head_layer_norm/", "norm."),
    (r"^head/", "head."),
    (r"kernel$|scale$", "weight"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: MlpMixer) -> dict[str, Tensor]:
    """Published Mixer and our own weights -> what `model` takes: names, and token weights at its image size.

    Reads timm's layout, ours, and Google's `.npz` names, wrapped or not. Token weights of another image size are
    resampled: along S by interpolating over the patch grid, along S1 (which has no geometry) by repeating or averaging
    neighbours.
    """
    state_dict = unwrap_checkpoint(state_dict)
    if any("/" in key for key in state_dict):
        state_dict = from_google(state_dict)
    wanted = model.state_dict()
    (old_outer, old_inner), (new_outer, new_inner) = _token_counts(state_dict), _token_counts(wanted)
    if (old_outer, old_inner) == (new_outer, new_inner) or None in (old_outer, new_outer):
        return dict(state_dict)
    outer = _interpolation(old_outer, model.stem.grid_size)
    inner = _repeat(old_inner, new_inner) if old_inner and new_inner else outer
    return {
        key: _resample(value, _token_axes(key.split(".", 2)[-1], outer, inner)) if key.startswith("blocks.") else value
        for key, value in state_dict.items()
    }


class _Resampling(NamedTuple):
    """Matrices (new, old) for token axes: of a weight that reads tokens, and of one that writes them."""

    read: Tensor
    write: Tensor


def _token_counts(state_dict: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """S and S1 of a checkpoint, None where it has none."""

    def shape(pattern: str) -> tuple[Any, Any]:
        return next(((v.shape[-2], v.shape[-1]) for k, v in state_dict.items() if re.search(pattern, k)), (None, None))

    s1, s = shape(r"rerepresent_in\.token_proj\.weight$")
    if s is None:
        s = shape(r"mlp_tokens\.(fc1|router)\.weight$")[1]
    return s, s1


def _token_axes(name: str, outer: _Resampling, inner: _Resampling) -> dict[int, Tensor]:
    """Which axes of a block's weight run over tokens, and what to multiply them by."""
    return {
        "mlp_tokens.fc1.weight": {1: outer.read},
        "mlp_tokens.fc2.weight": {0: outer.write},
        "mlp_tokens.fc2.bias": {0: outer.write},
        "rerepresent_in.token_proj.weight": {0: inner.write, 1: outer.read},
        "rerepresent_in.token_proj.bias": {0: inner.write},
        "rerepresent_out.token_proj.weight": {0: outer.write, 1: inner.read},
        "rerepresent_out.token_proj.bias": {0: outer.write},
        "mlp_tokens.router.weight": {1: inner.read},
        "mlp_tokens.experts.fc1.weight": {1: inner.read},
        "mlp_tokens.experts.fc2.weight": {2: inner.write},
        "mlp_tokens.experts.fc2.bias": {1: inner.write},
    }.get(name, {})


def _resample(value: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    for axis, matrix in axes.items():
        value = torch.tensordot(value.float(), matrix, dims=([axis], [1])).movedim(-1, axis).to(value.dtype)
    return value.contiguous()


def _interpolation(old_tokens: int, grid: tuple[int, int]) -> _Resampling:
    """Patches, from a square grid to `grid`. A sum over more tokens stays as large as it was."""
    side = round(old_tokens**0.5)
    if side * side != old_tokens:
        raise ValueError(f"token weights for {old_tokens} patches come from no square image and cannot be resampled")
    images = torch.eye(old_tokens).view(old_tokens, 1, side, side)
    write = F.interpolate(images, size=tuple(grid), mode="bicubic", antialias=True).flatten(1).t()
    return _Resampling(write * (old_tokens / write.shape[0]), write)


def _repeat(old: int, new: int) -> _Resampling:
    """Re-represented tokens, which have an order but no place.

    More of them: copies, read with their share of the weight, so that the function stays the same. Fewer: averages.
    """
    if new >= old:
        write = F.one_hot(torch.arange(new) * old // new, old).float()
        return _Resampling(write / write.sum(0), write)
    read = F.one_hot(torch.arange(old) * new // old, new).float().t()
    return _Resampling(read, read / read.sum(1, keepdim=True))


# Variants


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2109.02008",
        "paper_name": "Sparse-MLP: A Fully-MLP Architecture with Conditional Computation",
        **kwargs,
    }


_SMALL = {"num_classes": 10, "input_size": (3, 32, 32), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "sparse_mlp_s16_224.untrained": _cfg(),
        "sparse_mlp_b16_224.untrained": _cfg(),
        "sparse_mlp_l16_224.untrained": _cfg(),
        "sparse_mlp_t4_32.untrained": _cfg(**_SMALL),
        "sparse_mlp_s4_32.untrained": _cfg(**_SMALL),
        "mixer_t4_32.untrained": _cfg(**_SMALL),
        "mixer_s4_32.untrained": _cfg(**_SMALL),
    }
)


def _create(
    model_cls: type[MlpMixer], variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    out_indices = kwargs.pop("out_indices", 3)
    if pretrained and not names_weights(variant, kwargs):
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        kwargs["pretrained_cfg_overlay"] = {**overlay, **_weights_of_dense_twin(variant, {**defaults, **kwargs})}
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


_DENSE_TWINS = {"sparse_mlp_b16_224": "mixer_b16_224"}
"""timm's models with published weights that ours are without sparse blocks."""


def _weights_of_dense_twin(variant: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Where the weights are that `variant` takes when it has no sparse block; RuntimeError if there are none."""
    twin = _DENSE_TWINS.get(variant)
    if twin is None:
        raise no_published_weights(variant)
    if _sparse_indices(arguments.get("sparse_blocks", 2), arguments["num_blocks"]):
        raise RuntimeError(f"there are no published weights of {variant}; sparse_blocks=0 takes those of timm's {twin}")
    cfg = get_pretrained_cfg(twin)
    assert cfg is not None
    return {"url": cfg.url, "hf_hub_id": cfg.hf_hub_id}


@register_model
def sparse_mlp_s16_224(pretrained: bool = False, **kwargs: Any) -> SparseMlp:
    """Sparse-S/16: 6 dense + 2 sparse blocks, 22.4 M parameters; authors' ImageNet-1k top-1 71.3 (table 1)."""
    return _create(
        SparseMlp, "sparse_mlp_s16_224", pretrained, {"num_blocks": 8, "embed_dim": 512, "num_experts": (4, 4)}, kwargs
    )


@register_model
def sparse_mlp_b16_224(pretrained: bool = False, **kwargs: Any) -> SparseMlp:
    """Sparse-B/16: 10 dense + 2 sparse blocks, 70.7 M parameters; authors' ImageNet-1k top-1 77.9 (table 1)."""
    return _create(SparseMlp, "sparse_mlp_b16_224", pretrained, {"num_blocks": 12, "embed_dim": 768}, kwargs)


@register_model
def sparse_mlp_l16_224(pretrained: bool = False, **kwargs: Any) -> SparseMlp:
    """Sparse-L/16: 8 dense + 6 sparse blocks, 131.2 M parameters; authors' ImageNet-1k top-1 79.2 (table 1).

    Our reconstruction from the published parameter count; weakly supported.
    """
    defaults = {"num_blocks": 14, "embed_dim": 768, "sparse_blocks": 6, "num_experts": (16, 4)}
    return _create(SparseMlp, "sparse_mlp_l16_224", pretrained, defaults, kwargs)


_T4 = {"img_size": 32, "patch_size": 4, "num_blocks": 6, "embed_dim": 128}
_S4 = {"img_size": 32, "patch_size": 4, "num_blocks": 8, "embed_dim": 256}


@register_model
def sparse_mlp_t4_32(pretrained: bool = False, **kwargs: Any) -> SparseMlp:
    """Tiny Sparse-MLP for 32-pixel images: 4 dense + 2 sparse blocks of width 128, 64 tokens. Ours, not published."""
    return _create(SparseMlp, "sparse_mlp_t4_32", pretrained, _T4, kwargs)


@register_model
def sparse_mlp_s4_32(pretrained: bool = False, **kwargs: Any) -> SparseMlp:
    """Small Sparse-MLP for 32-pixel images: 6 dense + 2 sparse blocks of width 256, 64 tokens. Ours, not published."""
    return _create(SparseMlp, "sparse_mlp_s4_32", pretrained, _S4, kwargs)


@register_model
def mixer_t4_32(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """timm's Mixer at the size of `sparse_mlp_t4_32`, its channel MLP widened to the same multiply-adds."""
    defaults = {**_T4, "mlp_ratio": (0.5, 4.84), "mlp_layer": DenseMlp}
    return _create(MlpMixer, "mixer_t4_32", pretrained, defaults, kwargs)


@register_model
def mixer_s4_32(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """timm's Mixer at the size of `sparse_mlp_s4_32`, its channel MLP widened to the same multiply-adds."""
    defaults = {**_S4, "mlp_ratio": (0.5, 4.5), "mlp_layer": DenseMlp}
    return _create(MlpMixer, "mixer_s4_32", pretrained, defaults, kwargs)
