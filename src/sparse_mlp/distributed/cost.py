"""What a training step of a model needs, counted without its weights: memory, multiply-adds, rows for the experts.

The model is on the meta device and runs once, forward and backward, on fake tensors: shapes and types, no numbers. Of
each MoE layer's experts one stands for all, which takes every row: what a rank computes and keeps if the experts are
evenly loaded, whatever their number.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp.distributed.parallelize import units
from sparse_mlp.moe import MoeMlp, dispatch
from sparse_mlp.moe.experts import ExpertLinear, product_type
from sparse_mlp.moe.telemetry import moe_layers

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LayerCost:
    """One MoE layer in one step of one rank.

    rows: M, of all its experts. width: D. sent_size, returned_size: bytes of a number of a row on its way to the
    experts and back. parameters: of all experts. flops: of the experts, forward and backward. totals: numbers whose sum
    over the ranks the balance loss takes.
    """

    name: str
    num_experts: int
    rows: int
    width: int
    sent_size: int
    returned_size: int
    parameters: int
    flops: int
    totals: int


@dataclass(frozen=True)
class UnitCost:
    """Weights that FSDP2 gathers together, of a block or of all beside the blocks: outside experts, and of experts."""

    dense: int
    experts: int


@dataclass(frozen=True)
class StepCost:
    """One step of one rank on `images` images.

    dense: parameters outside experts. units: see `parallelize.units`. layers: its MoE layers. activations: most bytes
    at a time during forward and backward, without weights and their gradients. flops: all, forward and backward.
    weight_size, product_size: bytes of a weight, and of one as matrix products take it.
    """

    images: int
    dense: int
    units: tuple[UnitCost, ...]
    layers: tuple[LayerCost, ...]
    activations: int
    written: int
    flops: int
    weight_size: int
    product_size: int

    @property
    def experts(self) -> int:
        return sum(layer.parameters for layer in self.layers)


def measure(model: nn.Module, images: int, channels: int, image_size: int, amp: str | None = None) -> StepCost:
    """The cost of a training step of a model of images, on any device; none of its weights is read.

    `amp`: "bf16" or "fp16", the type of autocast, or None.
    """
    dtype = AMP.get(amp or "")
    layers, seen = moe_layers(model), dict[str, tuple[Tensor, Tensor]]()
    stacked = _stacked(layers)
    with FakeTensorMode(), _watched(layers, seen), _training(model):
        tensors = {name: _stand_in(tensor, name in stacked) for name, tensor in model.named_parameters()}
        tensors |= {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.named_buffers()}
        x = torch.empty(images, channels, image_size, image_size, dtype=next(model.parameters()).dtype)
        live, flops = LiveBytes([x, *tensors.values()]), FlopCounterMode(display=False)
        with live:
            with _autocast(dtype), flops:
                y = torch.func.functional_call(model, tensors, (x,))
            y.float().sum().backward()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    weight_size = next(model.parameters()).element_size()
    return StepCost(
        images=images,
        dense=sum(count for name, count in sizes.items() if name not in stacked),
        units=_units(model, stacked),
        layers=tuple(_layer(name, layer, *seen[name]) for name, layer in layers.items()),
        activations=live.peak,
        written=live.written,
        flops=3 * flops.get_total_flops(),  # the counter is wrong about the backward of grouped convolutions
        weight_size=weight_size,
        product_size=dtype.itemsize if dtype else weight_size,
    )


class LiveBytes(TorchDispatchMode):
    """The most bytes that operators inside the block have made and are still held, views counted once.

    What was there before, `known`, is not counted; nor are gradients of leaves, into which backward adds. `written` is
    the sum of all that was made.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        for tensor in known:
            if tensor.requires_grad:
                tensor.grad = torch.empty_like(tensor)
        self._known = {_address(t) for tensor in known for t in (tensor, tensor.grad) if t is not None}
        self.now = self.peak = self.written = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in self._known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.written += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast as on a GPU, where norms are in float32 whatever their input; the fake tensors are a CPU's."""
    if dtype is None:
        yield
        return
    with torch.autocast("cpu", dtype), _NormsInFloat32():
        yield


class _NormsInFloat32(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (F.layer_norm, F.group_norm):
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _stacked(layers: dict[str, MoeMlp]) -> set[str]:
    """Names of the parameters that are split over ranks: those with one slice an expert."""
    return {
        f"{layer_name}.experts.{name}.{kind}"
        for layer_name, layer in layers.items()
        for name, module in layer.experts.named_modules()
        if isinstance(module, ExpertLinear)
        for kind, _ in module.named_parameters()
    }


def _stand_in(parameter: Tensor, stacked: bool) -> Tensor:
    shape = (1, *parameter.shape[1:]) if stacked else parameter.shape
    return torch.empty(shape, dtype=parameter.dtype, requires_grad=parameter.requires_grad)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was)


@contextmanager
def _watched(layers: dict[str, MoeMlp], seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let one expert take all rows of each layer, and note them, as they go to it and as they come back."""
    with ExitStack() as stack:
        for name, layer in layers.items():

            def one_expert(
                items: Tensor, gates: Tensor, plan: dispatch.Plan, experts: dispatch.Experts, name: str = name
            ) -> Tensor:
                rows = dispatch.gather(items, plan.item_M, plan.row_NK)
                rows = rows.to(product_type(rows))
                returned = experts(rows, None)
                seen[name] = rows.detach().to("meta"), returned.detach().to("meta")
                return dispatch.combine(returned, plan.row_NK, gates.to(returned.dtype))

            stack.callback(setattr, layer, "dispatcher", layer.dispatcher)
            layer.dispatcher = one_expert
        yield


def _layer(name: str, layer: MoeMlp, rows: Tensor, returned: Tensor) -> LayerCost:
    linears = [module for module in layer.experts.modules() if isinstance(module, ExpertLinear)]
    products = sum(linear.weight[0].numel() for linear in linears)
    noisy = layer.router.noise_std > 0 and layer.router.bias is None
    return LayerCost(
        name=name,
        num_experts=layer.num_experts,
        rows=rows.shape[0],
        width=layer.dim,
        sent_size=rows.element_size(),
        returned_size=returned.element_size(),
        parameters=sum(parameter.numel() for linear in linears for parameter in linear.parameters()),
        flops=3 * 2 * rows.shape[0] * products,
        totals=layer.num_experts * (2 if noisy else 1),
    )


def _units(model: nn.Module, stacked: set[str]) -> tuple[UnitCost, ...]:
    """Of each block, and of what is beside the blocks."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def cost(parameters: Iterable[nn.Parameter]) -> UnitCost:
        sizes = {names[id(parameter)]: parameter.numel() for parameter in parameters}
        experts = sum(count for name, count in sizes.items() if name in stacked)
        return UnitCost(sum(sizes.values()) - experts, experts)

    blocks = [list(unit.parameters()) for unit in units(model)]
    inside = {id(parameter) for block in blocks for parameter in block}
    return (*map(cost, blocks), cost(p for p in model.parameters() if id(p) not in inside))
