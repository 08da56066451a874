"""Images with boxes and masks: turned upright, cropped, resized and flipped together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

# (transposed, then flipped left-right, then flipped top-bottom) brings an image of this EXIF orientation upright.
_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


@dataclass(frozen=True)
class Scene:
    """An image and its objects: boxes (N, 4) float32 x1, y1, x2, y2, labels (N,), masks (N, H, W) uint8 or None."""

    image: Image.Image
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None


def turn_boxes(boxes: Tensor, orientation: int, width: int, height: int, *, back: bool = False) -> Tensor:
    """Boxes (N, 4) of a stored image of this size and EXIF orientation -> of the upright one; `back` the reverse.

    `width` and `height` are those of the image that the boxes are of.
    """
    transposed, flip_x, flip_y = _TURNS[orientation]
    x1, y1, x2, y2 = boxes.unbind(-1)
    if transposed and not back:
        x1, y1, x2, y2 = y1, x1, y2, x2
        width, height = height, width
    if flip_x:
        x1, x2 = width - x2, width - x1
    if flip_y:
        y1, y2 = height - y2, height - y1
    if transposed and back:
        x1, y1, x2, y2 = y1, x1, y2, x2
    return torch.stack((x1, y1, x2, y2), -1)


def turn_masks(masks: Tensor, orientation: int, *, back: bool = False) -> Tensor:
    """Masks (N, H, W) of a stored image -> of the upright one; `back` the reverse."""
    transposed, flip_x, flip_y = _TURNS[orientation]
    flips = [axis for axis, flipped in ((2, flip_x), (1, flip_y)) if flipped]
    if back:
        masks = masks.flip(flips)
        return masks.transpose(1, 2) if transposed else masks
    return (masks.transpose(1, 2) if transposed else masks).flip(flips)


def clip_boxes(scene: Scene) -> Scene:
    """Boxes cut at the border of the image; objects with less than a pixel of it left are dropped."""
    width, height = scene.image.size
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = torch.minimum(scene.boxes.clamp(min=0), limit)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    masks = scene.masks[kept] if scene.masks is not None else None
    return replace(scene, boxes=boxes[kept], labels=scene.labels[kept], masks=masks)


def crop(scene: Scene, left: int, top: int, width: int, height: int) -> Scene:
    """A rectangle of the scene, in pixels; objects outside of it are dropped."""
    boxes = scene.boxes - torch.tensor([left, top, left, top], dtype=torch.float32)
    masks = scene.masks[:, top : top + height, left : left + width] if scene.masks is not None else None
    image = scene.image.crop((left, top, left + width, top + height))
    return clip_boxes(Scene(image, boxes, scene.labels, masks))


def fitted_size(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """Width and height with the shorter side `short`, or less where the longer one would exceed `longest`."""
    scale = min(short / min(size), longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resize(scene: Scene, size: tuple[int, int]) -> Scene:
    """The scene at (width, height): the image antialiased, masks by their nearest pixel."""
    if size == scene.image.size:
        return scene
    scale = torch.tensor([size[0] / scene.image.width, size[1] / scene.image.height] * 2, dtype=torch.float32)
    masks = scene.masks
    if masks is not None:
        masks = (
            F.interpolate(masks[:, None], size=(size[1], size[0]), mode="nearest-exact")[:, 0]
            if len(masks)
            else (masks.new_zeros(0, size[1], size[0]))
        )
    image = scene.image.resize(size, Image.Resampling.BILINEAR)
    return Scene(image, scene.boxes * scale, scene.labels, masks)


def flip(scene: Scene) -> Scene:
    """The scene left to right."""
    masks = scene.masks.flip(2) if scene.masks is not None else None
    boxes = turn_boxes(scene.boxes, 2, *scene.image.size)
    return Scene(scene.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), boxes, scene.labels, masks)


def to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W) uint8."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
