"""The headline experiment as a list of named runs: Sparse-MLP against dense Mixers on CIFAR-10.

The paper's claim is that at equal compute the sparse model is ahead. Three models are compared:

- `sparse`: the mixture of experts;
- `mixer`: the dense Mixer with as many multiply-adds an image, hence as many steps;
- `mixer_wide`: the dense Mixer with as many parameters. It costs more an image, so that it gets fewer steps.

Lengths are in steps, never in minutes, and every run of a part spends the same multiply-adds in training, to 1 %
(tests/test_arms.py counts them): a figure does not depend on what else the machine was doing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from experiments.runs import NamedRun
from sparse_mlp.data import AugmentConfig, DataConfig, ViewsConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import ModelConfig
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.knn import KnnRecipe
from sparse_mlp.jobs.pretrain import PretrainRecipe
from sparse_mlp.recipes.pretrained import linear_probe
from sparse_mlp.tasks.classify import ClassifyConfig
from sparse_mlp.tasks.moco import MocoConfig

HeadlineRecipe = ClassifyRecipe | PretrainRecipe | KnnRecipe

PARTS = ("supervised", "pretrain", "linear", "knn", "finetune", "transfer", "ablations")
"""From scratch; MoCo v3 and what its features are worth; one change at a time."""

_NEED_PRETRAINING = ("linear", "knn", "finetune", "transfer")

BATCH_SIZE = 128
STEPS = 1560  # of sparse and mixer: 4 epochs of CIFAR-10
ABLATION_STEPS = 390  # 1 epoch
PRETRAIN_BATCH_SIZE, PRETRAIN_STEPS = 256, 585  # 3 epochs, two views of each image
LINEAR_STEPS = 780  # 2 epochs, the same for every model: a measure, no budget
FINETUNE_STEPS = 390  # 1 epoch
TRANSFER_STEPS = 390  # 5 epochs of a fifth of CIFAR-100

CIFAR10 = DataConfig(name="cifar10", batch_size=BATCH_SIZE, download=True)
CIFAR100_FIFTH = DataConfig(
    name="folder",
    root="data/cifar100_fifth",
    image_size=32,
    batch_size=BATCH_SIZE,
    mean=(0.5071, 0.4865, 0.4409),  # of all of CIFAR-100
    std=(0.2673, 0.2564, 0.2762),
    crop_pct=1.0,
)
"""A class-balanced fifth of CIFAR-100 as image files; experiments/data writes them."""


@dataclass(frozen=True)
class Contestant:
    """A model, and how many steps it gets for one of `sparse`: the ratio of their multiply-adds."""

    model: ModelConfig
    steps: float = 1.0


# Lists for tuples, as config.json gives them back.
_SIZE: dict[str, Any] = {"embed_dim": 64, "num_blocks": 8, "mlp_ratio": [0.5, 1.0]}
_MOE: dict[str, Any] = {"sparse_blocks": 4, "num_experts": [8, 8], "top_k": [1, 1], "rerepresent": False}


def _sparse(**changed: Any) -> ModelConfig:
    return ModelConfig("sparse_mlp_t4_32", {**_SIZE, **_MOE, **changed})


CONTESTANTS = {
    "sparse": Contestant(_sparse()),
    "mixer": Contestant(ModelConfig("mixer_t4_32", {**_SIZE, "mlp_ratio": [0.5, 1.07]})),
    "mixer_wide": Contestant(ModelConfig("mixer_t4_32", {**_SIZE, "mlp_ratio": [0.5, 6.375]}), 0.2325),
}

# The paper's ablations (its tables 3 to 6), one change to `sparse` each; `sparse` itself stands among them.
ABLATIONS = {
    "sparse": CONTESTANTS["sparse"],
    "token top-2": Contestant(_sparse(top_k=[2, 1]), 0.866),
    "channel top-2": Contestant(_sparse(top_k=[1, 2]), 0.763),
    "4 token experts": Contestant(_sparse(num_experts=[4, 8]), 1.010),
    "16 token experts": Contestant(_sparse(num_experts=[16, 8]), 0.981),
    "4 channel experts": Contestant(_sparse(num_experts=[8, 4]), 1.010),
    "16 channel experts": Contestant(_sparse(num_experts=[8, 16]), 0.981),
    "first four blocks": Contestant(_sparse(sparse_blocks=[0, 1, 2, 3])),
    "all blocks": Contestant(_sparse(sparse_blocks=8), 0.963),
    "Re-represent": Contestant(_sparse(rerepresent=True, expert_hidden=[32, 64]), 0.518),
    "no blocks (mixer)": CONTESTANTS["mixer"],
}


def headline_runs(parts: tuple[str, ...] = PARTS, seeds: int = 3) -> Iterator[NamedRun[HeadlineRecipe]]:
    """The runs of some parts in the order to make them: all models with the first seed, then with the next.

    UserError for an unknown part, or less than one seed.
    """
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"unknown part {unknown[0]!r} of the headline experiment; known: {', '.join(PARTS)}")
    for part in (part for part in PARTS if part in parts and part != "ablations"):
        for seed in range(seeds):
            for arm, contestant in CONTESTANTS.items():
                source = f"pretrain/{arm}/seed{seed}" if part in _NEED_PRETRAINING else None
                yield NamedRun(part, arm, seed, _RECIPES[part](contestant, seed), source)
    if "ablations" in parts:
        for arm, contestant in ABLATIONS.items():
            yield NamedRun("ablations", arm, 0, _supervised(contestant, seed=0, steps=ABLATION_STEPS))


def _supervised(contestant: Contestant, seed: int, steps: int = STEPS, lr: float = 4e-3) -> ClassifyRecipe:
    return ClassifyRecipe(
        name="headline",
        model=contestant.model,
        data=CIFAR10,
        augment=AugmentConfig(pad=4, flip=0.5),
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(lr=lr, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_steps=50),
        train=_training(round(steps * contestant.steps), seed),
    )


def _pretrain(contestant: Contestant, seed: int) -> PretrainRecipe:
    return PretrainRecipe(
        name="headline",
        model=contestant.model,
        data=replace(CIFAR10, batch_size=PRETRAIN_BATCH_SIZE),
        views=ViewsConfig(blur=(0.0, 0.0)),  # none on 32 pixels, as SimCLR (arXiv 2002.05709, appendix B.9)
        task=MocoConfig(hidden_dim=512, out_dim=128, knn_images=5000),
        optim=OptimConfig(lr=3e-3, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=50),
        train=_training(round(PRETRAIN_STEPS * contestant.steps), seed),
    )


def _linear(contestant: Contestant, seed: int) -> ClassifyRecipe:
    published = linear_probe()
    return replace(
        published,
        name="headline",
        model=contestant.model,
        data=CIFAR10,
        optim=replace(published.optim, lr=published.optim.lr * BATCH_SIZE / published.data.batch_size),
        train=replace(_training(LINEAR_STEPS, seed), clip_grad=None),
    )


def _knn(contestant: Contestant, seed: int) -> KnnRecipe:
    """The seed is that of the pre-training; nothing is drawn here."""
    return KnnRecipe(name="headline", model=contestant.model, data=CIFAR10)


def _finetune(contestant: Contestant, seed: int) -> ClassifyRecipe:
    return _supervised(contestant, seed, FINETUNE_STEPS, lr=2e-3)


def _transfer(contestant: Contestant, seed: int) -> ClassifyRecipe:
    return replace(_supervised(contestant, seed, TRANSFER_STEPS, lr=2e-3), data=CIFAR100_FIFTH)


def _training(steps: int, seed: int) -> TrainConfig:
    return TrainConfig(steps=steps, seed=seed, clip_grad=1.0, log_every=25, eval_every=195, save_every=100, keep=1)


_RECIPES: dict[str, Callable[[Contestant, int], HeadlineRecipe]] = {
    "supervised": _supervised,
    "pretrain": _pretrain,
    "linear": _linear,
    "knn": _knn,
    "finetune": _finetune,
    "transfer": _transfer,
}
