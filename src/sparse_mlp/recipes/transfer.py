"""Transfer to CIFAR as MoCo v3's appendix has it, at whatever image size the backbone is given."""

from __future__ import annotations

from sparse_mlp.data import AugmentConfig, DataConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.recipes.recipe import Recipe
from sparse_mlp.tasks.classify import ClassifyConfig


def transfer_cifar10() -> Recipe:
    """Fine-tuning on CIFAR-10 by the published transfer recipe: 100 epochs, batch 1024, learning rate 3e-4.

    sparse-mlp transfer runs/pretrained cifar10
    """
    return _transfer("cifar10", mixup=0.8)


def transfer_cifar100() -> Recipe:
    """Fine-tuning on CIFAR-100 by the published transfer recipe: as on CIFAR-10, with mixup 0.5.

    sparse-mlp transfer runs/pretrained cifar100
    """
    return _transfer("cifar100", mixup=0.5)


def transfer_cifar100_fifth() -> Recipe:
    """The same on a class-balanced fifth of CIFAR-100 (10,000 + 2,000 images): no figure to compare with others'.

    sparse-mlp transfer runs/pretrained cifar100_fifth
    """
    return _transfer("cifar100_fifth", mixup=0.5)


def _transfer(data: str, mixup: float) -> Recipe:
    return Recipe(
        name=f"transfer_{data}",
        data=DataConfig(name=data, batch_size=1024, download=data != "cifar100_fifth"),
        augment=AugmentConfig(crop_scale=(0.05, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5, mixup=mixup, cutmix=1.0),
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(opt="adamw", lr=3e-4, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_epochs=3),
        train=TrainConfig(epochs=100, log_every=20),
    )
