"""`sparse-mlp models`: names that recipes and the other commands take."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import timm
import torch
import tyro
from timm.models import get_pretrained_cfg

from sparse_mlp.cli.output import console, table
from sparse_mlp.cli.parse import parse
from sparse_mlp.errors import UserError
from sparse_mlp.models import registered_names
from sparse_mlp.report.cost import count_parameters


@dataclass(frozen=True)
class ModelsArguments:
    filter: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PART]")] = None
    """Part of a name, or a pattern such as *b16*. Left out: all."""

    all: bool = False
    """timm's other models too."""


def run(arguments: list[str]) -> int:
    given = parse(ModelsArguments, arguments, prog="models", description="List the models by name.")
    pattern = given.filter or ""
    pattern = pattern if "*" in pattern else f"*{pattern}*"
    ours = registered_names(pattern)
    names = timm.list_models(pattern) if given.all else ours
    if not names:
        where = "" if given.all else "; --all looks through timm's too"
        raise UserError(f"no model name fits {given.filter!r}{where}")
    out = console()
    if given.all:
        out.print("\n".join(names), markup=False)
        return 0
    shown = table("model", "image", "parameters", "what it is", numbers=2)
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        published = get_pretrained_cfg(name)
        size = "x".join(map(str, published.input_size)) if published else "?"
        about = (inspect.getdoc(timm.model_entrypoint(name)) or "").splitlines()[0]
        shown.add_row(name, size, f"{count_parameters(model) / 1e6:.1f} M", about)
    out.print(shown)
    return 0
