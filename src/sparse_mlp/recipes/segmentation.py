"""Semantic segmentation: ADE20K as published, and CamVid at a size for two cores.

Figures marked "authors'" are from the papers or their repositories and were not measured here. Backbones start from
ImageNet weights: pass them as --model.weights FILE (or --model.pretrained where this package knows their address).
"""

from __future__ import annotations

from sparse_mlp.data.segmentation_config import SegmentationConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.jobs.recipe import ModelConfig
from sparse_mlp.jobs.segment import HeadConfig, SegmentRecipe
from sparse_mlp.tasks.segment import InferenceConfig


def ade20k_as_mlp_tiny_upernet() -> SegmentRecipe:
    """AS-MLP-T with UPerNet on ADE20K, 160,000 steps of 16 images, 8 GPUs; authors' multi-scale mIoU 46.5.

    sparse-mlp train ade20k_as_mlp_tiny_upernet --data.root ADEChallengeData2016 --model.weights FILE
    """
    return _as_mlp("tiny", 0.3)


def ade20k_as_mlp_small_upernet() -> SegmentRecipe:
    """AS-MLP-S with UPerNet on ADE20K, 160,000 steps of 16 images, 8 GPUs; authors' multi-scale mIoU 49.2.

    Shift size 3, as the authors' file for segmentation has it; their classifier has 5.

    sparse-mlp train ade20k_as_mlp_small_upernet --data.root ADEChallengeData2016 --model.weights FILE
    """
    return _as_mlp("small", 0.3, shift_size=3)


def ade20k_as_mlp_base_upernet() -> SegmentRecipe:
    """AS-MLP-B with UPerNet on ADE20K, 160,000 steps of 16 images, 8 GPUs; authors' multi-scale mIoU 49.5.

    sparse-mlp train ade20k_as_mlp_base_upernet --data.root ADEChallengeData2016 --model.weights FILE
    """
    return _as_mlp("base", 0.5)


def _as_mlp(size: str, drop_path: float, **args: int) -> SegmentRecipe:
    return SegmentRecipe(
        name=f"ade20k_as_mlp_{size}_upernet",
        model=ModelConfig(f"as_mlp_{size}", {"drop_path_rate": drop_path, **args}),
        data=_ade20k(16),
        optim=OptimConfig(lr=6e-5, weight_decay=0.01),
        schedule=ScheduleConfig("linear", warmup_steps=1500, warmup_lr=6e-11),
        train=TrainConfig(steps=160_000, eval_every=16_000, save_every=16_000, log_every=50),
    )


def ade20k_hire_mlp_small_upernet() -> SegmentRecipe:
    """Hire-MLP-Small with UPerNet on ADE20K, 80,000 steps of 32 images, 8 GPUs, as the authors' file has it; of this
    one they give no figure (their best model: 49.9 mIoU).

    sparse-mlp train ade20k_hire_mlp_small_upernet --data.root ADEChallengeData2016 --model.weights FILE
    """
    return SegmentRecipe(
        name="ade20k_hire_mlp_small_upernet",
        model=ModelConfig("hire_mlp_small", {"drop_path_rate": 0.2}),
        data=_ade20k(32),
        optim=OptimConfig(lr=1.2e-4, weight_decay=0.01, betas=(0.9, 0.999)),
        schedule=ScheduleConfig("linear", warmup_steps=800, warmup_lr=1.2e-10),
        train=TrainConfig(steps=80_000, eval_every=8000, save_every=8000, log_every=50),
    )


def ade20k_hire_mlp_small_fpn() -> SegmentRecipe:
    """Hire-MLP-Small with Semantic FPN on ADE20K, 40,000 steps of 32 images, 8 GPUs, as the authors' file has it.

    sparse-mlp train ade20k_hire_mlp_small_fpn --data.root ADEChallengeData2016 --model.weights FILE
    """
    return _semantic_fpn("hire_mlp_small", {"drop_path_rate": 0.1}, lr=2e-4, weight_decay=0.05)


def ade20k_cycle_mlp_b1_fpn() -> SegmentRecipe:
    """CycleMLP-B1 with Semantic FPN on ADE20K, 40,000 steps of 32 images. The authors published no file for it: the
    settings are those of PVT's, which the paper follows, and no figure of it is known to the repository.

    sparse-mlp train ade20k_cycle_mlp_b1_fpn --data.root ADEChallengeData2016 --model.pretrained
    """
    return _semantic_fpn("cycle_mlp_b1", {}, lr=2e-4, weight_decay=1e-4)


def ade20k_cycle_mlp_b2_fpn() -> SegmentRecipe:
    """CycleMLP-B2 with Semantic FPN on ADE20K, as ade20k_cycle_mlp_b1_fpn.

    sparse-mlp train ade20k_cycle_mlp_b2_fpn --data.root ADEChallengeData2016 --model.pretrained
    """
    return _semantic_fpn("cycle_mlp_b2", {}, lr=2e-4, weight_decay=1e-4)


def _semantic_fpn(model: str, args: dict[str, float], lr: float, weight_decay: float) -> SegmentRecipe:
    return SegmentRecipe(
        name=f"ade20k_{model.removesuffix('_mlp')}_fpn",
        model=ModelConfig(model, args),
        head=HeadConfig("semantic_fpn"),
        data=_ade20k(32),
        optim=OptimConfig(lr=lr, weight_decay=weight_decay),
        schedule=ScheduleConfig("poly", power=0.9),
        train=TrainConfig(steps=40_000, eval_every=4000, save_every=4000, log_every=50),
    )


def _ade20k(batch_size: int) -> SegmentationConfig:
    """Resized to a shorter side of 512, scaled by 0.5 to 2, cropped to 512."""
    return SegmentationConfig("ade20k", image_size=512, short_side=512, batch_size=batch_size, workers=4)


def camvid() -> SegmentRecipe:
    """CycleMLP-B1 with Semantic FPN on CamVid, from random weights, at 240 of 360 lines; for two cores.

    sparse-mlp train camvid --data.root camvid
    """
    return SegmentRecipe(
        name="camvid",
        model=ModelConfig("cycle_mlp_b1", {"drop_path_rate": 0.1}),
        head=HeadConfig("semantic_fpn", width=64),
        data=SegmentationConfig("camvid", image_size=192, short_side=240, scale=(0.75, 1.5), batch_size=8),
        inference=InferenceConfig(),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=1),
        train=TrainConfig(epochs=20, clip_grad=1.0, eval_every=0, save_every=0, log_every=5),
    )
