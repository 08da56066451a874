"""Detection and instance segmentation on COCO: the published configurations, and small ones for a laptop.

Settings as in the repositories of the papers, where they have them, else as said in a docstring; biases do not decay
here, as elsewhere in this library. Figures of box and
mask mAP are the authors', on val2017; nothing here was trained on COCO. All of them start from ImageNet weights:
`--model.weights FILE`, made by `sparse-mlp convert` from the authors' file, or a run folder.
"""

from __future__ import annotations

from sparse_mlp.data.coco import CocoConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.jobs.detect import DetectorConfig, DetectRecipe
from sparse_mlp.jobs.recipe import ModelConfig


def coco_cycle_mlp_b1_retinanet() -> DetectRecipe:
    """RetinaNet over CycleMLP-B1 on COCO, 12 epochs, for 8 GPUs. Box mAP 38.6 (the authors' figure).

    Settings of PVT's RetinaNet, which the authors name: weight decay 1e-4, one size of 800 x 1,333, no drop path.

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_cycle_mlp_b1_retinanet --data.root COCO --model.weights FILE
    """
    return DetectRecipe(
        name="coco_cycle_mlp_b1_retinanet",
        model=ModelConfig("cycle_mlp_b1"),
        data=CocoConfig(short_sides=(800,), batch_size=16, workers=8),
        detector=DetectorConfig("retinanet"),
        optim=OptimConfig(lr=1e-4, weight_decay=1e-4),
        schedule=ScheduleConfig(sched="multistep", milestones=(8 / 12, 11 / 12), warmup_steps=500, warmup_lr=1e-7),
        train=TrainConfig(epochs=12, amp="bf16", log_every=50),
    )


def coco_as_mlp_tiny_mask_rcnn() -> DetectRecipe:
    """Mask R-CNN over AS-MLP-T on COCO, 12 epochs, for 8 GPUs. Box mAP 44.0, mask mAP 40.0 (the authors' figures).

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_as_mlp_tiny_mask_rcnn --data.root COCO --model.weights FILE
    """
    return _multi_scale("coco_as_mlp_tiny_mask_rcnn", "as_mlp_tiny", "mask_rcnn", 12)


def coco_as_mlp_tiny_mask_rcnn_3x() -> DetectRecipe:
    """Mask R-CNN over AS-MLP-T on COCO, 36 epochs, for 8 GPUs. Box mAP 46.0, mask mAP 41.5 (the authors' figures).

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_as_mlp_tiny_mask_rcnn_3x --data.root COCO --model.weights FILE
    """
    return _multi_scale("coco_as_mlp_tiny_mask_rcnn_3x", "as_mlp_tiny", "mask_rcnn", 36)


def coco_as_mlp_small_mask_rcnn() -> DetectRecipe:
    """Mask R-CNN over AS-MLP-S on COCO, 12 epochs, for 8 GPUs. Box mAP 46.7, mask mAP 42.0 (the authors' figures).

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_as_mlp_small_mask_rcnn --data.root COCO --model.weights FILE
    """
    return _multi_scale("coco_as_mlp_small_mask_rcnn", "as_mlp_small", "mask_rcnn", 12)


def coco_as_mlp_small_mask_rcnn_3x() -> DetectRecipe:
    """Mask R-CNN over AS-MLP-S on COCO, 36 epochs, for 8 GPUs. Box mAP 47.8, mask mAP 42.9 (the authors' figures).

    The shift is 3, as in the authors' file, whose name says 5.

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_as_mlp_small_mask_rcnn_3x --data.root COCO --model.weights FILE
    """
    return _multi_scale("coco_as_mlp_small_mask_rcnn_3x", "as_mlp_small", "mask_rcnn", 36, shift_size=3)


def coco_as_mlp_tiny_cascade() -> DetectRecipe:
    """Cascade Mask R-CNN over AS-MLP-T on COCO, 12 epochs. Box mAP 48.4, mask mAP 42.0 (the authors' figures).

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_as_mlp_tiny_cascade --data.root COCO --model.weights FILE
    """
    return _multi_scale("coco_as_mlp_tiny_cascade", "as_mlp_tiny", "cascade_mask_rcnn", 12, drop_path=0.1)


def coco_as_mlp_tiny_cascade_3x() -> DetectRecipe:
    """Cascade Mask R-CNN over AS-MLP-T on COCO, 36 epochs. Box mAP 50.1, mask mAP 43.5 (the authors' figures).

    The shift is 3, as in the authors' file.

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_as_mlp_tiny_cascade_3x --data.root COCO --model.weights FILE
    """
    name = "coco_as_mlp_tiny_cascade_3x"
    return _multi_scale(name, "as_mlp_tiny", "cascade_mask_rcnn", 36, shift_size=3)


def coco_as_mlp_small_cascade() -> DetectRecipe:
    """Cascade Mask R-CNN over AS-MLP-S on COCO, 12 epochs. Box mAP 50.5, mask mAP 43.7 (the authors' figures).

    The authors' file has the depths of AS-MLP-T; these are AS-MLP-S's, which the parameters in their table fit.

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_as_mlp_small_cascade --data.root COCO --model.weights FILE
    """
    return _multi_scale("coco_as_mlp_small_cascade", "as_mlp_small", "cascade_mask_rcnn", 12, drop_path=0.1)


def coco_as_mlp_small_cascade_3x() -> DetectRecipe:
    """Cascade Mask R-CNN over AS-MLP-S on COCO, 36 epochs. Box mAP 51.1, mask mAP 44.2 (the authors' figures).

    The shift is 3, as in the authors' file.

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_as_mlp_small_cascade_3x --data.root COCO --model.weights FILE
    """
    name = "coco_as_mlp_small_cascade_3x"
    return _multi_scale(name, "as_mlp_small", "cascade_mask_rcnn", 36, shift_size=3)


def coco_as_mlp_base_cascade() -> DetectRecipe:
    """Cascade Mask R-CNN over AS-MLP-B on COCO, 12 epochs. Box mAP 51.1, mask mAP 44.2 (the authors' figures).

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_as_mlp_base_cascade --data.root COCO --model.weights FILE
    """
    return _multi_scale("coco_as_mlp_base_cascade", "as_mlp_base", "cascade_mask_rcnn", 12)


def coco_as_mlp_base_cascade_3x() -> DetectRecipe:
    """Cascade Mask R-CNN over AS-MLP-B on COCO, 36 epochs. Box mAP 51.5, mask mAP 44.7 (the authors' figures).

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_as_mlp_base_cascade_3x --data.root COCO --model.weights FILE
    """
    name = "coco_as_mlp_base_cascade_3x"
    return _multi_scale(name, "as_mlp_base", "cascade_mask_rcnn", 36, drop_path=0.3)


def coco_hire_mlp_tiny_mask_rcnn() -> DetectRecipe:
    """Mask R-CNN over Hire-MLP-Tiny on COCO, 12 epochs, for 8 GPUs.

    The authors published no settings of their detectors: these are AS-MLP's, and there is no figure to compare with.

    torchrun --nproc-per-node 8 -m sparse_mlp train coco_hire_mlp_tiny_mask_rcnn --data.root COCO --model.weights FILE
    """
    return _multi_scale("coco_hire_mlp_tiny_mask_rcnn", "hire_mlp_tiny", "mask_rcnn", 12)


def _multi_scale(
    name: str, model: str, detector: str, epochs: int, *, drop_path: float = 0.2, **args: object
) -> DetectRecipe:
    """AS-MLP's and Swin's configuration, of 12 epochs (1x) or 36 (3x)."""
    last = 1 / 12
    milestones = (1 - 4 * last, 1 - last) if epochs == 12 else (27 / 36, 33 / 36)
    return DetectRecipe(
        name=name,
        model=ModelConfig(model, {"drop_path_rate": drop_path, **args}),
        data=CocoConfig(crop=True, batch_size=16, workers=8),
        detector=DetectorConfig(detector),  # type: ignore[arg-type]
        optim=OptimConfig(lr=1e-4, weight_decay=0.05),
        schedule=ScheduleConfig(sched="multistep", milestones=milestones, warmup_steps=500, warmup_lr=1e-7),
        train=TrainConfig(epochs=epochs, amp="bf16", log_every=50),
    )


def coco_small_mask_rcnn() -> DetectRecipe:
    """Mask R-CNN over CycleMLP-B1 on 24 images, until it knows them by heart: about 25 minutes of one core.

    Box mAP 41 %, AP50 69 %, mask mAP 28 %, AP50 51 % after 200 steps on the images that it is trained on, which shows
    that the whole chain works and nothing more (24 photos of COCO with 246 objects of 47 classes, AMD EPYC).

    sparse-mlp train coco_small_mask_rcnn --data.root FOLDER
    """
    detector = DetectorConfig("mask_rcnn", fpn_channels=128, anchor_size=16, samples=64)
    return _small("coco_small_mask_rcnn", detector, steps=300)


def coco_small_retinanet() -> DetectRecipe:
    """RetinaNet over CycleMLP-B1 on 24 images, until it knows them by heart: 16 minutes of one core.

    Box mAP 53 %, AP50 67 % on the images that it is trained on, which shows that the whole chain works and nothing more
    (24 photos of COCO with 246 objects of 47 classes, AMD EPYC).

    sparse-mlp train coco_small_retinanet --data.root FOLDER
    """
    detector = DetectorConfig("retinanet", fpn_channels=128, anchor_size=16)
    return _small("coco_small_retinanet", detector, steps=500)


def _small(name: str, detector: DetectorConfig, steps: int) -> DetectRecipe:
    return DetectRecipe(
        name=name,
        model=ModelConfig("cycle_mlp_b1"),
        data=CocoConfig(
            name="coco_small",
            limit=24,
            test_on="train",
            short_sides=(256,),
            test_short_side=256,
            max_side=256,
            flip=0.0,
            batch_size=4,
        ),
        detector=detector,
        optim=OptimConfig(lr=3e-4, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=50, min_lr=3e-6),
        train=TrainConfig(steps=steps, clip_grad=5.0, log_every=10, eval_every=100, save_every=100),
    )
