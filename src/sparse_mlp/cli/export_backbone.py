"""`sparse-mlp export-backbone`: from a run folder to a file that timm loads without this package's help."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import tyro
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg

from sparse_mlp import recipes
from sparse_mlp.cli.parse import parse
from sparse_mlp.cli.showing import console
from sparse_mlp.errors import UserError

_DESCRIPTION = """Write the backbone of a run, pre-training or supervised, as bare timm weights without a classifier.

    sparse-mlp export-backbone RUN out.safetensors

The file loads with timm.create_model(NAME, num_classes=0, checkpoint_path=...); the exact call is printed, tried out,
and stored in the file's metadata."""


@dataclass(frozen=True)
class ExportArguments:
    run: tyro.conf.Positional[Path]
    """Folder of a run; its newest checkpoint is taken, with the averaged weights where the run kept them."""

    target: tyro.conf.Positional[Path]
    """File to write; its name ends in .safetensors."""


def run(arguments: list[str]) -> int:
    given = parse(ExportArguments, arguments, prog="export-backbone", description=_DESCRIPTION)
    if given.target.suffix != ".safetensors":
        raise UserError(f"the target must end in .safetensors, got {given.target.name}")
    config, spec = recipes.load_model_config(given.run), recipes.load_inputs(given.run)
    made: dict[str, Any] = {**config.args, "in_chans": spec.channels, "num_classes": 0}
    published = get_pretrained_cfg(config.name)
    if published is not None and published.fixed_input_size:
        made["img_size"] = spec.image_size
    model = timm.create_model(config.name, **made)
    recipes.load_weights(model, given.run, new_head=True)
    given.target.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, given.target, {"format": "pt", "model": config.name, "args": json.dumps(made)})
    # What is printed below has been done once.
    timm.create_model(config.name, checkpoint_path=str(given.target), **made)
    call = ", ".join([repr(config.name), *(f"{name}={value!r}" for name, value in made.items())])
    out = console()
    out.print(f"{len(weights)} tensors: {given.target}", markup=False, soft_wrap=True)
    out.print("\nimport sparse_mlp, timm  # sparse_mlp registers its models with timm", markup=False)
    out.print(f"timm.create_model({call}, checkpoint_path={str(given.target)!r})", markup=False, soft_wrap=True)
    head = call.replace("num_classes=0", "num_classes=10, pretrained=True")
    overlay = f"pretrained_cfg_overlay={{'file': {str(given.target)!r}, 'num_classes': 0}}"
    out.print("# with a new classifier:", markup=False)
    out.print(f"timm.create_model({head}, {overlay})", markup=False, soft_wrap=True)
    if not config.final_norm:
        out.print(
            "# trained without its final norm: the same features with model.norm = torch.nn.Identity()", markup=False
        )
    return 0
