"""Our figures are pycocotools'; boxes and masks go back into the frame of the annotations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tests import coco_files

from sparse_mlp.data.coco import CocoConfig, open_coco
from sparse_mlp.data.coco_annotations import decode_mask, read_annotations
from sparse_mlp.tasks.coco_metrics import coco_metrics, coco_rows, outcomes

pytest.importorskip("pycocotools")

NAMES = ("map", "map50", "map75", "map_small", "map_medium", "map_large")


@pytest.fixture
def truth(tmp_path):
    root = coco_files.write(tmp_path / "set", images=5)
    return read_annotations(root / "annotations" / "instances_val2017.json")


def perfect(truth, *, score=0.9):
    """The annotations as detections."""
    from pycocotools import mask

    rows = []
    for image in truth.images:
        for record in truth.objects.get(image["id"], []):
            code = mask.encode(np.asfortranarray(decode_mask(record["segmentation"], image)))
            segmentation = {"size": list(code["size"]), "counts": code["counts"].decode()}
            row = {"image_id": image["id"], "category_id": record["category_id"], "score": score}
            rows.append({**row, "bbox": record["bbox"], "segmentation": segmentation})
    return rows


def shaken(truth, seed=0):
    """Detections that are somewhat off, some missing, some double, some of another class."""
    draw = np.random.default_rng(seed)
    rows = []
    for row in perfect(truth) * 2:
        if draw.random() < 0.25:
            continue
        box = (np.array(row["bbox"]) + draw.normal(0, 0.06, 4) * row["bbox"][2]).round(2)
        category = row["category_id"] if draw.random() < 0.85 else int(draw.choice(truth.category_ids))
        rows.append({**row, "bbox": box.tolist(), "score": round(float(draw.random()), 4), "category_id": category})
    return rows


def of_pycocotools(annotations, rows, kind, tmp_path):
    """As a user of pycocotools has it from files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if kind == "segm":
        rows = [{name: value for name, value in row.items() if name != "bbox"} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    reference = COCO(str(annotations))
    evaluation = COCOeval(reference, reference.loadRes(str(tmp_path / "rows.json")), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:6]


@pytest.mark.parametrize("source", ["drawn", "photos"])
def test_the_figures_are_those_of_pycocotools(truth, tmp_path, source, request):
    if source == "photos":
        folder = request.getfixturevalue("data_root") / "coco_small"
        if not folder.is_dir():
            pytest.skip("coco_small is not there")
        truth = read_annotations(folder / "instances_val.json")
    rows = shaken(truth)
    metrics, _ = coco_metrics(truth, rows, [image["id"] for image in truth.images], masks=True)
    for kind, of in (("box", "bbox"), ("mask", "segm")):
        expected = of_pycocotools(truth.path, rows, of, tmp_path)
        for name, value in zip(NAMES, expected, strict=True):
            assert metrics.get(f"{kind}_{name}", -1) == pytest.approx(value, abs=1e-12)
    assert 0.05 < metrics["box_map"] < 0.95


def test_known_results(truth):
    ids = [image["id"] for image in truth.images]
    metrics, curves = coco_metrics(truth, perfect(truth), ids, masks=True)
    assert [metrics[name] for name in ("box_map", "mask_map", "box_map50")] == pytest.approx([1, 1, 1])
    assert "box_map_large" not in metrics  # there is no object of 96 x 96 pixels: not measured
    np.testing.assert_array_equal(curves["box"].ap, [1, 1])
    np.testing.assert_array_equal(curves["box"].precision["0.50"], np.ones(101))
    nothing, _ = coco_metrics(truth, [], ids, masks=True)
    assert nothing["box_map"] == nothing["mask_map"] == 0
    squares = [row for row in perfect(truth) if row["category_id"] == 3]
    _, half = coco_metrics(truth, squares, ids, masks=False)
    np.testing.assert_array_equal(half["box"].ap, [1, 0])


def test_images_that_were_not_evaluated_do_not_count(truth):
    rows = [row for row in perfect(truth) if row["image_id"] == 1]
    assert coco_metrics(truth, rows, [1], masks=False)[0]["box_map"] == pytest.approx(1)


def test_an_annotation_with_the_id_zero_is_found(truth):
    """COCOeval takes a match with annotation 0 for none."""
    truth.objects[1][0]["id"] = 0
    ids = [image["id"] for image in truth.images]
    assert coco_metrics(truth, perfect(truth), ids, masks=False)[0]["box_map"] == pytest.approx(1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_detections_return_to_the_frame_of_the_stored_file(tmp_path, orientation):
    """Boxes and masks of the upright image at another size, as the detector sees it, are the annotations again."""
    root = coco_files.write(tmp_path / "set", images=1)
    picture = np.full((48, 64, 3), 120, np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(root / "train2017" / "1.png", exif=exif)

    def describe(content):
        content["images"][0] |= {"width": 64, "height": 48}
        content["annotations"] = [coco_files.annotation(1, 1, 3, 6, 4, 16), coco_files.annotation(2, 1, 17, 36, 20, 20)]

    coco_files.change(root, "train", describe)
    config = CocoConfig(root=str(root), test_on="train", short_sides=(96,), test_short_side=96, max_side=128)
    data = open_coco(config, masks=True)
    batch = data.test.batch([0])
    image, target = batch["image"][0], batch["target"][0]
    assert tuple(image.shape[1:]) == ((128, 96) if orientation >= 5 else (96, 128))
    scene, _ = data.test.load(0)
    found = {"boxes": scene.boxes * 2, "labels": scene.labels, "scores": torch.ones(2)}
    found["masks"] = torch.ones(2, 1, 28, 28)
    rows = coco_rows(found, tuple(image.shape[1:]), target, data.truth.category_ids)
    assert [row["category_id"] for row in rows] == [3, 17]
    np.testing.assert_allclose([row["bbox"] for row in rows], [[6, 4, 16, 16], [36, 20, 20, 20]], atol=0.01)
    metrics, _ = coco_metrics(data.truth, rows[:1], [1], masks=True)
    assert metrics["mask_map50"] == pytest.approx(0.5)  # the square; the disc was not found
    assert rows[0]["segmentation"]["size"] == [48, 64]


def test_confusion_and_outcomes(truth):
    """By hand: image 1 has two objects, a right answer, a wrong class and an answer beside them."""
    first, second = truth.objects[1]
    other = {3: 17, 17: 3}
    rows = [
        {"image_id": 1, "category_id": first["category_id"], "bbox": first["bbox"], "score": 0.9},
        {"image_id": 1, "category_id": other[second["category_id"]], "bbox": second["bbox"], "score": 0.8},
        {"image_id": 1, "category_id": 3, "bbox": [0, 0, 2, 2], "score": 0.7},
        {"image_id": 1, "category_id": 3, "bbox": first["bbox"], "score": 0.1},  # not sure enough to count
    ]
    found, confusion = outcomes(truth, rows, [1])
    assert [vars(one) for one in found] == [{"image_id": 1, "right": 1, "missed": 1, "wrong": 2}]
    assert found[0].f1 == pytest.approx(2 / 5)
    labels = truth.labels()
    expected = np.zeros((3, 3), int)
    expected[labels[first["category_id"]], labels[first["category_id"]]] += 1
    expected[labels[second["category_id"]], labels[other[second["category_id"]]]] += 1
    expected[2, 0] += 1
    np.testing.assert_array_equal(confusion, expected)


def test_an_answer_within_a_crowd_is_not_wrong(truth):
    truth.objects[1] = [truth.objects[1][0], {**truth.objects[1][1], "iscrowd": 1}]
    rows = [{"image_id": 1, "category_id": 3, "bbox": truth.objects[1][1]["bbox"], "score": 0.9}]
    found, _ = outcomes(truth, rows, [1])
    assert [found[0].right, found[0].missed, found[0].wrong] == [0, 1, 0]
