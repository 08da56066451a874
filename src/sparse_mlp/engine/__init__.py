"""The training engine: the loop, schedules, checkpoints and metrics of any task."""

from sparse_mlp.engine.checkpoint import last_checkpoint, list_checkpoints
from sparse_mlp.engine.config import FREE_ON_RESUME, LENGTHS, OptimConfig, ScheduleConfig, TrainConfig, check_configs
from sparse_mlp.engine.errors import CheckpointError, NonFiniteError, TrainingError, TrainingStopped
from sparse_mlp.engine.resume import check_longer
from sparse_mlp.engine.run import RunFolder
from sparse_mlp.engine.task import Batch, Evaluation, Loaders, Task
from sparse_mlp.engine.trainer import Trainer

__all__ = [
    "FREE_ON_RESUME",
    "LENGTHS",
    "Batch",
    "CheckpointError",
    "Evaluation",
    "Loaders",
    "NonFiniteError",
    "OptimConfig",
    "RunFolder",
    "ScheduleConfig",
    "Task",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "TrainingStopped",
    "check_configs",
    "check_longer",
    "last_checkpoint",
    "list_checkpoints",
]
