"""CycleMLP: the authors' recipe on ImageNet-1k, and a small one for CIFAR-10.

ImageNet by the defaults of their training script (DeiT's recipe): AdamW, batch 1024, learning rate 1e-3 after 5 epochs
of warm-up from 1e-6, cosine to 1e-5, weight decay 0.05, no clipping, RandAugment, mixup and cutmix, random erasing,
label smoothing 0.1, stochastic depth 0.1 for every variant, each image three times in a batch (repeated augmentation).
The moving average they keep beside is left out, as their figures are of the plain weights.
"""

from __future__ import annotations

from sparse_mlp.data import DataConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.recipe import ModelConfig
from sparse_mlp.recipes.augmentation import DEIT, SMALL_IMAGES
from sparse_mlp.tasks.classify import ClassifyConfig


def imagenet_cycle_mlp_b1() -> ClassifyRecipe:
    """CycleMLP-B1 on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 78.9 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_cycle_mlp_b1 --data.root /path/to/imagenet
    """
    return _imagenet("cycle_mlp_b1")


def imagenet_cycle_mlp_b2() -> ClassifyRecipe:
    """CycleMLP-B2 on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 81.6 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_cycle_mlp_b2 --data.root /path/to/imagenet
    """
    return _imagenet("cycle_mlp_b2")


def imagenet_cycle_mlp_b3() -> ClassifyRecipe:
    """CycleMLP-B3 on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 82.4 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_cycle_mlp_b3 --data.root /path/to/imagenet
    """
    return _imagenet("cycle_mlp_b3")


def imagenet_cycle_mlp_b4() -> ClassifyRecipe:
    """CycleMLP-B4 on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 83.0 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_cycle_mlp_b4 --data.root /path/to/imagenet
    """
    return _imagenet("cycle_mlp_b4")


def imagenet_cycle_mlp_b5() -> ClassifyRecipe:
    """CycleMLP-B5 on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 83.2 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_cycle_mlp_b5 --data.root /path/to/imagenet
    """
    return _imagenet("cycle_mlp_b5")


def _imagenet(model: str) -> ClassifyRecipe:
    return ClassifyRecipe(
        name=f"imagenet_{model}",
        model=ModelConfig(model, {"drop_path_rate": 0.1}),
        data=DataConfig(name="folder", image_size=224, batch_size=1024, repeats=3, workers=16),
        augment=DEIT,
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(opt="adamw", lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5),
        train=TrainConfig(epochs=300, amp="bf16", log_every=50),
    )


def cifar10_cycle_mlp() -> ClassifyRecipe:
    """A small CycleMLP on CIFAR-10 at 32 px in 15 minutes of training; downloads the set where it is missing.

    sparse-mlp train cifar10_cycle_mlp
    """
    return ClassifyRecipe(
        name="cifar10_cycle_mlp",
        model=ModelConfig("cycle_mlp_b1", {"depths": [2, 2, 2, 2], "dims": [32, 64, 128, 256]}),
        data=DataConfig(name="cifar10", batch_size=128, download=True),
        augment=SMALL_IMAGES,
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=0.5),
        train=TrainConfig(minutes=15, clip_grad=1.0, log_every=20),
    )
