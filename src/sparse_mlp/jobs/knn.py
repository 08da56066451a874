"""kNN classification with a pre-trained backbone's features: an evaluation as a run, without training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch

from sparse_mlp import distributed
from sparse_mlp.data import AugmentConfig, DataConfig, eval_loader
from sparse_mlp.engine import Batch, Evaluation, RunFolder
from sparse_mlp.engine.logging import MetricsLog
from sparse_mlp.errors import UserError
from sparse_mlp.jobs.classify import predict_pictures, with_file_names
from sparse_mlp.jobs.images import ImageJob, load_inputs, open_images
from sparse_mlp.jobs.job import Context, EvalOptions, PredictOptions, Row
from sparse_mlp.jobs.model import build_model
from sparse_mlp.jobs.recipe import ModelConfig, Recipe
from sparse_mlp.tasks import Classify, extract_features, weighted_knn
from sparse_mlp.tasks.features import pooled_features
from sparse_mlp.tasks.metrics import top_accuracies

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnnConfig:
    """The vote of the nearest training images."""

    k: int = 20
    """Neighbours that vote."""

    temperature: float = 0.07
    """A neighbour's vote is exp(cosine / temperature)."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"task.k {self.k} must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"task.temperature {self.temperature} is not positive and finite")


@dataclass(frozen=True)
class KnnRecipe(Recipe):
    """A complete configuration of a kNN evaluation."""

    kind: ClassVar[str] = "knn"

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: KnnConfig = field(default_factory=KnnConfig)
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""


class KnnJob(ImageJob[KnnRecipe]):
    """Each test image is classified by the training images whose features are nearest by cosine."""

    recipe_type = KnnRecipe
    scores = ("top1", "top5")
    free: ClassVar[frozenset[str]] = ImageJob.free | {"device"}

    def __init__(self, recipe: KnnRecipe, context: Context | None = None) -> None:
        super().__init__(recipe, context)
        self.data = open_images(recipe.data, AugmentConfig(), self.context)
        self.task = Classify(build_model(self.model_config(), self.data.spec), class_names=self.data.classes)

    @classmethod
    def device_of(cls, recipe: KnnRecipe) -> str:
        return recipe.device

    def prepare(self, run: RunFolder, device: torch.device) -> None:
        """There is no trainer."""
        if self.recipe.model.optimizer_state:
            raise UserError("model.optimizer_state would be ignored: nothing is trained")
        self.check_folder(run)

    def fit(self, run: RunFolder, device: torch.device, *, resume: bool, show: bool) -> Evaluation:
        """Classify the test images; every rank does all of it."""
        backbone = self.task.backbone().to(device)
        features, labels, _ = extract_features(backbone, self.train_batches(), device)
        queries, target, index = extract_features(backbone, eval_loader(self.data, self.recipe.data), device)
        config = self.recipe.task
        votes = weighted_knn(features, labels, queries, len(self.data.classes), config.k, config.temperature)
        shares = votes / votes.sum(1, keepdim=True)
        metrics = {**top_accuracies(votes, target), "images": len(target)}
        if distributed.is_main():
            with MetricsLog(run, 0, _log.warning) as log:
                log.write("eval", 0, 0.0, 0.0, {"split": "test", **metrics, "ema": False})
        logits = shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
        return Evaluation(metrics, {"index": index.numpy(), "target": target.numpy(), "logits": logits.numpy()})

    def train_batches(self) -> Iterable[Batch]:
        """The training images as they are evaluated."""
        return eval_loader(replace(self.data, test=self.data.train), self.recipe.data)

    def predictions(self, evaluation: Evaluation) -> dict[str, np.ndarray]:
        return with_file_names(evaluation.predictions, self.data)

    def summary(self, evaluation: Evaluation) -> str:
        return f"kNN top-1 {evaluation.metrics['top1']:.2%} of {evaluation.metrics['images']:,} images"

    @classmethod
    def evaluate(cls, run: RunFolder, options: EvalOptions, device: torch.device) -> Evaluation:
        raise UserError(f"{run.path} is an evaluation already: its result is in {run.results_path.name}")

    @classmethod
    def predict(cls, run: RunFolder, files: Sequence[str], options: PredictOptions) -> list[Row]:
        """The class that the nearest training images vote for, and its share of the votes."""
        if options.checkpoint is not None:
            raise UserError(f"--checkpoint {options.checkpoint} would be ignored: the weights are the recipe's")
        job = cls(cls.stored(run), Context(run, trusted=options.trust_data))
        backbone, spec, config = job.task.backbone(), load_inputs(run), job.recipe.task
        features, labels, _ = extract_features(backbone, job.train_batches(), torch.device("cpu"))

        def vote(images: torch.Tensor) -> list[Row]:
            queries = pooled_features(backbone.eval(), images).float()
            votes = weighted_knn(features, labels, queries, len(spec.classes), config.k, config.temperature)
            share, best = (votes / votes.sum(1, keepdim=True)).max(1)
            return [
                {"class_1": spec.classes[index], "probability_1": round(value, 6)}
                for value, index in zip(share.tolist(), best.tolist(), strict=True)
            ]

        return predict_pictures(files, spec, vote)
