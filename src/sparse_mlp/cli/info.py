"""`sparse-mlp info`: where a model's parameters and multiply-adds are, and what its experts look like."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table
from timm.models import get_pretrained_cfg
from torch import nn

from sparse_mlp import jobs
from sparse_mlp.cli.output import console, table
from sparse_mlp.cli.parse import parse
from sparse_mlp.data import InputSpec
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


def run(arguments: list[str]) -> int:
    description = "Parameters, multiply-adds for one image and experts of a model, module by module."
    given = parse(InfoArguments, arguments, prog="info", description=description)
    for name in ("image_size", "channels", "classes"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    config, spec = _resolve(given)
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
