"""What the kinds of run for dense prediction share: a timm model's feature maps, and what a run keeps of its data."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from sparse_mlp.data import InputSpec, display_name
from sparse_mlp.data.coco import CocoData
from sparse_mlp.data.segmentation import SegmentationData
from sparse_mlp.engine import Evaluation, RunFolder
from sparse_mlp.errors import UserError
from sparse_mlp.files import read_json
from sparse_mlp.jobs.images import log_notes, log_skipped
from sparse_mlp.jobs.job import INPUTS, Context, EvalOptions, Job, check_export_target, evaluation_batches
from sparse_mlp.jobs.model import (
    begin_optimizer,
    build_model,
    check_local,
    load_weights,
    model_to_start,
    without_weights,
)
from sparse_mlp.jobs.recipe import ModelConfig, Recipe
from sparse_mlp.models.feature_maps import FeatureMaps
from sparse_mlp.report.cost import count_macs, count_parameters
from sparse_mlp.weights.write import write_file

R = TypeVar("R", bound=Recipe)


class DenseJob(Job[R]):
    """A run whose model answers at every place of an image: detection, segmentation.

    The recipe has `model: ModelConfig`, the backbone, and `data` with `root`. A subclass sets `task`,
    `loaders` and `classes`, and builds its whole model, backbone included, in `build`.
    """

    free: ClassVar[frozenset[str]] = Job.free | {"data.root", "data.workers", "data.eval_batch_size"}

    classes: tuple[str, ...]
    data: SegmentationData | CocoData

    @classmethod
    @abstractmethod
    def build(cls, recipe: R, classes: tuple[str, ...], config: ModelConfig | None = None) -> nn.Module:
        """The whole model for these classes, its backbone by `config` (left out: the recipe's)."""

    def model_config(self) -> ModelConfig:
        """The backbone to build, see `model_to_start`."""
        return model_to_start(self.recipe.model, self.context.run, self.context.trusted)  # type: ignore[attr-defined]

    def prepare(self, run: RunFolder, device: torch.device) -> None:
        log_notes(self.data.notes)
        super().prepare(run, device)
        begin_optimizer(self.trainer, self.model_config())

    def finish(self, run: RunFolder, evaluation: Evaluation) -> None:
        log_skipped(self.data.bad_images())

    def inputs(self) -> dict[str, Any]:
        return {INPUTS: {"classes": list(self.classes)}}

    @classmethod
    def _built(cls, run: RunFolder) -> nn.Module:
        """The whole model of a run, without its weights."""
        recipe = cls.stored(run)
        config: ModelConfig = recipe.model  # type: ignore[attr-defined]
        check_local(config, run)
        return cls.build(recipe, load_classes(run), without_weights(config))

    @classmethod
    def load(cls, run: RunFolder, checkpoint: Path | None = None) -> nn.Module:
        """The whole model of a run in evaluation mode, with its newest weights or those of `checkpoint`."""
        model = cls._built(run)
        load_weights(model, checkpoint or run.path)
        return model.eval()

    @classmethod
    def evaluated(cls, recipe: R, options: EvalOptions) -> R:
        """The recipe of a run with the options of an evaluation in it."""
        return recipe

    @classmethod
    def evaluate(cls, run: RunFolder, options: EvalOptions, device: torch.device) -> Evaluation:
        job = cls(cls.evaluated(cls.stored(run), options), Context(run, trusted=options.trust_data))
        load_weights(job.task.backbone(), options.checkpoint or run.path)
        return job.task.to(device).evaluate(evaluation_batches(job.loaders), device)

    @classmethod
    @abstractmethod
    def image_side(cls, recipe: R) -> int:
        """Side in pixels of the square image that multiply-adds are counted for."""

    @classmethod
    def cost(cls, run: RunFolder) -> tuple[int | None, int | None]:
        """Of the whole model, for a square image of `image_side`."""
        if not run.has_checkpoint():
            return None, None
        model = cls._built(run)
        return count_parameters(model), count_macs(model, 3, cls.image_side(cls.stored(run)))[""]

    @classmethod
    def export(cls, run: RunFolder, target: Path) -> str:
        """The whole model as a safetensors file; returns the lines of code that load it."""
        check_export_target(target)
        model, recipe = cls.load(run), cls.stored(run)
        metadata = {"format": "pt", "kind": recipe.kind, "classes": json.dumps(load_classes(run))}
        write_file(model.state_dict(), target, metadata)
        return "\n".join(
            [
                f"# {len(model.state_dict())} tensors, {count_parameters(model):,} parameters",
                "import safetensors.torch",
                "from sparse_mlp.jobs import Run",
                f"model = Run({str(run.path)!r}).load()  # a torch.nn.Module; or, with the exported weights:",
                f"model.load_state_dict(safetensors.torch.load_file({str(target)!r}))",
            ]
        )


def load_classes(run: RunFolder) -> tuple[str, ...]:
    """The class names of a run. UserError or OSError naming the file."""
    path = run.path / INPUTS
    classes = read_json(path).get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: classes should be a list of names")
    return tuple(classes)


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A name for the pictures of each file: its own without the ending, numbered where it is taken, also by the mask
    (NAME.mask) of another."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem = name = display_name(path.stem)
        number = 2
        while {name, f"{name}.mask"} & taken:
            name, number = f"{stem}-{number}", number + 1
        taken |= {name, f"{name}.mask"}
        names.append(name)
    return names


def build_backbone(config: ModelConfig, *, image_size: int, channels: int = 3) -> nn.Module:
    """The timm model of a configuration with the weights that it names; `image_size` is the side of the training
    images, which models of a fixed size are built for. UserError, one line, for all that `build_model` refuses."""
    return build_model(config, InputSpec(("",), channels, image_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, 1.0))


def build_feature_maps(config: ModelConfig, *, image_size: int, channels: int = 3) -> FeatureMaps:
    """The feature maps of `build_backbone`'s model. UserError for a model that gives no pyramid."""
    model = build_backbone(config, image_size=image_size, channels=channels)
    try:
        return FeatureMaps(model)
    except ValueError as error:
        raise UserError(f"model {config.name}: {error}") from error
