"""The page of a detector's run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tests.report.pages import Page

from sparse_mlp.report.boxes import draw_objects
from sparse_mlp.report.detection import DetectedImage, Objects, write_detection_report


@pytest.fixture
def folder(tmp_path):
    """A run folder as the engine leaves it."""
    run = tmp_path / "run"
    run.mkdir()
    config = {"kind": "detect", "name": "small", "model": {"name": "cycle_mlp_b1"}}
    (run / "config.json").write_text(json.dumps(config))
    lines = [
        {"kind": "train", "step": 10, "epoch": 1, "time": 5.0, "loss": 2.0, "loss_mask": 0.5, "lr": 0.1},
        {"kind": "train", "step": 20, "epoch": 2, "time": 9.0, "loss": 1.0, "loss_mask": 0.3, "lr": 0.1},
        {"kind": "eval", "step": 20, "epoch": 2, "time": 9.0, "box_map": 0.41, "box_map50": 0.62, "mask_map": 0.33},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def analysis(classes, *, masks=True):
    ap = [0.5 if c % 2 else None for c in range(classes)]
    curve = {"ap": ap, "precision": {name: [1.0] * 60 + [0.2] * 41 for name in ("0.50", "0.75", "0.50 to 0.95")}}
    confusion = np.eye(classes + 1, dtype=int) * 3
    confusion[-1, -1] = 0
    confusion[0, -1] = 2
    return {
        "classes": [str(c) for c in range(classes)],
        "objects": [5] + [3] * (classes - 1),
        "curves": {"box": curve, **({"mask": curve} if masks else {})},
        "confusion": confusion.tolist(),
        "images": [{"image_id": 1, "right": 3, "missed": 1, "wrong": 1, "f1": 0.75, "file": "1.png"}],
    }


def example(name="1.png", found=2, masks=True):
    boxes = np.array([[5.0, 5, 30, 20], [20, 30, 60, 60]])[:found].reshape(-1, 4)
    mask = np.zeros((found, 64, 64), bool)
    mask[:, 10:20, 10:20] = True
    objects = Objects(boxes, [0, 1][:found], [0.9, 0.4][:found], mask if masks else None)
    picture = Image.new("RGB", (64, 64), "grey")
    return DetectedImage(name, picture, Objects(boxes, [0, 1][:found]), objects, right=1, missed=1, wrong=0)


@pytest.mark.parametrize(("classes", "masks"), [(2, True), (80, False)])
def test_the_page(folder, classes, masks):
    names = ["<b>cat</b>", *(f"class {c}" for c in range(1, classes))]
    page = Page(
        write_detection_report(
            folder, names, analysis(classes, masks=masks), best=[example(masks=masks)], worst=[example("2.png", 0)]
        )
    )
    assert page.sections() == ["curves", "ap", "examples"]
    for text in ("Box mAP 41.0 %", "Box AP50 62.0 %", "Mask mAP 33.0 %", "1.png · 1 right, 1 missed, 0 wrong"):
        assert text in page.text
    assert "b" not in {tag for tag, _ in page.tags}
    pictures = [dict(attrs)["alt"] for tag, attrs in page.tags if tag == "img"]
    assert pictures == ["1.png: annotated", "1.png: found", "2.png: annotated", "2.png: found"]


def test_a_run_that_has_not_finished_has_its_curves(folder):
    assert Page(write_detection_report(folder, ["a", "b"], None)).sections() == ["curves"]


def test_no_class_has_an_object(folder):
    nothing = analysis(2)
    nothing["objects"] = [0, 0]
    for curve in nothing["curves"].values():
        curve["ap"], curve["precision"] = [None, None], {}
    assert Page(write_detection_report(folder, ["a", "b"], nothing)).sections() == ["curves", "ap"]


def test_objects_are_drawn_where_they_are():
    picture = Image.new("RGB", (200, 100), "black")
    mask = np.zeros((1, 100, 200), bool)
    mask[0, 60:80, 100:150] = True
    drawn = np.asarray(draw_objects(picture, np.array([[100.0, 50, 180, 90]]), [1], ["dog 90%"], 3, mask))
    changed = drawn.any(axis=2)
    assert changed[70, 120] and not changed[70, 160]  # the mask, and beside it in the box
    assert changed[50, 170] and changed[89, 120] and changed[70, 100] and changed[70, 179]  # the four sides
    assert not changed[:, :90].any() and not changed[95:].any()
    assert not np.asarray(picture).any()  # the picture itself is untouched
