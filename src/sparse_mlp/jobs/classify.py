"""Image classification: training from scratch, fine-tuning, transfer, linear probes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from sparse_mlp.data import (
    AugmentConfig,
    BadImageError,
    DataConfig,
    ImageData,
    InputSpec,
    display_name,
    eval_loader,
    find_images,
    read_image,
)
from sparse_mlp.data.sets import ignored_options
from sparse_mlp.distributed import MeshConfig
from sparse_mlp.engine import Evaluation, Loaders, OptimConfig, RunFolder, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import deploy
from sparse_mlp.jobs.capacity_curve import write_capacity_curve
from sparse_mlp.jobs.images import (
    ImageJob,
    RoutingReportOptions,
    file_names,
    first_images,
    image_loaders,
    image_source,
    load_inputs,
    load_model_config,
    load_split,
    load_trained,
    log_notes,
    open_images,
    samples,
)
from sparse_mlp.jobs.job import Context, EvalOptions, PredictOptions, ProgramOptions, Row, evaluation_batches
from sparse_mlp.jobs.model import build_model
from sparse_mlp.jobs.recipe import InferenceConfig, ModelConfig, Recipe
from sparse_mlp.report import write_classification_report, write_predictions_csv
from sparse_mlp.report.cost import count_macs
from sparse_mlp.tasks import Classify, ClassifyConfig, Probe

_log = logging.getLogger(__name__)

_OF_TRAINING = ("label_share", "label_seed", "repeats")  # options that say nothing of an evaluation
_BATCH_SIZE = 64  # of predictions


@dataclass(frozen=True)
class ClassifyRecipe(Recipe):
    """A complete configuration of a classifier's training."""

    kind: ClassVar[str] = "classify"

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    task: ClassifyConfig = field(default_factory=ClassifyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10))
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class ClassifyEvalOptions(EvalOptions):
    """How a classifier is evaluated."""

    data: DataConfig = field(default_factory=DataConfig)
    """Left out: the run's own images, split as they were. The classes of another set are matched by name."""

    model: InferenceConfig = field(default_factory=InferenceConfig)

    curve: bool = False
    """Evaluate also with less computation for the experts, at several capacities; the report draws the curve."""


@dataclass(frozen=True)
class ClassifyPredictOptions(PredictOptions):
    """How a classifier predicts."""

    top: int = 5
    """How many classes to give for each image."""

    model: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"--top {self.top} must be at least 1")


class ClassifyJob(ImageJob[ClassifyRecipe]):
    """A timm model learns the classes of images."""

    recipe_type = ClassifyRecipe
    scores = ("top1", "top5")
    eval_options_type = ClassifyEvalOptions
    predict_options_type = ClassifyPredictOptions
    report_options_type = RoutingReportOptions

    def __init__(self, recipe: ClassifyRecipe, context: Context | None = None) -> None:
        super().__init__(recipe, context)
        if recipe.task.frozen and recipe.train.compile:
            raise UserError("train.compile would be ignored: a frozen backbone only gives its features")
        self.data = data = open_images(recipe.data, recipe.augment, self.context)
        self.loaders = image_loaders(data, recipe.data, recipe.train.seed)
        torch.manual_seed(recipe.train.seed)
        model = build_model(self.model_config(), data.spec, first_images(self.loaders.train))
        self.task = (Probe if recipe.task.frozen else Classify)(model, recipe.task, class_names=data.classes)

    def predictions(self, evaluation: Evaluation) -> dict[str, np.ndarray]:
        return with_file_names(evaluation.predictions, self.data)

    def finish(self, run: RunFolder, evaluation: Evaluation) -> None:
        super().finish(run, evaluation)
        write_predictions_csv(run.path / "predictions.csv", self.predictions(evaluation), self.data.classes)

    def summary(self, evaluation: Evaluation) -> str:
        return f"top-1 {evaluation.metrics['top1']:.2%} of {evaluation.metrics['images']:,.0f} images"

    @classmethod
    def eval_options(cls, run: RunFolder) -> ClassifyEvalOptions:
        return ClassifyEvalOptions(data=cls.stored(run).data)

    @classmethod
    def evaluate(cls, run: RunFolder, options: EvalOptions, device: torch.device) -> Evaluation:
        """On the run's own data split as it was stored, or on other images with classes of the same names."""
        assert isinstance(options, ClassifyEvalOptions)
        recipe, spec = cls.stored(run), load_inputs(run)
        images = options.data
        own = images.name == recipe.data.name and (images.root == recipe.data.root or _is_moved(run, recipe, images))
        if own and images.test_share != recipe.data.test_share:
            raise UserError(f"data.test_share {images.test_share} would be ignored: {run.path} keeps its own split")
        if not own:
            images = _other_images(images, recipe.data, spec)
        context = Context(run if own else None, trusted=options.trust_data or not own)
        data = open_images(images, AugmentConfig(), context, classes=spec.classes)
        log_notes(data.notes)
        spec = replace(data.spec, classes=spec.classes)
        model = load_trained(run, options.checkpoint, spec, options.model.args)
        if options.curve:
            if not own:
                raise UserError("--curve is of the run's own images")
            write_capacity_curve(
                run, model, spec, lambda m: evaluate_model(m, recipe.task, data, images, device).metrics["top1"]
            )
        return evaluate_model(model, recipe.task, data, images, device)

    @classmethod
    def predict(cls, run: RunFolder, files: Sequence[str], options: PredictOptions) -> list[Row]:
        """For each image its likeliest classes and their probabilities, `class_1`, `probability_1`, `class_2`, ..."""
        assert isinstance(options, ClassifyPredictOptions)
        spec, model = load_inputs(run), load_trained(run, options.checkpoint, args=options.model.args)
        top = min(options.top, len(spec.classes))

        def classify(images: torch.Tensor) -> list[Row]:
            best = model(images).float().softmax(1).topk(top)
            return [
                _top_classes(*row, spec.classes)
                for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]

        return predict_pictures(files, spec, classify)

    @classmethod
    def report(cls, run: RunFolder, context: Context | None = None) -> Path:
        """The page of a run, with images and their routing where the data can be opened and are not a stream."""
        if not run.has_checkpoint():
            return write_classification_report(run.path)
        spec, model = load_inputs(run), load_trained(run)
        macs = count_macs(model, spec.channels, spec.image_size)[""]
        try:
            data = open_images(cls.stored(run).data, AugmentConfig(), context or Context(run), classes=spec.classes)
        except (UserError, OSError) as error:
            _log.warning("the report of %s shows no images: %s", run.path, error)
            return write_classification_report(run.path, macs=macs)
        return write_classification_report(run.path, model, samples(run, data), image_source(data, macs), macs=macs)

    @classmethod
    def export_program(cls, run: RunFolder, target: Path, options: ProgramOptions) -> str:
        """ONNX or torch.export, logits of normalised images; in 8 bits with the accuracy before and after."""
        deploy.check_target(target, options.to)
        if options.int8 and options.to != "onnx":
            raise UserError(f"--int8 would be ignored: it is of --to onnx, not of --to {options.to}")
        if options.weight_only and not options.int8:
            raise UserError("--weight-only would be ignored: it is of --int8")
        parts = load_trained(run), load_model_config(run).name, load_inputs(run)
        if not options.int8:
            return deploy.usage(deploy.export(*parts, options.to, target), options.to, parts[2])

        def batches() -> Iterable[Any]:
            data = cls.stored(run).data
            return eval_loader(open_images(data, AugmentConfig(), Context(run, trusted=options.trust_data)), data)

        return deploy.export_in_8_bits(*parts, target, batches, weight_only=options.weight_only)


def evaluate_model(
    model: nn.Module, config: ClassifyConfig, data: ImageData, images: DataConfig, device: torch.device
) -> Evaluation:
    """Loss, top-1 and top-5 of a model on the test images; collective."""
    task = Classify(model, replace(config, frozen=False), class_names=data.classes).to(device)
    loaders = Loaders(train=_no_training, evaluate=partial(eval_loader, data, images), batch_size=1, steps_per_epoch=1)
    result = task.evaluate(evaluation_batches(loaders), device)
    return Evaluation(result.metrics, with_file_names(result.predictions, data))


def with_file_names(predictions: dict[str, np.ndarray], data: ImageData) -> dict[str, np.ndarray]:
    """Predictions with the array `files` where the test images are files."""
    names = file_names(data.test, predictions["index"].tolist()) if predictions else None
    return {**predictions, "files": np.array(names)} if names else predictions


def _top_classes(probabilities: Sequence[float], indices: Sequence[int], classes: Sequence[str]) -> Row:
    row: Row = {}
    for rank, (probability, index) in enumerate(zip(probabilities, indices, strict=True), 1):
        row |= {f"class_{rank}": classes[index], f"probability_{rank}": round(probability, 6)}
    return row


def predict_pictures(
    files: Sequence[str], spec: InputSpec, predict: Callable[[torch.Tensor], Sequence[Row]]
) -> list[Row]:
    """A row for each image file: what `predict` gives for a batch (B, C, H, W), or the `error` why it cannot be read.

    FileNotFoundError if there are no images, BadImageError if none can be read.
    """
    paths = find_images(files)
    rows: list[Row] = [{"file": display_name(file)} for file in paths]
    for start in range(0, len(paths), _BATCH_SIZE):
        images = {}
        for number, file in enumerate(paths[start : start + _BATCH_SIZE], start):
            try:
                images[number] = spec.transform(read_image(file, spec.channels))
            except BadImageError as error:
                rows[number]["error"] = str(error)
        if images:
            with torch.no_grad():
                predicted = predict(torch.stack(list(images.values())))
            for number, row in zip(images, predicted, strict=True):
                rows[number] |= row
    bad = [row["error"] for row in rows if "error" in row]
    if len(bad) == len(rows):
        raise BadImageError(bad[0] + (f"; nor can the {len(bad) - 1} others" if len(bad) > 1 else ""))
    for reason in bad:
        _log.error("%s", reason)
    return rows


def _other_images(images: DataConfig, trained: DataConfig, spec: InputSpec) -> DataConfig:
    """Another set in the input format of the model, without the options that were given for the run's own set."""
    default, dropped = DataConfig(), ["test_share", *_OF_TRAINING]
    if images.name != trained.name:
        dropped += ["num_classes", *ignored_options(images.name)]
    changed = {n: getattr(default, n) for n in dropped if getattr(images, n) == getattr(trained, n)}
    images = replace(images, **changed)
    if images.name == "folder" and images.test_share is None and not (Path(images.root or "") / "train").is_dir():
        images = replace(images, test_share=1.0)  # not trained on: evaluate on all of it
    cropped = images.name == "folder" or "/" in images.name
    return replace(
        images,
        image_size=images.image_size or spec.image_size,
        channels=images.channels or spec.channels,  # type: ignore[arg-type]
        mean=images.mean or spec.mean,
        std=images.std or spec.std,
        crop_pct=images.crop_pct or (spec.crop_pct if cropped else None),
    )


def _is_moved(run: RunFolder, recipe: ClassifyRecipe, images: DataConfig) -> bool:
    """Whether a folder that was named is the run's own in another place: it has every image that the run divided."""
    split = load_split(run)
    if split is None or images.root is None or images.test_share != recipe.data.test_share:
        return False
    names = [*split["train"], *split["test"]]
    if not all((Path(images.root) / name).is_file() for name in names):
        return False
    _log.info(
        "%s has the images of the run: those that it was tested on count; --data.test-share 1 takes all", images.root
    )
    return True


def _no_training(**_: Any) -> Iterable[Any]:
    raise AssertionError("a model that is only evaluated has no training data")
