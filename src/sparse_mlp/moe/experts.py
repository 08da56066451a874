"""E stacked two-layer MLPs, and the two ways to run them: over items sorted by expert, or over slots.

The sorted form is one autograd function with its own backward. It works on one expert at a time, so that the hidden
activations of that expert are still in cache when the next operation reads them, and writes what it makes into its
place: an expert's weight gradient into the stack (indexing `weight[e]` under autograd fills a whole (E, D, H) gradient
of zeros per expert), its outputs among those of the sorted assignments, which are put in the items' order at the end
(adding them up item by item is done by one thread).

On a CPU its float32 products go to oneDNN or to torch's own MKL, whichever is the faster one on the processor, and what
lies between them to `compiled`; where an expert has few rows, as of one image or of many experts, the products too.
"""

from __future__ import annotations

from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_mlp.moe import compiled, dispatch, rows
from sparse_mlp.moe.eager import onednn_is_faster, runs_eagerly_on_cpu
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
    return x.dtype == torch.float32 and onednn_is_faster() and runs_eagerly_on_cpu(x)


def _rows(n: int, onednn: bool) -> int:
    """Rows to work on for n items: oneDNN prepares each new shape for about half a millisecond, and an expert's load is
    another at every step. So n is rounded up to a multiple of 8, or to one of sixteen sizes an octave; MKL takes n."""
    step = 1 << max(3, n.bit_length() - 5) if onednn else 1
    return -(-n // step) * step


def _row_ops(*tensors: Tensor) -> ModuleType:
    """`compiled` if it serves them all, else `rows`: the same functions."""
    return compiled if compiled.serves(*tensors) else rows


class _Rows(NamedTuple):
    """The rows the experts work on, P in all, one expert's after another's: the sorted assignments, and after each
    expert's own as many more as `_rows` says, whose results nobody reads.

    of_expert: how many each expert has. item_P: the item of each (past an expert's own its last one, so that an item
    that is not finite spoils no other expert). row_NK: the row of each choice.
    """

    of_expert: list[int]
    item_P: Tensor
    row_NK: Tensor


def _lay_out(order_M: Tensor, counts: list[int], top_k: int, onednn: bool) -> _Rows:
    of_expert = [_rows(n, onednn) for n in counts]
    row_M = torch.empty_like(order_M)
    if of_expert == counts:
        row_M[order_M] = torch.arange(len(order_M), device=order_M.device)
        return _Rows(of_expert, order_M if top_k == 1 else order_M // top_k, row_M.view(-1, top_k))
    sorted_rows, places = [], []  # of the sorted assignments; and for each row, which of these it holds
    first_rows, first_places = accumulate(of_expert, initial=0), accumulate(counts, initial=0)
    for n, size, row, place in zip(counts, of_expert, first_rows, first_places, strict=False):
        sorted_rows.append(torch.arange(row, row + n, device=order_M.device))
        places.append(torch.arange(place, place + size, device=order_M.device).clamp_(max=place + n - 1))
    row_M[order_M] = torch.cat(sorted_rows)
    return _Rows(of_expert, order_M[torch.cat(places)] // top_k, row_M.view(-1, top_k))


def _by_expert(*stacks: Tensor) -> list[tuple[Tensor, ...]]:
    """What each stack holds for each expert: one operation a stack, not one an expert."""
    return [stack.unbind() for stack in stacks]


def _gather(x_ND: Tensor, item_P: Tensor) -> Tensor:
    """The rows that the experts work on: (P, D)."""
    return _row_ops(x_ND).gather(x_ND, item_P, x_ND.new_empty(len(item_P), x_ND.shape[1]))


def _matmul(a: Tensor, b: Tensor, onednn: bool, out: Tensor | None = None) -> Tensor:
    """a @ b; any strides. In `out` where the library can: fresh memory costs as much as a tenth of a product."""
    if onednn:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b, out=out)


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, onednn: bool) -> None:
    product = _matmul(a, b, onednn, out)
    if onednn:
        out.copy_(product)


def _weight_gradient(a: Tensor, b: Tensor, place: Tensor, room: Tensor, onednn: bool, to_system: bool) -> None:
    """a^T b into its place in the stack. oneDNN copies a^T if it is a view; into `room`, not into memory of its own."""
    if not onednn:
        torch.mm(a.t(), b, out=place)
        return
    a_t = room[: a.numel()].view(a.shape[::-1]).copy_(a.t())
    product = _matmul(a_t, b, onednn)
    place.copy_(product)
    release(product, to_system)


def _forward(
    x_PD: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, of_expert: list[int], gelu: str, onednn: bool
) -> tuple[Tensor, list[Tensor]]:
    """GELU(x w1 + b1) w2 of each row: (P, D), and for each expert that has rows x w1: (n, H)."""
    ops = _row_ops(x_PD, w1, b1, w2)
    room_act = x_PD.new_empty(max(of_expert), w1.shape[2])
    out_PD = torch.empty_like(x_PD)
    hiddens = []
    parts = zip(x_PD.split(of_expert), out_PD.split(of_expert), *_by_expert(w1, b1, w2), strict=True)
    for x, out, w1_e, b1_e, w2_e in parts:
        if n := len(x):
            hidden = _matmul(x, w1_e, onednn)
            act = ops.gelu(hidden, b1_e, gelu, room_act[:n])
            _matmul_into(out, act, w2_e, onednn)
            hiddens.append(hidden)
    return out_PD, hiddens


def _has_few_rows(counts: list[int], *tensors: Tensor) -> bool:
    """Whether `compiled` is to make the products too: by how many rows an expert has, on average over the rows."""
    return sum(n * n for n in counts) <= compiled.FEW * sum(counts) and compiled.serves(*tensors)


def _run_sorted(
    x_ND: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gates_NK: Tensor,
    experts_NK: Tensor,
    order_M: Tensor,
    counts: list[int],
    gelu: str,
) -> Tensor:
    """sum_k gate_k expert_k(x), expert by expert, without a backward."""
    few = _has_few_rows(counts, x_ND, w1, b1, w2, b2)
    onednn = not few and _use_onednn(x_ND)
    layout = _lay_out(order_M, counts, gates_NK.shape[1], onednn)
    if few:
        out_PD, _ = compiled.few_rows(x_ND, w1, b1, w2, layout.item_P, counts, gelu, keep=False)
        out_PD = out_PD[:, : x_ND.shape[1]]
    else:
        out_PD, _ = _forward(_gather(x_ND, layout.item_P), w1, b1, w2, layout.of_expert, gelu, onednn)
    return _row_ops(out_PD, gates_NK, b2).combine_gated(out_PD, layout.row_NK, gates_NK, experts_NK, b2)


class _SortedExperts(torch.autograd.Function):
    """`_run_sorted` with a backward. Keeps one (P, H) activation, where autograd would keep two: GELU again costs less
    than to fetch it from memory."""

    @staticmethod
    def forward(ctx, x_ND, w1, b1, w2, b2, gates_NK, experts_NK, order_M, counts, gelu):  # type: ignore[no-untyped-def]
        onednn = _use_onednn(x_ND)
        layout = _lay_out(order_M, counts, gates_NK.shape[1], onednn)
        x_PD = _gather(x_ND, layout.item_P)
        out_PD, hiddens = _forward(x_PD, w1, b1, w2, layout.of_expert, gelu, onednn)
        ctx.save_for_backward(x_PD, w1, b1, w2, b2, gates_NK, layout.item_P, layout.row_NK, out_PD, *hiddens)
        ctx.of_expert, ctx.gelu = layout.of_expert, gelu
        return _row_ops(out_PD, gates_NK, b2).combine_gated(out_PD, layout.row_NK, gates_NK, experts_NK, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        x_PD, w1, b1, w2, b2, gates_NK, item_P, row_NK, out_PD, *hiddens = ctx.saved_tensors
        need_x, *need_weights, need_gates = ctx.needs_input_grad[:6]
        graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        onednn, ops = _use_onednn(grad_ND), _row_ops(grad_ND, w1, b1, w2, b2)
        grads, memory_is_new = _weight_gradients(w1, w2, need_weights, ctx.of_expert)
        # rows past an expert's own have the gate zero here, and so add nothing to any gradient below
        gates_P = gates_NK.new_zeros(len(item_P)).index_put_((row_NK,), gates_NK)
        dgates_P = torch.empty_like(gates_P)
        # an expert's outputs are read for the last time before its part of the input's gradient is written
        dx_PD = torch.empty_like(out_PD) if graph_is_kept else out_PD
        parts = zip(
            *(of_all.split(ctx.of_expert) for of_all in (item_P, x_PD, gates_P, dgates_P, out_PD, dx_PD)),
            *_by_expert(w1.transpose(1, 2), b1, w2.transpose(1, 2), b2),
            *([None] * len(ctx.of_expert) if grad is None else grad.unbind() for grad in grads),
            strict=True,
        )
        largest = max(ctx.of_expert)
        room_dy, room_act = grad_ND.new_empty(largest, w1.shape[1]), grad_ND.new_empty(largest, w1.shape[2])
        room_dact = grad_ND.new_empty(0 if onednn else largest, w1.shape[2])
        room_t = grad_ND.new_empty(largest * max(w1.shape[1:]) if onednn else 0)
        for part, hidden in zip((part for part in parts if len(part[0])), hiddens, strict=True):
            items, x, gates, dgates, out, dx, w1_t, b1_e, w2_t, b2_e, dw1_e, db1_e, dw2_e, db2_e = part
            n = len(items)
            dy = ops.gather_gated(grad_ND, items, gates, out, b2_e, room_dy[:n], dgates, db2_e)
            act, dhidden = room_act[:n], _matmul(dy, w2_t, onednn, out=room_dact[:n])
            ops.gelu_backward(hidden, b1_e, ctx.gelu, dhidden, act, db1_e)
            if dw2_e is not None:
                _weight_gradient(act, dy, dw2_e, room_t, onednn, memory_is_new)
            if dw1_e is not None:
                _weight_gradient(x, dhidden, dw1_e, room_t, onednn, memory_is_new)
            if need_x:
                _matmul_into(dx, dhidden, w1_t, onednn)
            if onednn:
                release(dhidden, memory_is_new)
            if not graph_is_kept:  # as the weights' gradients fill, the activations go: the peak is not the sum of both
                release(hidden, memory_is_new)
        dw1, db1, dw2, db2 = grads
        dx_ND, dgates_NK = ops.combine(dx_PD, row_NK) if need_x else None, dgates_P[row_NK] if need_gates else None
        return dx_ND, dw1, db1, dw2, db2, dgates_NK, None, None, None, None


class _FewRowsExperts(torch.autograd.Function):
    """`_run_sorted` with a backward where each expert has few rows: all products by `compiled`."""

    @staticmethod
    def forward(ctx, x_ND, w1, b1, w2, b2, gates_NK, experts_NK, order_M, counts, gelu):  # type: ignore[no-untyped-def]
        layout = _lay_out(order_M, counts, gates_NK.shape[1], onednn=False)
        out_PD, hidden_PH = compiled.few_rows(x_ND, w1, b1, w2, layout.item_P, counts, gelu, keep=True)
        gates_P = gates_NK.flatten()[order_M]
        ctx.save_for_backward(x_ND, w1, b1, w2, b2, gates_P, layout.item_P, layout.row_NK, out_PD, hidden_PH)
        ctx.counts, ctx.gelu = counts, gelu
        return compiled.combine_gated(out_PD[:, : x_ND.shape[1]], layout.row_NK, gates_NK, experts_NK, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        x_ND, w1, b1, w2, b2, gates_P, item_P, row_NK, out_PD, hidden_PH = ctx.saved_tensors
        need_x, *need_weights, need_gates = ctx.needs_input_grad[:6]
        graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        grads, _ = _weight_gradients(w1, w2, need_weights, ctx.counts)
        # an expert's outputs are read for the last time before its part of the input's gradient is written
        dx_PD = (torch.empty_like(out_PD) if graph_is_kept else out_PD) if need_x else None
        rows_in, rows_out = (item_P, ctx.counts, gates_P), (hidden_PH, out_PD)
        dgates_P = compiled.few_rows_backward(
            x_ND, grad_ND, w1, b1, w2, b2, *rows_in, *rows_out, ctx.gelu, dx_PD, grads
        )
        dx_ND = None if dx_PD is None else compiled.combine(dx_PD[:, : x_ND.shape[1]], row_NK)
        return dx_ND, *grads, dgates_P[row_NK] if need_gates else None, None, None, None, None


def _weight_gradients(
    w1: Tensor, w2: Tensor, needed: list[bool], of_expert: list[int]
) -> tuple[tuple[Tensor | None, Tensor, Tensor | None, Tensor], bool]:
    """Room for the gradients of w1, b1, w2, b2 (those of the biases come for nothing), zero where an expert has no row;
    is it new memory, and to be kept?"""
    dw1, new_w1 = gradient_like(w1) if needed[0] else (None, False)
    dw2, new_w2 = gradient_like(w2) if needed[2] else (None, False)
    grads = dw1, w1.new_empty(w1.shape[0], w1.shape[2]), dw2, w2.new_empty(w2.shape[0], w2.shape[2])
    for e in (e for e, n in enumerate(of_expert) if not n):
        for grad in grads:
            if grad is not None:
                grad[e].zero_()
    return grads, new_w1 or new_w2


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

    def forward_sorted(
        self, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor, order_M: Tensor, counts_E: Tensor
    ) -> Tensor:
        """Dropless, over items in the order of `dispatch.sort_by_expert`; reads the counts: one wait for the device."""
        x_ND, w1, b1, w2, b2 = self._operands(x_ND)
        gates_NK = gates_NK.to(x_ND.dtype)
        differentiable = any(t.requires_grad for t in (x_ND, w1, b1, w2, b2, gates_NK))
        counts, run = counts_E.tolist(), _run_sorted
        if torch.is_grad_enabled() and differentiable:
            few = _has_few_rows(counts, x_ND, w1, b1, w2, b2)
            run = (_FewRowsExperts if few else _SortedExperts).apply
        return run(x_ND, w1, b1, w2, b2, gates_NK, experts_NK, order_M, counts, self.gelu)

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
