"""E stacked two-layer MLPs of any of timm's forms: other activations, gates, dropout, a norm, no biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import get_act_layer
from torch import Tensor, nn

from sparse_mlp.moe.experts import Blocks, ExpertLinear, Experts, product_type
from sparse_mlp.moe.kernels import accelerated

Act = str | Callable[[], nn.Module]
GATES = (None, "first", "last")


@accelerated
def expert_linear(rows_MD: Tensor, counts_E: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x w + b of each row with the weight and bias of its expert: (M, in) -> (M, out); rows as `apply_experts`'."""
    if counts_E is None:
        y_ESD = torch.bmm(rows_MD.unflatten(0, (weight.shape[0], -1)), weight)
        return (y_ESD if bias is None else y_ESD + bias.unsqueeze(1)).flatten(0, 1)
    blocks = Blocks.of(counts_E, rows_MD.shape[0])
    y_BSD = torch.bmm(blocks.take(rows_MD), weight[blocks.expert_B])
    return blocks.give_back(y_BSD if bias is None else y_BSD + bias[blocks.expert_B].unsqueeze(1))


class GeneralExperts(nn.Module):
    """fc2(norm(dropout(act(fc1(x))))) with a dropout after it, as timm's `Mlp`, and gated as its `GluMlp`.

    fc1 (E, D, H), or (E, D, 2 H) with a gate, whose half `gate` ("first" or "last") goes through the activation and
    multiplies the other (GLU, Dauphin et al. 2017; SwiGLU, Shazeer 2020, has the first half gated by SiLU); fc2
    (E, H, D). The weights of norm and activation, if they have some, are one for all experts.

    Input: rows (M, D) in the order of experts, and how many each has, (E,), or None for as many each. Output: (M, D).
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        act: nn.Module,
        *,
        gate: str | None,
        bias: tuple[bool, bool],
        drop: tuple[float, float],
        norm: nn.Module | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        width = hidden_dim if gate is None else 2 * hidden_dim
        self.fc1 = ExpertLinear(num_experts, dim, width, device, dtype, bias[0])
        self.act = act
        self.drop1 = nn.Dropout(drop[0])
        self.norm = nn.Identity() if norm is None else norm
        self.fc2 = ExpertLinear(num_experts, hidden_dim, dim, device, dtype, bias[1])
        self.drop2 = nn.Dropout(drop[1])

    def extra_repr(self) -> str:
        return "" if self.gate is None else f"gate={self.gate}"

    def forward(self, rows_MD: Tensor, counts_E: Tensor | None = None) -> Tensor:
        hidden_MH = expert_linear(rows_MD.to(product_type(rows_MD)), counts_E, *self.fc1(rows_MD))
        if self.gate is None:
            hidden_MH = self.act(hidden_MH)
        else:
            first, last = hidden_MH.chunk(2, -1)
            hidden_MH = first * self.act(last) if self.gate == "last" else self.act(first) * last
        hidden_MH = self.norm(self.drop1(hidden_MH))
        return self.drop2(expert_linear(hidden_MH.to(product_type(rows_MD)), counts_E, *self.fc2(rows_MD)))


def make_experts(
    dim: int,
    hidden_dim: int,
    num_experts: int,
    act: Act = "gelu",
    *,
    gate: str | None = None,
    bias: bool | tuple[bool, bool] = True,
    drop: float | tuple[float, float] = 0.0,
    norm_layer: Callable[..., nn.Module] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Experts | GeneralExperts:
    """`Experts`, which have fast kernels, where they are of that form, and `GeneralExperts` where not.

    `act`: a name of timm's or what makes the module. `bias`, `drop`: one for both layers, or a pair. ValueError for an
    activation that timm does not know.
    """
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    module = make_activation(act)
    biases = (bias, bias) if isinstance(bias, bool) else (bias[0], bias[1])
    drops = (drop, drop) if isinstance(drop, int | float) else (drop[0], drop[1])
    gelu = _gelu(module)
    if gelu is not None and gate is None and biases == (True, True) and drops == (0.0, 0.0) and norm_layer is None:
        return Experts(dim, hidden_dim, num_experts, gelu, **dd)
    norm = None if norm_layer is None else norm_layer(hidden_dim, **dd)
    return GeneralExperts(dim, hidden_dim, num_experts, module, gate=gate, bias=biases, drop=drops, norm=norm, **dd)


def make_activation(act: Act) -> nn.Module:
    """ValueError, naming some of those there are, for a name that timm does not know."""
    if callable(act):
        return act()
    try:
        found = get_act_layer(act)
    except KeyError:
        found = None
    if found is None:
        raise ValueError(f"act must be a name of timm's (gelu, gelu_tanh, relu, silu, ...) or a class; got {act!r}")
    return found()


def _gelu(act: nn.Module) -> str | None:
    """The name of the GELU that an activation is, None for any other."""
    kind, approximate = type(act).__name__, getattr(act, "approximate", "none")  # timm has classes of its own
    if kind == "GELUTanh" or (kind == "GELU" and approximate == "tanh"):
        return "gelu_tanh"
    return "gelu" if kind == "GELU" else None
