"""Experts for exported programs: the same answers, and no expert computes an item that is not its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.unrolled import unroll

MODES: list[dict[str, Any]] = [
    {},
    {"top_k": 2, "renormalize": True},
    {"act": "gelu_tanh"},
    {"eval_capacity_ratio": 2.0},
    {"act": "silu", "bias": (False, True), "norm_layer": nn.LayerNorm},
]
GATED: list[dict[str, Any]] = [
    {"act": "silu", "gate": "first"},
    {"act": "sigmoid", "gate": "last", "bias": False},
    {"shared_experts": 1},
]


class Net(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = MoeMlp(16, 32, 4, **kwargs)
        nn.init.normal_(self.moe.router.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.moe(x)


@pytest.mark.parametrize("kwargs", [*MODES, *GATED])
def test_the_answers_are_the_same(kwargs: dict[str, Any]) -> None:
    model = Net(**kwargs).eval()
    for batch in (1, 5):
        x = torch.randn(batch, 20, 16)
        torch.testing.assert_close(unroll(model)(x), model(x), atol=1e-5, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_expert_without_items() -> None:
    model = Net().eval()
    model.moe.router.weight.data.zero_()
    model.moe.router.weight.data[2] = 1.0
    x = torch.rand(2, 20, 16)
    torch.testing.assert_close(unroll(model)(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kwargs", MODES)
def test_an_exported_program_multiplies_each_item_with_its_own_experts(kwargs: dict[str, Any]) -> None:
    model = Net(**kwargs).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(unroll(model), (torch.randn(3, 20, 16),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 2, 7):
        x = torch.randn(size, 20, 16)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            found = program(x)
        torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-4)
        items, top_k = size * 20, kwargs.get("top_k", 1)
        rows = items * top_k * kwargs.get("eval_capacity_ratio", 1)
        assert flops.get_total_flops() // 2 == items * 16 * 4 + rows * 2 * 16 * 32


@pytest.mark.slow  # the exporter takes seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kwargs", [{}, {"top_k": 2}])
def test_an_onnx_graph_multiplies_each_item_with_its_own_experts(kwargs: dict[str, Any], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, file = Net(**kwargs).eval(), str(tmp_path / "model.onnx")
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.onnx.export(unroll(model), (torch.randn(3, 20, 16),), file, dynamic_shapes=shapes, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    x = torch.randn(5, 20, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), atol=1e-4, rtol=1e-4)
    macs = 0
    for event in json.loads(Path(session.end_profiling()).read_text()):
        args = event.get("args", {})
        if args.get("op_name") in ("MatMul", "Gemm") and "output_type_shape" in args:
            (inner,) = args["input_type_shape"][0].values()
            (out,) = args["output_type_shape"][0].values()
            macs += inner[-1] * torch.Size(out).numel()
    top_k = kwargs.get("top_k", 1)
    assert macs == 100 * 16 * 4 + 100 * top_k * 2 * 16 * 32
