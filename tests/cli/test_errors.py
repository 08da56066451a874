"""Every mistake a user is known to make: one line on standard error, exit code 2, no traceback."""

from __future__ import annotations

import os
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
        ("tran digits_sparse", "unknown verb 'tran'; nearest: train"),
        ("train digits_sprase", "unknown recipe 'digits_sprase'; nearest: digits_sparse"),
        ("train", "which recipe?"),
        ("train --optim.lr 1", "which recipe?"),
        ("train sparse_mlp_t4_32", "which images? sparse_mlp_t4_32 is a model: --data.root FOLDER"),
        ("train cycle_mlp_b9", "nearest: cycle_mlp_b"),
        ("train resnet10t.nosuch --data.name digits", "unknown weights 'resnet10t.nosuch'; known: resnet10t.c3_in1k"),
        ("train digits_mixer --model.name resnet10t.nosuch", "unknown weights 'resnet10t.nosuch'"),
        ("info resnet10t.nosuch", "unknown weights 'resnet10t.nosuch'"),
        ("eval sparse_mlp_t4_32.x --pretrained --data.name digits", "known: sparse_mlp_t4_32 alone"),
        ("train digits_sparse digits_mixer", "train takes one recipe"),
        ("train digits_sparse --optm.lr 1", "nearest: --optim.lr"),
        ("train digits_sparse --optim.lr fast", "--optim.lr"),
        ("train digits_sparse --train.amp fp8", "--train.amp"),
        ("train digits_sparse --optim.opt adamv", "unknown optimiser 'adamv'; nearest: adam"),
        ("train digits_sparse --train.steps 5 --train.epochs 1", "exactly one of train.epochs"),
        ("train digits_sparse --model.name sparse_mlp_t4_23", "nearest: sparse_mlp_t4_32"),
        ("train digits_sparse --model.args top_k", "name=value"),
        ("train digits_sparse --model.args topk=3", "nearest: top_k"),
        ("train digits_sparse --model.args top_k=(9,2)", "top_k"),
        ("train digits_sparse --model.args capacity_ratio=0", "capacity_ratio must be above 0"),
        ("train digits_sparse --model.args patch_size=3", "not divisible by patch_size 3"),
        ("train digits_mixer --model.args patch_size=3", "not divisible by its patch size 3"),
        ("train digits_sparse --model.args num_classes=7", "comes from the data"),
        ("train digits_sparse --model.args checkpoint_path=missing", "use --model.weights"),
        ("train digits_sparse --name ../x", "name '../x' is no name of a folder in runs/"),
        ("train digits_sparse --name a/b", "name 'a/b' is no name of a folder in runs/"),
        ("train digits_sparse --name .. --train.steps 1", "name '..' is no name of a folder in runs/"),
        ("train digits_sparse --out .", "--out '.' names no folder of its own"),
        ("train digits_sparse --data.num-classes 7", "digits has 10 classes"),
        ("train digits_sparse --data.name digit", "did you mean digits"),
        ("train digits_sparse --data.name folder", "--data.root"),
        ("train digits_sparse --data.name folder --data.root=", "a folder set needs --data.root FOLDER"),
        ("train digits_sparse --data.name folder --data.root /no/such/folder", "/no/such/folder is not a folder"),
        ("train digits_sparse --data.name cifar10 --data.root /no/such/folder", "expected /no/such/folder/cifar-10"),
        ("train digits_sparse --data.batch-size 5000", "5000 is more than the 1198 training images"),
        ("train digits_sparse --data.batch-size 7 --augment.mixup 0.5", "even number"),
        ("train digits_sparse --augment.auto-augment rand", "colour"),
        ("train digits_sparse --model.weights /no/such/file", "no file of weights /no/such/file"),
        ("train --resume /no/such/run", "/no/such/run is not a run folder"),
        ("train --resume --optim.lr 1", "--resume"),
        ("train digits_sparse --trust-data", "--trust-data would be ignored"),
        ("train digits_sparse extra", "train takes one recipe, not 2"),
        ("train digits_sparse --optim.lr 1 extra", "'extra' is no option"),
        ("train digits_sparse --data.batch-size 0", "data.batch_size 0 must be at least 1"),
        ("train digits_sparse --data.repeats 0", "data.repeats 0 must be at least 1"),
        ("train digits_sparse --data.eval-batch-size 0", "data.eval_batch_size 0 must be at least 1"),
        ("train digits_sparse --data.image-size 0", "data.image_size 0 must be at least 1"),
        ("train digits_sparse --data.workers -1", "data.workers -1 must be at least 0"),
        ("train digits_sparse --data.workers 1000000", "data.workers 1000000 is more than the"),
        ("train digits_sparse --data.std 0", "data.std 0.0 must be above 0"),
        ("train digits_sparse --data.mean nan", "data.mean nan must be at least 0 and at most 1"),
        ("train digits_sparse --augment.rotate nan", "augment.rotate nan must be at least 0 and at most 180"),
        ("train digits_sparse --augment.rotate -5", "augment.rotate -5.0 must be at least 0"),
        ("train digits_sparse --augment.flip 2", "augment.flip 2.0 must be at least 0 and at most 1"),
        ("train digits_sparse --augment.mixup nan", "augment.mixup nan must be at least 0"),
        ("train digits_sparse --augment.pad 0 --augment.crop-scale 1 0.5", "augment.crop_scale 1.0 0.5 must be two"),
        ("train digits_sparse --optim.lr inf", "optim.lr inf is not positive and finite"),
        ("train digits_sparse --train.epochs inf", "train.epochs inf is not positive and finite"),
        ("train digits_sparse --train.epochs -1", "train.epochs -1.0 is not positive"),
        ("train digits_sparse --optim.weight-decay nan", "optim.weight_decay nan is not a finite number"),
        ("train digits_sparse --train.seed 9223372036854775808", "is not below 2^63"),
        ("train digits_sparse --train.seed 99999999999999999999999", "is not below 2^63"),
        ("train cora --train.seed 99999999999999999999999", "is not below 2^63"),
        ("train digits_sparse --data.label-share 0.5 --data.label-seed -1", "data.label_seed -1 must be at least 0"),
        ("train digits_sparse --model.args drop_path_rate=2", "drop_path_rate=2 is not a share in [0, 1)"),
        ("train digits_sparse --model.args embed_dim=0", "embed_dim must be a whole number of at least 1; got 0"),
        ("train digits_sparse --model.args num_experts=(2,2) top_k=(3,1)", "top_k must be at most num_experts (2)"),
        ("train digits_sparse --model.args noise_std=nan", "noise_std must be a finite number; got 'nan'"),
        ("train digits_mixer --model.args embed_dim=0", "model mixer_t4_32: "),
        ("train digits_mixer --model.args act_layer=swich", "model mixer_t4_32: "),
        ("compare digits_sparse", "compare takes two to 24 recipes or runs, not 1"),
        ("compare digits_sparse digits_mixer --seeds 1.5", "error: --seeds '1.5' is not {None}|INT"),
        ("train digits_sparse --train.steps=two", "error: --train.steps 'two' is not {None}|INT"),
        ("train digits_moco_sparse --task.momentum 2", "error: task.momentum 2.0 is not in [0, 1]"),
        ("compare digits_sparse digits_mixer --seeds 0", "--seeds 0 must be at least 1"),
        ("compare digits_sparse digits_sparse", "named twice"),
        ("compare digits_sparse digits_mixr", "nearest: digits_mixer"),
        ("compare digits_sparse digits_mixer --name both", "--name both would be ignored"),
        ("compare digits_sparse digits_mixer --optim.lr -1", "optim.lr -1.0 is not positive"),
        ("compare digits_mixer digits_sparse --data.image-size 7", "not divisible by its patch size 2"),
        ("eval", "one run folder or model name"),
        ("eval sparse_mlp_t4_23", "nearest: sparse_mlp_t4_32"),
        ("eval sparse_mlp_t4_32", "which images? a MODEL needs --data.name"),
        ("eval sparse_mlp_t4_32 --data.name digits", "which weights?"),
        ("eval mixer_b16_224 --data.name digits --checkpoint x.npz", "image size 8 is not divisible by its patch"),
        ("predict", "predict"),
        ("predict /no/such/run", "predict takes a run folder and files"),
        ("report /no/such/run", "/no/such/run is not a run folder"),
        ("recipes digits_sprase", "nearest: digits_sparse"),
        ("models xyz", "no model name fits 'xyz'"),
        ("info sparse_mlp_b16_225", "nearest: sparse_mlp_b16_224"),
        ("info sparse_mlp_t4_32 --image-size 33", "not divisible"),
        ("info", "info"),
        ("info sparse_mlp_t4_32 --classes 0", "--classes 0 must be at least 1"),
        ("info sparse_mlp_t4_32 --image-size -32", "--image-size -32 must be at least 1"),
        ("info sparse_mlp_t4_32 --node-link 100", "--node-link has no effect without --gpus"),
        ("info sparse_mlp_t4_32 --gpus 0", "--gpus 0 must be at least 1"),
        ("info sparse_mlp_t4_32 --gpus 4 --batch 6", "--batch 6 cannot be divided by 4 GPUs"),
        ("info sparse_mlp_t4_32 --gpus 8 --expert 8", "8 GPUs cannot share the 4 experts of blocks.4.mlp_channels"),
        ("info mixer_t4_32 --gpus 4 --expert 2", "the model has no experts that 2 GPUs could share"),
        ("info sparse_mlp_t4_32 --gpus 4 --link 0", "link 0 must be above 0"),
        ("predict /no/such/run x.png", "/no/such/run is not a run folder"),
        ("predict /no/such/run x.png --out x.txt", "--out x.txt must end in .csv or .json"),
        ("convert /no/such/file out.safetensors --model cycle_mlp_b1", "no file /no/such/file"),
        ("train linear_probe", "linear_probe begins with weights: --model.weights RUN_OR_FILE"),
        ("train knn --model.weights /no/such/run", "no run folder and no file of weights /no/such/run"),
        ("train knn --optim.lr 1 --model.weights x", "unknown option --optim.lr"),
        ("train finetune --model.weights /no/such/run", "no run folder and no file of weights /no/such/run"),
        ("train finetun --model.weights x", "nearest: finetune"),
        ("export /no/such/run out.safetensors", "/no/such/run is not a run folder"),
        ("train digits_sparse --data.label-share 0.001", "leaves class 0 without an image"),
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


@pytest.mark.parametrize("command", ["train digits_sparse", "compare digits_sparse digits_mixer"])
def test_a_file_where_the_run_folder_should_be(fails: Callable[..., str], tmp_path: Path, command: str):
    (tmp_path / "file").write_text("")
    message = fails(*command.split(), "--out", tmp_path / "file")
    assert "cannot be a run folder" in message and f"{tmp_path / 'file'} is a file" in message


def test_a_configuration_that_was_edited(run: Run, fails: Callable[..., str], trained: Path, tmp_path: Path):
    folder = tmp_path / "edited"
    shutil.copytree(trained, folder)
    config = folder / "config.json"
    original = config.read_text()
    config.write_text(original.replace('"lr": 0.003', '"lr": 0.5'))
    assert "cannot go on as it began: optim.lr was 0.003 and is now 0.5" in fails("train", "--resume", folder)
    config.write_text(original.replace('"seed"', '"sead"'))
    assert "config.json: unknown field train.sead; nearest: train.seed" in fails("train", "--resume", folder)
    config.write_text(original[:100])
    assert str(config) in fails("train", "--resume", folder)


@pytest.mark.parametrize("name", ["empty.pth", "cut.safetensors", "list.pth", "foreign.npz"])
def test_files_that_hold_no_weights(fails: Callable[..., str], trained: Path, tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(b"")
    if name == "cut.safetensors":
        path.write_bytes((trained / "model.safetensors").read_bytes()[:1000])
    elif name == "list.pth":
        torch.save([1, 2], path)
    elif name == "foreign.npz":
        np.savez(path, a=np.zeros(3))
    assert str(path) in fails("eval", trained, "--checkpoint", path)
    if path.suffix != ".npz":
        assert name in fails("convert", path, tmp_path / "out.safetensors", "--model", "cycle_mlp_b1")


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


@pytest.mark.parametrize("inside", [".", "runs/first", "cat"])
def test_a_run_folder_among_the_images(fails: Callable[..., str], images: Path, on_images: list[str], inside: str):
    before = sorted(images.rglob("*"))
    assert "lies among the images" in fails(*on_images[:-1], images / inside)
    assert sorted(images.rglob("*")) == before


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
    reason = f"cannot read image {tmp_path / 'text.png'}: not an image"
    assert (code, out, err) == (2, "", f"sparse-mlp: error: {reason}\n")


@pytest.mark.parametrize("what", ["missing.png", "empty", "*.jpg"])
def test_no_image_to_predict(fails: Callable[..., str], trained: Path, tmp_path: Path, what: str):
    (tmp_path / "empty").mkdir()
    assert "no image" in fails("predict", trained, tmp_path / what)


def test_evaluating_a_run_on_data_of_other_classes(fails: Callable[..., str], trained: Path, images: Path):
    options = ("--data.name", "folder", "--data.root", images, "--data.image-size", "8", "--data.channels", "1")
    message = fails("eval", trained, *options)
    assert "classes that the model was not trained on: 'cat', 'dog'" in message


def test_options_of_a_model_on_a_run(fails: Callable[..., str], trained: Path):
    assert "unknown option --pretrained" in fails("eval", trained, "--pretrained")


def test_images_of_one_class(fails: Callable[..., str], images: Path, on_images: list[str]):
    shutil.rmtree(images / "dog")
    assert "cat is the only class" in fails(*on_images)


def test_images_of_one_class_to_probe(fails: Callable[..., str], images: Path, trained: Path):
    shutil.rmtree(images / "dog")
    data = ["--data.name", "folder", "--data.root", images, "--data.image-size", "8", "--data.channels", "1"]
    options = ["--model.weights", trained, *data]
    assert "cat is the only class" in fails("train", "knn", *options)
    assert "cat is the only class" in fails("train", "linear_probe", *options, "--data.batch-size", "8")


def test_pretrained_weights_of_another_architecture(fails: Callable[..., str], trained: Path):
    message = fails("train", "finetune", "--model.weights", trained, "--model.name", "resnet10t")
    assert "0 matched" in message and "missing (conv1" in message and "unexpected (blocks.0" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data.image-size 9", "img_size 9 is not divisible by patch_size 4"),
        ("--data.num-classes 7", "data.num_classes is 7, but digits has 10 classes"),
        ("--train.compile", "train.compile would be ignored"),
        ("--optim.layer-decay 0.5", "optim.layer_decay 0.5 would be ignored"),
    ],
)
def test_a_probe_that_cannot_be(fails: Callable[..., str], trained: Path, options: str, message: str):
    assert message in fails("train", "linear_probe", "--model.weights", trained, *options.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task.k 0", "task.k 0 must be at least 1"),
        ("--task.temperature nan", "task.temperature nan is not positive and finite"),
    ],
)
def test_a_knn_that_cannot_be(fails: Callable[..., str], trained: Path, options: str, message: str):
    assert message in fails("train", "knn", "--model.weights", trained, *options.split())


def test_a_file_of_weights_does_not_say_enough(fails: Callable[..., str], trained: Path):
    weights = ["train", "linear_probe", "--model.weights", trained / "model.safetensors"]
    assert "which model are the weights" in fails(*weights, "--data.name", "digits")
    assert "on which images?" in fails(*weights, "--model.name", "sparse_mlp_t4_32")


@pytest.mark.parametrize("options", ["--top 0", "--top -3"])
def test_predicting_no_class(fails: Callable[..., str], trained: Path, options: str):
    assert "must be at least 1" in fails("predict", trained, "x.png", *options.split())


@pytest.mark.parametrize("target", ["none/x.csv", ".csv", "x.txt", "folder.csv"])
def test_predicting_into_what_is_no_file(fails: Callable[..., str], trained: Path, tmp_path: Path, target: str):
    (tmp_path / "folder.csv").mkdir()
    assert f"--out {tmp_path / target}" in fails("predict", trained, "x.png", "--out", tmp_path / target)


@pytest.mark.parametrize("target", ["out.pth", "."])
def test_exporting_to_what_is_no_file(fails: Callable[..., str], trained: Path, target: str):
    assert "must end in .safetensors" in fails("export", trained, target)


def test_comparing_a_run_that_has_not_finished(fails: Callable[..., str], trained: Path, tmp_path: Path):
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    (copy / "results.json").unlink()
    assert "has not finished" in fails("compare", trained, copy)
    assert "has not finished" in fails("report", trained, copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"kind": "clasify"}', "unknown kind of run 'clasify'; nearest: classify"),
        ("config.json", "{}", "names no kind of run"),
        (
            "config.json",
            '{"kind": "classify", "model": {"name": "resnet10t", "args": {"pretrained": true}}}',
            "is not an",
        ),
        ("config.json", "[]", "config.json"),
        ("inputs.json", "{", "inputs.json"),
        ("inputs.json", '{"classes": 3}', "inputs.json"),
        ("inputs.json", "[1]", "inputs.json should hold a JSON object"),
        ("config.json", "\udcff", "config.json is not valid JSON"),
        ("config.json", "[" * 100_000, "config.json is not valid JSON"),
    ],
)
@pytest.mark.parametrize("verb", ["eval", "report", "predict", "export", "train"])
def test_a_damaged_run_folder(
    fails: Callable[..., str], trained: Path, tmp_path: Path, verb: str, name: str, content: str, message: str
):
    if name == "inputs.json" and verb in ("report", "train"):
        pytest.skip("reads the data themselves")
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    (copy / name).write_bytes(os.fsencode(content))
    words = {"predict": ["x.png"], "export": ["x.safetensors"]}.get(verb, [])
    (tmp_path / "x.png").write_bytes(b"")
    arguments = ["train", "--resume", copy] if verb == "train" else [verb, copy, *words]
    assert message in fails(*arguments)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "{}", '{"metrics": 3}', "\udcff"])
def test_damaged_results(fails: Callable[..., str], trained: Path, tmp_path: Path, content: str):
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    (copy / "results.json").write_bytes(os.fsencode(content))
    assert "results.json" in fails("compare", trained, copy)


def test_seeds_that_would_be_ignored(fails: Callable[..., str], trained: Path, tmp_path: Path):
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    assert "--seeds would be ignored: finished runs" in fails("compare", trained, copy, "--seeds", "2")
    both = ["compare", "digits_sparse", "digits_mixer", "--out", tmp_path / "out"]
    assert "--train.seed 7 would be ignored" in fails(*both, "--seeds", "2", "--train.seed", "7")
    kinds = ["compare", "knn", trained, "--model.weights", trained, "--out", tmp_path / "out"]
    assert "--seeds 2 would be ignored: knn trains nothing" in fails(*kinds, "--seeds", "2")


@pytest.mark.parametrize("value", ["{1}", "1e999", "b'x'", "1j", "{[]:1}"])
def test_arguments_that_no_file_can_hold(fails: Callable[..., str], value: str):
    message = fails("train", "digits_sparse", "--model.args", f"act_layer={value}")
    assert "act_layer" in message or "model sparse_mlp_t4_32" in message


def test_options_of_a_report_that_would_be_ignored(fails: Callable[..., str], trained: Path, tmp_path: Path):
    assert "--out would be ignored" in fails("report", trained, "--out", tmp_path)
    assert "unknown option --images" in fails("report", trained, trained, "--images", tmp_path)
    assert "there are no images in" in fails("report", trained, "--images", tmp_path)
    with_kind = Path(shutil.copytree(trained, tmp_path / "run")) / "config.json"
    with_kind.write_text(with_kind.read_text().replace('"kind": "classify"', '"kind": "nodes"'))
    assert "unknown option --images" in fails("report", with_kind.parent, "--images", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.pt", "--to", "onnx"], "the file to write for --to onnx must end in .onnx, got model.pt"),
        (["model.pt2", "--to", "torch-export", "--int8"], "--int8 would be ignored"),
        (["model.onnx", "--to", "oxxn"], "--to 'oxxn' must be one of timm, onnx, torch-export"),
        (["model.safetensors", "--int8"], "int8 would be ignored"),
        (["no/model.onnx", "--to", "onnx"], "there is no folder no"),
    ],
)
def test_an_export_that_cannot_be(fails: Callable[..., str], trained: Path, options: list[str], message: str):
    assert message in fails("export", trained, *options)


@pytest.mark.parametrize("verb", ["compare", "report"])
def test_a_comparison_has_a_folder_of_its_own(fails: Callable[..., str], trained: Path, tmp_path: Path, verb: str):
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    assert "--out '.' names no folder of its own" in fails(verb, trained, copy, "--out", "")


def test_a_run_on_a_graph_is_no_model_of_images(fails: Callable[..., str], trained: Path, tmp_path: Path):
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"kind": "classify"', '"kind": "nodes"'))
    assert "config.json has no model of a run on images" in fails("info", copy)
    assert "config.json has no model of a run on images" in fails("train", "knn", "--model.weights", copy)


def test_a_knn_is_compared_with_what_was_trained(run: Run, trained: Path, tmp_path: Path):
    assert run("train", "knn", "--model.weights", trained, "--out", tmp_path / "knn")[0] == 0
    code, out, _ = run("compare", tmp_path / "knn", trained, "--out", tmp_path / "both")
    assert code == 0 and "knn" in out and (tmp_path / "both" / "comparison.html").is_file()
