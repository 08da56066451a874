"""`sparse-mlp eval`: the metric of a run, or of any model with any weights, on a data set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg

from sparse_mlp import distributed, jobs
from sparse_mlp.cli.help import EVAL
from sparse_mlp.cli.output import add_row, console, table
from sparse_mlp.cli.parse import HELP_ALL, parse, split_names
from sparse_mlp.data import SETS, AugmentConfig, DataConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import Context, ModelConfig
from sparse_mlp.jobs.classify import evaluate_model
from sparse_mlp.jobs.images import log_notes, open_images
from sparse_mlp.jobs.recipe import Arguments, ExpertsConfig
from sparse_mlp.tasks.classify import ClassifyConfig

_COUNTS = ("images", "nodes")
_SCORES = ("box_map", "mask_map")
_ACCURACIES = ("top1", "top5", "val_top1", "knn_top1", "knn_top5")


@dataclass(frozen=True)
class ModelEvalOptions:
    checkpoint: Path | None = None
    """Weights: a file (.safetensors, .pth, a published Mixer .npz) or a run folder."""

    pretrained: bool = False
    """Weights that timm publishes for MODEL."""

    model_args: Arguments = field(default_factory=dict)
    """Arguments of MODEL, for example: top_k=(1,1) sparse_blocks=4."""

    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""

    data: DataConfig = field(default_factory=lambda: DataConfig(name=""))


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    if len(names) != 1 and HELP_ALL not in options:
        raise UserError(f"eval takes one run folder or model name, not {len(names)} (see sparse-mlp eval --help)")
    target = names[0] if names else ""
    if (Path(target) / "config.json").is_file() and target:
        _show(target, _evaluate_run(target, options))
    else:
        _show(target, _evaluate_model(target, options))
    return 0


def _evaluate_run(target: str, options: list[str]) -> dict[str, float]:
    run = jobs.Run(Path(target))
    job, folder = run.job, run.folder
    given: Any = parse(job.eval_options_type, options, prog="eval", description=EVAL, default=job.eval_options(folder))
    with distributed.join(given.device) as device:
        return job.evaluate(folder, given, device).metrics


def _evaluate_model(target: str, options: list[str]) -> dict[str, float]:
    given = parse(ModelEvalOptions, options, prog="eval", description=EVAL, default=ModelEvalOptions())
    if Path(target).is_dir():
        raise FileNotFoundError(f"{target} is not a run folder: it has no config.json")
    jobs.check_model_name(target)
    if given.data.root is not None and not given.data.name:
        given = replace(given, data=replace(given.data, name="folder"))
    if not given.data.name:
        raise UserError(f"which images? a MODEL needs --data.name, one of {', '.join(SETS)} or a name of timm's")
    if given.pretrained == (given.checkpoint is not None):
        raise UserError(f"which weights? give either --checkpoint FILE or --pretrained for model {target}")
    images = _as_published(target, given.data)
    config = ModelConfig(target, given.model_args, given.pretrained, experts=given.experts)
    with distributed.join(given.device) as device:
        data = open_images(images, AugmentConfig(), Context(trusted=True))
        log_notes(data.notes)
        if given.checkpoint is not None:
            model = jobs.load_model(config, data.spec, given.checkpoint)
        else:
            model = jobs.build_model(config, data.spec)
        return evaluate_model(model, ClassifyConfig(), data, images, device).metrics


def _as_published(target: str, data: DataConfig) -> DataConfig:
    """The preprocessing of a model's published weights, where no other is given; not for the small built-in sets."""
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


def _show(target: str, metrics: dict[str, float]) -> None:
    if not distributed.is_main():
        return
    shown = table("what", *metrics, numbers=len(metrics))
    add_row(shown, target, *(_cell(name, value) for name, value in metrics.items()))
    console().print(shown)


def _cell(name: str, value: float) -> str:
    if name in _ACCURACIES or name.startswith(_SCORES):
        return f"{value:.2%}"
    return f"{value:,.0f}" if isinstance(value, int) or name in _COUNTS else f"{value:.4f}"
