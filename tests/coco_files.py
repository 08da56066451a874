"""A small set in COCO's format: squares and discs of two colours, for the tests of detection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "square"}, {"id": 17, "name": "disc"}]  # ids with a hole, as COCO's
COLOURS = {3: (220, 40, 40), 17: (40, 60, 220)}


def content(
    images: int = 4, side: int = 64, seed: int = 0, objects: int = 2
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """An annotation file's content and the pixels of its images; objects of one image do not overlap."""
    draw = np.random.default_rng(seed)
    records, annotations, pixels = [], [], []
    for number in range(images):
        picture = np.full((side, side, 3), 120, dtype=np.uint8)
        cells = draw.permutation(4)[:objects]
        for cell in cells:
            size = int(draw.integers(side // 4, side // 2 - 4))
            x, y = (int(part * side // 2 + draw.integers(1, side // 2 - size - 1)) for part in (cell % 2, cell // 2))
            category = int(draw.choice([3, 17]))
            annotations.append(annotation(len(annotations) + 1, number + 1, category, x, y, size))
            paint(picture, category, x, y, size)
        records.append({"id": number + 1, "file_name": f"{number + 1}.png", "width": side, "height": side})
        pixels.append(picture)
    return {"images": records, "annotations": annotations, "categories": CATEGORIES}, pixels


def annotation(number: int, image: int, category: int, x: int, y: int, size: int) -> dict[str, Any]:
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False) if category == 17 else np.pi * np.array([5, 7, 9, 11]) / 4
    radius = size / 2 if category == 17 else size / 2**0.5
    points = np.stack([x + size / 2 + radius * np.cos(angle), y + size / 2 + radius * np.sin(angle)], axis=1)
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, size, size],
        "area": size * size,
        "iscrowd": 0,
        "segmentation": [points.round(2).flatten().tolist()],
    }


def paint(picture: np.ndarray, category: int, x: int, y: int, size: int) -> None:
    rows, columns = np.mgrid[0:size, 0:size] + 0.5 - size / 2
    inside = np.ones((size, size), bool) if category == 3 else rows**2 + columns**2 <= (size / 2) ** 2
    picture[y : y + size, x : x + size][inside] = COLOURS[category]


def write(root: Path, *, images: int = 4, side: int = 64, seed: int = 0, objects: int = 2) -> Path:
    """A folder with train and val in COCO's layout; returns it."""
    (root / "annotations").mkdir(parents=True)
    for split, offset in (("train", 0), ("val", 100)):
        described, pixels = content(images, side, seed + offset, objects)
        (root / f"{split}2017").mkdir()
        for record, picture in zip(described["images"], pixels, strict=True):
            Image.fromarray(picture).save(root / f"{split}2017" / record["file_name"])
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(described))
    return root


def change(root: Path, split: str, change: Any) -> None:
    """Apply a function to the content of an annotation file."""
    path = root / "annotations" / f"instances_{split}2017.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
