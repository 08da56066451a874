"""Dense MLPs and experts: what an MLP of timm's is made of, experts that begin as one, one expert as an MLP again.

`read_mlp` knows timm's `Mlp`, `GluMlp`, `SwiGLU` and `ConvMlp`; another type is taught with `read_mlp.register`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.layers.mlp import ConvMlp
from torch import Tensor, nn

from sparse_mlp.moe.general_experts import GeneralExperts

if TYPE_CHECKING:
    from sparse_mlp.moe.layer import MoeMlp

Map = nn.Linear | nn.Conv2d
Weights = dict[str, Tensor]


class Parts(NamedTuple):
    """fc2(drop[0], norm(act(fc1(x)))), drop[1]: what an MLP is made of.

    fc1: the names of its first maps: one, or those of the two halves of a gated MLP in their order. fc2: the name of
    the last. gate: the half that goes through `act`. norm: None, or one that norms each item by itself.
    """

    fc1: tuple[str, ...]
    fc2: str
    act: nn.Module
    gate: str | None = None
    drop: tuple[float, float] = (0.0, 0.0)
    norm: nn.Module | None = None


class Origin(NamedTuple):
    """The MLP that experts began as, without its weights (on the meta device), and its parts."""

    mlp: nn.Module
    parts: Parts


@singledispatch
def read_mlp(mlp: nn.Module) -> Parts:
    """The parts of an MLP. ValueError, saying why, for one that experts cannot stand for."""
    raise ValueError(_REASONS.get(type(mlp).__name__, f"a {type(mlp).__name__} is no MLP that experts can stand for"))


_REASONS = {
    "GlobalResponseNormMlp": "its GlobalResponseNorm is taken over all positions of an image",
    "GatedMlp": "the gate of a GatedMlp mixes positions",
}


@read_mlp.register
def _(mlp: Mlp) -> Parts:
    _check_forward(mlp, Mlp)
    norm = _norm_of_items(mlp.norm)
    return Parts(("fc1",), "fc2", mlp.act, None, (mlp.drop1.p, mlp.drop2.p), norm)


@read_mlp.register
def _(mlp: GluMlp) -> Parts:
    _check_forward(mlp, GluMlp)
    gate = "last" if mlp.gate_last else "first"
    return Parts(("fc1",), "fc2", mlp.act, gate, (mlp.drop1.p, mlp.drop2.p), _norm_of_items(mlp.norm))


@read_mlp.register
def _(mlp: SwiGLU) -> Parts:
    _check_forward(mlp, SwiGLU)
    return Parts(("fc1_g", "fc1_x"), "fc2", mlp.act, "first", (mlp.drop1.p, mlp.drop2.p), _norm_of_items(mlp.norm))


@read_mlp.register
def _(mlp: ConvMlp) -> Parts:
    _check_forward(mlp, ConvMlp)
    if not isinstance(mlp.norm, nn.Identity):
        raise ValueError(f"its {type(mlp.norm).__name__} lies before the activation")
    return Parts(("fc1",), "fc2", mlp.act, None, (mlp.drop.p, 0.0))


def _check_forward(mlp: nn.Module, kind: type[nn.Module]) -> None:
    if type(mlp).forward is not kind.forward:
        raise ValueError(f"a {type(mlp).__name__} is a {kind.__name__} with a forward of its own")


def _norm_of_items(norm: nn.Module) -> nn.Module | None:
    if isinstance(norm, nn.Identity):
        return None
    name = type(norm).__name__
    if name not in ("LayerNorm", "LayerNormFp32", "RMSNorm", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32"):
        raise ValueError(f"its {name} does not norm each item by itself")
    return norm


def from_mlp(layer_type: type[MoeMlp], mlp: nn.Module, num_experts: int, top_k: int = 1, **arguments: Any) -> MoeMlp:
    """Experts that are copies of `mlp`, and a random router (Sparse Upcycling, Komatsuzaki et al. 2023, section 3).

    With `shared_experts` s the last map of every expert is divided by 1 + s, so that the sum stays the MLP's answer.
    `arguments`: further ones of `MoeMlp`. ValueError for an MLP that experts cannot stand for.
    """
    parts = read_mlp(mlp)
    first = _maps(mlp, parts.fc1)[0]
    last = _maps(mlp, (parts.fc2,))[0]
    dim, hidden_dim = first.weight.shape[1], last.weight.shape[1]
    if last.weight.shape[0] != dim:
        raise ValueError(f"it maps {dim} channels to {last.weight.shape[0]}")
    form: dict[str, Any] = {
        "act": lambda: copy.deepcopy(parts.act),
        "gate": parts.gate,
        "bias": (first.bias is not None, last.bias is not None),
        "drop": parts.drop,
        "norm_layer": None if parts.norm is None else lambda *_, **__: copy.deepcopy(parts.norm),
        "channels_first": isinstance(first, nn.Conv2d),
    }
    # without memory at first: random weights for every expert would take longer than all the rest
    layer = layer_type(
        dim, hidden_dim, num_experts, top_k, **form, **arguments, device="meta", dtype=first.weight.dtype
    )
    weights = expert_weights(mlp.state_dict(), layer, parts)
    router = torch.nn.init.trunc_normal_(torch.empty_like(layer.router.weight, device=first.weight.device), std=0.02)
    state = layer.state_dict() | weights | {"router.weight": router}
    if layer.router.bias is not None:
        state["router.bias"] = torch.zeros_like(layer.router.bias, device=first.weight.device)
    layer.load_state_dict(state, assign=True)
    for module in (layer.experts, layer.shared):
        if module is not None:
            module.requires_grad_(any(parameter.requires_grad for parameter in mlp.parameters()))
    layer.origin = Origin(without_weights(mlp), parts)
    return layer.train(mlp.training)


def expert_weights(state: Mapping[str, Tensor], layer: MoeMlp, parts: Parts, *, divide: bool = True) -> Weights:
    """The weights of `layer`'s experts, as its state dict names them, each expert being the MLP of this state dict.

    `divide`: the last map by 1 + s where there are s shared experts, see `from_mlp`.
    """

    def stacked(names: tuple[str, ...], experts: int, leaf: str, share: float = 1.0) -> Tensor:
        values = [state[f"{name}.{leaf}"] for name in names]
        value = torch.cat([v.flatten(1).t() for v in values], 1) if leaf == "weight" else torch.cat(values)
        return (value if share == 1.0 else value * share).expand(experts, *value.shape).clone()

    weights: Weights = {}
    share = 1 / (1 + layer.shared_experts) if divide else 1.0
    for prefix, experts in (("experts", layer.num_experts), ("shared", layer.shared_experts)):
        if not experts:
            continue
        for leaf in ("weight", "bias"):
            if f"{parts.fc1[0]}.{leaf}" in state:
                weights[f"{prefix}.fc1.{leaf}"] = stacked(parts.fc1, experts, leaf)
            if f"{parts.fc2}.{leaf}" in state:
                weights[f"{prefix}.fc2.{leaf}"] = stacked((parts.fc2,), experts, leaf, share)
        for inner in ("act", "norm"):
            own = {name: value for name, value in state.items() if name.startswith(f"{inner}.")}
            weights |= {f"{prefix}.{name}": value.clone() for name, value in own.items()}
    return weights


def to_mlp(layer: MoeMlp, expert: int = 0) -> nn.Module:
    """One expert of a layer as a dense MLP: of the type that the experts began as, or else timm's.

    ValueError for a layer with shared experts, of which no one expert is the whole.
    """
    if layer.shared is not None:
        raise ValueError("a layer with shared experts cannot be one MLP")
    origin = layer.origin or _origin_in_timm(layer)
    experts, parts, state = layer.experts, origin.parts, dict[str, Tensor]()
    for names, linear in ((parts.fc1, experts.fc1), ((parts.fc2,), experts.fc2)):
        widths = [_maps(origin.mlp, (name,))[0].weight.shape for name in names]
        for name, shape, weight in zip(names, widths, linear.weight[expert].t().chunk(len(names)), strict=True):
            state[f"{name}.weight"] = weight.reshape(shape).clone()
        if linear.bias is not None:
            for name, bias in zip(names, linear.bias[expert].chunk(len(names)), strict=True):
                state[f"{name}.bias"] = bias.clone()
    for inner in ("act", "norm"):
        module = getattr(experts, inner, None)
        state |= {f"{inner}.{n}": v.clone() for n, v in module.state_dict().items()} if module is not None else {}
    mlp = copy.deepcopy(origin.mlp)
    mlp.load_state_dict(state, assign=True)
    return mlp.train(layer.training)


def _origin_in_timm(layer: MoeMlp) -> Origin:
    experts = layer.experts
    _, dim, width = experts.fc1.weight.shape
    act = experts.act if isinstance(experts, GeneralExperts) else nn.GELU(approximate=experts.gelu)
    gate, norm = getattr(experts, "gate", None), getattr(experts, "norm", nn.Identity())
    form: dict[str, Any] = {
        "act_layer": lambda: copy.deepcopy(act),
        "norm_layer": None if isinstance(norm, nn.Identity) else lambda *_, **__: copy.deepcopy(norm),
        "bias": (experts.fc1.bias is not None, experts.fc2.bias is not None),
        "drop": (experts.drop1.p, experts.drop2.p) if isinstance(experts, GeneralExperts) else 0.0,
        "use_conv": layer.channels_first,
        "device": "meta",
    }
    mlp: nn.Module = Mlp(dim, width, **form) if gate is None else GluMlp(dim, width, gate_last=gate == "last", **form)
    return Origin(mlp, read_mlp(mlp))


def as_mlp_layer(layer_type: type[MoeMlp], num_experts: int, top_k: int = 1, **arguments: Any) -> Callable[..., MoeMlp]:
    """`MoeMlp` as timm's models build their MLPs: for every block, as `mlp_layer` has no block's number.

    timm.create_model("vit_tiny_patch16_224", mlp_layer=MoeMlp.as_mlp_layer(num_experts=8))
    """

    def build(
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        **kwargs: Any,
    ) -> MoeMlp:
        if out_features not in (None, in_features):
            raise ValueError(f"experts map {in_features} channels to as many, not to {out_features}")
        form: dict[str, Any] = {"act": act_layer, "norm_layer": norm_layer, "bias": bias, "drop": drop}
        return layer_type(
            in_features, hidden_features or in_features, num_experts, top_k, **form, **arguments, **kwargs
        )

    return build


def without_weights(module: nn.Module) -> nn.Module:
    """A copy on the meta device, made without a second copy of the weights on the way."""
    tensors = [*module.parameters(), *module.buffers()]
    empty = {id(t): nn.Parameter(t.to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
             for t in tensors}  # fmt: skip
    return copy.deepcopy(module, empty)


def _maps(mlp: nn.Module, names: tuple[str, ...]) -> list[Map]:
    """ValueError for a map that is neither linear nor a convolution of single positions."""
    maps = [mlp.get_submodule(name) for name in names]
    for one in maps:
        pointwise = isinstance(one, nn.Conv2d) and one.kernel_size == one.stride == (1, 1) and one.groups == 1
        if not (isinstance(one, nn.Linear) or pointwise):
            raise ValueError(f"its {type(one).__name__} is no linear map of single positions")
    return maps  # type: ignore[return-value]
