"""Pre-training from the command line, on the real digits."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from sparse_mlp.cli.main import main

Run = Callable[..., tuple[int, str, str]]
PROGRAM = Path(__file__).with_name("train_command.py")

MODEL = {"patch_size": 4, "num_blocks": 2, "embed_dim": 16, "sparse_blocks": 1}
TINY = ["--model.args", *(f"{name}={value}" for name, value in MODEL.items()), "--task.hidden-dim", "16"]
SHORT = ["--train.steps", "6", "--schedule.warmup-epochs", "0.5", "--train.log-every", "2"]
SHORT += ["--train.eval-every", "4", "--train.save-every", "3", "--task.knn-images", "100", "--train.device", "cpu"]
COMMAND = ["digits_moco_sparse", *TINY, *SHORT]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    assert main(["train", *COMMAND, "--out", str(folder)]) == 0
    return folder


def test_a_pretraining_is_no_program(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(pretrained), str(tmp_path / "model.onnx"), "--to", "onnx"]) == 2
    assert "of the kind pretrain cannot be exported to onnx" in " ".join(capsys.readouterr().err.split())


def lines(folder: Path, *kinds: str) -> list[dict]:
    clock = {"time", "items_per_s", "data_time"}
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in found if line["kind"] in kinds]


def test_a_run_folder_holds_everything(pretrained: Path):
    config = json.loads((pretrained / "config.json").read_text())
    assert config["optim"]["lr"] == pytest.approx(3e-3)
    weights = load_file(pretrained / "model.safetensors")
    model = timm.create_model("sparse_mlp_t4_32", num_classes=0, img_size=8, in_chans=1, **MODEL)
    model.load_state_dict(weights)
    train, evals = lines(pretrained, "train"), lines(pretrained, "eval")
    assert [line["step"] for line in train] == [2, 4, 6] and [line["step"] for line in evals] == [4, 6]
    for name in ("loss", "contrast_acc", "feature_std", "momentum", "grad_norm", "first_grad_norm", "balance"):
        assert name in train[0]
    assert {"knn_top1", "knn_top5", "feature_std", "feature_rank"} <= evals[0].keys()
    assert lines(pretrained, "routing")
    predictions = np.load(pretrained / "predictions.npz")
    assert (predictions["logits"].argmax(1) == predictions["target"]).mean() == pytest.approx(evals[-1]["knn_top1"])


def test_the_report_shows_map_and_neighbours(pretrained: Path, run: Run):
    (pretrained / "report.html").unlink()
    code, out, _ = run("report", pretrained)
    assert code == 0 and "report.html" in out
    page = (pretrained / "report.html").read_text()
    for part in ("Where the test images lie", "Nearest neighbours", "kNN top-1 accuracy", "Load of the experts"):
        assert part in page
    for name in ("map", "knn", "feature_std", "first_gradient_norm", "momentum", "contrast"):
        assert (pretrained / "figures" / f"{name}.png").is_file()


def test_the_report_shows_what_experts_do_with_own_images(pretrained: Path, run: Run, tmp_path: Path):
    Image.new("L", (20, 20), 90).save(tmp_path / "grey.png")
    code, out, _ = run("report", pretrained, "--images", tmp_path)
    page = (pretrained / "routing.html").read_text()
    assert code == 0 and "routing.html" in out
    assert "grey.png" in page and "taken for" not in page  # there is no classifier


def test_killed_and_resumed_equals_uninterrupted(launch: Callable[..., list[int]], tmp_path: Path):
    """Killed in the middle of an epoch (of 4 steps) with data workers."""
    folders = {name: tmp_path / name for name in ("whole", "broken")}
    start = {name: [*COMMAND, "--data.workers", "2", "--out", str(path)] for name, path in folders.items()}
    errors: list[str] = []
    assert launch(PROGRAM, {"arguments": start["whole"]}, errors=errors) == [0], errors
    assert launch(PROGRAM, {"arguments": start["broken"], "kill_at": 5}) == [-signal.SIGKILL]
    assert launch(PROGRAM, {"arguments": ["--resume", str(folders["broken"])]}, errors=errors) == [0], errors
    whole, broken = folders["whole"], folders["broken"]
    assert lines(whole, "train", "eval", "routing") == lines(broken, "train", "eval", "routing")
    for one in sorted((whole / "checkpoints/step_00000006").rglob("*.safetensors")):
        first, second = load_file(one), load_file(broken / one.relative_to(whole))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow  # three processes of a whole command each; gradients are compared in tests/tasks/test_moco.py
def test_two_ranks_train_as_one(launch: Callable[..., list[int]], tmp_path: Path):
    """Without noise, which every rank draws for itself."""
    losses = {}
    for ranks in (1, 2):
        out, errors = tmp_path / str(ranks), []
        noiseless = ["noise_std=0.0", *TINY[1:]]
        arguments = ["digits_moco_sparse", TINY[0], *noiseless, *SHORT, "--out", str(out)]
        assert launch(PROGRAM, {"arguments": arguments}, ranks=ranks, errors=errors) == [0] * ranks, errors
        losses[ranks] = [line["loss"] for line in lines(out, "train")]
        scores = lines(out, "eval")[-1]
        losses[ranks].append(scores["knn_top1"])
        assert scores["images"] == 599
    assert losses[2] == pytest.approx(losses[1], abs=4e-3)  # two of 599 images may tip over after six updates


def test_without_a_knn_the_run_ends_as_well(tmp_path: Path, run: Run):
    code, _, err = run("train", *COMMAND, "--task.knn-images", "0", "--out", tmp_path / "run")
    assert code == 0, err
    assert "knn_top1" not in lines(tmp_path / "run", "eval")[-1]
    assert "Right and wrong" not in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("opt", ["lars", "adamw"])
def test_optimisers(opt: str, tmp_path: Path, run: Run):
    extra = ["--optim.opt", opt, "--model.name", "mixer_t4_32", "--train.steps", "4", "--train.eval-every", "0"]
    args = ["--model.args", "patch_size=4", "num_blocks=1", "embed_dim=16"]
    code, _, err = run("train", "digits_moco_sparse", *SHORT, *extra, *args, "--out", tmp_path / "run")
    assert code == 0, err


@pytest.fixture
def one_class(tmp_path: Path) -> Path:
    (tmp_path / "data/cat").mkdir(parents=True)
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), i, dtype=np.uint8)).save(tmp_path / f"data/cat/{i}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data.batch-size 1", "data.batch_size 1 is too small for batch norm"),
        ("--task.temperature 0", "task.temperature 0.0 is not positive"),
        ("--task.momentum 1.5", "task.momentum 1.5 is not in [0, 1]"),
        ("--views.grey 0.2", "for colour images"),
        ("--train.grad-accum 2", "train.grad_accum 2"),
        ("--optim.layer-decay 0.7", "optim.layer_decay 0.7"),
        ("--model.args patch_size=16", "views of 8 pixels (data.image_size) are smaller than a patch"),
        ("--model.name resnet10t --task.freeze-patch-embed True", "no patch embedding"),
        ("--model.name resnet10t --model.no-final-norm", "no final norm"),
        ("--model.name mixer_t4_23", "nearest: mixer_t4_32"),
    ],
)
def test_mistakes_are_one_line(options: str, message: str, run: Run, tmp_path: Path):
    code, out, err = run("train", "digits_moco_sparse", *options.split(), "--out", tmp_path / "run")
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()


def test_other_mistakes_are_one_line(run: Run, pretrained: Path, one_class: Path, tmp_path: Path):
    for arguments, message in (
        ([], "which recipe?"),
        (["digits_moco_sprase"], "nearest: digits_moco_sparse"),
        (["--resume", pretrained, "--task.temperature", "0.3"], "task.temperature was 0.2 and is now 0.3"),
        (["--resume", "/no/such/run"], "/no/such/run is not a run folder"),
        (["cifar10_moco_mixer", "--data.name", "folder", "--data.root", one_class, "--data.image-size", "32",
          "--data.no-download"], "needs two classes, but folder has 'cat' alone"),
    ):  # fmt: skip
        if "cifar10_moco_mixer" in arguments:
            arguments = [*arguments, "--data.batch-size", "4", "--out", tmp_path / "run"]
        code, out, err = run("train", *arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err


def test_a_checkpoint_of_another_architecture_is_named(run: Run, pretrained: Path, tmp_path: Path):
    wider = ["digits_moco_sparse", *TINY, *SHORT]
    wider[wider.index("embed_dim=16")] = "embed_dim=32"
    assert run("train", *wider, "--out", tmp_path / "run")[0] == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    shutil.copytree(pretrained / "checkpoints", tmp_path / "run/checkpoints")
    code, _, err = run("train", "--resume", tmp_path / "run")
    assert code == 2 and "does not fit this model and optimiser" in err and err.count("\n") == 1


def test_recipes_are_listed(run: Run):
    assert "digits_moco_sparse" in run("recipes")[1]
    assert '"views"' in run("recipes", "digits_moco_sparse")[1]


@pytest.mark.slow  # a minute of training: whether features get better is seen in no less
def test_loss_falls_and_knn_rises_on_real_images(run: Run, tmp_path: Path):
    options = ["--train.epochs", "60", "--train.eval-every", "20", "--train.threads", "1"]
    args = ["--model.args", "num_blocks=2", "embed_dim=32", "sparse_blocks=1"]
    folder = tmp_path / "run"
    code, _, err = run("train", "digits_moco_sparse", *options, *args, "--out", folder)
    assert code == 0, err
    losses = [line["loss"] for line in lines(folder, "train")]
    scores = [line["knn_top1"] for line in lines(folder, "eval")]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    assert scores[-1] > scores[0] + 0.03 and scores[-1] > 0.8
