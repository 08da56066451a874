"""The training loop.

A step is a function of the weights, the configuration and the step's number: the number selects the batch, seeds the
generators and determines the learning rate. A checkpoint therefore holds no generator and no position in the data, and
a resumed run repeats an uninterrupted one to the bit. The exception is train.minutes, where learning rate and end
depend on the time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from sparse_mlp import distributed
from sparse_mlp.distributed import MeshConfig, is_main, rank, world_size
from sparse_mlp.engine import checkpoint
from sparse_mlp.engine.batch import check_batch_size
from sparse_mlp.engine.clock import Clock
from sparse_mlp.engine.config import OptimConfig, ScheduleConfig, TrainConfig, check_configs
from sparse_mlp.engine.errors import NonFiniteError, TrainingStopped
from sparse_mlp.engine.learner import Learner
from sparse_mlp.engine.length import create_length
from sparse_mlp.engine.logging import Meter, MetricsLog, routing_statistics
from sparse_mlp.engine.optim import create_schedule
from sparse_mlp.engine.progress import ProgressBar
from sparse_mlp.engine.resume import check_settings, flat_settings
from sparse_mlp.engine.run import RunFolder, environment
from sparse_mlp.engine.saving import Saver
from sparse_mlp.engine.stop import StopRequest
from sparse_mlp.engine.task import Batch, Evaluation, Loaders, Task, called_module
from sparse_mlp.engine.torch_settings import torch_settings
from sparse_mlp.errors import UserError
from sparse_mlp.weights import carry_over, classifier_names

_UNKNOWN_STEPS = 1 << 40  # requested from the data of a run by time, which reads only the first ones


class Trainer:
    """Trains a task; `fit` is the loop.

    Under torchrun every rank creates one and calls it, inside `distributed.join`.
    """

    def __init__(
        self,
        task: Task,
        loaders: Loaders,
        *,
        optim: OptimConfig,
        schedule: ScheduleConfig,
        train: TrainConfig,
        run: RunFolder,
        mesh: MeshConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        """UserError for configurations that are not allowed, or whose options would be ignored."""
        check_configs(optim, schedule, train)
        if not loaders.replicated:
            check_batch_size(loaders.batch_size, train.grad_accum)
        self.loaders, self.run = loaders, run
        self.optim, self.schedule, self.train = optim, schedule, train
        self.mesh = mesh or MeshConfig()
        device = device or distributed.resolve_device(train.device)
        self.learner = Learner(task, optim, train, device, self.mesh)
        self.length = create_length(train, schedule, loaders.steps_per_epoch)
        self.step = 0  # updates made
        self.saved = 0  # step of the newest checkpoint
        self.seconds = 0.0  # training time after `step` updates, the same on all ranks
        self.meter, self.clock = Meter(), Clock(self.learner.device)
        self.log: MetricsLog | None = None  # only on rank 0

    @property
    def steps(self) -> int | None:
        """Updates of the whole run; None until a run by time is over."""
        return self.length.steps

    def begin_with_optimizer_of(self, run: RunFolder) -> tuple[int, int]:
        """Begin with the optimiser's state in the newest checkpoint of another run, see `weights.carry_over`.

        To be called before `fit`; collective. The learning rate still follows the schedule of this run. Returns how
        many parameters have the other run's state, and how many begin without one. FileNotFoundError if the run has no
        checkpoint; UserError if it had another optimiser, or if nothing of its state fits.
        """
        last = distributed.on_main(lambda: checkpoint.last_checkpoint(run.checkpoints))
        if last is None:
            raise FileNotFoundError(f"{run.path} has no checkpoint yet")
        state = distributed.on_main(lambda: checkpoint.load_state(last))
        if (opt := state["settings"]["optim.opt"]) != self.optim.opt:
            raise UserError(f"optim.opt {self.optim.opt!r} cannot begin with the state of {run.path}: its was {opt!r}")
        task = self.learner.task
        trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
        found = carry_over(checkpoint.load_optimizer(last, state["learner"]), task, _classifier(task))
        carried = {name: values for name, values in found.items() if name in trained}
        if not carried:
            raise UserError(f"{run.path} has no optimiser's state of a weight that is trained here")
        self.learner.begin_with(carried)
        return len(carried), len(trained) - len(carried)

    def fit(self, *, resume: bool = False, show: bool = True) -> Evaluation:
        """Train to the end; returns the last evaluation (of the averaged weights where they are kept).

        `resume` continues from the newest checkpoint; without one the run starts again. A finished run continues if its
        length is greater than before (see TrainConfig). Raises TrainingStopped on Ctrl-C and SIGTERM, NonFiniteError,
        CheckpointError, and UserError if the run was started with other settings.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch_settings(self.train))
            distributed.on_main(lambda: stack.enter_context(self.run.locked()))
            self._begin(resume)
            self.stop = stack.enter_context(StopRequest())
            items = self.learner.task.items
            bar = ProgressBar(steps_per_epoch=self.loaders.steps_per_epoch, items=items, show=show and is_main())
            self.bar = stack.enter_context(bar)
            distributed.on_main(lambda: self._open_log(stack))
            self.saver = Saver(self.run.checkpoints, self.train.keep)
            stack.callback(self.saver.close)
            self._announce(resume)
            return self._loop()

    def _open_log(self, stack: contextlib.ExitStack) -> None:
        self.log = stack.enter_context(MetricsLog(self.run, self.step, self.bar.print))

    def _announce(self, resume: bool) -> None:
        """Log how training starts, and print what differs from the request."""
        if resume:
            self._event("resumed", ranks=world_size(), environment=environment())
            start = f"resumed after step {self.step}" if self.step else "no checkpoint yet: starting again"
            self.bar.print(start if self.steps is None else f"{start} of {self.steps}")
        if self.step == 0:
            self._event(
                "started", ranks=world_size(), items=self.learner.task.items, batch_size=self.loaders.batch_size
            )
            self._warmup_note = None
        else:
            self._warmup_note = self.length.warmup_note()  # printed when the run started
        self._advance()

    def _loop(self) -> Evaluation:
        evaluation = self._evaluate_if_missed()
        self.learner.task.train()
        self.clock.start()
        for batch in self._remaining():
            self.rates.step_update(self.length.position(self.step, self.seconds))  # type: ignore[arg-type]
            self._print_warmup_note()
            measure = self._due(self.train.log_every, self.step + 1)
            expected = self.length.expected_steps(self.step, self.seconds)
            self.meter.add(self.learner.update(batch, self.step, expected, measure=measure))
            self.step += 1
            self._read_clock()
            self._advance()
            stopping = self.stop.agreed()
            if self._due(self.train.log_every, self.step):
                self._log()
            if stopping or self._due(self.train.save_every, self.step):
                self._save()
            if stopping:
                self._saved()
                raise self._stopped(stopping)
            if self._due(self.train.eval_every, self.step):
                evaluation = self._evaluate()
        assert evaluation is not None, "the last step is always evaluated"
        self._saved()
        self._event("finished", steps=self.step, seconds=self.seconds)
        if self.train.minutes is not None:
            self.bar.print(f"{self.train.minutes:g} minutes of training: {self.step} steps")
        return evaluation

    def _due(self, every: int | None, step: int) -> bool:
        """Whether `step` is a multiple of `every` updates, or of an epoch's (None), or the last step."""
        every = self.loaders.steps_per_epoch if every is None else every
        return step == self.steps or (every > 0 and step % every == 0)

    def _finished(self) -> bool:
        return self.length.finished(self.step, self.seconds)

    def _read_clock(self) -> None:
        """Training time after the last update. Where learning rate and end depend on it, all ranks get rank 0's."""
        self.seconds = self.clock.seconds()
        if self.train.minutes is not None:
            self.seconds = distributed.broadcast(self.seconds)
        self._finished()  # a run by time now knows its number of steps

    def _remaining(self) -> Iterator[Batch]:
        """Batches of the remaining steps. Data workers end with the loop, also when an exception ends it."""
        if self._finished():
            return
        steps = _UNKNOWN_STEPS if self.steps is None else self.steps - self.step
        loader = self.loaders.train(start_step=self.step, steps=steps, rank=rank(), world_size=world_size())
        batches = iter(loader)
        while not self._finished():
            with self.clock.waiting():
                batch = next(batches, None)
            if batch is None:
                raise UserError(f"the training data ended after step {self.step}{self._of_steps()}")
            yield batch

    def _of_steps(self) -> str:
        return "" if self.steps is None else f" of {self.steps}"

    # Before the first step.

    def _begin(self, resume: bool) -> None:
        """Create the schedule and, when resuming, restore the checkpoint."""
        # Found and verified by rank 0: checkpoints are large, and all ranks have to load the same one.
        last = distributed.on_main(lambda: checkpoint.last_checkpoint(self.run.checkpoints))
        if last is not None and not resume:
            raise UserError(f"{self.run.path} has checkpoints; resume it or train in another folder")
        state = distributed.on_main(lambda: checkpoint.load_state(last)) if last is not None else None
        if state is not None:
            self._check_settings(state["settings"])
            self.length.load(state["length"])
        length, warmup = self.length.schedule_length, self.length.schedule_warmup
        self.rates = create_schedule(self.learner.optimizer, self.schedule, length, warmup)
        if state is None or last is None:
            return
        tensors, _ = self.learner.state()
        checkpoint.load_tensors(last, tensors)
        self.learner.restore(tensors, state["learner"])
        self.step = self.saved = state["step"]
        self.meter.steps = state["meter"]
        self.clock.load(state["clock"])
        self._read_clock()
        if is_main():
            checkpoint.clean(self.run.checkpoints)

    def _settings(self) -> dict[str, Any]:
        sizes = {"batch_size": self.loaders.batch_size, "steps_per_epoch": self.loaders.steps_per_epoch}
        if self.mesh.balance == "rank":  # a loss of its own for each number of ranks
            sizes |= {"mesh.balance of ranks": world_size()}
        return flat_settings(self.optim, self.schedule, self.train, **sizes)

    def _check_settings(self, stored: Mapping[str, Any]) -> None:
        longer = check_settings(stored, self._settings(), self.run.path)
        if longer and self.learner.task.schedules_over_run:
            raise UserError(
                f"{self.run.path} cannot be made longer: {type(self.learner.task).__name__} has a schedule of its own "
                "over the planned length"
            )

    # Between steps.

    def _advance(self) -> None:
        self.bar.advance(self.step, self.steps, self.length.share(self.step, self.seconds))

    def _print_warmup_note(self) -> None:
        note = self.length.warmup_note()
        if note is not None and note != self._warmup_note:
            self._warmup_note = note
            self.bar.print(note)

    def _log(self) -> None:
        """Write the means since the last line, and the routing of this step."""
        self._check_losses()
        interval = self.clock.interval(self.step)
        routing = routing_statistics(self.learner.task.backbone())
        values = self.meter.take()
        if routing:
            values["balance"] = sum(stats["balance_loss"] for stats in routing.values()) / len(routing)
        values["lr"] = max(group["lr"] for group in self.learner.optimizer.param_groups)
        values["items_per_s"] = interval.steps * self.loaders.batch_size / interval.seconds
        values["data_time"] = interval.waited / interval.seconds
        self._write("train", values)
        for layer, stats in routing.items():
            self._write("routing", {"layer": layer, **stats})
        left = self.length.seconds_left(self.step, self.seconds, interval.seconds / interval.steps)
        self.bar.train(values, left)

    def _evaluate(self, *, write: bool = True) -> Evaluation:
        """Evaluate the weights and their average. A signal saves and stops; the evaluation is then done on resume."""
        with self.clock.paused():
            self.bar.status("evaluating")
            tasks = {False: self.learner.task}
            if self.learner.ema is not None:
                tasks[True] = self.learner.ema.module
            try:
                results = {averaged: self._evaluate_one(task) for averaged, task in tasks.items()}
            except _Interrupted:
                self._save()
                self._saved()
                raise self._stopped(self.stop.received) from None
            for averaged, result in results.items():
                if write:
                    self._write("eval", {"split": "test", **result.metrics, "ema": averaged})
                self.bar.evaluation(result.metrics, averaged)
        return results[max(results)]

    def _evaluate_one(self, task: Task) -> Evaluation:
        loader = self._interruptible(self.loaders.evaluate(rank=rank(), world_size=world_size()))
        if not self.learner.mesh.is_split:
            return task.evaluate(loader, self.learner.device)
        with distributed.Together(called_module(task)) as together:
            return task.evaluate(together.batches(loader), self.learner.device)

    def _evaluate_if_missed(self) -> Evaluation | None:
        """On resume: the evaluation due at the checkpoint if it is missing; in a finished run always the last one."""
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
        """Begin to write a checkpoint unless this step has one. Weights that are not finite are never saved."""
        if self.step == self.saved:
            return
        with self.clock.paused():
            self.bar.status("saving")
            self._saved()
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
                "length": self.length.state(),
                "settings": self._settings(),
                "learner": numbers,
                "meter": self.meter.steps,
                "clock": self.clock.state(),
            }
            self.saver.start(self.step, tensors, self.learner.weights(), state)
            self.saved = self.step

    def _saved(self) -> None:
        """Wait for the checkpoint that is being written."""
        path = self.saver.wait()
        if path is not None:
            self._event("saved", checkpoint=path.name)

    def _stopped(self, signum: int) -> TrainingStopped:
        self._event("stopped", signal=signum)
        return TrainingStopped(
            f"stopped after step {self.step}{self._of_steps()} and saved; go on with --resume {self.run.path}", signum
        )

    def _check_losses(self) -> None:
        self.meter.flush()
        for number, values in enumerate(self.meter.steps, self.step - len(self.meter.steps) + 1):
            if not math.isfinite(values["loss"]):
                raise self._not_finite(f"the loss is {values['loss']} at step {number}")

    def _not_finite(self, what: str) -> NonFiniteError:
        self._event("stopped", reason=what)
        self.saver.close()
        last = checkpoint.last_checkpoint(self.run.checkpoints)
        previous = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        return NonFiniteError(f"{what}; {previous}; a lower optim.lr, more warm-up or train.clip_grad may help")

    def _event(self, what: str, **values: Any) -> None:
        self._write("event", {"what": what, **values})

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        if self.log is not None:
            epoch = self.step / self.loaders.steps_per_epoch
            self.log.write(kind, self.step, epoch, self.clock.seconds(), values)


def _classifier(task: Task) -> list[str]:
    """Names of the parameters of the classifier, as the task has them."""
    backbone = task.backbone()
    names = classifier_names(backbone)
    own = {id(parameter) for name, parameter in backbone.named_parameters() if name in names}
    return [name for name, parameter in task.named_parameters() if id(parameter) in own]


class _Interrupted(Exception):
    """A signal came during an evaluation."""
