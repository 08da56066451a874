"""Pre-training without labels: MoCo v3 on two views of each image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import IterableDataset

from sparse_mlp.data import (
    AugmentConfig,
    DataConfig,
    ImageData,
    InputSpec,
    ViewsConfig,
    eval_loader,
    in_two_views,
    steps_per_epoch,
    view_loader,
)
from sparse_mlp.distributed import MeshConfig
from sparse_mlp.engine import Batch, Evaluation, Loaders, OptimConfig, RunFolder, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs.classify import predict_pictures
from sparse_mlp.jobs.images import ImageJob, RoutingReportOptions, first_images, load_inputs, load_trained, open_images
from sparse_mlp.jobs.job import Context, PredictOptions, Row
from sparse_mlp.jobs.model import build_model
from sparse_mlp.jobs.recipe import ModelConfig, Recipe
from sparse_mlp.report.cost import count_macs
from sparse_mlp.report.pretraining import Neighbourhood, write_pretraining_report
from sparse_mlp.report.samples import example_rows, picture
from sparse_mlp.tasks.features import extract_features, pooled_features
from sparse_mlp.tasks.knn import nearest
from sparse_mlp.tasks.moco import Moco, MocoConfig

_log = logging.getLogger(__name__)

_MAP_IMAGES = 2000  # test images in the map of a report
_NEIGHBOURS = 6  # shown of each example


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    """A complete configuration of a pre-training run."""

    kind: ClassVar[str] = "pretrain"

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    task: MocoConfig = field(default_factory=MocoConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.5e-4, weight_decay=0.1))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup_epochs=40))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=300))
    mesh: MeshConfig = field(default_factory=MeshConfig)


class PretrainJob(ImageJob[PretrainRecipe]):
    """A timm model learns from two views of each image, without labels."""

    recipe_type = PretrainRecipe
    scores = ("knn_top1",)
    report_options_type = RoutingReportOptions

    def __init__(self, recipe: PretrainRecipe, context: Context | None = None) -> None:
        super().__init__(recipe, context)
        parts, size = recipe.train.grad_accum, recipe.data.batch_size
        if parts != 1:
            raise UserError(
                f"train.grad_accum {parts}: each image is contrasted with the whole batch, which stays whole"
            )
        if size < 2:
            raise UserError(f"data.batch_size {size} is too small for batch norm and a contrast; from 2 on")
        self.data = data = in_two_views(open_images(recipe.data, AugmentConfig(), self.context), recipe.views)
        per_epoch = steps_per_epoch(data, recipe.data)
        _check_bank(recipe, data)
        torch.manual_seed(recipe.train.seed)
        train = partial(view_loader, data, recipe.data, recipe.train.seed)
        backbone = _backbone(self.model_config(), data.spec, first_images(train, "view1"))
        self.task = Moco(backbone, recipe.task, num_classes=len(data.classes))
        self.loaders = Loaders(
            train=train,
            evaluate=partial(_eval_batches, data, recipe),
            batch_size=size,
            steps_per_epoch=per_epoch,
        )

    def summary(self, evaluation: Evaluation) -> str:
        metrics = evaluation.metrics
        parts = [f"{name} {value:.2%}" for name, value in metrics.items() if name.startswith("knn_")]
        return ", ".join([*parts, f"features vary in {metrics['feature_rank']:.0f} directions"])

    @classmethod
    def predict(cls, run: RunFolder, files: Sequence[str], options: PredictOptions) -> list[Row]:
        """The pooled features of each image, `feature_0`, `feature_1`, ...: the run has no classes."""
        backbone = load_trained(run, options.checkpoint)

        def features(images: torch.Tensor) -> list[Row]:
            rows = pooled_features(backbone, images).tolist()
            return [{f"feature_{i}": round(value, 6) for i, value in enumerate(row)} for row in rows]

        return predict_pictures(files, load_inputs(run), features)

    @classmethod
    def report(cls, run: RunFolder, context: Context | None = None) -> Path:
        """The page of a run, with the map and the neighbours where its images can be opened and indexed."""
        recipe = cls.stored(run)
        if not run.has_checkpoint():
            return write_pretraining_report(run.path)
        spec, backbone = load_inputs(run), load_trained(run)
        macs = count_macs(backbone, spec.channels, spec.image_size)[""]
        try:
            data = open_images(recipe.data, AugmentConfig(), context or Context(run))
        except (UserError, OSError) as error:
            _log.warning("the report of %s shows no images: %s", run.path, error)
            return write_pretraining_report(run.path, macs=macs)
        streamed = isinstance(data.test, IterableDataset)
        shown = None if streamed or not recipe.task.knn_images else _neighbourhood(recipe, data, backbone)
        return write_pretraining_report(run.path, shown, macs=macs)


def bank_images(recipe: PretrainRecipe, data: ImageData) -> np.ndarray:
    """Sorted indices of the training images that the kNN compares with, the same in every run."""
    images = len(data.train)  # type: ignore[arg-type]
    chosen = np.random.default_rng(0).permutation(images)[: recipe.task.knn_images]
    return np.sort(chosen)


def _backbone(config: ModelConfig, spec: InputSpec, images: Callable[[], torch.Tensor]) -> nn.Module:
    try:
        return build_model(config, spec, images)
    except UserError as error:
        patch = _patch_size(config)
        if patch is not None and patch > spec.image_size:
            views = f"views of {spec.image_size} pixels (data.image_size)"
            raise UserError(f"{views} are smaller than a patch of {config.name}, {patch}") from error
        raise


def _patch_size(config: ModelConfig) -> int | None:
    """Side of the patches of a model at its own image size; None where it has none or cannot be built."""
    try:
        with torch.device("meta"):
            model = timm.create_model(config.name, **config.args)
    except (TypeError, ValueError, RuntimeError, AssertionError):
        return config.args.get("patch_size")
    sizes = [module.patch_size[0] for module in model.modules() if isinstance(module, timm.layers.PatchEmbed)]
    return max(sizes, default=None)


def _check_bank(recipe: PretrainRecipe, data: ImageData) -> None:
    """UserError if the kNN of the evaluations cannot be computed."""
    if not recipe.task.knn_images:
        return
    if isinstance(data.train, IterableDataset):
        raise UserError(
            f"the kNN needs training images by index, which the stream {recipe.data.name} has not; --task.knn-images 0"
        )
    if len(data.classes) < 2:
        raise UserError(
            f"the kNN needs two classes, but {recipe.data.name} has {data.classes[0]!r} alone; --task.knn-images 0"
        )


def _eval_batches(data: ImageData, recipe: PretrainRecipe, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """This rank's share of the bank, then of the test images, as they are evaluated."""
    if recipe.task.knn_images:
        own = bank_images(recipe, data)[rank::world_size]
        for start in range(0, len(own), recipe.data.eval_batch_size):
            batch = data.train.batch(own[start : start + recipe.data.eval_batch_size])  # type: ignore[union-attr]
            yield {**batch, "bank": torch.ones(len(batch["target"]), dtype=torch.bool)}
    for batch in eval_loader(data, recipe.data, rank, world_size):
        yield {**batch, "bank": torch.zeros(len(batch["target"]), dtype=torch.bool)}


def _neighbourhood(recipe: PretrainRecipe, data: ImageData, backbone: nn.Module) -> Neighbourhood:
    """Features of some test images, and which training images lie nearest to an example of each class."""
    device = torch.device("cpu")
    size, spec = recipe.data.eval_batch_size, data.spec

    def features(images: ImageData, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = (indices[i : i + size] for i in range(0, len(indices), size))
        return extract_features(backbone, (images.batch(part) for part in parts), device)  # type: ignore[attr-defined]

    chosen = np.sort(np.random.default_rng(0).permutation(len(data.test))[:_MAP_IMAGES])  # type: ignore[arg-type]
    known, _, known_index = features(data.train, bank_images(recipe, data))  # type: ignore[arg-type]
    test, labels, index = features(data.test, chosen)  # type: ignore[arg-type]
    rows = example_rows(labels.numpy(), seed=0)
    cosines, neighbours = nearest(known, test[rows], _NEIGHBOURS)

    def pictures(images: ImageData, indices: torch.Tensor) -> tuple[list, list[int]]:
        batch = images.batch(indices.tolist())  # type: ignore[attr-defined]
        return [picture(image, spec.mean, spec.std) for image in batch["image"]], batch["target"].tolist()

    queries, query_labels = pictures(data.test, index[rows])  # type: ignore[arg-type]
    near = [pictures(data.train, known_index[row]) for row in neighbours]  # type: ignore[arg-type]
    return Neighbourhood(
        features=test.numpy(),
        labels=labels.numpy(),
        names=data.classes,
        queries=list(zip(queries, query_labels, strict=True)),
        neighbours=[list(zip(*both, row.tolist(), strict=True)) for both, row in zip(near, cosines, strict=True)],
    )
