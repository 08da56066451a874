"""MoCo v3 pre-training: complete configurations by name, and the objects a trainer takes.

The ImageNet-1k figures are the authors' for ViT (arXiv 2104.02057, section 5; github.com/facebookresearch/moco-v3,
CONFIG.md): 300 epochs, batch 4096, AdamW, lr 1.5e-4 x batch / 256, weight decay 0.1, 40 epochs of warm-up, cosine to 0.
Sparse-MLP's paper pre-trains with MoCo v3 and does not say how: that it takes these figures is our reading.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import IterableDataset

from sparse_mlp.data import DataConfig, ImageData, InputSpec, ViewsConfig, build_views, eval_loader, steps_per_epoch
from sparse_mlp.data.views import view_loader
from sparse_mlp.engine import Batch, Loaders, OptimConfig, RunFolder, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.recipes.build import build_model
from sparse_mlp.recipes.recipe import ModelConfig, decode
from sparse_mlp.tasks.moco import Moco, MocoConfig

__all__ = [
    "PRETRAIN_RECIPES",
    "PretrainJob",
    "PretrainRecipe",
    "bank_images",
    "build_pretraining",
    "get_pretraining",
    "is_pretraining",
    "load_pretraining",
    "resolve",
]


@dataclass(frozen=True)
class PretrainRecipe:
    """A complete configuration of a pre-training run."""

    name: str = "pretrain"
    """What the run folder is called if --out does not say."""

    lr_base_size: int | None = 256
    """optim.lr is for a batch of so many images: the run takes lr x data.batch_size / this, which its config.json
    holds. None: optim.lr as it is."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    task: MocoConfig = field(default_factory=MocoConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.5e-4, weight_decay=0.1))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup_epochs=40))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=300))


@dataclass(frozen=True)
class PretrainJob:
    """What a pre-training recipe describes, built."""

    data: ImageData
    task: Moco
    loaders: Loaders


def digits_moco_sparse() -> PretrainRecipe:
    """A small Sparse-MLP on two views of the 8x8 digits, without their labels, in three minutes on one core.

    kNN 95.5 % (seed 0, one core of an AMD EPYC, 2026-11-24).

    sparse-mlp pretrain digits_moco_sparse
    """
    return PretrainRecipe(
        name="digits_moco_sparse",
        model=ModelConfig("sparse_mlp_t4_32", {"patch_size": 2, "num_blocks": 4, "embed_dim": 64}),
        data=DataConfig(name="digits", batch_size=256),
        views=ViewsConfig(
            crop_scale=(0.4, 1.0),
            flip=0.0,
            rotate=15.0,
            saturation=0.0,
            hue=0.0,
            grey=0.0,
            blur=(0.0, 0.0),
            solarize=(0.0, 0.0),
        ),
        task=MocoConfig(hidden_dim=512, out_dim=64),
        optim=OptimConfig(lr=3e-3, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_epochs=10),
        train=TrainConfig(epochs=150, log_every=4, eval_every=80, save_every=200),
    )


def cifar10_moco_sparse() -> PretrainRecipe:
    """A small Sparse-MLP on two views of the CIFAR-10 images; downloads the set where it is missing.

    sparse-mlp pretrain cifar10_moco_sparse
    """
    return _cifar("cifar10_moco_sparse", ModelConfig("sparse_mlp_t4_32"))


def cifar10_moco_mixer() -> PretrainRecipe:
    """The dense Mixer with as many multiply-adds as cifar10_moco_sparse, pre-trained alike.

    sparse-mlp pretrain cifar10_moco_mixer
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
        pretrain imagenet_moco_sparse_s --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_moco_sparse_s", "sparse_mlp_s16_224")


def imagenet_moco_sparse_b() -> PretrainRecipe:
    """Sparse-B/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        pretrain imagenet_moco_sparse_b --data.root /path/to/imagenet

    From webdataset shards, which have no bank of training images for the kNN:
        ... pretrain imagenet_moco_sparse_b --data.name wds/imagenet --data.root /path/to/shards \
        --data.num-samples 1281167 --data.num-classes 1000 --task.knn-images 0
    """
    return _imagenet("imagenet_moco_sparse_b", "sparse_mlp_b16_224")


def imagenet_moco_sparse_l() -> PretrainRecipe:
    """Sparse-L/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        pretrain imagenet_moco_sparse_l --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_moco_sparse_l", "sparse_mlp_l16_224")


def imagenet_moco_mixer_s() -> PretrainRecipe:
    """Mixer-S/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        pretrain imagenet_moco_mixer_s --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_moco_mixer_s", "mixer_s16_224")


def imagenet_moco_mixer_b() -> PretrainRecipe:
    """Mixer-B/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        pretrain imagenet_moco_mixer_b --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_moco_mixer_b", "mixer_b16_224")


def imagenet_moco_mixer_l() -> PretrainRecipe:
    """Mixer-L/16 on ImageNet-1k, 300 epochs, 4 machines of 8 GPUs (this line on each, HOST is one of them).

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sparse_mlp \
        pretrain imagenet_moco_mixer_l --data.root /path/to/imagenet
    """
    return _imagenet("imagenet_moco_mixer_l", "mixer_l16_224")


def _imagenet(name: str, model: str) -> PretrainRecipe:
    return PretrainRecipe(
        name=name,
        model=ModelConfig(model),
        data=DataConfig(name="folder", image_size=224, batch_size=4096, workers=16),
        task=MocoConfig(decay_all=True, knn_images=100_000),
        train=TrainConfig(epochs=300, amp="bf16", log_every=50, eval_every=312 * 10),
    )


PRETRAIN_RECIPES: dict[str, Callable[[], PretrainRecipe]] = {
    function.__name__: function
    for function in (
        digits_moco_sparse,
        cifar10_moco_sparse,
        cifar10_moco_mixer,
        imagenet_moco_sparse_s,
        imagenet_moco_sparse_b,
        imagenet_moco_sparse_l,
        imagenet_moco_mixer_s,
        imagenet_moco_mixer_b,
        imagenet_moco_mixer_l,
    )
}


def get_pretraining(name: str) -> PretrainRecipe:
    """The pre-training recipe of that name. ValueError with the nearest names if there is none."""
    if name not in PRETRAIN_RECIPES:
        near = difflib.get_close_matches(name, PRETRAIN_RECIPES, n=3, cutoff=0.4)
        told = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(PRETRAIN_RECIPES)}"
        raise UserError(f"unknown pre-training recipe {name!r}; {told}")
    return PRETRAIN_RECIPES[name]()


def is_pretraining(run_dir: str | Path) -> bool:
    """Whether a run folder was made by pre-training. FileNotFoundError if it is none."""
    return "views" in RunFolder.open(run_dir).config()


def load_pretraining(run_dir: str | Path) -> PretrainRecipe:
    """The recipe that a run folder was made with. FileNotFoundError or ValueError, naming the file, if it is none."""
    run = RunFolder.open(run_dir)
    try:
        if not is_pretraining(run_dir):
            raise UserError("not a pre-training run")
        return decode(PretrainRecipe, run.config())
    except ValueError as error:
        raise UserError(f"{run.config_path}: {error}") from error


def resolve(recipe: PretrainRecipe) -> PretrainRecipe:
    """The recipe with the learning rate of its batch. Resolving twice changes nothing."""
    if recipe.lr_base_size is None:
        return recipe
    if recipe.lr_base_size < 1:
        raise UserError(f"lr_base_size {recipe.lr_base_size} is below 1")
    lr = recipe.optim.lr * recipe.data.batch_size / recipe.lr_base_size
    return replace(recipe, lr_base_size=None, optim=replace(recipe.optim, lr=lr))


def build_pretraining(recipe: PretrainRecipe) -> PretrainJob:
    """Open the data, make the model with weights drawn from the recipe's seed, and join them.

    ValueError or FileNotFoundError, one line, for whatever does not exist or fit.
    """
    recipe, seed = resolve(recipe), recipe.train.seed
    parts, size = recipe.train.grad_accum, recipe.data.batch_size
    if parts != 1:
        raise UserError(f"train.grad_accum {parts}: an image is contrasted with its whole batch, which cannot be cut")
    if size < 2:
        raise UserError(f"data.batch_size {size} is too small for batch norm and a contrast; from 2 on")
    data = build_views(recipe.data, recipe.views)
    per_epoch = steps_per_epoch(data, recipe.data)
    _check_bank(recipe, data)
    torch.manual_seed(seed)
    task = Moco(_backbone(recipe.model, data.spec), recipe.task, num_classes=len(data.classes))
    loaders = Loaders(
        train=partial(view_loader, data, recipe.data, seed),
        evaluate=partial(_eval_batches, data, recipe),
        batch_size=recipe.data.batch_size,
        steps_per_epoch=per_epoch,
    )
    return PretrainJob(data, task, loaders)


def _backbone(config: ModelConfig, spec: InputSpec) -> nn.Module:
    try:
        return build_model(config, spec)
    except ValueError as error:
        patch = _patch_size(config)
        if patch is not None and patch > spec.image_size:
            views = f"views of {spec.image_size} pixels (data.image_size)"
            raise UserError(f"{views} are smaller than a patch of {config.name}, {patch}") from error
        raise


def _patch_size(config: ModelConfig) -> int | None:
    """Side of the patches of a model at its own image size; None where it has none or cannot be built."""
    try:
        with torch.device("meta"):
            model = timm.create_model(config.name, **config.args)
    except (TypeError, ValueError, RuntimeError, AssertionError):
        return config.args.get("patch_size")
    sizes = [module.patch_size[0] for module in model.modules() if isinstance(module, timm.layers.PatchEmbed)]
    return max(sizes, default=None)


def _check_bank(recipe: PretrainRecipe, data: ImageData) -> None:
    """ValueError if the kNN of the evaluations cannot be."""
    if not recipe.task.knn_images:
        return
    if isinstance(data.train, IterableDataset):
        raise UserError(
            f"the kNN needs training images by number, which the stream {recipe.data.name} has not; --task.knn-images 0"
        )
    if len(data.classes) < 2:
        raise UserError(
            f"the kNN needs two classes, but {recipe.data.name} has {data.classes[0]!r} alone; --task.knn-images 0"
        )


def bank_images(recipe: PretrainRecipe, data: ImageData) -> np.ndarray:
    """Numbers of the training images that the kNN compares with, in order: drawn once, the same in every run."""
    images = len(data.train)  # type: ignore[arg-type]
    chosen = np.random.default_rng(0).permutation(images)[: recipe.task.knn_images]
    return np.sort(chosen)


def _eval_batches(data: ImageData, recipe: PretrainRecipe, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """This rank's share of the bank, then of the test images, as they are evaluated."""
    if recipe.task.knn_images:
        own = bank_images(recipe, data)[rank::world_size]
        for start in range(0, len(own), recipe.data.eval_batch_size):
            batch = data.train.batch(own[start : start + recipe.data.eval_batch_size])  # type: ignore[union-attr]
            yield {**batch, "bank": torch.ones(len(batch["target"]), dtype=torch.bool)}
    for batch in eval_loader(data, recipe.data, rank, world_size):
        yield {**batch, "bank": torch.zeros(len(batch["target"]), dtype=torch.bool)}
