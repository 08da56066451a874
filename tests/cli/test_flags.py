from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def one_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """tyro sets its groups of options side by side where there is room; their order is another then."""
    monkeypatch.setenv("COLUMNS", "80")


EXPORT_FLAGS = "--to --int8 --no-int8 --weight-only --no-weight-only --trust-data --no-trust-data"
RECIPE_FLAGS = (
    "--name "
    "--model.name --model.args --model.pretrained --model.no-pretrained --model.final-norm --model.no-final-norm "
    "--model.weights --model.optimizer-state --model.no-optimizer-state "
    "--model.experts.blocks --model.experts.num-experts --model.experts.top-k --model.experts.init "
    "--model.experts.strength --model.experts.router "
    "--model.experts.renormalize --model.experts.no-renormalize --model.experts.args "
    "--data.name --data.root --data.image-size --data.channels --data.batch-size --data.repeats "
    "--data.eval-batch-size "
    "--data.workers --data.on-bad-image --data.test-share --data.label-share --data.label-seed "
    "--data.download --data.no-download "
    "--data.train-split --data.test-split --data.num-classes --data.num-samples --data.mean --data.std "
    "--data.crop-pct "
    "--augment.pad --augment.rotate --augment.crop-scale --augment.crop-ratio --augment.flip "
    "--augment.color-jitter --augment.auto-augment --augment.erase --augment.mixup --augment.cutmix "
    "--augment.mix-probability --augment.cutmix-share "
    "--task.loss --task.smoothing --task.frozen --task.no-frozen "
    "--optim.opt --optim.lr --optim.weight-decay --optim.betas --optim.eps --optim.momentum "
    "--optim.layer-decay "
    "--schedule.sched --schedule.power --schedule.milestones "
    "--schedule.warmup-steps --schedule.warmup-epochs --schedule.warmup-lr "
    "--schedule.min-lr "
    "--train.epochs --train.steps --train.minutes --train.seed --train.amp --train.grad-accum "
    "--train.clip-grad --train.ema-decay --train.ema-warmup --train.no-ema-warmup --train.compile "
    "--train.no-compile --train.grad-checkpointing --train.no-grad-checkpointing --train.channels-last "
    "--train.no-channels-last --train.deterministic --train.no-deterministic --train.log-every "
    "--train.eval-every --train.save-every --train.keep --train.device --train.threads "
    "--mesh.data --mesh.expert --mesh.shard --mesh.no-shard --mesh.balance "
)


PRETRAIN_FLAGS = (
    "--views.crop-scale --views.crop-ratio --views.flip --views.rotate --views.jitter "
    "--views.brightness --views.contrast --views.saturation --views.hue --views.grey --views.blur --views.blur-sigma "
    "--views.solarize --task.temperature --task.momentum --task.momentum-sched --task.no-momentum-sched "
    "--task.hidden-dim --task.out-dim --task.projector-layers --task.predictor-layers --task.freeze-patch-embed "
    "--task.decay-all --task.no-decay-all --task.knn-images --task.knn-k --task.knn-temperature "
)


def flags(text: str) -> list[str]:
    """The options that a help text explains, in its order."""
    lines = [line.strip("│ ") for line in text.splitlines()]
    return [flag for line in lines if line.startswith("--") for flag in re.findall(r"--[a-z][\w.-]*", line)]


@pytest.mark.parametrize("command", ["train digits_sparse", "train resnet18", "compare digits_sparse"])
def test_the_flags_of_a_recipe_are_frozen(run: Run, command: str):
    """Scripts depend on these names: adding one is fine, with a line here; renaming one is not."""
    _, out, _ = run(*command.split(), "--help-all")
    assert flags(out) == RECIPE_FLAGS.split()


def test_the_flags_of_pretraining_are_frozen(run: Run):
    """Those of a recipe but for augmentation and loss, and its own."""
    _, out, _ = run("train", "digits_moco_sparse", "--help-all")
    kept = {flag for flag in RECIPE_FLAGS.split() if not flag.startswith(("--augment.", "--task."))}
    assert set(flags(out)) == {*kept, *PRETRAIN_FLAGS.split()}


def test_the_flags_of_the_nearest_neighbours_are_frozen(run: Run):
    _, out, _ = run("train", "knn", "--help-all")
    kept = {flag for flag in RECIPE_FLAGS.split() if flag.startswith(("--name", "--model.", "--data."))}
    shown = set(flags(out)) - {"--out"}  # named in a help text
    assert shown == {*kept, "--task.k", "--task.temperature", "--device"}


INFO_FLAGS = """
--args --image-size --channels --classes --gpus --batch --amp --expert --states --memory --tflops --bandwidth --node
--node-link --link --latency
"""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("predict", ["--out", "--checkpoint", "--trust-data", "--no-trust-data"]),
        ("report", ["--out"]),
        ("recipes", []),
        ("models", ["--all", "--no-all"]),
        ("info", INFO_FLAGS.split()),
        ("export", EXPORT_FLAGS.split()),
    ],
)
def test_the_flags_of_the_other_verbs_are_frozen(run: Run, command: str, expected: list[str]):
    assert flags(run(command, "--help")[1]) == expected


@pytest.mark.parametrize("recipe", ["digits_sparse", "digits_moco_sparse"])
def test_every_flag_is_explained(run: Run, recipe: str):
    """No field of a recipe without a docstring: tyro shows then nothing but the default."""
    _, out, _ = run("train", recipe, "--help-all")
    lines = [line.strip("│ ") for line in out.splitlines()]
    bare = [one for one, two in pairwise(lines) if one.startswith("--") and two.startswith("(default")]
    assert not bare
