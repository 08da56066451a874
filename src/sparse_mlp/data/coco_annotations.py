"""COCO's annotation files: read, checked record by record, and held against detections by pycocotools.

Boxes, polygons and masks are in the pixel frame of `width` x `height` that the file states for an image.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from sparse_mlp.errors import UserError

Record = dict[str, Any]
Reason = tuple[str, str]
"""Why a record is bad: the kind of fault, in the plural, and the sentence that names the record."""


@dataclass(frozen=True)
class Annotations:
    """The records of an annotation file that can be used.

    images: `id`, `file_name`, `width`, `height` of each. objects: by image id its annotations, crowds included; each
    has `id`, `category_id`, `bbox` [x, y, w, h], `area`, `iscrowd` and, where there is one, `segmentation`.
    category_ids: ascending; label i is category_ids[i], of the name classes[i].
    """

    path: Path
    images: list[Record]
    objects: dict[int, list[Record]]
    category_ids: tuple[int, ...]
    classes: tuple[str, ...]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """The records that were skipped: for every kind of fault one sentence a record."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Annotations:
        return self  # never changed, and large: a moving average of a task shares it

    @property
    def notes(self) -> list[str]:
        """One line for each kind of fault that was skipped."""
        return [f"{self.path}: left out {len(of)} {kind}: {of[0]}" for kind, of in self.left_out.items()]

    def labels(self) -> dict[int, int]:
        return {category: label for label, category in enumerate(self.category_ids)}

    def subset(self, images: Sequence[Record]) -> Annotations:
        """Only these of its images."""
        objects = {image["id"]: self.objects.get(image["id"], []) for image in images}
        return Annotations(self.path, list(images), objects, self.category_ids, self.classes, self.left_out)

    def ground_truth(self, image_ids: Sequence[int]) -> Any:
        """A pycocotools.coco.COCO of these images. Annotations are numbered anew from 1: to COCOeval 0 is no match."""
        from pycocotools.coco import COCO

        kept = set(image_ids)
        objects = [record for image in image_ids for record in self.objects.get(image, [])]
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [image for image in self.images if image["id"] in kept],
            "annotations": [{**record, "id": number} for number, record in enumerate(objects, 1)],
            "categories": [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)],
        }
        with quiet():
            truth.createIndex()
        return truth


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep pycocotools from printing."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def read_annotations(
    path: Path, *, on_bad_record: Literal["error", "skip"] = "error", masks: bool = True
) -> Annotations:
    """Read a file of COCO's format. With `masks` every object needs a polygon or a run-length code.

    UserError, one line that names the record, for the first bad one; with `skip` they are left out and counted.
    Categories that repeat and files without the three lists are always errors.
    """
    content = _read(path)
    category_ids, classes = _categories(content["categories"], path)
    left_out: dict[str, list[str]] = {}

    def reject(reason: Reason) -> None:
        if on_bad_record == "error":
            raise UserError(f"{path}: {reason[1]}; data.on_bad_record skip leaves such records out")
        left_out.setdefault(reason[0], []).append(reason[1])

    images: dict[int, Record] = {}
    for number, image in enumerate(content["images"]):
        fault = _image_fault(image, number, images)
        if fault:
            reject(fault)
        else:
            images[image["id"]] = {name: image[name] for name in ("id", "file_name", "width", "height")}
    objects: dict[int, list[Record]] = {}
    seen: set[int] = set()
    known = set(category_ids)
    for number, record in enumerate(content["annotations"]):
        fault = _fault(record, number, images, known, seen, masks)
        if fault:
            reject(fault)
        else:
            seen.add(record["id"])
            objects.setdefault(record["image_id"], []).append(_clean(record, images[record["image_id"]]))
    return Annotations(path, list(images.values()), objects, category_ids, classes, left_out)


def _read(path: Path) -> Record:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from error
    names = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in names):
        raise UserError(f"{path} is no COCO annotation file: it needs the lists {', '.join(names)}")
    return content


def _categories(records: Sequence[Any], path: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids, ascending (they may have holes), and names."""
    names: dict[int, str] = {}
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not _is_id(record.get("id")) or not isinstance(record.get("name"), str):
            raise UserError(f"{path}: categories[{number}] {_short(record)} needs an integer id and a name")
        if record["id"] in names:
            raise UserError(f"{path}: two categories have the id {record['id']}")
        if record["name"] in names.values():
            raise UserError(f"{path}: two categories have the name {record['name']!r}")
        names[record["id"]] = record["name"]
    if not names:
        raise UserError(f"{path} has no categories")
    return tuple(sorted(names)), tuple(names[i] for i in sorted(names))


def _image_fault(image: Any, number: int, images: Mapping[int, Record]) -> Reason | None:
    if not isinstance(image, dict) or not _is_id(image.get("id")):
        return "images without an id", f"images[{number}] {_short(image)} has no integer id"
    name = image.get("file_name")
    if not isinstance(name, str) or not name or name.startswith("/") or ".." in PurePosixPath(name).parts:
        return (
            "images without a file",
            f"image {image['id']} has the file_name {name!r}, not one below the image folder",
        )
    if image["id"] in images:
        return "images with the id of another", f"two images have the id {image['id']}"
    if not all(_is_id(image.get(side)) and image[side] > 0 for side in ("width", "height")):
        return "images without a size", f"image {image['id']} ({name}) has no width and height in pixels"
    return None


def _fault(
    record: Any, number: int, images: Mapping[int, Record], known: set[int], seen: set[int], masks: bool
) -> Reason | None:
    """What is wrong with an annotation."""
    if not isinstance(record, dict) or not _is_id(record.get("id")):
        return "annotations without an id", f"annotations[{number}] {_short(record)} has no integer id"
    name = f"annotation {record['id']}"
    if record["id"] in seen:
        return "annotations with the id of another", f"two annotations have the id {record['id']}"
    image = images.get(record["image_id"]) if _is_id(record.get("image_id")) else None
    if image is None:
        return "annotations without an image", f"{name} is of image {record.get('image_id')!r}, which is not there"
    name = f"{name} of image {image['id']} ({image['file_name']})"
    if not _is_id(record.get("category_id")) or record["category_id"] not in known:
        return (
            "annotations without a category",
            f"{name} is of category {record.get('category_id')!r}, which is not there",
        )
    if record.get("iscrowd", 0) not in (0, 1):
        return "annotations with another iscrowd than 0 or 1", f"{name} has iscrowd {record['iscrowd']!r}"
    return _box_fault(record.get("bbox"), name, image) or _mask_fault(record, name, image, masks)


def _box_fault(box: Any, name: str, image: Record) -> Reason | None:
    if not _are_numbers(box) or len(box) != 4:
        return "annotations without a box", f"{name} has the bbox {_short(box)}, not four numbers [x, y, width, height]"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "boxes of no area", f"the bbox {box} of {name} has no area"
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        size = f"{image['width']} x {image['height']}"
        return "boxes outside of their image", f"the bbox {box} of {name} lies outside of the image, which is {size}"
    return None


def _mask_fault(record: Record, name: str, image: Record, masks: bool) -> Reason | None:
    shape = record.get("segmentation")
    if shape is None or shape == []:
        return ("objects without a mask", f"{name} has no segmentation") if masks else None
    if isinstance(shape, list):
        right = all(_are_numbers(polygon) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in shape)
        return None if right else ("malformed polygons", f"{name} has a polygon that is no list of three or more x, y")
    size = [image["height"], image["width"]]
    counts = shape.get("counts") if isinstance(shape, dict) else None
    if counts is None or not isinstance(counts, list | str):
        return "malformed masks", f"{name} has a segmentation that is neither polygons nor a run-length code"
    if shape.get("size") != size:
        return "masks of another size", f"{name} has a mask of the size {shape.get('size')}, its image has {size}"
    if isinstance(counts, list) and not (_are_numbers(counts) and sum(counts) == size[0] * size[1]):
        return "malformed masks", f"{name} has a run-length code that does not fill its image"
    return None


def _clean(record: Record, image: Record) -> Record:
    """What training and evaluation read; the area as COCO has it where it is left out: of the mask, else of the box."""
    kept = {name: record[name] for name in ("id", "image_id", "category_id", "bbox")}
    shape = record.get("segmentation") or None
    if shape is not None:
        kept["segmentation"] = shape
    area = record.get("area")
    if not isinstance(area, int | float) or not math.isfinite(area):
        area = record["bbox"][2] * record["bbox"][3] if shape is None else float(decode_mask(shape, image).sum())
    return {**kept, "area": area, "iscrowd": int(record.get("iscrowd", 0))}


def decode_mask(segmentation: Any, image: Record) -> np.ndarray:
    """Polygons or a run-length code as (height, width) uint8 zeros and ones, in the frame of the annotation."""
    from pycocotools import mask

    height, width = image["height"], image["width"]
    try:
        with warnings.catch_warnings():  # pycocotools gives numpy 2 an array interface of numpy 1
            warnings.simplefilter("ignore", DeprecationWarning)
            if isinstance(segmentation, list):
                return mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width)))
            if isinstance(segmentation["counts"], list):
                segmentation = mask.frPyObjects(segmentation, height, width)
            return mask.decode(segmentation)
    except (ValueError, RuntimeError, MemoryError) as error:
        name = f"image {image['id']} ({image['file_name']})"
        raise UserError(f"{name} has a mask that cannot be decoded: {error}") from error


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
