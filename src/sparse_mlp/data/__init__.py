"""Image sets, and their batches as pure functions of (seed, step)."""

from sparse_mlp.data.augment import normalize
from sparse_mlp.data.classes import match_classes
from sparse_mlp.data.config import AugmentConfig, DataConfig
from sparse_mlp.data.decode import BadImageError, display_name, read_image
from sparse_mlp.data.files import find_images
from sparse_mlp.data.images import ArrayImages, Batch, FileImages
from sparse_mlp.data.loader import eval_loader, steps_per_epoch, train_loader
from sparse_mlp.data.mix import BatchMixer, batch_mixer
from sparse_mlp.data.own import image_data_from
from sparse_mlp.data.sets import SETS, ImageData, build_datasets, default_root
from sparse_mlp.data.spec import InputSpec
from sparse_mlp.data.trust import check_trusted, is_remote
from sparse_mlp.data.views import ViewsConfig, in_two_views, view_loader

__all__ = [
    "SETS",
    "ArrayImages",
    "AugmentConfig",
    "BadImageError",
    "Batch",
    "BatchMixer",
    "DataConfig",
    "FileImages",
    "ImageData",
    "InputSpec",
    "ViewsConfig",
    "batch_mixer",
    "build_datasets",
    "check_trusted",
    "default_root",
    "display_name",
    "eval_loader",
    "find_images",
    "image_data_from",
    "in_two_views",
    "is_remote",
    "match_classes",
    "normalize",
    "read_image",
    "steps_per_epoch",
    "train_loader",
    "view_loader",
]
