"""Runs whose model has experts in the place of its MLPs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sparse_mlp
from sparse_mlp.cli.main import main
from sparse_mlp.data import InputSpec
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import ModelConfig, build_model, from_json, override
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.recipe import ExpertsConfig
from sparse_mlp.moe.telemetry import moe_layers

SMALL = {"num_blocks": 2, "embed_dim": 16, "mlp_ratio": [0.5, 2.0]}
SPEC = InputSpec(tuple("abcd"), 1, 8, (0.5,), (0.5,), 1.0)


def model(**experts) -> ModelConfig:
    return ModelConfig("mixer_t4_32", {**SMALL, "patch_size": 2}, experts=ExpertsConfig(**experts))


def recipe(steps: int = 4, **changes):
    experts = {"blocks": 1, "num_experts": 4}
    changes = {"args": SMALL, "experts": experts, **changes}
    return sparse_mlp.recipe("digits_mixer", model=changes, train={"steps": steps, "save_every": 2, "log_every": 1})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sparse_mlp.Run:
    return sparse_mlp.train(recipe(), tmp_path_factory.mktemp("experts") / "run", show=False)


def test_the_run_folder_makes_the_same_model_again(run: sparse_mlp.Run, tmp_path: Path) -> None:
    assert run.evaluate()["top1"] == pytest.approx(run.metrics["top1"])
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    assert "class_1" in run.predict(tmp_path / "digit.png")[0]
    assert "busiest" in run.report().read_text()
    stored = load_file(run.folder.weights())
    assert stored["blocks.1.mlp_channels.experts.fc1.weight"].shape == (4, 16, 32)
    assert "blocks.0.mlp_channels.fc1.weight" in stored


def test_what_export_prints_loads_the_model(run: sparse_mlp.Run, tmp_path: Path) -> None:
    code = run.export(tmp_path / "weights.safetensors")
    assert "sparse_mlp.sparsify(model, blocks=1, num_experts=4" in code
    space: dict = {}
    exec(code, space)
    assert list(moe_layers(space["model"])) == ["blocks.1.mlp_tokens", "blocks.1.mlp_channels"]
    stored = load_file(run.folder.weights())
    assert all(torch.equal(value, stored[name]) for name, value in space["model"].state_dict().items())


def test_its_weights_are_evaluated_as_those_of_a_model(run: sparse_mlp.Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["num_blocks=2", "embed_dim=16", "mlp_ratio=(0.5,2.0)", "patch_size=2"]
    words = ["eval", "mixer_t4_32", "--model-args", *arguments, "--data.name", "digits"]
    words += ["--checkpoint", str(run.folder.weights())]
    assert main([*words, "--experts.blocks", "1", "--experts.num-experts", "4"]) == 0
    assert f"{run.metrics['top1']:.2%}" in capsys.readouterr().out
    assert main(words) == 2
    assert "of a model with experts: call `sparse_mlp.sparsify`" in capsys.readouterr().err


def test_a_resumed_run_ends_as_one_that_was_not_stopped(run: sparse_mlp.Run, tmp_path: Path) -> None:
    stopped = sparse_mlp.train(recipe(), tmp_path / "run", show=False)
    for checkpoint in sorted((stopped.path / "checkpoints").iterdir())[1:]:
        checkpoint.rename(tmp_path / checkpoint.name)
    resumed = sparse_mlp.resume(stopped.path, show=False)
    first, second = (load_file(one.folder.weights()) for one in (run, resumed))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_experts_begin_as_the_mlps_of_a_dense_run(tmp_path: Path) -> None:
    dense = sparse_mlp.train(recipe(experts={}), tmp_path / "dense", show=False)
    stored = load_file(dense.folder.weights())
    sparse = build_model(
        ModelConfig(
            "mixer_t4_32",
            {**SMALL, "patch_size": 2},
            weights=str(dense.path),
            experts=ExpertsConfig(blocks=1, num_experts=4),
        ),
        InputSpec(tuple("0123456789"), 1, 8, (0.5,), (0.5,), 1.0),
    )
    fc1 = sparse.blocks[1].mlp_channels.experts.fc1.weight
    for e in range(4):
        assert torch.equal(fc1[e], stored["blocks.1.mlp_channels.fc1.weight"].t())


def test_a_run_that_begins_with_another_of_experts_has_its_weights(run: sparse_mlp.Run, tmp_path: Path) -> None:
    probe = sparse_mlp.recipe("linear_probe", model={"weights": str(run.path)}, train={"epochs": None, "steps": 1})
    tuned = sparse_mlp.train(probe, tmp_path / "probe", show=False)
    stored, own = (load_file(one.folder.weights()) for one in (run, tuned))
    name = "blocks.1.mlp_channels.experts.fc1.weight"
    assert torch.equal(stored[name], own[name])


def test_a_configuration_without_the_field_still_loads() -> None:
    values = json.loads(json.dumps({"kind": "classify", "model": {"name": "resnet10t"}}))
    assert from_json(ClassifyRecipe, values).model.experts == ExpertsConfig()


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(1, [1]), ("last-1", [1]), ("every-1", [0, 1]), ("0,-1", [0, 1]), ("0,", [0]), ("blocks.0", [0])],
)
def test_blocks_as_the_command_line_has_them(blocks: int | str, expected: list[int]) -> None:
    layers = moe_layers(build_model(model(blocks=blocks, num_experts=2), SPEC))
    assert sorted({int(name.split(".")[1]) for name in layers}) == expected


# ---- Starts ----


@torch.no_grad()
def test_the_strength_of_a_start_is_taken() -> None:
    dense = build_model(model(), SPEC).blocks[1].mlp_channels.fc1.weight
    far: dict[float, float] = {}
    for strength in (0.01, 0.5):
        torch.manual_seed(0)
        noisy = build_model(model(blocks=1, num_experts=2, init="noise", strength=strength), SPEC).blocks[1]
        torch.manual_seed(0)
        begun = build_model(model(blocks=1, num_experts=2), SPEC).blocks[1]
        difference = noisy.mlp_channels.experts.fc1.weight - begun.mlp_channels.experts.fc1.weight
        far[strength] = float(difference.std() / begun.mlp_channels.experts.fc1.weight[0].std())
    assert far == pytest.approx({0.01: 0.01, 0.5: 0.5}, rel=0.15)
    half = build_model(model(blocks=1, num_experts=2, init="sample", strength=0.25), SPEC).blocks[1]
    assert half.mlp_channels.experts.fc1.weight.shape == (2, 16, dense.shape[0] // 4)


def test_routers_begin_as_the_centroids_of_the_first_training_batch(tmp_path: Path) -> None:
    """The rows are those that `sparsify` gives for the same images; a run that goes on has its own."""
    from sparse_mlp.jobs import Context
    from sparse_mlp.jobs.classify import ClassifyJob

    given = recipe(2, experts={"blocks": 1, "num_experts": 4, "router": "centroids", "init": "sample"})
    job = ClassifyJob(given, Context(trusted=True))
    layers = moe_layers(job.task.backbone())
    batch = next(iter(job.loaders.train(start_step=0, steps=1)))["image"]
    torch.manual_seed(given.train.seed)
    dense = build_model(ModelConfig("mixer_t4_32", dict(given.model.args)), job.data.spec)
    sparse_mlp.sparsify(dense, 1, 4, init="sample", router="centroids", images=batch)
    for name, layer in moe_layers(dense).items():
        assert torch.equal(layer.router.weight, layers[name].router.weight)
        assert torch.equal(layer.experts.fc1.weight, layers[name].experts.fc1.weight)
        assert torch.allclose(layer.router.weight.norm(dim=1), torch.ones(4))
    run = sparse_mlp.train(given, tmp_path / "run", show=False)
    assert run.evaluate()["top1"] == pytest.approx(run.metrics["top1"])
    assert "router=" not in run.export(tmp_path / "weights.safetensors")
    assert sparse_mlp.resume(run.path, show=False).metrics == run.metrics


@pytest.mark.slow
def test_a_pretraining_begins_with_centroids_too(tmp_path: Path) -> None:
    experts = {"blocks": 1, "num_experts": 2, "router": "centroids"}
    args = {**SMALL, "patch_size": 2}
    changes = {"model": {"name": "mixer_t4_32", "args": args, "experts": experts}, "train": {"steps": 1}}
    run = sparse_mlp.train(sparse_mlp.recipe("digits_moco_sparse", **changes), tmp_path / "run", show=False)
    assert len(moe_layers(run.load())) == 2


def test_centroids_where_there_are_none_are_one_line(run: sparse_mlp.Run, tmp_path: Path) -> None:
    centroids = model(blocks=1, num_experts=4, router="centroids")
    with pytest.raises(UserError, match=r"model\.experts\.router centroids is for classification and pre-training"):
        build_model(centroids, SPEC)
    experts = {"blocks": 1, "num_experts": 4, "router": "centroids"}
    with pytest.raises(UserError, match=r"router centroids would be ignored: .* has routers"):
        sparse_mlp.train(recipe(1, weights=str(run.path), experts=experts), tmp_path / "run", show=False)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"strength": 0.1}, r"model\.experts\.strength would be ignored"),
        ({"blocks": 1, "strength": 0.1}, "strength 0.1 has no effect on 'copy'"),
        ({"blocks": 1, "init": "drop", "strength": 1.5}, r"strength 1.5 is not in \(0, 1\]"),
        ({"num_experts": 4}, r"model\.experts\.num_experts would be ignored: model\.experts\.blocks does not say"),
        ({"blocks": 3}, "blocks 3 does not fit a model of 2 blocks"),
        ({"blocks": 1, "top_k": 9}, r"top_k must be at most num_experts \(8\)"),
        ({"blocks": 1, "args": {"capacity": 1}}, "capacity=1 is no argument of experts; nearest: capacity_ratio"),
        ({"blocks": 1, "args": {"act": "relu"}}, "act='relu' is no argument of experts"),
        ({"blocks": 1, "args": {"scores": "tanh"}}, "scores must be"),
    ],
)
def test_what_does_not_fit_is_one_line(experts: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_model(model(**experts), SPEC)
    assert "\n" not in str(error.value)


def test_of_the_starts_only_known_ones_are_taken() -> None:
    with pytest.raises(UserError, match=r"model\.experts\.init"):
        override(ClassifyRecipe(), {"model": {"experts": {"blocks": 1, "init": "copies"}}})


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "digits_mixer", "--model.args", "num_blocks=2", "embed_dim=16", "--train.steps", "1"]
    words += ["--model.experts.blocks", "last-1", "--model.experts.num-experts", "2", "--out", str(tmp_path / "run")]
    assert main([*words, "--model.experts.args", "shared_experts=1"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["experts"]["blocks"] == "last-1"
    assert main(["eval", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "run")]) == 0
    assert "blocks.1.mlp_channels" in capsys.readouterr().out


# ---- Other arguments at inference ----


@pytest.fixture(scope="module")
def top_2(tmp_path_factory: pytest.TempPathFactory) -> sparse_mlp.Run:
    two = recipe(2, experts={"blocks": 1, "num_experts": 4, "top_k": 2})
    return sparse_mlp.train(two, tmp_path_factory.mktemp("top_2") / "run", show=False)


def test_a_trained_model_is_evaluated_with_fewer_experts_an_item(top_2: sparse_mlp.Run) -> None:
    from sparse_mlp.jobs.images import load_trained

    assert {layer.top_k for layer in moe_layers(load_trained(top_2.folder, args={"top_k": 1})).values()} == {1}
    other = top_2.evaluate(model={"args": {"top_k": 1}})
    assert other["loss"] != top_2.metrics["loss"]
    assert top_2.evaluate(model={"args": {"top_k": 2}})["loss"] == pytest.approx(top_2.metrics["loss"])
    capacity = {"eval_capacity_ratio": 0.5, "prioritized": True, "capacity_group": "batch"}
    assert top_2.evaluate(model={"args": capacity})["loss"] != top_2.metrics["loss"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("top_k=3", "model.args top_k=3 is too many: blocks.1.mlp_tokens was trained with 2 of 4 experts an item"),
        ("top_k=5", "top_k must be at most num_experts (4); got 5"),
        ("top_k=0", "top_k must be at least 1; got 0"),
        ("top_k=1.5", "model.args top_k=1.5 must be a whole number"),
        ("top_k=(1,1)", "model.args top_k=(1, 1) must be a whole number"),
        ("renormalize=2", "model.args renormalize=2 must be True or False"),
        ("num_experts=3", "num_experts=3 cannot change in a trained model; what can: top_k"),
    ],
)
def test_other_experts_than_it_was_trained_for_are_one_line(
    top_2: sparse_mlp.Run, args: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    for words in (["eval", str(top_2.path)], ["predict", str(top_2.path), str(tmp_path / "digit.png")]):
        assert main([*words, "--model.args", args]) == 2
        error = capsys.readouterr().err
        assert message in " ".join(error.split()) and "Traceback" not in error


def test_the_experts_of_tokens_and_of_channels_have_each_their_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = sparse_mlp.recipe(
        "digits_sparse", model={"args": {"num_blocks": 1, "sparse_blocks": 1, "embed_dim": 16}}, train={"steps": 2}
    )
    run = sparse_mlp.train(sparse, tmp_path / "run", show=False)
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    assert main(["eval", str(run.path), "--model.args", "top_k=(1,1)"]) == 0
    assert main(["predict", str(run.path), str(tmp_path / "digit.png"), "--model.args", "top_k=(1,1)"]) == 0
    capsys.readouterr()
    for args, message in {
        "top_k=(2,2)": "top_k=(2, 2) is too many: blocks.0.mlp_tokens was trained with 1 of",
        "top_k=(1,3)": "top_k=(1, 3) is too many: blocks.0.mlp_channels was trained with 2 of",
        "top_k=(99,1)": "top_k must be at most num_experts",
        "top_k=2": "top_k must be a pair of numbers (token mixing, channel mixing); got 2",
    }.items():
        assert main(["eval", str(run.path), "--model.args", args]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_without_experts_has_nothing_to_change(tmp_path: Path) -> None:
    args = {"num_blocks": 1, "sparse_blocks": 0, "embed_dim": 16}
    run = sparse_mlp.train(
        sparse_mlp.recipe("digits_sparse", model={"args": args}, train={"steps": 1}), tmp_path / "run", show=False
    )
    with pytest.raises(UserError, match=r"top_k=\[1, 1\] would be ignored: the trained model has no experts"):
        run.evaluate(model={"args": {"top_k": [1, 1]}})


def test_the_curve_of_accuracy_against_multiply_adds_is_measured_and_drawn(run: sparse_mlp.Run) -> None:
    metrics = run.evaluate(curve=True)
    points = json.loads((run.path / "capacity_curve.json").read_text())["points"]
    assert [point["ratio"] for point in points] == [None, 1.0, 0.75, 0.5, 0.25, 0.1]
    assert points[0]["top1"] == pytest.approx(metrics["top1"]) == pytest.approx(run.metrics["top1"])
    macs = [point["macs"] for point in points]
    assert macs == sorted(macs, reverse=True) and macs[-1] < 0.9 * macs[0]
    assert "Top-1 by capacity of the experts" in run.report().read_text()
    (run.path / "capacity_curve.json").write_text('{"points": [{"ratio": 1}]}')
    with pytest.raises(UserError, match=r"capacity_curve\.json should hold points"):
        run.report()
    (run.path / "capacity_curve.json").unlink()


def test_a_dense_run_has_no_such_curve(tmp_path: Path) -> None:
    dense = sparse_mlp.train(recipe(2, experts={}), tmp_path / "run", show=False)
    with pytest.raises(UserError, match="has no experts whose capacity"):
        dense.evaluate(curve=True)
