from __future__ import annotations

import pytest

from sparse_mlp import recipes


def test_imagenet_figures_are_the_published_ones():
    """arXiv 2104.02057, section 5; facebookresearch/moco-v3, CONFIG.md."""
    recipe = recipes.get("imagenet_moco_sparse_b")
    assert recipe.optim.lr == pytest.approx(2.4e-3)  # 1.5e-4 x 4096 / 256
    assert (recipe.data.batch_size, recipe.train.epochs, recipe.optim.weight_decay) == (4096, 300, 0.1)
    assert (recipe.schedule.warmup_epochs, recipe.schedule.sched, recipe.schedule.min_lr) == (40, "cosine", 0.0)
    task, views = recipe.task, recipe.views
    assert (task.temperature, task.momentum, task.hidden_dim, task.out_dim) == (0.2, 0.99, 4096, 256)
    assert (task.projector_layers, task.predictor_layers) == (3, 2)
    assert (views.crop_scale, views.jitter, views.grey) == ((0.08, 1.0), 0.8, 0.2)
    assert (views.brightness, views.contrast, views.saturation, views.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (views.blur, views.solarize) == ((1.0, 0.1), (0.0, 0.2))


def test_the_learning_rate_follows_the_batch():
    """1.5e-4 x batch / 256."""
    recipe = recipes.recipe("imagenet_moco_sparse_b", data={"batch_size": 512})
    assert recipe.optim.lr == pytest.approx(3e-4)
