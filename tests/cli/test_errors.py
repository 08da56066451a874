"""Every mistake a user is known to make: one line on standard error, exit code 2, no traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """Runs a command that has to fail; its message."""

    def call(*arguments: str | Path) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("sparse-mlp: error: ") and err.count("\n") == 1
        return err

    return call


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tran digits_sparse", "unknown command 'tran'; nearest: train"),
        ("train digits_sprase", "unknown recipe 'digits_sprase'; nearest: digits_sparse"),
        ("train", "which recipe?"),
        ("train --optim.lr 1", "which recipe?"),
        ("train digits_sparse digits_mixer", "train takes one recipe"),
        ("train digits_sparse --optm.lr 1", "nearest: --optim.lr"),
        ("train digits_sparse --optim.lr fast", "--optim.lr"),
        ("train digits_sparse --train.amp fp8", "--train.amp"),
        ("train digits_sparse --optim.opt adamv", "unknown optimiser 'adamv'; nearest: adam"),
        ("train digits_sparse --train.steps 5", "train.epochs"),
        ("train digits_sparse --model.name sparse_mlp_t4_23", "nearest: sparse_mlp_t4_32"),
        ("train digits_sparse --model.args top_k", "name=value"),
        ("train digits_sparse --model.args topk=3", "nearest: top_k"),
        ("train digits_sparse --model.args top_k=(9,2)", "top_k"),
        ("train digits_sparse --model.args capacity_ratio=0", "capacity_ratio must be above 0"),
        ("train digits_sparse --model.args patch_size=3", "not divisible by patch_size 3"),
        ("train digits_mixer --model.args patch_size=3", "not divisible by its patch size 3"),
        ("train digits_sparse --model.args num_classes=7", "comes from the data"),
        ("train digits_sparse --data.num-classes 7", "digits has 10 classes"),
        ("train digits_sparse --data.name digit", "did you mean digits"),
        ("train digits_sparse --data.name folder", "--data.root"),
        ("train digits_sparse --data.name folder --data.root /no/such/folder", "/no/such/folder is not a folder"),
        ("train digits_sparse --data.name cifar10 --data.root /no/such/folder", "expected /no/such/folder/cifar-10"),
        ("train digits_sparse --data.batch-size 5000", "5000 is more than the 1198 training images"),
        ("train digits_sparse --data.batch-size 7 --augment.mixup 0.5", "even number"),
        ("train digits_sparse --augment.auto-augment rand", "colour"),
        ("train digits_sparse --model.weights /no/such/file", "no file of weights /no/such/file"),
        ("train --resume /no/such/run", "/no/such/run is not a run folder"),
        ("compare digits_sparse", "two to six recipes"),
        ("compare digits_sparse digits_sparse", "named twice"),
        ("compare digits_sparse digits_mixr", "nearest: digits_mixer"),
        ("eval", "one run folder or model name"),
        ("eval sparse_mlp_t4_23", "nearest: sparse_mlp_t4_32"),
        ("eval sparse_mlp_t4_32", "which weights?"),
        ("predict", "predict"),
        ("predict /no/such/run", "no image given"),
        ("report /no/such/run", "/no/such/run is not a run folder"),
        ("recipes digits_sprase", "nearest: digits_sparse"),
        ("models xyz", "no model name fits 'xyz'"),
        ("info sparse_mlp_b16_225", "nearest: sparse_mlp_b16_224"),
        ("info sparse_mlp_t4_32 --image-size 33", "not divisible"),
        ("info", "info"),
    ],
)
def test_wrong_command_lines(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
):
    monkeypatch.chdir(tmp_path)
    assert message in fails(*line.split())
    assert not list(tmp_path.rglob("config.json")), "what cannot be trained leaves no run folder"


def test_resuming_with_another_configuration(fails: Callable[..., str], trained: Path):
    message = fails("train", "--resume", trained, "--optim.lr", "0.5", "--data.batch-size", "64")
    assert "data.batch_size was 128 and is now 64" in message and "optim.lr was 0.003 and is now 0.5" in message


def test_resuming_into_another_folder(fails: Callable[..., str], trained: Path, tmp_path: Path):
    assert "--out" in fails("train", "--resume", trained, "--out", tmp_path)


def test_a_folder_that_holds_a_run_already(fails: Callable[..., str], trained: Path):
    assert "holds a run already" in fails("train", "digits_sparse", "--out", trained)


def test_loss_that_is_not_finite(run: Run, tiny: list[str], tmp_path: Path):
    code, _, err = run(
        "train", "digits_sparse", *tiny, "--out", tmp_path / "run", "--optim.lr", "1e30", "--train.log-every", "1"
    )
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("sparse-mlp: error: the loss is nan at step") and "checkpoint" in last


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def on_images(images: Path, tmp_path: Path) -> list[str]:
    """A tiny run on the folder of images."""
    data = ["--data.name", "folder", "--data.root", str(images), "--data.image-size", "16", "--data.batch-size", "8"]
    model = ["--model.args", "num_blocks=1", "embed_dim=16", "sparse_blocks=1", "patch_size=8", "--augment.pad", "0"]
    length = ["--train.epochs", "2", "--schedule.warmup-epochs", "0", "--augment.rotate", "0"]
    return ["train", "digits_sparse", *data, *model, *length, "--out", str(tmp_path / "run")]


def test_truncated_image_in_a_folder_is_fatal_and_named(fails: Callable[..., str], images: Path, on_images: list[str]):
    for path in (images / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert "cannot read image" in fails(*on_images) and str(images / "cat")


def test_unreadable_image_in_a_folder_is_skipped_and_counted_on_request(run: Run, images: Path, on_images: list[str]):
    (images / "cat" / "3.png").write_text("no picture")
    code, _, err = run(*on_images, "--data.on-bad-image", "skip")
    assert code == 0 and "1 images could not be read and were skipped" in err and "3.png" in err


def test_empty_folder(fails: Callable[..., str], images: Path, on_images: list[str]):
    shutil.rmtree(images)
    images.mkdir()
    assert "no class folders" in fails(*on_images)


def test_foreign_checkpoint(fails: Callable[..., str], trained: Path, tmp_path: Path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    message = fails("eval", trained, "--checkpoint", tmp_path / "foreign.pth")
    assert "0 matched" in message and "missing" in message and "1 unexpected (conv1.weight)" in message


def test_corrupt_checkpoint(fails: Callable[..., str], trained: Path, tmp_path: Path):
    (tmp_path / "corrupt.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:1000])
    assert "holds no weights" in fails("eval", trained, "--checkpoint", tmp_path / "corrupt.safetensors")


def test_corrupt_checkpoint_on_resuming(fails: Callable[..., str], trained: Path, tmp_path: Path):
    broken = Path(shutil.copytree(trained, tmp_path / "run"))
    state = next(file for file in sorted((broken / "checkpoints").rglob("*.safetensors")))
    state.write_bytes(state.read_bytes()[:-10])
    assert "damaged" in fails("train", "--resume", broken)


def test_unreadable_image_to_predict(run: Run, trained: Path, tmp_path: Path):
    (tmp_path / "text.png").write_text("no picture")
    code, out, err = run("predict", trained, tmp_path / "text.png")
    assert (code, out, err) == (2, "", f"sparse-mlp: error: cannot read image {tmp_path / 'text.png'}: not an image\n")


@pytest.mark.parametrize("what", ["missing.png", "empty", "*.jpg"])
def test_no_image_to_predict(fails: Callable[..., str], trained: Path, tmp_path: Path, what: str):
    (tmp_path / "empty").mkdir()
    assert "no image" in fails("predict", trained, tmp_path / what)


def test_evaluating_a_run_on_data_of_other_classes(fails: Callable[..., str], trained: Path, images: Path):
    options = ("--data.name", "folder", "--data.root", images, "--data.image-size", "8", "--data.channels", "1")
    assert "knows 10 classes, folder has 2" in fails("eval", trained, *options)


def test_options_of_a_model_on_a_run(fails: Callable[..., str], trained: Path):
    assert "for a MODEL" in fails("eval", trained, "--pretrained")
