"""What holds on any device and must not cost one: nothing waits for it, no weights are copied, grouped products are
the plain form. On a CPU the C kernels are off, so that what runs is what runs on a GPU; `-m cuda` are those on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tests.moe.conftest import use_backend
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.experts import apply_experts
from sparse_mlp.moe.kernels import grouped

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]
CAPACITY: dict[str, Any] = {"capacity_ratio": 1.0, "eval_capacity_ratio": 1.0}
FORMS: list[dict[str, Any]] = [
    {},
    CAPACITY,
    {**CAPACITY, "prioritized": True, "capacity_group": "batch"},
    {"act": "silu", "gate": "first", "shared_experts": 1},
    {"bias_rate": 0.001, "balance_weight": 0.0, "z_loss_weight": 0.001},
    {"scores": "sigmoid", "renormalize": True, **CAPACITY},
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def no_kernels_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend("grouped", monkeypatch)


READS = """
_local_scalar_dense item is_nonzero equal allclose nonzero nonzero_numpy argwhere bincount masked_select unique_dim
_unique _unique2 unique_consecutive repeat_interleave
"""


class NoOperatorReads(TorchDispatchMode):
    """Fails on operators that wait for a device: for a value, or for a shape that depends on one."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        assert name.removeprefix("aten::") not in READS.split(), name
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), f"{name} by a mask"
        return function(*args, **(kwargs or {}))


METHODS = ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@contextmanager
def no_method_reads() -> Iterator[None]:
    """The same of methods, also inside operators of our own and of autograd functions, which no mode sees."""
    with ExitStack() as stack:
        for name in METHODS:
            refuse = mock.Mock(side_effect=AssertionError(name))
            stack.enter_context(mock.patch.object(Tensor, name, refuse))
        yield


@contextmanager
def nothing_waits(device: str) -> Iterator[None]:
    if device == "cpu":
        with NoOperatorReads(), no_method_reads():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make(dim: int = 16, hidden: int = 32, experts: int = 4, top_k: int = 2, **kwargs: Any) -> MoeMlp:
    torch.manual_seed(0)
    layer = MoeMlp(dim, hidden, experts, top_k, **kwargs)
    nn.init.normal_(layer.router.weight)
    return layer


@pytest.mark.filterwarnings("ignore:capacity")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kwargs", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["grouped", "plain"])
def test_nothing_waits_for_the_device(
    device: str, kind: str, kwargs: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(kind, monkeypatch)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    layer = make(**kwargs).to(device, dtype)
    x = torch.randn(2, 10, 16, device=device, dtype=dtype, requires_grad=True)
    cast = torch.autocast(device, torch.bfloat16) if precision == "autocast" else nullcontext()

    def run() -> None:
        for training in (True, False):
            layer.train(training)
            with cast:
                y = layer(x)
            y.sum().backward()
            with torch.no_grad(), cast:
                layer(x)

    run()
    with nothing_waits(device):
        run()


READERS = {
    "item": lambda x: x.item(),
    "tolist": lambda x: x.tolist(),
    "bool": bool,
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "to the host": lambda x: x.cpu(),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_read_is_seen(device: str, read: Any) -> None:
    x = torch.ones(1, device=device)
    with pytest.raises((AssertionError, RuntimeError)), nothing_waits(device):
        read(x)


def test_the_guard_is_off_where_the_c_kernels_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layer with the C kernels does read its counts: what is tested above is another path."""
    monkeypatch.undo()
    use_backend("C", monkeypatch)
    layer = make(128, 256).eval()
    with pytest.raises(AssertionError, match="tolist"), nothing_waits("cpu"):
        layer(torch.randn(4000, 128))


def weights(experts: int, dim: int, hidden: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes = (experts, dim, hidden), (experts, hidden), (experts, hidden, dim), (experts, dim)
    scales = (dim**-0.5, 1.0, hidden**-0.5, 1.0)
    return [(s * torch.randn(*shape)).to(device, dtype) for shape, s in zip(shapes, scales, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "hidden"), [(64, 32), (49, 98), (196, 49)])
@pytest.mark.parametrize("counts", [[10, 10, 10, 10], [0, 17, 0, 23], [0, 0, 40, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_grouped_products_are_a_loop(
    device: str, counts: list[int], dim: int, hidden: int, dtype: torch.dtype, transposed: bool
) -> None:
    """Against a product an expert in float64; experts without a row get gradients of zero, not what memory held."""
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), dim).to(device, dtype)
    leaves = [rows, *weights(4, dim, hidden, dtype, device)]
    if transposed:  # as nn.Linear lays them out
        leaves[1], leaves[3] = (t.mT.contiguous().mT for t in (leaves[1], leaves[3]))
    ours = [leaf.clone(memory_format=torch.preserve_format).requires_grad_() for leaf in leaves]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    number = torch.tensor(counts, device=device)
    if device == "cpu":
        y = grouped.apply_experts(ours[0], number, *ours[1:], "none")
    else:
        y = apply_experts(ours[0], number, *ours[1:], "none")
    parts = zip(exact[0].split(counts), *exact[1:], strict=True)
    z = torch.cat([F.gelu(x @ w1 + b1) @ w2 + b2 for x, w1, b1, w2, b2 in parts])
    assert y.dtype == dtype
    gradient = torch.randn_like(z)
    y.backward(gradient.to(dtype)), z.backward(gradient)
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for a, b in zip([y.detach(), *(t.grad for t in ours)], [z.detach(), *(t.grad for t in exact)], strict=True):
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * scale)
    assert ours[1].grad is not None
    for expert, count in enumerate(counts):
        assert count or (ours[1].grad[expert] == 0).all()


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:capacity")
@pytest.mark.parametrize("gate", [None, "first"])
def test_a_capacity_is_batched_products_and_dropless_grouped_ones(gate: str | None) -> None:
    found = {}
    for kwargs in ({}, CAPACITY):
        with Names() as run:
            make(gate=gate, **kwargs)(torch.randn(2, 10, 16)).sum().backward()
        found[bool(kwargs)] = set(run.names)
    batched, products = {"aten::bmm", "aten::baddbmm"}, {"sparse_mlp::grouped_product", "sparse_mlp::grouped_outer"}
    assert products <= found[False] and not batched & found[False]
    assert batched & found[True] and not products & found[True]


@pytest.mark.parametrize(
    ("dtype", "major", "expected"),
    [
        (torch.bfloat16, 9, True),
        (torch.bfloat16, 10, True),
        (torch.bfloat16, 8, False),
        (torch.bfloat16, 12, False),
        (torch.float32, 9, False),
        (torch.float16, 9, False),
    ],
    ids=str,
)
def test_grouped_products_only_where_a_gpu_has_a_kernel(dtype: torch.dtype, major: int, expected: bool) -> None:
    """Elsewhere torch's fallback copies the counts to the host (aten/src/ATen/native/cuda/GroupedBlas.cpp)."""
    assert grouped.has_kernel(dtype, major) == expected
    assert not grouped.has_kernel(dtype, major, nvidia=False)


@pytest.mark.filterwarnings("ignore:capacity", "ignore:Your compiler for AOTAutograd")
@pytest.mark.parametrize("kwargs", [{}, CAPACITY], ids=["dropless", "capacity"])
@pytest.mark.parametrize("gate", [None, "first"])
def test_compiled_without_a_copy_of_the_experts_weights(kwargs: dict[str, Any], gate: str | None) -> None:
    """No result in the graphs of forward and backward is as large as a weight of all experts, but for their gradients
    and views. The definition's, which copies weights, are."""
    layer, x = make(64, 128, 16, 1, gate=gate, **kwargs), torch.randn(2, 30, 64, requires_grad=True)
    smallest = min(module.weight.numel() for module in (layer.experts.fc1, layer.experts.fc2))

    def largest_results(layer: MoeMlp) -> list[str]:
        graphs = list[torch.fx.GraphModule]()

        def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
        compiled(x).sum().backward()
        assert len(graphs) == 2
        return [
            node.target._schema.name
            for graph in graphs
            for node in graph.graph.nodes
            if node.op == "call_function" and isinstance(value := node.meta.get("val"), Tensor)
            if value.numel() >= smallest
        ]

    views = {"aten::transpose", "aten::permute", "aten::view", "aten::expand"}
    gradients = [name for name in largest_results(layer) if name not in views]
    assert gradients in (["sparse_mlp::grouped_outer"] * 2, ["aten::bmm"] * 2)
    if not kwargs:
        with pytest.MonkeyPatch.context() as patch:
            use_backend("plain", patch)
            assert "aten::index" in largest_results(layer)


@pytest.mark.filterwarnings("ignore:capacity")
@pytest.mark.parametrize("kwargs", FORMS, ids=str)
def test_a_gpu_gives_what_the_cpu_gives(device: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, output and gradients; on a CPU, of this path against the definition."""
    layer = make(49, 70, noise_std=0.0, **kwargs)
    other = copy.deepcopy(layer).to(device)
    x, found = torch.randn(3, 20, 49), []
    for each, at in ((layer, "cpu"), (other, device)):
        use_backend("plain" if each is layer else "grouped", monkeypatch)
        leaf = x.to(at, copy=True).requires_grad_()
        y = each(leaf)
        y.square().sum().backward()
        found.append([y.detach().cpu(), leaf.grad.cpu(), *(p.grad.cpu() for p in each.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max())))


@pytest.mark.cuda
@needs_gpu
@pytest.mark.filterwarnings("ignore:capacity")
@pytest.mark.parametrize("kwargs", [{}, CAPACITY], ids=["dropless", "capacity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_captured_in_a_cuda_graph_and_routes_anew(dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    layer = make(64, 128, noise_std=0.0, **kwargs).to("cuda", dtype)
    x = torch.randn(2, 30, 64, device="cuda", dtype=dtype, requires_grad=True)

    def step() -> Tensor:
        layer.zero_grad(set_to_none=True)
        y = layer(x)
        y.float().square().sum().backward()
        return y.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    expected = step()
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(captured, expected, rtol=tolerance, atol=tolerance)
    for a, parameter in zip(gradients, layer.parameters(), strict=True):
        torch.testing.assert_close(a, parameter.grad, rtol=tolerance, atol=tolerance * float(a.abs().max()))


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_a_gpu(mode: str) -> None:
    layer = make(64, 128, noise_std=0.0).to("cuda", torch.bfloat16)
    x = torch.randn(2, 30, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(3):
        y = compiled(x)
        y.sum().backward()
    torch.testing.assert_close(y, layer(x), rtol=5e-2, atol=5e-2)
