"""AS-MLP: the authors' recipe on ImageNet-1k, and a small one for CIFAR-10.

ImageNet by the released configurations: AdamW, batch 1024, learning rate 1e-3 after 20 epochs of warm-up from 1e-6,
cosine to 1e-5, weight decay 0.05 on matrices only, gradient norm clipped at 5, RandAugment, mixup and cutmix, random
erasing, label smoothing 0.1. They trained in mixed half precision (apex O1); here it is bfloat16.
"""

from __future__ import annotations

from sparse_mlp.data import DataConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.recipe import ModelConfig
from sparse_mlp.recipes.augmentation import DEIT, SMALL_IMAGES
from sparse_mlp.tasks.classify import ClassifyConfig


def imagenet_as_mlp_tiny() -> ClassifyRecipe:
    """AS-MLP-T on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 81.3 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_as_mlp_tiny --data.root /path/to/imagenet
    """
    return _imagenet("as_mlp_tiny", drop_path_rate=0.2)


def imagenet_as_mlp_small() -> ClassifyRecipe:
    """AS-MLP-S on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 83.1 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_as_mlp_small --data.root /path/to/imagenet
    """
    return _imagenet("as_mlp_small", drop_path_rate=0.3)


def imagenet_as_mlp_base() -> ClassifyRecipe:
    """AS-MLP-B on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 83.3 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_as_mlp_base --data.root /path/to/imagenet
    """
    return _imagenet("as_mlp_base", drop_path_rate=0.5)


def _imagenet(model: str, drop_path_rate: float) -> ClassifyRecipe:
    return ClassifyRecipe(
        name=f"imagenet_{model}",
        model=ModelConfig(model, {"drop_path_rate": drop_path_rate}),
        data=DataConfig(name="folder", image_size=224, batch_size=1024, workers=16),
        augment=DEIT,
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(opt="adamw", lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5),
        train=TrainConfig(epochs=300, clip_grad=5.0, amp="bf16", log_every=50),
    )


def cifar10_as_mlp() -> ClassifyRecipe:
    """A small AS-MLP on CIFAR-10 at 32 px in 15 minutes of training; downloads the set where it is missing.

    sparse-mlp train cifar10_as_mlp
    """
    return ClassifyRecipe(
        name="cifar10_as_mlp",
        model=ModelConfig("as_mlp_tiny", {"depths": [2, 2, 2, 2], "embed_dim": 32}),
        data=DataConfig(name="cifar10", batch_size=128, download=True),
        augment=SMALL_IMAGES,
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=0.5),
        train=TrainConfig(minutes=15, clip_grad=1.0, log_every=20),
    )
