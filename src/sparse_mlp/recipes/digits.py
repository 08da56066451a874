"""scikit-learn's handwritten digits, 8x8 pixels: trains in minutes, ships inside a dependency."""

from __future__ import annotations

from typing import Any

from sparse_mlp.data import AugmentConfig, DataConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.recipes.recipe import ModelConfig, Recipe
from sparse_mlp.tasks.classify import ClassifyConfig


def digits_sparse() -> Recipe:
    """A small Sparse-MLP on the digits; what it reaches, and how far one seed swings, is in the README.

    sparse-mlp train digits_sparse
    """
    return _digits("digits_sparse", ModelConfig("sparse_mlp_t4_32", {"patch_size": 2}))


def digits_mixer() -> Recipe:
    """The dense Mixer with as many multiply-adds as digits_sparse (hence its channel width), trained alike.

    sparse-mlp train digits_mixer
    """
    return _digits("digits_mixer", ModelConfig("mixer_t4_32", {"patch_size": 2, "mlp_ratio": [0.5, 4.59]}))


def _digits(name: str, model: ModelConfig, **train: Any) -> Recipe:
    return Recipe(
        name=name,
        model=model,
        data=DataConfig(name="digits", batch_size=128),
        augment=AugmentConfig(pad=1, rotate=10.0),
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(lr=3e-3, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=2),
        train=TrainConfig(
            **{"epochs": 60, "clip_grad": 1.0, "eval_every": 45, "save_every": 90, "log_every": 9} | train
        ),
    )
