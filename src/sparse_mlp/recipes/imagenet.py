"""ImageNet-1k from scratch, supervised, by the published recipe of the Mixer.

The figures are those of google-research/big_vision's configuration for Mixer-B/16, which reaches 76.3 % in 300 epochs
there: lr 1e-3, linear to 0 after 10,000 steps of warm-up, clip 1.0, RandAugment(2, 15), mixup 0.5, stochastic depth
0.1, sigmoid cross-entropy with a head bias of -log(classes). Its decay of 1e-4 stands there beside the learning rate,
not times it: 0.1 in AdamW's terms. The smaller and larger models take the same figures.
"""

from __future__ import annotations

from sparse_mlp.data import AugmentConfig, DataConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.recipe import ModelConfig
from sparse_mlp.tasks.classify import ClassifyConfig


def imagenet_sparse_s() -> ClassifyRecipe:
    """Sparse-S/16 on ImageNet-1k, 300 epochs, for a machine of several GPUs.

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_sparse_s --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_sparse_s", "sparse_mlp_s16_224")


def imagenet_sparse_b() -> ClassifyRecipe:
    """Sparse-B/16 on ImageNet-1k, 300 epochs, for a machine of several GPUs.

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_sparse_b --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_sparse_b", "sparse_mlp_b16_224")


def imagenet_sparse_l() -> ClassifyRecipe:
    """Sparse-L/16 on ImageNet-1k, 300 epochs, for a machine of several GPUs.

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_sparse_l --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_sparse_l", "sparse_mlp_l16_224")


def imagenet_mixer_s() -> ClassifyRecipe:
    """Mixer-S/16 on ImageNet-1k, 300 epochs, for a machine of several GPUs.

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_mixer_s --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_mixer_s", "mixer_s16_224")


def imagenet_mixer_b() -> ClassifyRecipe:
    """Mixer-B/16 on ImageNet-1k, 300 epochs, for a machine of several GPUs.

    torchrun --nproc-per-node 8 -m sparse_mlp train imagenet_mixer_b --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_mixer_b", "mixer_b16_224")


def _imagenet(name: str, model: str) -> ClassifyRecipe:
    return ClassifyRecipe(
        name=name,
        model=ModelConfig(model, {"drop_path_rate": 0.1, "nlhb": True}),
        data=DataConfig(
            name="folder", image_size=224, batch_size=4096, workers=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
        augment=AugmentConfig(
            crop_scale=(0.05, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5, auto_augment="rand-n2-m15-mmax15", mixup=0.5
        ),
        task=ClassifyConfig(loss="bce"),
        optim=OptimConfig(opt="adamw", lr=1e-3, weight_decay=0.1),
        schedule=ScheduleConfig(sched="linear", warmup_steps=10_000),
        train=TrainConfig(epochs=300, clip_grad=1.0, amp="bf16", log_every=50),
    )
