"""Semantic segmentation: a head over the feature maps of any timm model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from sparse_mlp import weights
from sparse_mlp.data import BadImageError, InputSpec, display_name, find_images, read_image
from sparse_mlp.data.segmentation import (
    SegmentationData,
    open_segmentation,
    resize_short_side,
    to_tensor,
)
from sparse_mlp.data.segmentation_config import SegmentationConfig
from sparse_mlp.distributed import MeshConfig
from sparse_mlp.engine import Evaluation, OptimConfig, RunFolder, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import deploy
from sparse_mlp.jobs.dense import DenseJob, build_backbone, build_feature_maps, load_classes, picture_names
from sparse_mlp.jobs.images import image_loaders
from sparse_mlp.jobs.job import Context, EvalOptions, PredictOptions, ProgramOptions, Row, check_export_target
from sparse_mlp.jobs.model import without_weights
from sparse_mlp.jobs.recipe import ModelConfig, Recipe
from sparse_mlp.models.segmenters import FcnHead, Norm, Segmenter, SemanticFpn, UperNet
from sparse_mlp.models.smp_segmenter import SmpSegmenter, smp_decoders
from sparse_mlp.report.cost import count_macs
from sparse_mlp.report.overlay import overlay, with_legend
from sparse_mlp.report.predictions import read_arrays
from sparse_mlp.report.segmentation import SegmentedImage, write_segmentation_report
from sparse_mlp.tasks.segment import InferenceConfig, Segment, SegmentConfig, segment_images

_log = logging.getLogger(__name__)

_HEADS: dict[str, Any] = {"upernet": UperNet, "semantic_fpn": SemanticFpn}
_SHOWN = 4  # best and worst images on the page


@dataclass(frozen=True)
class HeadConfig:
    """What makes classes of pixels from the feature maps."""

    name: str = "upernet"
    """upernet, semantic_fpn, or smp_ and a decoder of segmentation-models-pytorch: smp_unet, smp_fpn, smp_segformer,
    ... (pip install 'sparse-mlp[segment]')."""

    width: int | None = None
    """Channels of the head. Left out: as published (upernet 512, semantic_fpn 128)."""

    dropout: float = 0.1
    """Share of channels dropped before the classifier, in training."""

    norm: Norm = "batch"
    """batch, over all ranks; or group, which does not depend on the batch."""


@dataclass(frozen=True)
class SegmentRecipe(Recipe):
    """A complete configuration of a segmenter's training."""

    kind: ClassVar[str] = "segment"

    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: SegmentationConfig = field(default_factory=SegmentationConfig)
    task: SegmentConfig = field(default_factory=SegmentConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=50))
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class SegmentEvalOptions(EvalOptions):
    """How a segmenter is evaluated."""

    root: str | None = None
    """Folder of the same layout. Left out: the run's own."""

    split: str | None = None
    """Split to evaluate on. Left out: the run's own test split."""

    inference: InferenceConfig = field(default_factory=InferenceConfig)


@dataclass(frozen=True)
class SegmentPredictOptions(PredictOptions):
    """How a segmenter predicts."""

    pictures: Path = Path("predictions")
    """Folder for what is found in each image: its classes as colours over it with their legend (NAME.png), and as a
    mask of class numbers (NAME.mask.png)."""

    inference: InferenceConfig | None = None
    """Left out: the run's own."""


class SegmentJob(DenseJob[SegmentRecipe]):
    """A timm model and a head learn the class of every pixel."""

    recipe_type = SegmentRecipe
    scores = ("miou", "pixel_accuracy")
    eval_options_type = SegmentEvalOptions
    predict_options_type = SegmentPredictOptions
    data: SegmentationData
    free = DenseJob.free | {"inference.window", "inference.stride", "inference.scales", "inference.flip"}

    def __init__(self, recipe: SegmentRecipe, context: Context | None = None) -> None:
        super().__init__(recipe, context)
        if self.context.datasets is not None:
            raise UserError("datasets of your own are for classification: a segmentation run reads a folder")
        self.data = data = open_segmentation(recipe.data)
        self.classes = data.classes
        if self.context.run is not None and self.classes != (known := load_classes(self.context.run)):
            raise UserError(f"the set has the classes {self.classes}, {self.context.run.path} was trained on {known}")
        self.loaders = image_loaders(data, recipe.data, recipe.train.seed)
        torch.manual_seed(recipe.train.seed)
        model = self.build(recipe, self.classes, self.model_config())
        self.task = Segment(model, self.classes, recipe.task, recipe.inference)

    @classmethod
    def build(
        cls, recipe: SegmentRecipe, classes: tuple[str, ...], config: ModelConfig | None = None
    ) -> Segmenter | SmpSegmenter:
        config, head = config or recipe.model, recipe.head
        if not 0 <= head.dropout < 1 or (head.width is not None and head.width < 1):
            raise UserError(f"head.dropout {head.dropout} and head.width {head.width} are not a share and a width")
        if head.name.startswith("smp_"):
            return _build_smp(config, recipe, len(classes))
        if head.name not in _HEADS:
            raise UserError(f"unknown head {head.name!r}; allowed are {', '.join(_HEADS)} and smp_NAME")
        maps = build_feature_maps(config, image_size=recipe.data.image_size)
        options: dict[str, Any] = {"dropout": head.dropout, "norm": head.norm}
        options |= {} if head.width is None else {"width": head.width}
        decoder = _HEADS[head.name](maps.channels, len(classes), **options)
        auxiliary = None
        if head.name == "upernet" and recipe.task.auxiliary_weight > 0:
            auxiliary = FcnHead(maps.channels[-2], len(classes), dropout=head.dropout, norm=head.norm)
        return Segmenter(maps, decoder, auxiliary)

    @classmethod
    def image_side(cls, recipe: SegmentRecipe) -> int:
        return recipe.data.image_size

    def predictions(self, evaluation: Evaluation) -> dict[str, np.ndarray]:
        found = evaluation.predictions
        return found and {**found, "files": np.array([self.data.test.pairs[int(i)].name for i in found["index"]])}

    def summary(self, evaluation: Evaluation) -> str:
        metrics = evaluation.metrics
        images = f"{metrics['images']:,.0f} images"
        return f"mean IoU {metrics['miou']:.2%}, pixel accuracy {metrics['pixel_accuracy']:.2%} of {images}"

    @classmethod
    def eval_options(cls, run: RunFolder) -> SegmentEvalOptions:
        return SegmentEvalOptions(inference=cls.stored(run).inference)

    @classmethod
    def evaluated(cls, recipe: SegmentRecipe, options: EvalOptions) -> SegmentRecipe:
        assert isinstance(options, SegmentEvalOptions)
        data = replace(
            recipe.data,
            root=options.root or recipe.data.root,
            test_split=options.split or recipe.data.test_split,
        )
        return replace(recipe, data=data, inference=options.inference)

    @classmethod
    def predict(cls, run: RunFolder, files: Sequence[str], options: PredictOptions) -> list[Row]:
        """For each image its picture and mask, and the classes in it with their shares of its pixels."""
        assert isinstance(options, SegmentPredictOptions)
        recipe, classes, paths = cls.stored(run), load_classes(run), find_images(files)
        inference = options.inference or recipe.inference
        model = cls.load(run, options.checkpoint)
        assert isinstance(model, Segmenter | SmpSegmenter)
        options.pictures.mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        for path, name in zip(paths, picture_names(paths), strict=True):
            row: Row = {"file": display_name(path)}
            rows.append(row)
            try:
                image = read_image(path, 3)
            except BadImageError as error:
                row["error"] = str(error)
                _log.error("%s", error)
                continue
            found = classify_pixels(model, image, recipe.data.short_side, inference)
            picture, mask = options.pictures / f"{name}.png", options.pictures / f"{name}.mask.png"
            with_legend(overlay(image, found, len(classes)), found, classes).save(picture)
            Image.fromarray(found).save(mask)
            row |= {"picture": str(picture), "mask": str(mask)}
            shares = np.bincount(found.ravel(), minlength=len(classes)) / found.size
            for rank, c in enumerate(np.argsort(-shares, kind="stable")[: np.count_nonzero(shares)], 1):
                row |= {f"class_{rank}": classes[c], f"share_{rank}": round(float(shares[c]), 6)}
        if all("error" in row for row in rows):
            raise BadImageError(str(rows[0]["error"]))
        return rows

    @classmethod
    def export_program(cls, run: RunFolder, target: Path, options: ProgramOptions) -> str:
        """ONNX or torch.export: logits (B, classes, H, W) of normalised images, without windows, scales and flips."""
        deploy.check_target(target, options.to)
        if options.int8 or options.weight_only:
            raise UserError("--int8 is for runs of the kind classify, whose accuracy in 8 bits is measured")
        model, recipe = cls.load(run), cls.stored(run)
        assert isinstance(model, Segmenter | SmpSegmenter)
        side = (model.fixed_size or (recipe.data.image_size,))[0]
        spec = InputSpec(load_classes(run), 3, side, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, 1.0)
        program = deploy.export(model, recipe.model.name, spec, options.to, target, fixed=model.fixed_size is not None)
        return deploy.usage(program, options.to, spec)

    @classmethod
    def report(cls, run: RunFolder, context: Context | None = None) -> Path:
        """The page of a run, with the best and the worst test images where the data can be opened."""
        recipe, classes = cls.stored(run), load_classes(run)
        path = run.path / "predictions.npz"
        if not run.has_checkpoint() or not path.is_file():
            return write_segmentation_report(run.path, classes, None)
        evaluated = read_arrays(path, ("iou", "confusion", "class_iou", "files"))
        model = cls.load(run)
        assert isinstance(model, Segmenter | SmpSegmenter)
        macs = count_macs(model, 3, cls.image_side(recipe))[""]
        best: list[SegmentedImage] = []
        worst: list[SegmentedImage] = []
        try:
            data = open_segmentation(recipe.data)
            best, worst = _examples(model, data, evaluated, recipe)
        except (UserError, OSError) as error:
            _log.warning("the report of %s shows no images: %s", run.path, error)
        return write_segmentation_report(run.path, classes, evaluated, best=best, worst=worst, macs=macs)


def convert_mmseg(source: Path, recipe: SegmentRecipe, target: Path) -> int:
    """Write mmsegmentation's checkpoint of a recipe's model as safetensors in our layout; returns how many tensors.

    The recipe decides on backbone and head, the file on the number of classes. UserError, with the lists of names, for
    weights that do not fit; FileNotFoundError if there is no such file.
    """
    check_export_target(target)
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    stored = weights.read_file(source)
    stored = {str(name).removeprefix("module."): value for name, value in stored.get("state_dict", stored).items()}
    head = weights.head_from_mmseg(stored)
    if "head.classify.weight" not in head:
        raise UserError(f"{source} has no decode_head.conv_seg: it is no segmenter of mmsegmentation's")
    classes = len(head["head.classify.weight"])
    with torch.device("meta"):
        model = SegmentJob.build(recipe, ("",) * classes, without_weights(recipe.model))
    backbone = weights.adapt({k: v for k, v in stored.items() if k.startswith("backbone.")}, model.model)
    found = head | {f"maps.getter.model.{name}": value for name, value in backbone.items()}
    expected = weights.shapes(model.state_dict())
    weights.add_batch_counters(found, expected)
    weights.check_fit(weights.shapes(found), expected, f"the weights in {source} do not fit {recipe.name}")
    weights.write_file(found, target, {"format": "pt", "recipe": recipe.name})
    return len(found)


def _build_smp(config: ModelConfig, recipe: SegmentRecipe, classes: int) -> SmpSegmenter:
    """The backbone of a recipe under a decoder of segmentation-models-pytorch, as that library builds it."""
    head, default = recipe.head, HeadConfig()
    given = [name for name in ("width", "dropout", "norm") if getattr(head, name) != getattr(default, name)]
    if given:
        name, value = given[0], getattr(default, given[0])
        own = f"{head.name} has its own; give --head.{name} {value}"
        raise UserError(f"head.{name} {getattr(head, name)} would be ignored: {own}")
    if config.args:
        raise UserError(
            f"model.args {config.args} would be ignored: {head.name} builds {config.name} without arguments"
        )
    decoder = head.name.removeprefix("smp_")
    try:
        known = smp_decoders()
    except ImportError:
        raise UserError(
            f"head {head.name} needs segmentation-models-pytorch: pip install 'sparse-mlp[segment]'"
        ) from None
    if decoder not in known:
        raise UserError(f"unknown head {head.name!r}; allowed are {', '.join(f'smp_{name}' for name in known)}")
    model = build_backbone(config, image_size=recipe.data.image_size)
    try:
        return SmpSegmenter(model, config.name, decoder, classes)
    except ValueError as error:
        raise UserError(str(error)) from error


def classify_pixels(
    model: Segmenter | SmpSegmenter, image: Image.Image, short_side: int | None, inference: InferenceConfig
) -> np.ndarray:
    """The class of every pixel of an RGB image, (H, W) uint8."""
    with torch.inference_mode():
        pixels = to_tensor(resize_short_side(image, short_side))[None]
        return segment_images(model, pixels, image.size[::-1], inference).argmax(dim=1)[0].to(torch.uint8).numpy()


def _examples(
    model: Segmenter | SmpSegmenter, data: SegmentationData, evaluated: dict[str, np.ndarray], recipe: SegmentRecipe
) -> tuple[list[SegmentedImage], list[SegmentedImage]]:
    """The test images with the highest and the lowest IoU, found by their names."""
    places = {pair.name: i for i, pair in enumerate(data.test.pairs)}
    order = [int(i) for i in np.argsort(-evaluated["iou"], kind="stable") if np.isfinite(evaluated["iou"][i])]
    order = [i for i in order if str(evaluated["files"][i]) in places]
    shown = min(_SHOWN, (len(order) + 1) // 2)
    parts: list[list[SegmentedImage]] = []
    for part in (order[:shown], order[shown:][-shown:][::-1]):
        parts.append([])
        for i in part:
            name = str(evaluated["files"][i])
            image, truth = data.test.read(places[name])
            found = classify_pixels(model, image, recipe.data.short_side, recipe.inference)
            parts[-1].append(SegmentedImage(name, image, truth, found, float(evaluated["iou"][i])))
    return parts[0], parts[1]
