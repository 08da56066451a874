"""Hire-MLP: the authors' recipe on ImageNet-1k, and a small one for CIFAR-10.

ImageNet by the commands in their README (DeiT's recipe): AdamW, cosine to 1e-5 after 20 epochs of warm-up from 1e-6,
weight decay 0.05, RandAugment, mixup and cutmix, random erasing, label smoothing 0.1, seed 3407. Tiny: batch 2048,
learning rate 2e-3, no stochastic depth. Base: batch 1024, 1e-3, 0.2. For Small and Large they give no command: batch
and rate are Base's here, stochastic depth that of their dense-prediction classes, 0.1 and 0.3. Each image comes three
times in a batch (repeated augmentation). The 10 epochs at the lowest rate that follow the 300 are left out.
"""

from __future__ import annotations

from sparse_mlp.data import DataConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.recipe import ModelConfig
from sparse_mlp.recipes.augmentation import DEIT, SMALL_IMAGES
from sparse_mlp.tasks.classify import ClassifyConfig


def imagenet_hire_mlp_tiny() -> ClassifyRecipe:
    """Hire-MLP-Tiny on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 79.7 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_hire_mlp_tiny --data.root /path/to/imagenet
    """
    return _imagenet("hire_mlp_tiny", drop_path_rate=0.0, batch_size=2048, lr=2e-3)


def imagenet_hire_mlp_small() -> ClassifyRecipe:
    """Hire-MLP-Small on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 82.1 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_hire_mlp_small --data.root /path/to/imagenet
    """
    return _imagenet("hire_mlp_small", drop_path_rate=0.1)


def imagenet_hire_mlp_base() -> ClassifyRecipe:
    """Hire-MLP-Base on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 83.2 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_hire_mlp_base --data.root /path/to/imagenet
    """
    return _imagenet("hire_mlp_base", drop_path_rate=0.2)


def imagenet_hire_mlp_large() -> ClassifyRecipe:
    """Hire-MLP-Large on ImageNet-1k, 300 epochs, for a machine of several GPUs. Top-1 83.8 % (the authors' figure).

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_hire_mlp_large --data.root /path/to/imagenet
    """
    return _imagenet("hire_mlp_large", drop_path_rate=0.3)


def _imagenet(model: str, drop_path_rate: float, batch_size: int = 1024, lr: float = 1e-3) -> ClassifyRecipe:
    return ClassifyRecipe(
        name=f"imagenet_{model}",
        model=ModelConfig(model, {"drop_path_rate": drop_path_rate}),
        data=DataConfig(name="folder", image_size=224, batch_size=batch_size, repeats=3, workers=16),
        augment=DEIT,
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(opt="adamw", lr=lr, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5),
        train=TrainConfig(epochs=300, amp="bf16", seed=3407, log_every=50),
    )


def cifar10_hire_mlp() -> ClassifyRecipe:
    """A small Hire-MLP on CIFAR-10 at 32 px in 15 minutes of training; downloads the set where it is missing.

    sparse-mlp train cifar10_hire_mlp
    """
    return ClassifyRecipe(
        name="cifar10_hire_mlp",
        model=ModelConfig("hire_mlp_tiny", {"depths": [2, 2, 2, 2], "dims": [32, 64, 128, 256]}),
        data=DataConfig(name="cifar10", batch_size=128, download=True),
        augment=SMALL_IMAGES,
        task=ClassifyConfig(smoothing=0.1),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=0.5),
        train=TrainConfig(minutes=15, clip_grad=1.0, log_every=20),
    )
