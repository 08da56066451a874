"""Recipes that begin with the weights of something pre-trained: linear probe, fine-tuning.

`sparse-mlp probe SOURCE` and `sparse-mlp finetune SOURCE` put the model and the weights of SOURCE into them. Learning
rates are for the batch size given here; these commands keep them in proportion to another one.
"""

from __future__ import annotations

from sparse_mlp.data import AugmentConfig, DataConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.recipes.recipe import ModelConfig, Recipe
from sparse_mlp.tasks.classify import ClassifyConfig


def linear_probe() -> Recipe:
    """Linear probe as MoCo v3 has it: frozen backbone, SGD, 90 epochs, learning rate 3 x batch / 256, crop and flip.

    sparse-mlp probe runs/pretrained
    """
    return Recipe(
        name="linear_probe",
        data=DataConfig(batch_size=1024),
        augment=AugmentConfig(crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5),
        task=ClassifyConfig(frozen=True),
        optim=OptimConfig(opt="sgd", momentum=0.9, lr=3.0 * 1024 / 256, weight_decay=0.0),
        train=TrainConfig(epochs=90, log_every=50),
    )


def finetune_deit() -> Recipe:
    """Fine-tuning by DeiT's recipe as MoCo v3 uses it: 150 epochs, AdamW, learning rate 5e-4 x batch / 512, mixing.

    sparse-mlp finetune runs/pretrained
    sparse-mlp finetune runs/pretrained --data.label-share 0.1 --optim.layer-decay 0.75
    """
    return Recipe(
        name="finetune_deit",
        model=ModelConfig(args={"drop_path_rate": 0.1}),
        data=DataConfig(batch_size=1024),
        augment=AugmentConfig(
            crop_scale=(0.08, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            flip=0.5,
            auto_augment="rand-m9-mstd0.5-inc1",
            erase=0.25,
            mixup=0.8,
            cutmix=1.0,
        ),
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(opt="adamw", lr=5e-4 * 1024 / 512, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5),
        train=TrainConfig(epochs=150, log_every=50),
    )
