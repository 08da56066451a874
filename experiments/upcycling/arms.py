"""The upcycling study as a list of named runs.

For each model and seed four runs: `dense` is trained first; `continued` trains it on as it is, and `upcycled` trains it
on with experts in two blocks, which begin as its MLPs; `scratch` has the same experts from random weights on.
`continued` and `upcycled` spend the same multiply-adds after the seam, and `scratch` as many as `dense` and one of them
together. The second expert and the routers count: an arm with experts makes fewer steps in its budget.

The variants change one thing of the Mixer's `upcycled`, with one seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from experiments.runs import NamedRun
from sparse_mlp.data import AugmentConfig, DataConfig, InputSpec
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.jobs import ModelConfig
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.model import build_model
from sparse_mlp.jobs.recipe import ExpertsConfig, from_json
from sparse_mlp.report.cost import count_macs
from sparse_mlp.tasks.classify import ClassifyConfig

SEEDS = (0, 1, 2)
BATCH_SIZE = 128
STEPS_PER_EPOCH = 50_000 // BATCH_SIZE
SEAM_LR = 0.5
"""Peak of the learning rate after the seam, as a share of that before it."""

CLASSES = tuple("0123456789")

DENSE, CONTINUED, UPCYCLED, SCRATCH = ARMS = ("dense", "continued", "upcycled", "scratch")

_AFTER_SEAM = 100  # added to the seed: the images come in another order than before


@dataclass(frozen=True)
class Subject:
    """A dense model, where it gets its experts, and how long it is trained before and after the seam."""

    model: ModelConfig
    blocks: int | str
    lr: float
    epochs: float
    further_epochs: float


# Lists for tuples, as config.json gives them back.
SUBJECTS: dict[str, Subject] = {
    "mixer": Subject(
        ModelConfig(
            "sparse_mlp_t4_32",
            {"patch_size": 8, "embed_dim": 32, "num_blocks": 4, "sparse_blocks": 0, "mlp_ratio": [0.5, 2.0]},
        ),
        blocks=2,
        lr=8e-3,  # experiments/headline: in a model of this size worth as much as five times the multiply-adds
        epochs=8,
        further_epochs=5,
    ),
    "vit": Subject(
        ModelConfig(
            "vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0}
        ),
        blocks=2,
        lr=4e-3,
        epochs=8,
        further_epochs=5,
    ),
    "cycle_mlp": Subject(
        ModelConfig(
            "cycle_mlp_b1", {"dims": [16, 32, 48, 48], "depths": [1, 2, 1, 1], "mlp_ratios": [2.0, 2.0, 2.0, 2.0]}
        ),
        blocks="1,2",  # at 4 x 4 positions, as many as the others have; the later stages have four and one
        lr=4e-3,
        epochs=5,
        further_epochs=3,
    ),
}


@dataclass(frozen=True)
class Variant:
    """What differs from `upcycled`."""

    experts: Mapping[str, Any] = field(default_factory=dict)
    seam_lr: float = SEAM_LR


VARIANTS: dict[str, Variant] = {
    "start noise": Variant({"init": "noise"}),
    "start drop": Variant({"init": "drop"}),
    "start sample": Variant({"init": "sample"}),
    "top-1": Variant({"top_k": 1}),
    "1 block": Variant({"blocks": 1}),
    "4 blocks": Variant({"blocks": 4}),
    "seam lr 0.25": Variant(seam_lr=0.25),
    "seam lr 1": Variant(seam_lr=1.0),
}


def planned_runs() -> Iterator[NamedRun[ClassifyRecipe]]:
    """All runs in the order to make them: the table seed by seed, then the variants."""
    for seed in SEEDS:
        for name in SUBJECTS:
            yield from _four_arms(name, seed)
    for variant in VARIANTS:
        yield _upcycled("mixer", variant, 0, VARIANTS[variant])


def _four_arms(name: str, seed: int) -> Iterator[NamedRun[ClassifyRecipe]]:
    subject = SUBJECTS[name]
    whole, later = subject.epochs + subject.further_epochs, seed + _AFTER_SEAM
    dense = _recipe(subject.model, subject.epochs, subject.lr, seed)
    continued = _recipe(subject.model, subject.further_epochs, subject.lr * SEAM_LR, later)
    yield NamedRun(name, DENSE, seed, dense)
    yield NamedRun(name, CONTINUED, seed, continued, _dense(name, seed))
    yield _upcycled(name, UPCYCLED, seed, Variant())
    yield NamedRun(name, SCRATCH, seed, _recipe(_with_experts(subject), whole, subject.lr, seed))


def _upcycled(name: str, arm: str, seed: int, variant: Variant) -> NamedRun[ClassifyRecipe]:
    subject = SUBJECTS[name]
    model = _with_experts(subject, **variant.experts)
    recipe = _recipe(model, subject.further_epochs, subject.lr * variant.seam_lr, seed + _AFTER_SEAM)
    return NamedRun(name, arm, seed, recipe, _dense(name, seed))


def _dense(name: str, seed: int) -> str:
    return f"{name}/{DENSE}/seed{seed}"


def _with_experts(subject: Subject, **changed: Any) -> ModelConfig:
    experts = ExpertsConfig(blocks=subject.blocks, num_experts=8, top_k=2)
    return replace(subject.model, experts=replace(experts, **changed))


def _recipe(model: ModelConfig, epochs: float, lr: float, seed: int) -> ClassifyRecipe:
    """A run of as many multiply-adds as the model without its experts spends in `epochs`."""
    share = multiply_adds(replace(model, experts=ExpertsConfig())) / multiply_adds(model)
    return ClassifyRecipe(
        name="upcycling",
        model=model,
        data=DataConfig(name="cifar10", batch_size=BATCH_SIZE),
        augment=AugmentConfig(pad=4, flip=0.5),
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(lr=lr, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_steps=100),
        train=TrainConfig(
            steps=round(epochs * STEPS_PER_EPOCH * share),
            seed=seed,
            clip_grad=1.0,
            threads=1,
            log_every=20,
            eval_every=2 * STEPS_PER_EPOCH,
            save_every=2 * STEPS_PER_EPOCH,
            keep=1,
        ),
    )


def multiply_adds(model: ModelConfig) -> int:
    """Of one image of CIFAR-10 in evaluation, routers included."""
    return _multiply_adds(json.dumps(asdict(model)))


@cache
def _multiply_adds(model: str) -> int:
    spec = InputSpec(CLASSES, channels=3, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    return count_macs(build_model(from_json(ModelConfig, json.loads(model)), spec), 3, 32)[""]
