"""The training loop.

What a step does is a function of the weights, the configuration and the step's number: batches come from the data by
their number, the generators are seeded by it, the learning rate is computed from it. A checkpoint therefore needs no
generator and no position in the data, and a resumed run repeats an uninterrupted one to the bit.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from sparse_mlp import distributed
from sparse_mlp.distributed import is_main, rank, world_size
from sparse_mlp.engine import checkpoint
from sparse_mlp.engine.budget import steps_that_fit
from sparse_mlp.engine.clock import Clock
from sparse_mlp.engine.config import FREE_ON_RESUME, OptimConfig, ScheduleConfig, TrainConfig, check_configs
from sparse_mlp.engine.errors import NonFiniteError, TrainingStopped
from sparse_mlp.engine.learner import Learner
from sparse_mlp.engine.logging import Meter, MetricsLog, ProgressBar
from sparse_mlp.engine.optim import create_schedule, warmup_updates
from sparse_mlp.engine.run import RunFolder, environment
from sparse_mlp.engine.stop import StopRequest
from sparse_mlp.engine.task import Batch, Evaluation, Loaders, Task
from sparse_mlp.errors import UserError
from sparse_mlp.moe import telemetry


class Trainer:
    """Trains a task; `fit` is the loop. Under torchrun every rank makes one and calls it, inside `distributed.join`."""

    def __init__(
        self,
        task: Task,
        loaders: Loaders,
        *,
        optim: OptimConfig,
        schedule: ScheduleConfig,
        train: TrainConfig,
        run: RunFolder,
        device: torch.device | None = None,
    ) -> None:
        """ValueError for configurations that cannot be, or whose options would be ignored."""
        check_configs(optim, schedule, train)
        if not loaders.replicated:
            _check_batch_size(loaders.batch_size, train.grad_accum)
        if train.minutes is None:  # else nobody knows yet how many updates there will be
            warmup_updates(schedule, _count_steps(train, loaders), loaders.steps_per_epoch)
        self.loaders, self.run = loaders, run
        self.optim, self.schedule, self.train = optim, schedule, train
        self.learner = Learner(task, optim, train, device or distributed.resolve_device(train.device))
        self.step = self.steps = 0  # updates made, updates to make
        self.saved = 0  # step of the newest checkpoint
        self.meter, self.clock = Meter(), Clock(self.learner.device)

    def fit(self, *, resume: bool = False, show: bool = True) -> Evaluation:
        """Train to the end; returns the last evaluation (of the averaged weights where they are kept).

        `resume` goes on from the newest checkpoint; a run that was killed before its first one starts again. Raises
        TrainingStopped on Ctrl-C and SIGTERM, NonFiniteError, CheckpointError, ValueError if the run began differently.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(_torch_settings(self.train))
            distributed.on_main(lambda: stack.enter_context(self.run.locked()))
            self._begin(resume)
            self.stop = stack.enter_context(StopRequest())
            self.log = stack.enter_context(MetricsLog(self.run, self.step)) if is_main() else None
            steps = (self.step, self.steps, self.loaders.steps_per_epoch)
            bar = ProgressBar(*steps, show=show and is_main(), items=self.learner.task.items)
            self.bar = stack.enter_context(bar)
            if resume:
                self._event("resumed", ranks=world_size(), environment=environment())
                where = f"going on after step {self.step}" if self.step else "no checkpoint yet: beginning again"
                self.bar.say(f"{where}, {self.steps} in all")
            return self._loop()

    def _loop(self) -> Evaluation:
        evaluation = self._evaluate_if_missed()
        self.learner.task.train()
        self.clock.start()
        for batch in self._remaining():
            self.rates.step_update(self.step)
            due = self._due(self.train.log_every, self.step + 1)
            self.meter.add(self.learner.update(batch, self.step, self.steps, measure=due))
            self.step += 1
            self.bar.advance(self.step)
            stopping = self.stop.agreed()
            if due:
                self._log()
            if stopping or self._due(self.train.save_every, self.step):
                self._save()
            if stopping:
                raise self._stopped(stopping)
            if self._due(self.train.eval_every, self.step):
                evaluation = self._evaluate()
        assert evaluation is not None, "the last step is always evaluated"
        self._event("finished")
        return evaluation

    def _due(self, every: int | None, step: int) -> bool:
        """Whether something is to happen after `step` updates: every so many, once an epoch (None), and at the end."""
        every = self.loaders.steps_per_epoch if every is None else every
        return step == self.steps or (every > 0 and step % every == 0)

    def _remaining(self) -> Iterator[Batch]:
        """Batches of the steps that are left. Data workers end with the loop, also where an exception leaves it."""
        batches = iter(self._batches(self.step, self.steps - self.step))
        for step in range(self.step, self.steps):
            with self.clock.waiting():
                batch = next(batches, None)
            if batch is None:
                raise UserError(f"the training data ended after {step} of {self.steps} steps")
            yield batch

    def _batches(self, start: int, steps: int) -> Iterable[Batch]:
        return self.loaders.train(start_step=start, steps=steps, rank=rank(), world_size=world_size())

    # Before the first step.

    def _begin(self, resume: bool) -> None:
        """Fix the number of steps and, resuming, put everything back as it was."""
        # Found and verified by one rank: a checkpoint is large, and all have to mean the same one.
        last = distributed.on_main(lambda: checkpoint.last_checkpoint(self.run.checkpoints))
        if last is not None and not resume:
            raise UserError(f"{self.run.path} has checkpoints; resume it or train in another folder")
        state = distributed.on_main(lambda: checkpoint.load_state(last)) if last is not None else None
        if state is not None:
            self._check_settings(state["settings"])
        self.steps = state["steps"] if state is not None else self._decide_steps()
        self.rates = create_schedule(self.learner.optimizer, self.schedule, self.steps, self.loaders.steps_per_epoch)
        if state is None or last is None:
            return
        tensors, _ = self.learner.state()
        checkpoint.load_tensors(last, tensors)
        self.learner.restore(tensors, state["learner"])
        self.step = self.saved = state["step"]
        self.meter.steps = state["meter"]
        self.clock.load(state["clock"])
        if is_main():
            checkpoint.clean(self.run.checkpoints)

    def _decide_steps(self) -> int:
        if self.train.minutes is not None:
            return steps_that_fit(60 * self.train.minutes, self.learner, self._batches)
        return _count_steps(self.train, self.loaders)

    def _settings(self) -> dict[str, Any]:
        """What the course of the training depends on, flat; lists for tuples, as JSON gives them back."""
        train = {name: value for name, value in asdict(self.train).items() if name not in FREE_ON_RESUME}
        groups = {"optim": asdict(self.optim), "schedule": asdict(self.schedule), "train": train}
        flat = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
        flat |= {"batch_size": self.loaders.batch_size, "steps_per_epoch": self.loaders.steps_per_epoch}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def _check_settings(self, before: Mapping[str, Any]) -> None:
        now = self._settings()
        changed = [
            f"{name} was {before.get(name)} and is now {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise UserError(f"{self.run.path} cannot go on as it began: {'; '.join(changed)}")

    # Between steps.

    def _log(self) -> None:
        """Means since the last line, and the routing of this step."""
        self._check_losses()
        lap = self.clock.lap(self.step)
        routing = self._routing()
        values = self.meter.take()
        if routing:
            values["balance"] = sum(stats["balance_loss"] for stats in routing.values()) / len(routing)
        values["lr"] = max(group["lr"] for group in self.learner.optimizer.param_groups)
        values["images_per_s"] = lap.steps * self.loaders.batch_size / lap.seconds
        values["data_time"] = lap.waited / lap.seconds
        self._write("train", values)
        for layer, stats in routing.items():
            self._write("routing", {"layer": layer, **stats})
        self.bar.train(self.step, values, lap.seconds / lap.steps)

    def _routing(self) -> dict[str, dict[str, Any]]:
        """Statistics of each MoE layer's last forward, averaged over the ranks."""
        collected = telemetry.collect(self.learner.task.backbone())
        return {name: _mean_over_ranks(stats.to_dict()) for name, stats in collected.items()}

    def _evaluate(self, *, write: bool = True) -> Evaluation:
        """Evaluate the weights and their average. A signal meanwhile saves and stops; resuming makes up for it."""
        with self.clock.paused():
            self.bar.note("evaluating")
            tasks = {False: self.learner.task}
            if self.learner.ema is not None:
                tasks[True] = self.learner.ema.module
            try:
                results = {averaged: self._evaluate_one(task) for averaged, task in tasks.items()}
            except _Interrupted:
                self._save()
                raise self._stopped(self.stop.received) from None
            for averaged, result in results.items():
                if write:
                    self._write("eval", {"split": "test", **result.metrics, "ema": averaged})
                self.bar.evaluation(self.step, result.metrics, averaged)
        return results[max(results)]

    def _evaluate_one(self, task: Task) -> Evaluation:
        loader = self.loaders.evaluate(rank=rank(), world_size=world_size())
        return task.evaluate(self._interruptible(loader), self.learner.device)

    def _evaluate_if_missed(self) -> Evaluation | None:
        """After resuming: the evaluation that was due at the checkpoint if it was not made; the last one always."""
        if self.step == 0 or not self._due(self.train.eval_every, self.step):
            return None
        missed = distributed.broadcast(self.log is not None and not self.log.has("eval", self.step))
        return self._evaluate(write=missed) if missed or self.step == self.steps else None

    def _interruptible(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        for batch in loader:
            if self.stop.received and world_size() == 1:
                raise _Interrupted
            yield batch

    def _save(self) -> None:
        """Write a checkpoint, unless this step has one. Weights that are not finite are never saved."""
        if self.step == self.saved:
            return
        with self.clock.paused():
            self.bar.note("saving")
            self._check_losses()
            bad = self.learner.not_finite()
            if bad is not None:
                raise self._not_finite(f"{bad} is not finite after step {self.step}")
            tensors, numbers = self.learner.state()
            if self.log is not None:
                self.log.sync()
            state = {
                "step": self.step,
                "steps": self.steps,
                "settings": self._settings(),
                "learner": numbers,
                "meter": self.meter.steps,
                "clock": self.clock.state(),
            }
            path = checkpoint.save_checkpoint(
                self.run.checkpoints, self.step, tensors, self.learner.weights(), state, self.train.keep
            )
            self.saved = self.step
            self._event("saved", checkpoint=path.name)

    def _stopped(self, signum: int) -> TrainingStopped:
        self._event("stopped", signal=signum)
        return TrainingStopped(
            f"stopped after step {self.step} of {self.steps} and saved; go on with --resume {self.run.path}", signum
        )

    def _check_losses(self) -> None:
        self.meter.flush()
        for number, values in enumerate(self.meter.steps, self.step - len(self.meter.steps) + 1):
            if not math.isfinite(values["loss"]):
                raise self._not_finite(f"the loss is {values['loss']} at step {number}")

    def _not_finite(self, what: str) -> NonFiniteError:
        self._event("stopped", reason=what)
        last = checkpoint.last_checkpoint(self.run.checkpoints)
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        return NonFiniteError(f"{what}; {good}; a lower optim.lr, more warm-up or train.clip_grad may help")

    def _event(self, what: str, **values: Any) -> None:
        self._write("event", {"what": what, **values})

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        if self.log is not None:
            epoch = self.step / self.loaders.steps_per_epoch
            self.log.write(kind, self.step, epoch, self.clock.seconds(), values)


class _Interrupted(Exception):
    """A signal came during an evaluation."""


def _count_steps(train: TrainConfig, loaders: Loaders) -> int:
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None, "check_configs lets exactly one through"
    return max(1, round(train.epochs * loaders.steps_per_epoch))


def _check_batch_size(batch_size: int, parts: int) -> None:
    if batch_size % world_size():
        raise UserError(f"a batch size of {batch_size} is not divisible by the {world_size()} processes")
    if batch_size // world_size() < parts:
        raise UserError(f"train.grad_accum {parts} exceeds the {batch_size // world_size()} items a process gets")


@contextlib.contextmanager
def _torch_settings(train: TrainConfig) -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.use_deterministic_algorithms(train.deterministic or deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def _mean_over_ranks(stats: dict[str, Any]) -> dict[str, Any]:
    """Numbers and lists of numbers, averaged over the ranks."""
    if world_size() == 1:
        return stats
    flat = [number for value in stats.values() for number in (value if isinstance(value, list) else [value])]
    numbers = iter(distributed.mean(torch.tensor(flat, dtype=torch.float64)).tolist())
    return {
        name: [next(numbers) for _ in value] if isinstance(value, list) else next(numbers)
        for name, value in stats.items()
    }
