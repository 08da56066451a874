"""CIFAR-10 and CIFAR-100 from scratch, 32x32 pixels, in a budget of minutes."""

from __future__ import annotations

from sparse_mlp.data import AugmentConfig, DataConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.recipes.recipe import ModelConfig, Recipe
from sparse_mlp.tasks.classify import ClassifyConfig


def cifar10_sparse() -> Recipe:
    """A small Sparse-MLP on CIFAR-10 in 15 minutes of training; downloads the set where it is missing.

    63.0 % (seed 0) on two cores of an AMD EPYC, 2026-11-23; the dense Mixer in the same time 69.2 %.

    sparse-mlp train cifar10_sparse
    """
    return _cifar("cifar10_sparse", "cifar10", ModelConfig("sparse_mlp_t4_32"))


def cifar10_mixer() -> Recipe:
    """The dense Mixer with as many multiply-adds as cifar10_sparse, trained alike.

    sparse-mlp train cifar10_mixer
    """
    return _cifar("cifar10_mixer", "cifar10", ModelConfig("mixer_t4_32"))


def cifar100_sparse() -> Recipe:
    """A small Sparse-MLP on CIFAR-100 in 15 minutes of training; downloads the set where it is missing.

    sparse-mlp train cifar100_sparse
    """
    return _cifar("cifar100_sparse", "cifar100", ModelConfig("sparse_mlp_t4_32"))


def cifar100_mixer() -> Recipe:
    """The dense Mixer with as many multiply-adds as cifar100_sparse, trained alike.

    sparse-mlp train cifar100_mixer
    """
    return _cifar("cifar100_mixer", "cifar100", ModelConfig("mixer_t4_32"))


def _cifar(name: str, data: str, model: ModelConfig) -> Recipe:
    return Recipe(
        name=name,
        model=model,
        data=DataConfig(name=data, batch_size=128, download=True),
        augment=AugmentConfig(pad=4, flip=0.5),
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=0.5),
        train=TrainConfig(minutes=15, clip_grad=1.0, log_every=20),
    )
