"""What the pyramid models share: four stages, one head, timm's contract, and the reading of published checkpoints.

Inside, feature maps are (B, H, W, C), so that every channel map is one product; `forward_features` and the
intermediates are (B, C, H, W) views of them (channels_last). A model file adds the stem, the blocks, the norms and the
authors' key layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

__all__ = [
    "CheckpointMismatch",
    "Pyramid",
    "Stage",
    "check_fit",
    "create_pyramid",
    "to_nchw",
    "to_nhwc",
    "unwrap_checkpoint",
]

StateDict = dict[str, Tensor]
STRIDES = (4, 8, 16, 32)
MIN_SIZE = 32


def to_nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


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
    """

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
        self.output_norms = nn.ModuleList(norm_layer(dim) for dim in dims) if output_norms else None
        self.norm = norm_layer(dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self._set_pool(global_pool)
        self.head = nn.Linear(dims[-1], num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()

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
                    out = self.output_norms[i](x)
                else:
                    out = self.norm(x) if norm and i == last else x
                intermediates.append(to_nchw(out) if output_fmt == "NCHW" else out)
        if intermediates_only:
            return intermediates
        return to_nchw(self.norm(x) if i == last else x), intermediates

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
        return to_nchw(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def read_checkpoint(self, checkpoint: Mapping[str, Any]) -> StateDict:
        """Return the state dict in `checkpoint`, the authors' or ours, in this model's layout."""
        raise NotImplementedError

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module`'s, and reads the authors' layout too, through timm's `checkpoint_path` as well."""
        return super().load_state_dict(_load(self, "", state_dict, strict), strict=strict, assign=assign)


# --- published checkpoints ---


class CheckpointMismatch(ValueError, RuntimeError):
    """A state dict that does not fit a model. The key lists are its attributes `matched`, `missing`, `unexpected`."""

    def __init__(self, what: str, matched: list[str], missing: list[str], unexpected: list[str]) -> None:
        self.matched, self.missing, self.unexpected = matched, missing, unexpected

        def show(keys: list[str], most: int = 20) -> str:
            more = f" and {len(keys) - most} more" if len(keys) > most else ""
            return f"{len(keys)} [{', '.join(keys[:most])}{more}]"

        super().__init__(
            f"the weights do not fit {what}: matched {show(matched, 5)}, missing {show(missing)}, "
            f"unexpected {show(unexpected)}"
        )


def check_fit(state_dict: Mapping[str, Tensor], model: nn.Module, what: str, prefix: str = "") -> None:
    """Raise `CheckpointMismatch` unless `state_dict` has exactly the keys and shapes of `model`.

    A key whose shape differs is listed as missing and as unexpected, with the shapes.
    """
    have = {prefix + key: value.shape for key, value in model.state_dict().items()}
    wrong = {key for key in have if key in state_dict and state_dict[key].shape != have[key]}
    matched = [key for key in have if key in state_dict and key not in wrong]
    missing = [key if key not in wrong else f"{key} {tuple(have[key])}" for key in have if key not in matched]
    unexpected = [
        key if key not in wrong else f"{key} {tuple(state_dict[key].shape)}" for key in state_dict if key not in matched
    ]
    if missing or unexpected:
        raise CheckpointMismatch(what, matched, missing, unexpected)


def unwrap_checkpoint(checkpoint: Mapping[str, Any], use_ema: bool = True) -> StateDict:
    """Return the bare state dict in a checkpoint file's contents.

    Takes off the wrappers `state_dict_ema` and `model_ema` (where present and `use_ema`, timm's rule), `state_dict` and
    `model`, and the key prefixes of DDP, torch.compile and of a detector's or segmenter's `backbone`, whose other parts
    are left out.
    """
    wrappers = (("state_dict_ema", "model_ema") if use_ema else ()) + ("state_dict", "model")
    while key := next((key for key in wrappers if isinstance(checkpoint.get(key), Mapping)), None):
        checkpoint = checkpoint[key]
    state_dict = dict(checkpoint)
    for prefix in ("module.", "_orig_mod.", "module.", "model.", "backbone."):
        inside = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if len(inside) == len(state_dict) or (inside and prefix == "backbone."):
            state_dict = inside
    not_tensors = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise ValueError(f"not a state dict: {', '.join(map(repr, not_tensors[:5]))} hold no tensors")
    return state_dict


def _load(body: Pyramid, prefix: str, state_dict: Mapping[str, Any], strict: bool) -> StateDict:
    """What `module` is to load: any layout that `body` reads, in its own layout under `prefix`, checked if `strict`."""
    ours = body.read_checkpoint(state_dict)
    if prefix:  # a feature extractor has no use for a classifier's last parts
        pruned = [name for name in ("norm", "head") if isinstance(getattr(body, name), nn.Identity)]
        ours = {key: value for key, value in ours.items() if key.split(".")[0] not in pruned}
    if strict:
        name = getattr(body, "pretrained_cfg", {}).get("architecture") or type(body).__name__
        check_fit(ours, body, name)
    return {prefix + key: value for key, value in ours.items()}


class PyramidFeatures(FeatureGetterNet):
    """timm's feature extractor over a pyramid; loads the same layouts, and dense-prediction backbones'."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        ours = _load(cast(Pyramid, self.model), "model.", state_dict, strict)
        return super().load_state_dict(ours, strict=strict, assign=assign)


def create_pyramid(model_cls: type[Pyramid], variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a registered variant.

    `output_norms=True` belongs to `features_only=True` and is an error without it, as a classifier would never use the
    norms.
    """
    if kwargs.get("output_norms", False) and not kwargs.get("features_only", False):
        raise ValueError(f"{variant}: output_norms=True needs features_only=True")
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=lambda state_dict, model: model.read_checkpoint(state_dict),
        feature_cfg={"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "feature_cls": PyramidFeatures},
        **kwargs,
    )
