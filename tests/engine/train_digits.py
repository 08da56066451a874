"""Not a test: a program that trains a tiny model on the digits as SPEC says. The tests kill, stop and resume it."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import sys
import threading
from functools import partial
from typing import Any

import numpy as np
import timm
import torch

from sparse_mlp import distributed
from sparse_mlp.data import AugmentConfig, DataConfig, build_datasets, eval_loader, steps_per_epoch, train_loader
from sparse_mlp.distributed import MeshConfig
from sparse_mlp.engine import Loaders, OptimConfig, RunFolder, ScheduleConfig, TrainConfig, Trainer, TrainingError
from sparse_mlp.tasks import Classify

SPEC: dict[str, Any] = globals()["SPEC"]  # put here by the test
TINY = {"img_size": 8, "patch_size": 2, "num_blocks": 2, "embed_dim": 32, "drop_path_rate": 0.1}


class Digits(Classify):
    """Classify that before a given step sends this process a signal, spoils its weights, or fills the disk."""

    def before_step(self, step: int, steps: int) -> None:
        if step in (SPEC.get("signal_at"), SPEC.get("full_at")):
            wait_for_checkpoint()
        if distributed.rank() != SPEC.get("signal_rank", distributed.rank()):
            return
        if step == SPEC.get("signal_at"):
            os.killpg(0, SPEC["signal"]) if SPEC.get("signal_group") else os.kill(os.getpid(), SPEC["signal"])
        if step == SPEC.get("poison_at"):
            torch.nn.init.constant_(next(self.parameters()), float("nan"))
        if step == SPEC.get("full_at"):  # from now on no file may be larger: writing fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (SPEC["full_bytes"], resource.RLIM_INFINITY))


def wait_for_checkpoint() -> None:
    """What happens next happens after the checkpoint that is being written."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    data_config = DataConfig(batch_size=spec.get("batch_size", 400), workers=spec.get("workers", 0))
    data = build_datasets(data_config, AugmentConfig(**spec.get("augment", {})))
    train = TrainConfig(**{"log_every": 2, "save_every": 0, "eval_every": 0, "device": "cpu", **spec["train"]})
    with distributed.join(train.device) as device:
        torch.manual_seed(train.seed)
        model = timm.create_model(
            spec["model"], in_chans=data.spec.channels, num_classes=10, **TINY | spec.get("args", {})
        )
        loaders = Loaders(
            train=partial(train_loader, data, data_config, train.seed),
            evaluate=partial(eval_loader, data, data_config),
            batch_size=data_config.batch_size,
            steps_per_epoch=steps_per_epoch(data, data_config),
        )
        optim = OptimConfig(**{"lr": 3e-3, **spec.get("optim", {})})
        schedule = ScheduleConfig(**spec.get("schedule", {"warmup_steps": 2}))
        if spec.get("resume"):
            run = RunFolder.open(spec["run"])
        else:
            run = distributed.on_main(lambda: RunFolder.create(spec["run"], dataclasses.asdict(train)))
        task = Digits(model, class_names=data.classes)
        mesh = MeshConfig(**spec.get("mesh", {}))
        trainer = Trainer(task, loaders, optim=optim, schedule=schedule, train=train, run=run, mesh=mesh, device=device)
        evaluation = trainer.fit(resume=spec.get("resume", False))
        if distributed.is_main():
            np.savez(run.path / "predictions.npz", **evaluation.predictions)


if __name__ == "__main__":
    if SPEC.get("signal_group"):
        os.setsid()
    try:
        main(SPEC)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(error.exit_code)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
