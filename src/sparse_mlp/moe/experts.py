"""E stacked two-layer MLPs, and the two ways to run them: over items sorted by expert, or over slots.

The sorted form is one autograd function with its own backward. It works on one expert at a time, so that the hidden
activations of that expert are still in cache when the next operation reads them, writes each expert's weight gradient
into its place (indexing `weight[e]` under autograd fills a whole (E, D, H) gradient of zeros per expert), and keeps for
backward only the input and the hidden pre-activations.

Its matrix products go through `_matmul` below, which takes oneDNN's where it can: torch's own float32 products call
MKL, which on an AMD CPU of this decade reaches half of what oneDNN does (benchmarks/moe_layer.py prints both).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_mlp.moe import dispatch
from sparse_mlp.moe.eager import runs_eagerly_on_cpu
from sparse_mlp.moe.memory import gradient_like, release

GELU = {"gelu": "none", "gelu_tanh": "tanh"}


class ExpertLinear(nn.Module):
    """E linear maps: weight (E, in, out), bias (E, out). Parameters only; `Experts` does the arithmetic."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert from its own random start (equal experts would stay equal), as timm starts a Mixer's MLP."""
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)
        nn.init.normal_(self.bias, std=1e-6)

    def extra_repr(self) -> str:
        num_experts, in_features, out_features = self.weight.shape
        return f"num_experts={num_experts}, in_features={in_features}, out_features={out_features}"


def _use_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and runs_eagerly_on_cpu(x)


def _rows(n: int, onednn: bool) -> int:
    """Rows to work on for n items: oneDNN prepares each new shape for about half a millisecond, and an expert's load is
    another at every step. So n is rounded up to a multiple of 8, or to one of sixteen sizes an octave; MKL takes n."""
    step = 1 << max(3, n.bit_length() - 5) if onednn else 1
    return -(-n // step) * step


def _gather(x_ND: Tensor, items: Tensor, room: Tensor) -> Tensor:
    """The items' rows of x in `room`, then zeros to its end."""
    n = len(items)
    if n == len(room):
        return torch.index_select(x_ND, 0, items, out=room)
    torch.index_select(x_ND, 0, items, out=room[:n])
    room[n:].zero_()
    return room


def _matmul(a: Tensor, b: Tensor, onednn: bool, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias; any strides."""
    if onednn:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _matmul_gelu(a: Tensor, b: Tensor, onednn: bool, bias: Tensor, gelu: str) -> Tensor:
    """gelu(a @ b + bias), in one operation where oneDNN has it."""
    if onednn:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "gelu", [], gelu)
    return F.gelu(torch.addmm(bias, a, b), approximate=gelu)


def _weight_gradient(a: Tensor, b: Tensor, place: Tensor, room: Tensor, onednn: bool, to_system: bool) -> None:
    """a^T b into its place in the stack. oneDNN copies a^T if it is a view; into `room`, not into memory of its own."""
    a_t = room[: a.numel()].view(a.shape[::-1]).copy_(a.t()) if onednn else a.t()
    product = _matmul(a_t, b, onednn)
    place.copy_(product)
    release(product, to_system)


def _segments(items_M: Tensor, gates_M: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that has items, with those and their gates (n, 1)."""
    parts = zip(items_M.split(counts), gates_M.unsqueeze(1).split(counts), strict=True)
    return ((e, items, gates) for e, (items, gates) in enumerate(parts) if len(items))


def _by_expert(*stacks: Tensor) -> list[tuple[Tensor, ...]]:
    """Entry e of each stack, for all e: one operation a stack and not one an expert."""
    return list(zip(*(stack.unbind() for stack in stacks), strict=True))


def _run_sorted(
    x_ND: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gates_M: Tensor,
    items_M: Tensor,
    counts: list[int],
    gelu: str,
) -> Tensor:
    """sum_k gate_k expert_k(x), expert by expert, without a backward."""
    y_ND = torch.zeros_like(x_ND, memory_format=torch.contiguous_format)
    onednn = _use_onednn(x_ND)
    weights = _by_expert(w1, b1, w2, b2)
    room_D = x_ND.new_empty(_rows(max(counts), onednn), x_ND.shape[1])
    for e, items, gates in _segments(items_M, gates_M, counts):
        w1_e, b1_e, w2_e, b2_e = weights[e]
        x_e = _gather(x_ND, items, room_D[: _rows(len(items), onednn)])
        outputs = _matmul(_matmul_gelu(x_e, w1_e, onednn, b1_e, gelu), w2_e, onednn, b2_e)[: len(items)]
        y_ND.index_add_(0, items, outputs.mul_(gates))  # an item appears once per expert: no collisions
    return y_ND


class _SortedExperts(torch.autograd.Function):
    """`_run_sorted` with a backward, which keeps one (N, H) activation where autograd keeps two."""

    @staticmethod
    def forward(ctx, x_ND, w1, b1, w2, b2, gates_M, items_M, counts, gelu):  # type: ignore[no-untyped-def]
        y_ND = torch.zeros_like(x_ND, memory_format=torch.contiguous_format)
        onednn = _use_onednn(x_ND)
        weights = _by_expert(w1, b1, w2, b2)
        room_D, room_H = (x_ND.new_empty(_rows(max(counts), onednn), width) for width in w1.shape[1:])
        hidden_by_expert = []
        for e, items, gates in _segments(items_M, gates_M, counts):
            w1_e, b1_e, w2_e, b2_e = weights[e]
            rows = _rows(len(items), onednn)
            hidden = _matmul(_gather(x_ND, items, room_D[:rows]), w1_e, onednn, b1_e)
            act = torch.ops.aten.gelu.out(hidden, approximate=gelu, out=room_H[:rows])
            outputs = _matmul(act, w2_e, onednn, b2_e)[: len(items)]
            y_ND.index_add_(0, items, outputs.mul_(gates))
            hidden_by_expert.append(hidden)
        ctx.save_for_backward(x_ND, w1, w2, b2, gates_M, items_M, *hidden_by_expert)
        ctx.counts, ctx.gelu = counts, gelu
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        x_ND, w1, w2, b2, gates_M, items_M, *hidden_by_expert = ctx.saved_tensors
        need_x, need_w1, need_b1, need_w2, need_b2, need_gates = ctx.needs_input_grad[:6]
        dx = torch.zeros_like(x_ND, memory_format=torch.contiguous_format) if need_x else None
        dw1, new_w1 = gradient_like(w1) if need_w1 else (None, False)
        dw2, new_w2 = gradient_like(w2) if need_w2 else (None, False)
        db1 = w1.new_empty(w1.shape[0], w1.shape[2]) if need_b1 else None
        db2 = w2.new_empty(w2.shape[0], w2.shape[2]) if need_b2 else None
        dgates = torch.empty_like(gates_M) if need_gates else None
        for e in (e for e, n in enumerate(ctx.counts) if not n):
            for grad in (dw1, db1, dw2, db2):
                if grad is not None:
                    grad[e].zero_()
        onednn = _use_onednn(grad_ND)
        weights = _by_expert(w1, w2, b2)
        grads = [None if grad is None else grad.unbind() for grad in (dw1, db1, dw2, db2)]
        largest = max(map(len, hidden_by_expert), default=0)
        room_x, room_dy, room_H = (x_ND.new_empty(largest, width) for width in (w1.shape[1], *w1.shape[1:]))
        room_t = x_ND.new_empty(largest * max(w1.shape[1:]) if onednn else 0)
        # As the weights' gradients fill, expert by expert, the activations go: the peak is not the sum of both.
        memory_is_new = new_w1 or new_w2
        graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        dgates_by_expert = None if dgates is None else dgates.split(ctx.counts)
        segments = _segments(items_M, gates_M, ctx.counts)
        for (e, items, gates), hidden in zip(segments, hidden_by_expert, strict=True):
            w1_e, w2_e, b2_e = weights[e]
            dw1_e, db1_e, dw2_e, db2_e = (None if grad is None else grad[e] for grad in grads)
            n, rows = len(items), len(hidden)
            # rows past the items are zero here, and so add nothing to any gradient below
            dy, x_e = _gather(grad_ND, items, room_dy[:rows]), _gather(x_ND, items, room_x[:rows])
            act = torch.ops.aten.gelu.out(hidden, approximate=ctx.gelu, out=room_H[:rows])
            dact = _matmul(dy, w2_e.t(), onednn)
            dy_n, dact_n = dy[:n], dact[:n]
            if dgates_by_expert is not None:
                # dy . (act w2 + b2), without the outputs: what dact = dy w2^T is at hand for
                torch.linalg.vecdot(dact_n, act[:n], out=dgates_by_expert[e]).add_(torch.mv(dy_n, b2_e))
            dy_n *= gates
            if dw2_e is not None:
                _weight_gradient(act, dy, dw2_e, room_t, onednn, memory_is_new)
            if db2_e is not None:
                torch.sum(dy, 0, out=db2_e)
            if dx is None and dw1 is None and db1 is None:
                continue
            dact_n *= gates
            dhidden = torch.ops.aten.gelu_backward.grad_input(dact, hidden, approximate=ctx.gelu, grad_input=dact)
            if dw1_e is not None:
                _weight_gradient(x_e, dhidden, dw1_e, room_t, onednn, memory_is_new)
            if db1_e is not None:
                torch.sum(dhidden, 0, out=db1_e)
            if dx is not None:
                dx.index_add_(0, items, _matmul(dhidden, w1_e.t(), onednn)[:n])
            release(dact, memory_is_new)
            if not graph_is_kept:
                release(hidden, memory_is_new)
        return dx, dw1, db1, dw2, db2, dgates, None, None, None


class Experts(nn.Module):
    """E two-layer MLPs with one GELU, stacked: fc1 (E, D, H), fc2 (E, H, D)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        act: str = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gelu = GELU[act]
        self.fc1 = ExpertLinear(num_experts, dim, hidden_dim, device, dtype)
        self.fc2 = ExpertLinear(num_experts, hidden_dim, dim, device, dtype)

    def _operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """Input and weights in the type the products run in: autocast's where it is on, as for nn.Linear."""
        operands = (x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            return tuple(operand.to(dtype) for operand in operands)
        return operands

    def forward_sorted(self, x_ND: Tensor, gates_NK: Tensor, order_M: Tensor, counts_E: Tensor) -> Tensor:
        """Dropless, over items in the order of `dispatch.sort_by_expert`; reads the counts: one wait for the device."""
        x_ND, w1, b1, w2, b2 = self._operands(x_ND)
        gates_M, items_M = gates_NK.reshape(-1)[order_M].to(x_ND.dtype), order_M // gates_NK.shape[1]
        differentiable = any(t.requires_grad for t in (x_ND, w1, b1, w2, b2, gates_M))
        run = _SortedExperts.apply if torch.is_grad_enabled() and differentiable else _run_sorted
        return run(x_ND, w1, b1, w2, b2, gates_M, items_M, counts_E.tolist(), self.gelu)

    def forward_slots(
        self, x_ND: Tensor, gates_NK: Tensor, slots: dispatch.Slots, expert_of_block: Tensor | None = None
    ) -> Tensor:
        """Over slots, by batched products: one block of slots per expert, or blocks with the experts given."""
        x_ND, w1, b1, w2, b2 = self._operands(x_ND)
        if expert_of_block is not None:
            w1, b1, w2, b2 = (weight.index_select(0, expert_of_block) for weight in (w1, b1, w2, b2))
        slots_BSD = dispatch.fill(x_ND, slots)
        hidden_BSH = F.gelu(torch.baddbmm(b1.unsqueeze(1), slots_BSD, w1), approximate=self.gelu)
        out_BSD = torch.baddbmm(b2.unsqueeze(1), hidden_BSH, w2)
        return dispatch.combine(out_BSD, slots, gates_NK)
