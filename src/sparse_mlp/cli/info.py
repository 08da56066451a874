"""`sparse-mlp info`: where a model's parameters and multiply-adds are, what its experts look like, and with `--gpus`
what training it on so many would need."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.table import Table
from timm.models import get_pretrained_cfg
from torch import nn

from sparse_mlp import jobs
from sparse_mlp.cli.output import console, table
from sparse_mlp.cli.parse import parse
from sparse_mlp.cli.plan import show_plans
from sparse_mlp.data import InputSpec
from sparse_mlp.distributed.cost import measure
from sparse_mlp.distributed.plan import Hardware, plans
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import ModelConfig
from sparse_mlp.jobs.images import load_inputs, load_model_config
from sparse_mlp.jobs.model import without_weights
from sparse_mlp.jobs.recipe import Arguments
from sparse_mlp.moe import MoeMlp
from sparse_mlp.report.cost import count_macs, count_parameters


@dataclass(frozen=True)
class InfoArguments:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL|RUN")]
    """Name of a model, or a run folder."""

    args: Arguments = field(default_factory=dict)
    """Arguments of the model, for example: top_k=(1,1) sparse_blocks=4."""

    image_size: int | None = None
    """Side of the image in pixels. Left out: the model's own."""

    channels: int | None = None
    """Colour channels of the image. Left out: the model's own."""

    classes: int | None = None
    """Number of classes. Left out: the model's own."""

    gpus: int | None = None
    """Show instead what training on so many GPUs needs: memory, bytes sent and time for every mesh, best first."""

    batch: int | None = None
    """Images in a step of all GPUs together. Left out: 64 for each."""

    amp: Literal["bf16", "fp16"] | None = None
    """Type of matrix products, as in training with it. Left out: float32."""

    expert: int | None = None
    """Only meshes on which so many GPUs share the experts."""

    states: int | None = None
    """Numbers the optimiser keeps a weight. Left out: 2, as AdamW; SGD with momentum and Lion keep 1."""

    memory: float | None = None
    """GiB of a GPU. Left out: 80."""

    tflops: float | None = None
    """TFLOP/s that products reach on a GPU. Left out: 400 with --amp, 27 without (two fifths of an H100's peak)."""

    bandwidth: float | None = None
    """TB/s of a GPU's memory. Left out: 3.35 (H100)."""

    node: int | None = None
    """GPUs of a machine. Left out: 8."""

    node_link: float | None = None
    """GB/s that a GPU sends within its machine. Left out: 450 (NVLink of H100)."""

    link: float | None = None
    """GB/s that a GPU sends to other machines. Left out: 50 (400 Gb/s a GPU)."""

    latency: float | None = None
    """Microseconds that a message costs whatever its size. Left out: 5."""


def run(arguments: list[str]) -> int:
    description = (
        "Parameters, multiply-adds for one image and experts of a model, module by module; or a plan for N GPUs."
    )
    given = parse(InfoArguments, arguments, prog="info", description=description)
    _check(given)
    config, spec = _resolve(given)
    if given.gpus is not None:
        return _plan(given, given.gpus, config, spec)
    model = jobs.build_model(config, spec)
    macs = count_macs(model, spec.channels, spec.image_size)
    out = console()
    out.print(
        f"{config.name}: {count_parameters(model):,} parameters, {macs[''] / 1e6:,.1f} M multiply-adds for an image of "
        f"{spec.channels}x{spec.image_size}x{spec.image_size}, {len(spec.classes)} classes",
        soft_wrap=True,
    )
    out.print(_modules(model, macs))
    experts = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoeMlp)}
    if experts:
        out.print(_experts(experts, macs))
    return 0


_AT_LEAST_ONE = ("image_size", "channels", "classes", "gpus", "batch", "expert", "states", "node")
_HARDWARE = tuple(field.name for field in fields(Hardware))
_OF_A_PLAN = ("batch", "amp", "expert", "states", *_HARDWARE)


def _check(given: InfoArguments) -> None:
    for name in _AT_LEAST_ONE:
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1".replace("_", "-"))
    for name in _OF_A_PLAN:
        if given.gpus is None and getattr(given, name) is not None:
            raise UserError(f"--{name} has no effect without --gpus".replace("_", "-"))


def _plan(given: InfoArguments, gpus: int, config: ModelConfig, spec: InputSpec) -> int:
    batch = 64 * gpus if given.batch is None else given.batch
    if batch % gpus:
        raise UserError(f"--batch {batch} cannot be divided by {gpus} GPUs")
    hardware = Hardware(**{name: value for name in _HARDWARE if (value := getattr(given, name)) is not None})
    states = 2 if given.states is None else given.states
    with torch.device("meta"):
        model = jobs.build_model(without_weights(config), spec)
    cost = measure(model, batch // gpus, spec.channels, spec.image_size, given.amp)
    found = plans(cost, gpus, hardware, states=states, expert=given.expert)
    show_plans(console(), config.name, cost, found, hardware)
    return 0


def _resolve(given: InfoArguments) -> tuple[ModelConfig, InputSpec]:
    if Path(given.model).is_dir():
        if given.args or given.image_size or given.channels or given.classes:
            raise UserError(f"{given.model} is a run folder: its model is shown as it was trained, without options")
        folder = jobs.Run(Path(given.model)).folder
        return without_weights(load_model_config(folder)), load_inputs(folder)
    jobs.check_model_name(given.model)
    published = get_pretrained_cfg(given.model)
    channels, height, _ = published.input_size if published else (3, 224, 224)
    classes = given.classes or (published.num_classes if published else 1000)
    spec = InputSpec(
        classes=tuple(map(str, range(classes))),
        channels=given.channels or channels,
        image_size=given.image_size or height,
        mean=(0.5,),
        std=(0.5,),
        crop_pct=1.0,
    )
    return ModelConfig(given.model, given.args), spec


def _modules(model: nn.Module, macs: dict[str, int]) -> Table:
    """Children, and the children of lists of blocks."""
    shown = table("module", "parameters", "M mult-adds", "kind", numbers=2)
    for name, child in model.named_children():
        parts = child.named_children() if isinstance(child, nn.Sequential | nn.ModuleList) else [("", child)]
        for part, module in parts:
            full = f"{name}.{part}" if part else name
            count = count_parameters(module)
            if count or full in macs:
                shown.add_row(full, f"{count:,}", f"{macs.get(full, 0) / 1e6:,.2f}", type(module).__name__)
    return shown


def _experts(layers: dict[str, MoeMlp], macs: dict[str, int]) -> Table:
    shown = table("MoE layer", "E", "K", "width", "hidden", "M param", "M m-a", "in training", numbers=6)
    for name, layer in layers.items():
        hidden = layer.experts.fc2.weight.shape[1]
        mode = "dropless" if layer.capacity_ratio is None else f"capacity {layer.capacity_ratio:g}"
        millions = (f"{count / 1e6:,.2f}" for count in (count_parameters(layer), macs.get(name, 0)))
        shown.add_row(name, *map(str, (layer.num_experts, layer.top_k, layer.dim, hidden)), *millions, mode)
    return shown
