"""E stacked two-layer MLPs, and the two ways to run them: over items sorted by expert, or over slots.

The sorted form is one autograd function with its own backward. It works on one expert at a time, so that the hidden
activations of that expert are still in cache when the next operation reads them, and writes what it makes into its
place: an expert's weight gradient into the stack (indexing `weight[e]` under autograd fills a whole (E, D, H) gradient
of zeros per expert), its outputs among those of the sorted assignments, which are put in the items' order at the end
(adding them up item by item is done by one thread).

On a CPU its float32 products go to oneDNN or to torch's own MKL, whichever is the faster one on the processor.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_mlp.moe import dispatch
from sparse_mlp.moe.eager import onednn_is_faster, runs_eagerly_on_cpu
from sparse_mlp.moe.memory import gradient_like, release

GELU = {"gelu": "none", "gelu_tanh": "tanh"}
RECOMPUTE_FROM = 768  # width D from which GELU again in backward costs a hundredth of the products


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
    rows, places = [], []  # of the sorted assignments; and for each row, which of these it holds
    first_rows, first_places = accumulate(of_expert, initial=0), accumulate(counts, initial=0)
    for n, size, row, place in zip(counts, of_expert, first_rows, first_places, strict=False):
        rows.append(torch.arange(row, row + n))
        places.append(torch.arange(place, place + size).clamp_(max=place + n - 1))
    row_M[order_M] = torch.cat(rows)
    return _Rows(of_expert, order_M[torch.cat(places)] // top_k, row_M.view(-1, top_k))


def _combine(rows_PD: Tensor, row_NK: Tensor, gates_NK: Tensor | None = None) -> Tensor:
    """sum_k gate_k row_k of each item: (P, D) -> (N, D)."""
    y_ND = None
    for k, row_N in enumerate(row_NK.unbind(1)):
        rows_ND = rows_PD.index_select(0, row_N)
        if gates_NK is not None:
            rows_ND *= gates_NK[:, k, None]
        y_ND = rows_ND if y_ND is None else y_ND.add_(rows_ND)
    assert y_ND is not None, "K is at least 1"
    return y_ND


def _by_expert(*stacks: Tensor) -> list[tuple[Tensor, ...]]:
    """What each stack holds for each expert: one operation a stack, not one an expert."""
    return [stack.unbind() for stack in stacks]


def _matmul(a: Tensor, b: Tensor, onednn: bool, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a @ b + bias; any strides. In `out` where the library can: fresh memory costs as much as a tenth of a product."""
    if onednn:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, onednn: bool, bias: Tensor | None = None) -> None:
    product = _matmul(a, b, onednn, bias, out)
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


def _run_sorted(
    x_ND: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gates_NK: Tensor,
    order_M: Tensor,
    counts: list[int],
    gelu: str,
) -> Tensor:
    """sum_k gate_k expert_k(x), expert by expert, without a backward."""
    onednn = _use_onednn(x_ND)
    rows = _lay_out(order_M, counts, gates_NK.shape[1], onednn)
    out_PD = x_ND.index_select(0, rows.item_P)  # an expert's outputs take the place of its inputs
    room_H = x_ND.new_empty(0 if onednn else max(rows.of_expert), w1.shape[2])
    for out, w1_e, b1_e, w2_e, b2_e in zip(out_PD.split(rows.of_expert), *_by_expert(w1, b1, w2, b2), strict=True):
        if n := len(out):
            if onednn:
                hidden = torch.ops.mkldnn._linear_pointwise(out, w1_e.t(), b1_e, "gelu", [], gelu)
            else:
                hidden = torch.addmm(b1_e, out, w1_e, out=room_H[:n])
                torch.ops.aten.gelu.out(hidden, approximate=gelu, out=hidden)
            _matmul_into(out, hidden, w2_e, onednn, b2_e)
    return _combine(out_PD, rows.row_NK, gates_NK)


class _SortedExperts(torch.autograd.Function):
    """`_run_sorted` with a backward, which from `RECOMPUTE_FROM` on keeps one (P, H) activation; autograd keeps two."""

    @staticmethod
    def forward(ctx, x_ND, w1, b1, w2, b2, gates_NK, order_M, counts, gelu):  # type: ignore[no-untyped-def]
        onednn = _use_onednn(x_ND)
        rows = _lay_out(order_M, counts, gates_NK.shape[1], onednn)
        recompute = w1.shape[1] >= RECOMPUTE_FROM
        room_H = x_ND.new_empty(max(rows.of_expert) if recompute else 0, w1.shape[2])
        out_PD = x_ND.index_select(0, rows.item_P)  # an expert's outputs take the place of its inputs
        hiddens, acts = [], []
        for out, w1_e, b1_e, w2_e, b2_e in zip(out_PD.split(rows.of_expert), *_by_expert(w1, b1, w2, b2), strict=True):
            if n := len(out):
                hidden = _matmul(out, w1_e, onednn, b1_e)
                act = room_H[:n] if recompute else torch.empty_like(hidden)
                torch.ops.aten.gelu.out(hidden, approximate=gelu, out=act)
                _matmul_into(out, act, w2_e, onednn, b2_e)
                hiddens.append(hidden)
                if not recompute:
                    acts.append(act)
        ctx.save_for_backward(x_ND, w1, w2, gates_NK, rows.item_P, rows.row_NK, out_PD, *hiddens, *acts)
        ctx.of_expert, ctx.gelu, ctx.recompute = rows.of_expert, gelu, recompute
        return _combine(out_PD, rows.row_NK, gates_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        x_ND, w1, w2, gates_NK, item_P, row_NK, out_PD, *kept = ctx.saved_tensors
        need_x, *need_weights, need_gates = ctx.needs_input_grad[:6]
        graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        onednn = _use_onednn(grad_ND)
        grads, memory_is_new = _weight_gradients(w1, w2, need_weights, ctx.of_expert)
        # rows past an expert's own have the gate zero here, and so add nothing to any gradient below
        gates_P = gates_NK.new_zeros(len(item_P)).index_put_((row_NK,), gates_NK)
        dgates_P = torch.empty_like(gates_P)
        # an expert's outputs are read for the last time before its part of the input's gradient is written
        dx_PD = torch.empty_like(out_PD) if graph_is_kept else out_PD
        parts = zip(
            *(of_all.split(ctx.of_expert) for of_all in (item_P, gates_P.unsqueeze(1), dgates_P, out_PD, dx_PD)),
            *_by_expert(w1.transpose(1, 2), w2.transpose(1, 2)),
            *([None] * len(ctx.of_expert) if grad is None else grad.unbind() for grad in grads),
            strict=True,
        )
        loaded = [part for part in parts if len(part[0])]
        hiddens, acts = kept[: len(loaded)], kept[len(loaded) :] or [None] * len(loaded)
        largest = max(ctx.of_expert)
        room_x, room_dy = x_ND.new_empty(largest, w1.shape[1]), x_ND.new_empty(largest, w1.shape[1])
        room_act = x_ND.new_empty(largest if ctx.recompute else 0, w1.shape[2])
        room_dact = x_ND.new_empty(0 if onednn else largest, w1.shape[2])
        room_t = x_ND.new_empty(largest * max(w1.shape[1:]) if onednn else 0)
        ones = x_ND.new_ones(1, largest)
        for part, hidden, act in zip(loaded, hiddens, acts, strict=True):
            items, gates, dgates, out, dx, w1_t, w2_t, dw1_e, db1_e, dw2_e, db2_e = part
            n = len(items)
            dy = torch.index_select(grad_ND, 0, items, out=room_dy[:n])
            if need_gates:
                torch.sum(torch.mul(dy, out, out=room_x[:n]), 1, out=dgates)
            dy *= gates
            x_e = torch.index_select(x_ND, 0, items, out=room_x[:n])
            if db2_e is not None:
                torch.mm(ones[:, :n], dy, out=db2_e)
            if dw2_e is not None:
                if act is None:
                    act = torch.ops.aten.gelu.out(hidden, approximate=ctx.gelu, out=room_act[:n])
                _weight_gradient(act, dy, dw2_e, room_t, onednn, memory_is_new)
            if dw1_e is not None or db1_e is not None or need_x:
                dact = _matmul(dy, w2_t, onednn, out=room_dact[:n])
                dhidden = torch.ops.aten.gelu_backward.grad_input(dact, hidden, approximate=ctx.gelu, grad_input=dact)
                if dw1_e is not None:
                    _weight_gradient(x_e, dhidden, dw1_e, room_t, onednn, memory_is_new)
                if db1_e is not None:
                    torch.mm(ones[:, :n], dhidden, out=db1_e)
                if need_x:
                    _matmul_into(dx, dhidden, w1_t, onednn)
                if onednn:
                    release(dact, memory_is_new)
            if not graph_is_kept:  # as the weights' gradients fill, the activations go: the peak is not the sum of both
                release(hidden, memory_is_new)
                if not ctx.recompute:
                    release(act, memory_is_new)
        dw1, db1, dw2, db2 = grads
        db1, db2 = (None if db is None else db.squeeze(1) for db in (db1, db2))
        dx_ND, dgates_NK = _combine(dx_PD, row_NK) if need_x else None, dgates_P[row_NK] if need_gates else None
        return dx_ND, dw1, db1, dw2, db2, dgates_NK, None, None, None


def _weight_gradients(
    w1: Tensor, w2: Tensor, needed: list[bool], of_expert: list[int]
) -> tuple[tuple[Tensor | None, ...], bool]:
    """Room for the gradients of w1, b1, w2, b2 (a bias as one row), zero where an expert has no row; is it new memory,
    and to be kept?"""
    need_w1, need_b1, need_w2, need_b2 = needed
    dw1, new_w1 = gradient_like(w1) if need_w1 else (None, False)
    dw2, new_w2 = gradient_like(w2) if need_w2 else (None, False)
    db1, db2 = (w.new_empty(w.shape[0], 1, w.shape[2]) if need else None for w, need in ((w1, need_b1), (w2, need_b2)))
    grads = dw1, db1, dw2, db2
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

    def forward_sorted(self, x_ND: Tensor, gates_NK: Tensor, order_M: Tensor, counts_E: Tensor) -> Tensor:
        """Dropless, over items in the order of `dispatch.sort_by_expert`; reads the counts: one wait for the device."""
        x_ND, w1, b1, w2, b2 = self._operands(x_ND)
        gates_NK = gates_NK.to(x_ND.dtype)
        differentiable = any(t.requires_grad for t in (x_ND, w1, b1, w2, b2, gates_NK))
        run = _SortedExperts.apply if torch.is_grad_enabled() and differentiable else _run_sorted
        return run(x_ND, w1, b1, w2, b2, gates_NK, order_M, counts_E.tolist(), self.gelu)

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
