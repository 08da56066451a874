"""Mixup and cutmix as a pure function of (seed, step), the same on any number of ranks."""

from __future__ import annotations

import torch
from timm.data import Mixup
from torch import Tensor

from sparse_mlp.data.config import AugmentConfig
from sparse_mlp.data.randomness import preserved_generators, seed_generators, step_seed
from sparse_mlp.errors import UserError


class BatchMixer:
    """timm's Mixup over a batch; images are mixed in neighbouring pairs, so that a rank needs only its own slice."""

    def __init__(self, config: AugmentConfig, num_classes: int) -> None:
        self.mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mix_probability,
            switch_prob=config.cutmix_share,
            label_smoothing=0.0,  # done by the loss
            num_classes=num_classes,
        )

    def __call__(self, batch: dict[str, Tensor], seed: int, step: int) -> dict[str, Tensor]:
        """Mix `image` (B, C, H, W) and turn `target` (B,) into shares (B, classes); B must be even.

        The images come out in another order (the same for every entry of the batch).
        """
        size = len(batch["target"])
        # timm mixes image i with image B-1-i; in this order those are the neighbours 2i and 2i+1.
        order = torch.cat((torch.arange(0, size, 2), torch.arange(1, size, 2).flip(0)))
        batch = {name: value[order] for name, value in batch.items()}
        with preserved_generators():
            seed_generators(step_seed(seed, step))
            image, target = self.mixup(batch["image"], batch["target"])
        return batch | {"image": image, "target": target}


def batch_mixer(config: AugmentConfig, num_classes: int) -> BatchMixer | None:
    """The mixer of a configuration, or None. UserError for values that would be ignored."""
    default = AugmentConfig()
    if config.mix_probability != default.mix_probability and not (config.mixup or config.cutmix):
        raise UserError("augment.mix_probability would be ignored: neither augment.mixup nor augment.cutmix is set")
    if config.cutmix_share != default.cutmix_share and not (config.mixup and config.cutmix):
        raise UserError("augment.cutmix_share would be ignored: it needs both augment.mixup and augment.cutmix")
    return BatchMixer(config, num_classes) if config.mixup or config.cutmix else None
