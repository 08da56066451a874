"""Experts of other forms than two maps with a GELU between, against a loop over experts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.general_experts import GeneralExperts, make_experts

FORMS = {
    "relu": ({"act": "relu"}, F.relu),
    "silu without biases": ({"act": nn.SiLU, "bias": False}, F.silu),
    "glu": ({"act": "sigmoid", "gate": "last"}, lambda h: h.chunk(2, -1)[0] * h.chunk(2, -1)[1].sigmoid()),
    "swiglu": ({"act": "silu", "gate": "first"}, lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]),
    "norm": ({"norm_layer": nn.LayerNorm}, lambda h: F.layer_norm(F.gelu(h), h.shape[-1:])),
    "one bias": ({"bias": (True, False)}, F.gelu),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("counts", [[3, 0, 4], None], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rows_and_counts_in_rows_out(form: str, counts: list[int] | None) -> None:
    options, between = FORMS[form]
    torch.manual_seed(0)
    experts = make_experts(5, 6, 3, **options)
    assert isinstance(experts, GeneralExperts)
    rows = torch.randn(9 if counts is None else 7, 5, requires_grad=True)

    def loop(rows: Tensor) -> Tensor:
        parts = []
        for e, x in enumerate(rows.split([3, 3, 3] if counts is None else counts)):
            for linear, act in ((experts.fc1, between), (experts.fc2, lambda h: h)):
                x = x @ linear.weight[e]
                x = act(x if linear.bias is None else x + linear.bias[e])
            parts.append(x)
        return torch.cat(parts)

    weights = [rows, *experts.fc1.parameters(), *experts.fc2.parameters()]
    found = experts(rows, None if counts is None else torch.tensor(counts))
    torch.testing.assert_close(found, loop(rows), rtol=1e-4, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), weights) for y in (found, loop(rows))]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("backend")
def test_dropout_lies_after_the_activation_and_after_the_last_map() -> None:
    torch.manual_seed(0)
    layer, x = MoeMlp(8, 16, 4, drop=(0.0, 0.5), noise_std=0.0, balance_weight=0.0), torch.randn(50, 8)
    dropped = layer(x) == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert (layer.eval()(x) != 0).all()


@pytest.mark.usefixtures("backend")
def test_shared_experts_take_every_item_beside_the_chosen_ones() -> None:
    """y = sum of the shared experts + sum of gates times the routed ones (DeepSeekMoE, equation 9)."""
    torch.manual_seed(0)
    layer, x = MoeMlp(8, 16, 4, 2, shared_experts=2, noise_std=0.0), torch.randn(3, 7, 8)
    routed = copy.deepcopy(layer)
    routed.shared = None
    expected = routed(x)
    for e in range(2):
        fc1, fc2 = layer.shared.fc1, layer.shared.fc2
        expected = expected + F.gelu(x @ fc1.weight[e] + fc1.bias[e]) @ fc2.weight[e] + fc2.bias[e]
    torch.testing.assert_close(layer(x), expected)
    assert layer(torch.randn(0, 8)).shape == (0, 8)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("ratio", [None, 1.0])
def test_channels_first(ratio: float | None) -> None:
    torch.manual_seed(0)
    layer = MoeMlp(8, 16, 4, channels_first=True, eval_capacity_ratio=ratio).eval()
    last = MoeMlp(8, 16, 4, eval_capacity_ratio=ratio).eval()
    last.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 4, 6)
    torch.testing.assert_close(layer(x), last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="width 8 got an input"):
        layer(torch.randn(2, 4, 6, 8))


@pytest.mark.parametrize("form", ["swiglu", "relu", "norm"])
def test_compiles_exports_and_runs_under_autocast(form: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = MoeMlp(8, 16, 4, shared_experts=1, **FORMS[form][0]).eval()
    x = torch.randn(4, 9, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-6)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=dynamic).module()
    torch.testing.assert_close(exported(x[:3]), layer(x[:3]), rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer(x), rtol=0.05, atol=0.05)
    assert layer.double()(x.double()).dtype == torch.float64
