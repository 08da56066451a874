"""MoCo v3 pre-training.

The ImageNet-1k figures are the authors' for ViT (arXiv 2104.02057, section 5; github.com/facebookresearch/moco-v3,
CONFIG.md): 300 epochs, batch 4096, AdamW, lr 1.5e-4 x batch / 256, weight decay 0.1, 40 epochs of warm-up, cosine to 0.
Sparse-MLP's paper pre-trains with MoCo v3 and does not say how: that it takes these figures is our reading.
"""

from __future__ import annotations

from sparse_mlp.data import DataConfig, ViewsConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.jobs.pretrain import PretrainRecipe
from sparse_mlp.jobs.recipe import ModelConfig
from sparse_mlp.tasks.moco import MocoConfig


def cifar10_moco_sparse() -> PretrainRecipe:
    """A small Sparse-MLP on two views of the CIFAR-10 images; downloads the set where it is missing.

    sparse-mlp train cifar10_moco_sparse
    """
    return _cifar("cifar10_moco_sparse", ModelConfig("sparse_mlp_t4_32"))


def cifar10_moco_mixer() -> PretrainRecipe:
    """The dense Mixer with as many multiply-adds as cifar10_moco_sparse, pre-trained alike.

    sparse-mlp train cifar10_moco_mixer
    """
    return _cifar("cifar10_moco_mixer", ModelConfig("mixer_t4_32"))


def _cifar(name: str, model: ModelConfig) -> PretrainRecipe:
    return PretrainRecipe(
        name=name,
        model=model,
        data=DataConfig(name="cifar10", batch_size=256, workers=1, download=True),
        # no blur on 32 pixels, as SimCLR (arXiv 2002.05709, appendix B.9)
        views=ViewsConfig(blur=(0.0, 0.0)),
        task=MocoConfig(hidden_dim=512, out_dim=128, knn_images=5000),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_epochs=0.25),
        train=TrainConfig(minutes=20, log_every=10, eval_every=195, save_every=195),
    )


def imagenet_moco_sparse_s() -> PretrainRecipe:
    """Sparse-S/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        train imagenet_moco_sparse_s --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_moco_sparse_s", "sparse_mlp_s16_224")


def imagenet_moco_sparse_b() -> PretrainRecipe:
    """Sparse-B/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        train imagenet_moco_sparse_b --data.root /path/to/imagenet

    From webdataset shards, which have no bank of training images for the kNN:
        ... train imagenet_moco_sparse_b --data.name wds/imagenet --data.root /path/to/shards \
        --data.num-samples 1281167 --data.num-classes 1000 --task.knn-images 0
    """
    return _imagenet("imagenet_moco_sparse_b", "sparse_mlp_b16_224")


def imagenet_moco_sparse_l() -> PretrainRecipe:
    """Sparse-L/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        train imagenet_moco_sparse_l --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_moco_sparse_l", "sparse_mlp_l16_224")


def imagenet_moco_mixer_s() -> PretrainRecipe:
    """Mixer-S/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        train imagenet_moco_mixer_s --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_moco_mixer_s", "mixer_s16_224")


def imagenet_moco_mixer_b() -> PretrainRecipe:
    """Mixer-B/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        train imagenet_moco_mixer_b --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_moco_mixer_b", "mixer_b16_224")


def imagenet_moco_mixer_l() -> PretrainRecipe:
    """Mixer-L/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        train imagenet_moco_mixer_l --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_moco_mixer_l", "mixer_l16_224")


def _imagenet(name: str, model: str) -> PretrainRecipe:
    return PretrainRecipe(
        name=name,
        model=ModelConfig(model),
        data=DataConfig(name="folder", image_size=224, batch_size=4096, workers=16),
        task=MocoConfig(decay_all=True, knn_images=100_000),
        optim=OptimConfig(lr=1.5e-4 * 4096 / 256, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_epochs=40),
        train=TrainConfig(epochs=300, amp="bf16", log_every=50, eval_every=312 * 10),
    )
