"""Not a test: `sparse-mlp train` with the arguments of SPEC; it kills itself before the step SPEC names."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from sparse_mlp.cli.main import main
from sparse_mlp.tasks.moco import Moco

SPEC: dict[str, Any] = globals()["SPEC"]
torch.set_num_threads(1)
before = Moco.before_step


def kill_before(task: Moco, step: int, steps: int) -> None:
    if step == SPEC.get("kill_at"):
        os.kill(os.getpid(), signal.SIGKILL)
    before(task, step, steps)


Moco.before_step = kill_before  # type: ignore[method-assign]
sys.exit(main(["train", *SPEC["arguments"]]))
