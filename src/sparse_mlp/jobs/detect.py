"""Detection and instance segmentation: torchvision's detectors over any timm model, on data in COCO's format."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from torch import Tensor

from sparse_mlp import distributed
from sparse_mlp.data import (
    BadImageError,
    display_name,
    find_images,
    read_image,
)
from sparse_mlp.data.coco import CocoConfig, CocoData, open_coco
from sparse_mlp.data.coco_annotations import decode_mask
from sparse_mlp.data.coco_transforms import fitted_size, to_tensor, turn_boxes, turn_masks
from sparse_mlp.distributed import MeshConfig
from sparse_mlp.engine import Evaluation, OptimConfig, RunFolder, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.files import read_json, write_json
from sparse_mlp.jobs.dense import DenseJob, build_feature_maps, load_classes, picture_names
from sparse_mlp.jobs.images import image_loaders
from sparse_mlp.jobs.job import INPUTS, Context, EvalOptions, PredictOptions, Row
from sparse_mlp.jobs.recipe import ModelConfig, Recipe
from sparse_mlp.models.detectors import WITH_MASKS, Detector, DetectorName, paste_masks
from sparse_mlp.report.boxes import draw_objects
from sparse_mlp.report.detection import DetectedImage, Objects, write_detection_report
from sparse_mlp.tasks.coco_metrics import SHOWN_SCORE
from sparse_mlp.tasks.detect import Detect, DetectionEvaluation

_log = logging.getLogger(__name__)

_SHOWN = 4  # best and worst images on the page

RESULTS, ANALYSIS = "detections.json", "analysis.json"
"""Files of a finished run: the detections in COCO's result format, and what the report shows of them."""


@dataclass(frozen=True)
class DetectorConfig:
    """What stands on the backbone."""

    name: DetectorName = "mask_rcnn"
    """mask_rcnn, cascade_mask_rcnn (three stages), faster_rcnn (boxes only) or retinanet (boxes only, one stage)."""

    fpn_channels: int = 256
    """Channels of the feature pyramid network."""

    anchor_size: int = 32
    """Side in pixels of the smallest anchors; each of the five levels doubles it. Smaller for smaller images."""

    samples: int = 512
    """Regions of an image that the heads of an R-CNN are trained on, a quarter of them objects at most (not for
    retinanet, which is trained on all anchors)."""

    def __post_init__(self) -> None:
        for name in ("fpn_channels", "anchor_size", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"detector.{name} {getattr(self, name)} must be at least 1")
        if self.name == "retinanet" and self.samples != 512:
            raise UserError(f"detector.samples {self.samples} would be ignored: retinanet is trained on all anchors")


@dataclass(frozen=True)
class DetectRecipe(Recipe):
    """A complete configuration of a detector's training."""

    kind: ClassVar[str] = "detect"

    model: ModelConfig = field(default_factory=lambda: ModelConfig("cycle_mlp_b1"))
    data: CocoConfig = field(default_factory=CocoConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=12))
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class DetectEvalOptions(EvalOptions):
    """How a detector is evaluated."""

    data: CocoConfig = field(default_factory=CocoConfig)
    """Left out: the images that the run was evaluated on. Other images need the same categories."""

    results: Path | None = None
    """File to write the detections to, in COCO's result format (.json)."""


@dataclass(frozen=True)
class DetectPredictOptions(PredictOptions):
    """How a detector predicts."""

    score: float = SHOWN_SCORE
    """Least score, 0 to 1, of what is given and drawn."""

    pictures: Path = Path("predictions")
    """Folder for what is found in each image: boxes, masks and names drawn over it (NAME.png)."""

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise UserError(f"--score {self.score} is not in [0, 1]")


class DetectJob(DenseJob[DetectRecipe]):
    """A detector learns the objects of images."""

    recipe_type = DetectRecipe
    scores = ("box_map", "box_map50", "mask_map")
    eval_options_type = DetectEvalOptions
    predict_options_type = DetectPredictOptions

    data: CocoData

    def __init__(self, recipe: DetectRecipe, context: Context | None = None) -> None:
        super().__init__(recipe, context)
        if find_spec("pycocotools") is None:
            raise UserError("detection needs pycocotools: pip install 'sparse-mlp[detect]'")
        if self.context.datasets is not None:
            raise UserError("datasets of a program's own are not for detection: give files in COCO's format")
        self.data = data = open_coco(recipe.data, masks=recipe.detector.name in WITH_MASKS)
        self.classes = data.classes
        run = self.context.run
        if run is not None and (run.path / INPUTS).is_file() and load_classes(run) != data.classes:
            raise UserError(f"the categories of {data.truth.path} are not those that {run.path} was trained on")
        self.loaders = image_loaders(data, recipe.data, recipe.train.seed)
        torch.manual_seed(recipe.train.seed)
        self.task = Detect(self.build(recipe, data.classes, self.model_config()), data.truth)

    @classmethod
    def build(cls, recipe: DetectRecipe, classes: tuple[str, ...], config: ModelConfig | None = None) -> Detector:
        """The detector. UserError for a backbone without feature maps."""
        config, data, detector = config or recipe.model, recipe.data, recipe.detector
        published = get_pretrained_cfg(config.name) if ":" not in config.name else None
        # Only a model of one size is built for the largest image; for the others a small one tries out the model.
        size = -(-data.max_side // 32) * 32
        if published is None or not published.fixed_input_size:
            size = min(size, 224)
        maps = build_feature_maps(config, image_size=size)
        return Detector(
            maps,
            detector.name,
            len(classes),
            mean=data.mean or (published.mean if published else IMAGENET_DEFAULT_MEAN),
            std=data.std or (published.std if published else IMAGENET_DEFAULT_STD),
            fpn_channels=detector.fpn_channels,
            anchor_size=detector.anchor_size,
            samples=detector.samples,
        )

    def finish(self, run: RunFolder, evaluation: Evaluation) -> None:
        """COCO's result file, and what the report shows."""
        super().finish(run, evaluation)
        assert isinstance(evaluation, DetectionEvaluation)
        write_json(run.path / RESULTS, evaluation.results)
        write_json(run.path / ANALYSIS, evaluation.analysis)

    def summary(self, evaluation: Evaluation) -> str:
        metrics = evaluation.metrics
        parts = [("box mAP", "box_map"), ("AP50", "box_map50"), ("mask mAP", "mask_map")]
        shown = [f"{name} {metrics[key]:.2%}" for name, key in parts if key in metrics]
        return f"{', '.join(shown)} on {metrics['images']:,.0f} images"

    @classmethod
    def eval_options(cls, run: RunFolder) -> DetectEvalOptions:
        return DetectEvalOptions(data=cls.stored(run).data)

    @classmethod
    def evaluated(cls, recipe: DetectRecipe, options: EvalOptions) -> DetectRecipe:
        assert isinstance(options, DetectEvalOptions)
        return replace(recipe, data=options.data)

    @classmethod
    def evaluate(cls, run: RunFolder, options: EvalOptions, device: torch.device) -> Evaluation:
        """On the run's own images, or on others with the same categories."""
        assert isinstance(options, DetectEvalOptions)
        if options.results is not None and options.results.suffix != ".json":
            raise UserError(f"--results {options.results} must end in .json")
        evaluation = super().evaluate(run, options, device)
        assert isinstance(evaluation, DetectionEvaluation)
        if options.results is not None and distributed.is_main():
            write_json(options.results, evaluation.results)
        return evaluation

    @classmethod
    def predict(cls, run: RunFolder, files: Sequence[str], options: PredictOptions) -> list[Row]:
        """A row for each object: `file`, `picture`, `class`, `probability`, and its box in pixels of the upright image,
        `x`, `y`, `width`, `height`; a row without them for an image without objects, and one with `error` for an image
        that cannot be read.

        FileNotFoundError if there are no images, BadImageError if none can be read.
        """
        assert isinstance(options, DetectPredictOptions)
        paths = find_images(files)
        detector, recipe, classes = cls.load(run, options.checkpoint), cls.stored(run), load_classes(run)
        assert isinstance(detector, Detector)
        options.pictures.mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        for path, stem in zip(paths, picture_names(paths), strict=True):
            name, target = display_name(path), options.pictures / f"{stem}.png"
            try:
                found = _predict_one(detector, recipe.data, classes, path, options.score, target)
                rows += found or [{"file": name, "picture": str(target)}]
            except BadImageError as error:
                rows.append({"file": name, "error": str(error)})
                _log.error("%s", error)
        bad = [row["error"] for row in rows if "error" in row]
        if len(bad) == len(paths):
            raise BadImageError(bad[0] + (f"; nor can the {len(bad) - 1} others" if len(bad) > 1 else ""))
        return rows

    @classmethod
    def image_side(cls, recipe: DetectRecipe) -> int:
        return recipe.data.test_short_side

    @classmethod
    def report(cls, run: RunFolder, context: Context | None = None) -> Path:
        """The page of a run, with the best and the worst images where the data can be opened."""
        recipe, classes = cls.stored(run), load_classes(run)
        if not (run.path / ANALYSIS).is_file():
            return write_detection_report(run.path, classes, None)
        analysis = read_json(run.path / ANALYSIS)
        best: list[DetectedImage] = []
        worst: list[DetectedImage] = []
        try:
            data = open_coco(recipe.data, masks=recipe.detector.name in WITH_MASKS)
            rows = json.loads((run.path / RESULTS).read_text(encoding="utf-8"))
            best, worst = _examples(data, analysis["images"], rows)
        except (UserError, OSError, ValueError) as error:
            _log.warning("the report of %s shows no images: %s", run.path, error)
        return write_detection_report(run.path, classes, analysis, best=best, worst=worst, macs=cls.cost(run)[1])


def _predict_one(
    detector: Detector, data: CocoConfig, classes: Sequence[str], path: Path, score: float, target: Path
) -> list[Row]:
    """The objects of one image from `score` on; drawn into the file `target`."""
    image = read_image(path, 3)
    found = detect_objects(detector, data, to_tensor(image), score)
    boxes, labels = found["boxes"].numpy(), found["labels"].tolist()
    rows: list[Row] = []
    for (x1, y1, x2, y2), label, sure in zip(boxes.tolist(), labels, found["scores"].tolist(), strict=True):
        place = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
        rows.append(
            {
                "file": display_name(path),
                "picture": str(target),
                "class": classes[label],
                "probability": round(sure, 6),
                **{key: round(value, 2) for key, value in place.items()},
            }
        )
    captions = [f"{row['class']} {row['probability']:.0%}" for row in rows]
    masks = found["masks"].numpy() if "masks" in found else None
    draw_objects(image, boxes, labels, captions, len(classes), masks).save(target)
    return rows


def _examples(
    data: CocoData, images: Sequence[Row], rows: Sequence[Row]
) -> tuple[list[DetectedImage], list[DetectedImage]]:
    """Images with objects that were answered best and worst, of equal ones those with more objects."""
    places = {image["id"]: i for i, image in enumerate(data.truth.images)}
    known = [image for image in images if image["image_id"] in places and image["right"] + image["missed"]]
    order = sorted(known, key=lambda image: (-image["f1"], -image["right"] - image["missed"]))
    shown = min(_SHOWN, (len(order) + 1) // 2)
    last = sorted(order[shown:], key=lambda image: (image["f1"], -image["right"] - image["missed"]))[:_SHOWN]
    best, worst = ([_example(data, places, image, rows) for image in part] for part in (order[:shown], last))
    return best, worst


def _example(data: CocoData, places: dict[int, int], image: Row, rows: Sequence[Row]) -> DetectedImage:
    """An image upright, with the objects that it has and those that were found."""
    scene, orientation = data.test.load(places[image["image_id"]])
    record = data.truth.images[places[image["image_id"]]]
    of_image = [row for row in rows if row["image_id"] == image["image_id"] and row["score"] >= SHOWN_SCORE]
    xywh = torch.tensor([row["bbox"] for row in of_image]).reshape(-1, 4)
    boxes = torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), dim=1)
    masks = None
    if of_image and all("segmentation" in row for row in of_image):
        decoded = np.stack([decode_mask(row["segmentation"], record) for row in of_image])
        masks = turn_masks(torch.from_numpy(decoded), orientation).numpy()
    labels = data.truth.labels()
    return DetectedImage(
        name=record["file_name"],
        picture=scene.image,
        truth=Objects(
            scene.boxes.numpy(), scene.labels.tolist(), None, scene.masks.numpy() if scene.masks is not None else None
        ),
        found=Objects(
            turn_boxes(boxes, orientation, record["width"], record["height"]).numpy(),
            [labels[row["category_id"]] for row in of_image],
            [row["score"] for row in of_image],
            masks,
        ),
        right=image["right"],
        missed=image["missed"],
        wrong=image["wrong"],
    )


@torch.no_grad()
def detect_objects(detector: Detector, data: CocoConfig, image: Tensor, score: float) -> dict[str, Tensor]:
    """Objects of an image (C, H, W) uint8 from `score` on: `boxes` in pixels, `labels`, `scores`, `masks` (N, H, W).

    The detector sees it at the size of the evaluation.
    """
    height, width = image.shape[1:]
    size = fitted_size((width, height), data.test_short_side, data.max_side)
    small = torch.nn.functional.interpolate(
        image[None].float() / 255, size=(size[1], size[0]), mode="bilinear", antialias=True, align_corners=False
    )[0]
    found = detector([small])[0]
    kept = found["scores"] >= score
    found = {name: value[kept] for name, value in found.items()}
    found["boxes"] = found["boxes"] * torch.tensor([width / size[0], height / size[1]] * 2)
    if "masks" in found:
        found["masks"] = paste_masks(found["masks"], found["boxes"], (height, width))
    return found
