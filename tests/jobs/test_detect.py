"""Detection as a kind of run: trained, resumed, evaluated, reported; predicted into pictures."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests import coco_files
from tests.report.pages import Page

from sparse_mlp.cli.main import main
from sparse_mlp.data.coco import CocoConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig, TrainingStopped
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import ModelConfig, Run, resume, to_json, train
from sparse_mlp.jobs.detect import DetectJob, DetectorConfig, DetectRecipe

pytest.importorskip("pycocotools")

SMALL = ModelConfig("cycle_mlp_b1", {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48]})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return coco_files.write(tmp_path_factory.mktemp("coco") / "set", images=4)


def small_recipe(root, detector="mask_rcnn", **changes):
    options = {} if detector == "retinanet" else {"samples": 32}
    recipe = DetectRecipe(
        name="small",
        model=SMALL,
        data=CocoConfig(
            root=str(root), test_on="train", short_sides=(64,), test_short_side=64, max_side=64, flip=0.5, batch_size=2
        ),
        detector=DetectorConfig(detector, fpn_channels=32, anchor_size=8, **options),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig("constant"),
        train=TrainConfig(steps=4, log_every=1, eval_every=0, save_every=2, device="cpu"),
    )
    return replace(recipe, **changes)


def lines(run, kind):
    parsed = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in parsed if line["kind"] == kind]


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A Mask R-CNN after a few steps."""
    return train(small_recipe(root), tmp_path_factory.mktemp("runs") / "run", show=False)


def test_a_run_leaves_coco_results_and_its_page(run):
    metrics = run.metrics
    assert {"box_map", "box_map50", "box_map75", "mask_map", "images"} <= metrics.keys()
    assert metrics["images"] == 4
    rows = json.loads((run.path / "detections.json").read_text())
    assert all({"image_id", "category_id", "bbox", "score", "segmentation"} == row.keys() for row in rows)
    assert {row["category_id"] for row in rows} <= {3, 17}
    parts = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert {"loss"} | parts <= lines(run, "train")[0].keys()
    page = Page(run.path / "report.html")
    assert page.sections() == ["curves", "ap", "examples"]
    assert "Box mAP" in page.text and "Mask mAP" in page.text and "1.png" in page.text
    assert {p.stem for p in (run.path / "figures").glob("*.png")} >= {"class_ap", "precision_recall", "confusion"}


def test_evaluated_again_it_has_the_same_metrics(run, tmp_path):
    assert run.evaluate(results=str(tmp_path / "results.json")) == run.metrics
    assert (tmp_path / "results.json").read_text() == (run.path / "detections.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet"])
def test_stopped_and_resumed_it_is_the_run_that_never_stopped(root, tmp_path, detector, monkeypatch):
    recipe = small_recipe(root, detector)
    whole = train(recipe, tmp_path / "whole", show=False)

    def kill(task, step, steps):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr("sparse_mlp.tasks.detect.Detect.before_step", kill)
        with pytest.raises(TrainingStopped):
            train(recipe, tmp_path / "stopped", show=False)
    resumed = resume(tmp_path / "stopped", show=False)
    one, other = (load_file(r.path / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert whole.metrics == resumed.metrics


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"])
def test_a_loss_falls_and_ema_bf16_and_checkpointing_run(root, tmp_path, detector):
    often = {"steps": 12, "log_every": 1, "eval_every": 0, "save_every": 0, "device": "cpu"}
    options = TrainConfig(**often, amp="bf16", ema_decay=0.9, clip_grad=1.0, grad_checkpointing=True)
    run = train(small_recipe(root, detector, train=options), tmp_path / "run", show=False)
    losses = [line["loss"] for line in lines(run, "train")]
    assert np.median(losses[-6:]) < np.median(losses[:3])  # of a few images a single step may be off
    assert (run.path / "checkpoints").is_dir()


def test_recomputed_activations_change_nothing(root, tmp_path):
    base = small_recipe(root, "retinanet")
    kept = train(base, tmp_path / "kept", show=False)
    again = train(replace(base, train=replace(base.train, grad_checkpointing=True)), tmp_path / "again", show=False)
    one, other = (load_file(r.path / "model.safetensors") for r in (kept, again))
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-6


@pytest.mark.slow
def test_two_ranks_are_one(root, tmp_path, launch):
    """RetinaNet trains on all its anchors: nothing is sampled. The images are of one size, so that none is padded."""
    spec = to_json(small_recipe(root, "retinanet", optim=OptimConfig("momentum", lr=0.01, momentum=0.5)))
    program = Path(__file__).with_name("detect_on_ranks.py")
    for ranks, name in ((1, "one"), (2, "two")):
        assert launch(program, {"recipe": spec, "out": str(tmp_path / name)}, ranks=ranks) == [0] * ranks
    one, two = (Run(tmp_path / name) for name in ("one", "two"))
    first, second = (load_file(r.path / "model.safetensors") for r in (one, two))
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5
    for a, b in zip(lines(one, "train"), lines(two, "train"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
    assert two.metrics == pytest.approx(one.metrics, abs=1e-5)
    assert two.metrics["images"] == 4


def test_predict_draws_pictures_and_gives_rows(run, root, tmp_path, capsys):
    photo = tmp_path / "photos" / "a" / "1.png"
    photo.parent.mkdir(parents=True)
    with Image.open(root / "train2017" / "1.png") as picture:
        picture.resize((120, 90)).save(photo)
    shutil.copy(root / "train2017" / "2.png", tmp_path / "photos" / "1.png")
    out = tmp_path / "rows.json"
    command = ["predict", str(run.path), str(tmp_path / "photos"), "--out", str(out), "--score", "0.0"]
    assert main([*command, "--pictures", str(tmp_path / "drawn")]) == 0
    rows = json.loads(out.read_text())
    assert {Path(row["file"]).parent.name for row in rows} == {"a", "photos"}
    found = [row for row in rows if "class" in row]
    assert all(row["class"] in ("square", "disc") and 0 <= row["probability"] <= 1 for row in found)
    assert all(row["x"] >= 0 and row["x"] + row["width"] <= 120.5 for row in found)
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"1.png", "1-2.png"}
    sizes = set()
    for path in (tmp_path / "drawn").iterdir():
        with Image.open(path) as picture:
            sizes.add(picture.size)
    assert sizes == {(120, 90), (64, 64)}
    nothing = run.predict(photo, score=1.0, pictures=str(tmp_path / "none"))
    assert [row.keys() for row in nothing] == [{"file", "picture"}]


def test_a_file_that_is_no_image(run, root, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(OSError, match=r"broken\.png"):
        run.predict(broken, pictures=str(tmp_path / "drawn"))
    rows = run.predict(broken, root / "train2017" / "1.png", pictures=str(tmp_path / "drawn"))
    assert ["error" in row for row in rows][:2] == [True, False]


def test_the_exported_weights_are_the_whole_detector(run, tmp_path):
    run.export(tmp_path / "detector.safetensors")
    weights = load_file(tmp_path / "detector.safetensors")
    model = DetectJob.load(run.folder)
    assert weights.keys() == model.state_dict().keys()


def test_a_detector_is_no_program(run, tmp_path, capsys):
    assert main(["export", str(run.path), str(tmp_path / "detector.onnx"), "--to", "onnx"]) == 2
    assert "of the kind detect cannot be exported to onnx: only its weights" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_run_without_its_data_is_reported_without_pictures(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run.path, moved)
    config = json.loads((moved / "config.json").read_text())
    config["data"]["root"] = str(tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(config))
    page = Page(Run(moved).report())
    assert page.sections() == ["curves", "ap"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig("levit_128s")}, r"model levit_128s: .* none at \[4, 8\]"),
        ({"model": ModelConfig("cycle_mlp_b9")}, "unknown model 'cycle_mlp_b9'; nearest: cycle_mlp_b"),
    ],
)
def test_a_backbone_without_feature_maps_is_refused_in_one_line(root, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        DetectJob(small_recipe(root, **changes))
    assert "\n" not in str(caught.value)


def test_other_categories_than_the_runs_are_refused(run, tmp_path):
    other = coco_files.write(tmp_path / "other")
    for split in ("train", "val"):
        coco_files.change(other, split, lambda content: content["categories"][0].update(name="cube"))
    with pytest.raises(UserError, match="are not those that"):
        run.evaluate(data={"root": str(other)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse_mlp_t4_32", "resnet10t", "test_vit"])
def test_other_backbones(root, tmp_path, name):
    """An isotropic model of ours, a convolutional network and a transformer of timm's."""
    recipe = small_recipe(root, model=ModelConfig(name), train=TrainConfig(steps=1, device="cpu"))
    assert train(recipe, tmp_path / "run", show=False).metrics["images"] == 4
