"""What the pyramid models share: four stages, one head, timm's contract.

Inside, feature maps are (B, H, W, C), so that every channel map is one product; `forward_features` and the
intermediates are (B, C, H, W) views of them (channels_last). A model file adds the stem, the blocks, the norms, the
initialisation and the authors' key layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import get_device_dtype, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from sparse_mlp.mixing.linear import Mlp
from sparse_mlp.models._blocks import Blocks, choose_mlps, replace_modules
from sparse_mlp.models._checkpoint import StateDict, names_weights, no_published_weights
from sparse_mlp.moe import MoeMlp

__all__ = ["SPARSE", "Pyramid", "Stage", "create_pyramid", "init_normal", "norm_nchw", "to_nchw", "to_nhwc"]

SPARSE = {"sparse_blocks": "last-2"}
"""Of the sparse variants: 8 experts, one an item, in the last blocks of stages 3 and 4. So do the best ones of a study
of ConvNeXts and ViTs with experts (arXiv 2411.18322) and, beside others in stage 3, Swin-MoE."""

OF_EXPERTS = {
    "num_experts",
    "top_k",
    "renormalize",
    "capacity_ratio",
    "eval_capacity_ratio",
    "prioritized",
    "noise_std",
}
OF_EXPERTS |= {"balance_weight"}
STRIDES = (4, 8, 16, 32)
MIN_SIZE = 32


def to_nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def norm_nchw(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm over (B, C, H, W), as torch's batch and group norms are, to a map (B, H, W, C)."""
    return to_nhwc(norm(to_nchw(x)))


def init_normal(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> None:
    """Set a module of one of these kinds to truncated normal weights (std 0.02) and a zero bias."""
    if isinstance(module, kinds):
        trunc_normal_(cast(Tensor, module.weight), std=0.02)
        if module.bias is not None:
            nn.init.zeros_(cast(Tensor, module.bias))


class Stage(nn.Module):
    """A downsampling (none in the first stage) and the blocks that follow it. (B, H, W, C) in and out."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Pyramid(nn.Module):
    """Stem, stages at strides 4, 8, 16, 32, a last norm, mean over positions, linear head; any input size from 32 px
    on.

    `dims` are the widths of the stages, `norm_layer(dim)` makes the last norm and, with `output_norms`, one norm for
    the output of each stage, which only the intermediates see (the published dense-prediction backbones). `img_size`
    sets nothing, as no weight depends on the size; it is checked, so that code written for timm's other MLPs can pass
    it.

    `sparse_blocks`: the blocks whose channel MLPs are mixtures of experts, as `sparse_mlp.sparsify` takes them, or
    None. `num_experts` and the arguments after it are those of each `MoeMlp`.
    """

    norms_nchw = False
    """Whether the norms take (B, C, H, W) maps, as torch's batch and group norms do, and not (B, H, W, C)."""

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        norm_layer: Callable[[int], nn.Module],
        dims: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        output_norms: bool = False,
        sparse_blocks: Blocks | None = None,
        num_experts: int = 8,
        top_k: int = 1,
        renormalize: bool = True,
        capacity_ratio: float | None = None,
        eval_capacity_ratio: float | None = None,
        prioritized: bool = False,
        noise_std: float | None = None,
        balance_weight: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if img_size is not None and min((img_size,) if isinstance(img_size, int) else img_size) < MIN_SIZE:
            raise ValueError(f"img_size must be at least {MIN_SIZE}, got {img_size}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = dims[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, STRIDES, strict=True))
        ]
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        if sparse_blocks is not None:
            moe: dict[str, Any] = {"renormalize": renormalize, "noise_std": noise_std, "balance_weight": balance_weight}
            moe |= {"capacity_ratio": capacity_ratio, "eval_capacity_ratio": eval_capacity_ratio}
            moe |= {"prioritized": prioritized, "device": device, "dtype": dtype}
            for name, mlp in choose_mlps(self, sparse_blocks).items():
                assert isinstance(mlp, Mlp)
                sizes = mlp.fc1.in_features, mlp.fc1.out_features
                replace_modules(self, {name: MoeMlp(*sizes, num_experts, top_k, **moe)})
        self._norm_layer = norm_layer
        self.output_norms: nn.ModuleList | None = None
        if output_norms:
            self.add_output_norms()
        self.norm = norm_layer(dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self._set_pool(global_pool)
        self.head = nn.Linear(dims[-1], num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()

    def add_output_norms(self) -> None:
        """Give each stage's output, as the intermediates have it, a norm of its own; new where there was none."""
        if self.output_norms is None:
            self.output_norms = nn.ModuleList(self._norm_layer(int(info["num_chs"])) for info in self.feature_info)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights anew and reset all statistics, as needed after the meta device and `to_empty`."""
        for module in self.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self.apply_initialisation()

    def apply_initialisation(self) -> None:
        """Replace torch's initial values where the authors chose others."""

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, C, H, W), normed."""
        return norm(to_nchw(x)) if self.norms_nchw else to_nchw(norm(x))

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '' (none), got {global_pool!r}")
        self.global_pool = global_pool

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()  # norms and biases are one-dimensional, which timm's parameter groups leave out already

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stage = r"^stages\.(\d+)"
        blocks = [(stage, None)] if coarse else [(stage + r"\.downsample", (0,)), (stage + r"\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": [*blocks, (r"^norm", (99999,)), (r"^output_norms", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new linear head on the pooled features; 0 classes leave the features, pool '' unpooled."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_pool(global_pool)
        new = nn.Linear(self.num_features, num_classes, **get_device_dtype(self)) if num_classes > 0 else nn.Identity()
        self.head = new.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the outputs of stages, and the features unless `intermediates_only`.

        x (B, in_chans, H, W). `indices`: the last n stages (int), all (None) or those listed. `norm`: put the last norm
        on the last stage's output. With `output_norms` each map goes through the norm of its own stage instead.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                if self.output_norms is not None:
                    out = self._norm(self.output_norms[i], x)
                else:
                    out = self._norm(self.norm, x) if norm and i == last else to_nchw(x)
                intermediates.append(out if output_fmt == "NCHW" else to_nhwc(out))
        if intermediates_only:
            return intermediates
        return self._norm(self.norm, x) if i == last else to_nchw(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages in `indices` do not need; return the indices as a list."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shorter = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if self.output_norms is not None:
            kept = [norm if i in take_indices else nn.Identity() for i, norm in enumerate(self.output_norms)]
            self.output_norms = nn.ModuleList(kept[: max_index + 1])
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, ceil(H / 32), ceil(W / 32)), normed and unpooled."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self._norm(self.norm, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def create_pyramid(
    model_cls: type[Pyramid],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[Mapping[str, Any], nn.Module], StateDict],
    **kwargs: Any,
) -> nn.Module:
    """Build a registered variant; `filter_fn` brings published weights into our layout.

    `output_norms=True` belongs to `features_only=True` and is an error without it, as a classifier would never use the
    norms. ValueError for that, for arguments of experts without `sparse_blocks`, and for `pretrained` where there are
    no weights to fetch.
    """
    if kwargs.get("sparse_blocks") is None and (ignored := sorted(OF_EXPERTS & kwargs.keys())):
        raise ValueError(f"{variant}: {ignored[0]} would be ignored without sparse_blocks")
    if kwargs.get("output_norms", False) and not kwargs.get("features_only", False):
        raise ValueError(f"{variant}: output_norms=True needs features_only=True")
    if pretrained and not names_weights(variant, kwargs):
        raise no_published_weights(variant)
    feature_cfg = {"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "feature_cls": "getter"}
    if kwargs.get("feature_cls", "getter") != "getter":  # the others give the stages' own outputs
        feature_cfg["output_fmt"] = "NHWC"
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )
