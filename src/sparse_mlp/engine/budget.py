"""How many updates fit into a given time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from sparse_mlp.distributed import broadcast, is_main
from sparse_mlp.engine.learner import Learner
from sparse_mlp.engine.task import Batch

_UNTIMED, _LEAST, _MOST = 2, 5, 500  # updates: to get warm, to time at least, at most
_SHARE, _SECONDS = 0.02, 20.0  # of the budget that timing may take, and never longer


def steps_that_fit(seconds: float, learner: Learner, batches: Callable[[int, int], Iterable[Batch]]) -> int:
    """Updates that `seconds` are enough for, timed on the first real batches; collective.

    The updates are complete, with the reading of the data; afterwards weights, buffers and optimiser are as before.
    """
    before = {name: tensor.clone() for name, tensor in learner.task.state_dict().items()}
    learner.task.train()
    taken: list[float] = []
    began = time.perf_counter()
    for number, batch in enumerate(batches(0, _UNTIMED + _MOST)):
        learner.update(batch, number, _UNTIMED + _MOST, measure=False)
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)
        now = time.perf_counter()
        taken.append(now - began)
        began = now
        enough = len(taken) >= _UNTIMED + _LEAST and sum(taken[_UNTIMED:]) >= min(_SHARE * seconds, _SECONDS)
        if broadcast(enough if is_main() else None):
            break
    learner.task.load_state_dict(before)
    learner.start()
    timed = taken[_UNTIMED:]
    return broadcast(max(1, int(seconds * len(timed) / sum(timed))))
