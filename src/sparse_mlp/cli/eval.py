"""`sparse-mlp eval`: accuracy of a run, or of any model with any weights, on a data set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from timm.models import get_pretrained_cfg

from sparse_mlp import distributed, recipes
from sparse_mlp.cli.parse import parse, split_names
from sparse_mlp.cli.showing import console, table
from sparse_mlp.data import SETS, AugmentConfig, DataConfig, ImageData, build_datasets, eval_loader
from sparse_mlp.errors import UserError
from sparse_mlp.recipes import ModelConfig
from sparse_mlp.recipes.recipe import Arguments
from sparse_mlp.tasks.classify import Classify, ClassifyConfig

_DESCRIPTION = """Measure loss, top-1 and top-5 accuracy on the test images of a data set.

    sparse-mlp eval RUN [options]

    sparse-mlp eval MODEL --checkpoint FILE --data.name SET [options]

A run is evaluated with its newest weights on its own data; another data set needs the same number of classes."""


@dataclass(frozen=True)
class EvalArguments:
    checkpoint: Path | None = None
    """Weights: a file (.safetensors, .pth, a published Mixer .npz) or a run folder. A run has its own."""

    pretrained: bool = False
    """Weights that timm publishes for MODEL."""

    model_args: Arguments = field(default_factory=dict)
    """Arguments of MODEL, for example: top_k=(1,1) sparse_blocks=4."""

    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""

    data: DataConfig = field(default_factory=DataConfig)


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    asks_help = "--help" in options or "-h" in options
    if len(names) != 1 and not asks_help:
        raise UserError(f"eval takes one run folder or model name, not {len(names)} (see sparse-mlp eval --help)")
    target = names[0] if names else ""
    is_run = (Path(target) / "config.json").is_file() and bool(target)
    default = EvalArguments(data=_default_data(target, is_run)) if target else EvalArguments()
    if target and not is_run and not asks_help and not any(word.startswith("--data.name") for word in options):
        raise UserError(f"which images? a MODEL needs --data.name, one of {', '.join(SETS)} or a name of timm's")
    given = parse(EvalArguments, options, prog="eval", description=_DESCRIPTION, default=default)
    if not is_run:
        given = replace(given, data=_as_published(target, given.data))
    with distributed.join(given.device) as device:
        data = build_datasets(given.data, AugmentConfig())
        model, task_config = _open(target, is_run, given, data)
        task = Classify(model, task_config, class_names=data.classes).to(device)
        loader = partial(eval_loader, data, given.data)
        result = task.evaluate(loader(rank=distributed.rank(), world_size=distributed.world_size()), device)
        if distributed.is_main():
            _show(target, given.data, result.metrics, data.bad_images())
    return 0


def _default_data(target: str, is_run: bool) -> DataConfig:
    if is_run:
        return recipes.load(target).data
    if Path(target).is_dir():
        raise FileNotFoundError(f"{target} is not a run folder: it has no config.json")
    recipes.check_model_name(target)
    return DataConfig()


def _as_published(target: str, data: DataConfig) -> DataConfig:
    """Images as a model's published weights want them, where nothing else is asked for and the set is no small one."""
    published = get_pretrained_cfg(target)
    if published is None or not (data.name == "folder" or "/" in data.name):
        return data
    return replace(
        data,
        image_size=data.image_size or published.input_size[-1],
        mean=data.mean or published.mean,
        std=data.std or published.std,
        crop_pct=data.crop_pct or published.crop_pct,
    )


def _open(target: str, is_run: bool, given: EvalArguments, data: ImageData) -> tuple:
    if is_run:
        if given.pretrained or given.model_args:
            raise UserError("--pretrained and --model-args are for a MODEL; a run has its own")
        recipe = recipes.load(target)
        trained = recipes.load_inputs(target)
        if len(trained.classes) != len(data.classes):
            raise UserError(f"{target} knows {len(trained.classes)} classes, {given.data.name} has {len(data.classes)}")
        spec = replace(data.spec, classes=trained.classes)
        return recipes.load_model(recipe.model, spec, given.checkpoint or Path(target)), recipe.task
    if given.pretrained == (given.checkpoint is not None):
        raise UserError(f"which weights? give either --checkpoint FILE or --pretrained for model {target}")
    config = ModelConfig(target, given.model_args, given.pretrained)
    if given.checkpoint is not None:
        return recipes.load_model(config, data.spec, given.checkpoint), ClassifyConfig()
    return recipes.build_model(config, data.spec), ClassifyConfig()


def _show(target: str, data: DataConfig, metrics: dict[str, float], bad: list[str]) -> None:
    out = console()
    shown = table("what", "images", "loss", "top-1", "top-5", "data", numbers=4)
    scores = (f"{metrics['loss']:.4f}", f"{metrics['top1']:.2%}", f"{metrics['top5']:.2%}")
    shown.add_row(target, f"{metrics['images']:,}", *scores, data.name)
    out.print(shown)
    if bad:
        out.print(f"{len(bad)} images could not be read and were left out", markup=False)
