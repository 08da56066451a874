"""A segmentation run from its commands: trained, resumed, evaluated, predicted, reported, exported."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sparse_mlp
from sparse_mlp.cli.main import main
from sparse_mlp.data.segmentation_config import SegmentationConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import ModelConfig, Run, deploy, to_json
from sparse_mlp.jobs.segment import HeadConfig, SegmentRecipe

TINY = ModelConfig("cycle_mlp_b1", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.1})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks in the colours of their three classes."""
    root = tmp_path_factory.mktemp("blocks")
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], dtype=np.uint8)
    for split, count in (("train", 8), ("val", 4)):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for i in range(count):
            generator = np.random.default_rng([i, count])
            mask = generator.integers(0, 3, (3, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            noise = generator.integers(-25, 25, (*mask.shape, 3))
            Image.fromarray((colours[mask] + noise).astype(np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root


@pytest.fixture(scope="module")
def recipe(root: Path) -> SegmentRecipe:
    return SegmentRecipe(
        name="blocks",
        model=TINY,
        head=HeadConfig("semantic_fpn", width=16),
        data=SegmentationConfig(root=str(root), image_size=32, scale=(1.0, 1.5), batch_size=4, max_class_share=1.0),
        optim=OptimConfig(lr=5e-3),
        schedule=ScheduleConfig("poly", power=0.9),
        train=TrainConfig(steps=40, seed=3, log_every=10, eval_every=20, save_every=20, ema_decay=0.9),
    )


@pytest.fixture(scope="module")
def run(recipe: SegmentRecipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return sparse_mlp.train(recipe, tmp_path_factory.mktemp("runs") / "blocks", show=False)


def test_a_run_learns_and_leaves_its_files(run: Run):
    assert run.metrics["miou"] > 0.5, "colours are easy; by chance it is 0.2"
    assert json.loads((run.path / "inputs.json").read_text()) == {"classes": ["red", "green", "blue"]}
    with np.load(run.path / "predictions.npz") as found:
        assert found["files"].tolist() == [f"images/{i}.png" for i in range(4)]
        assert found["confusion"].sum() == 4 * 48 * 64
    page = (run.path / "report.html").read_text()
    for text in ("Mean IoU", "IoU per class", "Confusion of classes", "images/0.png", "The worst", "semantic_fpn"):
        assert text in page


def test_a_damaged_file_of_predictions_is_one_line(run: Run, tmp_path: Path, capsys):
    copy = Path(shutil.copytree(run.path, tmp_path / "copy"))
    (copy / "predictions.npz").write_bytes(b"damaged")
    assert main(["report", str(copy)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "predictions.npz is not a predictions file" in errors


def test_evaluated_again_it_is_the_same(run: Run, root: Path, capsys):
    assert run.evaluate() == pytest.approx(run.metrics)
    assert main(["eval", str(run.path), "--split", "train"]) == 0
    assert "miou" in capsys.readouterr().out
    more = run.evaluate(inference={"scales": [1.0, 2.0], "flip": True, "window": 32})
    assert more["miou"] != run.metrics["miou"] and more["images"] == 4


def test_stopped_and_resumed_to_the_bit(run: Run, recipe: SegmentRecipe, tmp_path: Path):
    half = replace(recipe, train=replace(recipe.train, steps=40))
    broken = sparse_mlp.train(half, tmp_path / "broken", show=False)
    shutil.rmtree(sorted((broken.path / "checkpoints").iterdir())[-1])
    (broken.path / "results.json").unlink()
    again = sparse_mlp.resume(broken.path, show=False)
    expected, got = (load_file(one.path / "model.safetensors") for one in (run, again))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_predict_draws_and_lists_the_classes(run: Run, root: Path, tmp_path: Path):
    files = [str(root / "val" / "images" / f"{i}.png") for i in (0, 1)]
    out = tmp_path / "out.json"
    assert main(["predict", str(run.path), *files, "--pictures", str(tmp_path / "p"), "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["file"] for row in rows] == files
    for row in rows:
        with Image.open(row["mask"]) as image, Image.open(row["picture"]) as picture:
            mask = np.asarray(image)
            assert picture.width == 64 and picture.height > 48, "with its legend below"
        assert mask.shape == (48, 64)
        names = ["red", "green", "blue"]
        assert row["share_1"] == pytest.approx((mask == names.index(row["class_1"])).mean(), abs=1e-6)


def test_a_file_that_is_no_image_does_not_stop_the_others(run: Run, root: Path, tmp_path: Path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    good = root / "val" / "images" / "0.png"
    rows = run.predict(tmp_path / "bad.png", good, pictures=str(tmp_path / "p"))
    assert "error" in rows[0] and rows[1]["class_1"] in ("red", "green", "blue")


@pytest.mark.slow  # the exporters
@pytest.mark.filterwarnings("ignore")  # the exporters' own
@pytest.mark.parametrize(
    ("to", "ending", "sizes"), [("onnx", ".onnx", ((32, 32), (64, 96))), ("torch-export", ".pt2", ((32, 32),))]
)
def test_its_program_gives_logits_at_the_size_of_the_image(
    run: Run, to: str, ending: str, sizes: tuple, tmp_path: Path, capsys
):
    """torch.export sets a last map of one position apart, which that of 32 pixels is."""
    pytest.importorskip("onnxscript")
    target = tmp_path / f"blocks{ending}"
    assert main(["export", str(run.path), str(target), "--to", to]) == 0
    assert ("any size that the model takes" in capsys.readouterr().out) == (len(sizes) > 1)
    call, model = deploy.load(target, to), run.load()
    for height, width in sizes:
        images = torch.randn(2, 3, height, width)
        logits = call(images)
        assert logits.shape == (2, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(logits, model(images), atol=1e-4, rtol=1e-4)


def test_routing_of_own_pictures_is_not_of_this_kind(run: Run, root: Path, capsys):
    assert main(["report", str(run.path), "--images", str(root / "val" / "images")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--images" in error


def test_eight_bits_are_not_of_this_kind(run: Run, tmp_path: Path, capsys):
    assert main(["export", str(run.path), str(tmp_path / "blocks.onnx"), "--to", "onnx", "--int8"]) == 2
    assert "--int8 is for runs of the kind classify" in " ".join(capsys.readouterr().err.split())


def test_the_model_can_be_loaded_and_exported(run: Run, tmp_path: Path):
    model = run.load()
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 40, 56))
    assert logits.shape == (1, 3, 40, 56) and not model.training
    text = run.export(tmp_path / "blocks.safetensors")
    assert "load_state_dict" in text
    model.load_state_dict(load_file(tmp_path / "blocks.safetensors"))


def test_weights_of_a_classifier_start_the_backbone(recipe: SegmentRecipe, tmp_path: Path):
    import timm
    from safetensors.torch import save_file

    source = timm.create_model(TINY.name, **TINY.args, num_classes=9)
    save_file(source.state_dict(), tmp_path / "classifier.safetensors")
    started = replace(
        recipe,
        model=replace(TINY, weights=str(tmp_path / "classifier.safetensors")),
        optim=OptimConfig(lr=1e-12),
        train=TrainConfig(steps=1),
    )
    model = sparse_mlp.train(started, tmp_path / "run", show=False).load()
    for name, value in source.stages.state_dict().items():
        torch.testing.assert_close(model.model.stages.state_dict()[name], value)


@pytest.mark.parametrize("head", ["upernet", "smp_unet"])
def test_other_heads_train(recipe: SegmentRecipe, head: str, tmp_path: Path):
    if head.startswith("smp_"):
        pytest.importorskip("segmentation_models_pytorch")
        model, config = ModelConfig("resnet10t"), HeadConfig(head)
    else:
        model, config = TINY, HeadConfig(head, width=8)
    short = replace(recipe, model=model, head=config, train=TrainConfig(steps=2, amp="bf16", grad_checkpointing=True))
    run = sparse_mlp.train(short, tmp_path / "run", show=False)
    assert run.evaluate() == pytest.approx(run.metrics)


def test_a_model_of_one_size_slides_its_window(recipe: SegmentRecipe, tmp_path: Path):
    args = {"embed_dim": 16, "num_blocks": 2, "sparse_blocks": 1, "num_experts": [2, 2], "patch_size": 8}
    short = replace(recipe, model=ModelConfig("sparse_mlp_t4_32", args), train=TrainConfig(steps=2, log_every=1))
    run = sparse_mlp.train(short, tmp_path / "run", show=False)
    assert run.metrics["images"] == 4
    kinds = [json.loads(line)["kind"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert "routing" in kinds, "experts in a backbone report their load"


@pytest.mark.slow
def test_two_ranks_are_one(recipe: SegmentRecipe, tmp_path: Path, launch):
    """Batch norm is over all ranks. No drop path and no dropout, which draw other numbers on each rank."""
    model = replace(TINY, args={**TINY.args, "drop_path_rate": 0.0})
    short = replace(
        recipe,
        model=model,
        head=replace(recipe.head, dropout=0.0),
        optim=OptimConfig("momentum", lr=0.05, momentum=0.5, weight_decay=0.0),
        train=TrainConfig(steps=3, log_every=1),
    )
    program = Path(__file__).with_name("segment_on_ranks.py")
    for ranks in (1, 2):
        spec = {"recipe": to_json(short), "out": str(tmp_path / str(ranks))}
        assert launch(program, spec, ranks=ranks) == [0] * ranks
    one, two = (load_file(tmp_path / str(ranks) / "model.safetensors") for ranks in (1, 2))
    assert max((one[name].double() - two[name].double()).abs().max().item() for name in one) < 1e-5
    results = [Run(tmp_path / str(ranks)).metrics for ranks in (1, 2)]
    assert results[0] == pytest.approx(results[1], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--head.name", "upernett"], "unknown head 'upernett'; allowed are upernet, semantic_fpn and smp_NAME"),
        (
            ["--head.name", "smp_unett", "--head.width", "None", "--model.name", "resnet18"],
            "unknown head 'smp_unett'; allowed are smp_",
        ),
        (["--head.name", "smp_unet"], "head.width 64 would be ignored: smp_unet has its own; give --head.width None"),
        (["--data.root", "nowhere"], "there is no folder nowhere"),
        (["--model.name", "cycle_mlp_b9"], "unknown model 'cycle_mlp_b9'; nearest: cycle_mlp_b"),
        (["--schedule.milestones", "0.5"], "would be ignored: the schedule is"),
        (["--optim.layer-decay", "0.7"], "optim.layer_decay 0.7 would be ignored"),
    ],
)
def test_mistakes_are_one_line(changes: list[str], message: str, root: Path, tmp_path: Path, capsys):
    command = ["train", "camvid", "--data.name", "folder", "--data.root", str(root), "--out", str(tmp_path / "run")]
    assert main([*command, *changes]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_ones_own_in_one_line(root: Path, tmp_path: Path, capsys):
    """What was chosen is said; what is given is kept."""
    command = ["train", "segment", "--data.root", str(root), "--out", str(tmp_path / "run"), "--train.steps", "1"]
    tiny = ["--model.args", "depths=[1,1,1,1]", "dims=[8,8,16,16]", "--head.width", "8"]
    assert main([*command, *tiny, "--data.batch-size", "2"]) == 0
    output = "".join(capsys.readouterr())
    assert "8 training images, 3 classes, crops of 64 pixels; from scratch" in output
    data = Run(tmp_path / "run").recipe.data
    assert (data.image_size, data.batch_size, data.short_side) == (64, 2, None)
    assert main(["train", "segment"]) == 2
    assert "which images? --data.root FOLDER" in capsys.readouterr().err


def test_other_classes_than_those_trained_on_are_refused(run: Run, root: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(root, other)
    (other / "classes.txt").write_text("green\nred\nblue\n")
    with pytest.raises(UserError, match="was trained on"):
        run.evaluate(root=str(other))
