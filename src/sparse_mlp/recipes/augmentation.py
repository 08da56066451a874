"""Augmentations that several published recipes share."""

from __future__ import annotations

from sparse_mlp.data import AugmentConfig

CROP_AND_FLIP = AugmentConfig(crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5)
"""Inception's random resized crop and a mirror, as ImageNet models have had them since 2014 (arXiv 1409.4842)."""

DEIT = AugmentConfig(
    crop_scale=(0.08, 1.0),
    crop_ratio=(3 / 4, 4 / 3),
    flip=0.5,
    auto_augment="rand-m9-mstd0.5-inc1",
    erase=0.25,
    mixup=0.8,
    cutmix=1.0,
)
"""DeiT's (arXiv 2012.12877, table 9), which AS-MLP, CycleMLP and Hire-MLP train with and MoCo v3 fine-tunes with."""

SMALL_IMAGES = AugmentConfig(pad=4, flip=0.5)
"""Shift by up to 4 pixels and mirror: CIFAR's usual one (arXiv 1512.03385, section 4.2)."""
