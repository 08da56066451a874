"""How long a run is: warm-up of short runs, runs by time, and runs that are made longer."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch

from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig, check_longer, last_checkpoint
from sparse_mlp.engine.clock import Clock
from sparse_mlp.engine.length import create_length
from sparse_mlp.engine.optim import create_schedule

CONSTANT = ScheduleConfig(sched="constant", warmup_steps=2)


def rates(trainer, metric_lines):
    return [line["lr"] for line in metric_lines(trainer.run, "train")]


# Warm-up of short runs.


def test_a_warmup_of_more_than_half_the_run_is_shortened_to_a_tenth(make_trainer, metric_lines, capfd):
    trainer = make_trainer(steps=20, log_every=1, schedule=ScheduleConfig(sched="constant", warmup_epochs=3))
    trainer.fit()
    note = "a warm-up of 15 updates is more than half of the run's 20: shortened to 2, a tenth of the run"
    assert capfd.readouterr().err.count(note) == 1
    assert rates(trainer, metric_lines) == pytest.approx([0.0001, 0.05005] + [0.1] * 18)


def test_a_warmup_of_half_the_run_stays(make_trainer, metric_lines, capfd):
    trainer = make_trainer(steps=8, log_every=1, schedule=ScheduleConfig(warmup_steps=4, warmup_lr=0.0))
    trainer.fit()
    assert "warm-up" not in capfd.readouterr().err
    assert rates(trainer, metric_lines)[:5] == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])


def test_the_shortest_run(make_trainer):
    trainer = make_trainer(steps=1, schedule=ScheduleConfig(warmup_epochs=40))
    trainer.fit(show=False)
    assert trainer.steps == 1


# Runs by time.


class FakeClock(Clock):
    """Each update takes `pace` seconds, the first one `first` more; evaluation and saving take none."""

    pace, first = 0.5, 0.0

    def __init__(self, device):
        super().__init__(device)
        self.trainer = None

    def seconds(self):
        step = self.trainer.step
        return step * self.pace + (self.first if step else 0.0)

    def load(self, state):
        pass


@pytest.fixture
def make_timed(make_trainer):
    """A trainer whose updates take half a second each."""

    def make(*args, pace=0.5, first=0.0, **options):
        trainer = make_trainer(*args, **options)
        trainer.clock = FakeClock(trainer.learner.device)
        trainer.clock.trainer, trainer.clock.pace, trainer.clock.first = trainer, pace, first
        return trainer

    return make


def test_the_run_stops_when_the_time_is_over(make_timed, metric_lines, capfd):
    trainer = make_timed(minutes=0.1, log_every=5, save_every=0, eval_every=0)  # 6 s
    trainer.fit()
    assert trainer.steps == trainer.step == 12
    assert [line["step"] for line in metric_lines(trainer.run, "train")] == [5, 10, 12]
    assert [line["step"] for line in metric_lines(trainer.run, "eval")] == [12]
    finished = metric_lines(trainer.run, "event")[-1]
    assert (finished["what"], finished["steps"], finished["seconds"]) == ("finished", 12, 6.0)
    assert last_checkpoint(trainer.run.checkpoints).name == "step_00000012"
    assert "0.1 minutes of training: 12 steps" in capfd.readouterr().err


def test_the_schedule_runs_over_the_share_of_the_time(make_timed, metric_lines):
    for name, pace in (("fast", 0.25), ("slow", 1.0)):
        schedule = ScheduleConfig(sched="linear", min_lr=0.01)
        trainer = make_timed(name, pace=pace, minutes=0.1, log_every=1, schedule=schedule)
        trainer.fit(show=False)
        steps = round(6 / pace)
        assert rates(trainer, metric_lines) == pytest.approx([0.1 - 0.09 * step / steps for step in range(steps)])


def test_the_warmup_takes_its_updates_then_the_rest_of_the_time_decays(make_timed, metric_lines):
    schedule = ScheduleConfig(sched="linear", warmup_steps=2, warmup_lr=0.0)
    trainer = make_timed(minutes=0.2, log_every=1, schedule=schedule)  # 12 s, 24 updates
    trainer.fit(show=False)
    decay = [0.1 * (1 - step / 22) for step in range(22)]
    assert rates(trainer, metric_lines) == pytest.approx([0.0, 0.05, *decay])


def test_the_warmup_takes_at_most_a_tenth_of_the_time(make_timed, metric_lines, capfd):
    """A slow first update, as torch.compile makes it, is no reason to end the warm-up early."""
    schedule = ScheduleConfig(sched="constant", warmup_steps=1000, warmup_lr=0.0)
    trainer = make_timed(minutes=0.5, first=9.0, log_every=1, schedule=schedule)  # 30 s: 2 updates take 10 s
    trainer.fit()
    got = rates(trainer, metric_lines)
    assert got[:3] == pytest.approx([0.0, 0.0001, 0.0002])
    assert got[3:6] == pytest.approx([0.025, 0.05, 0.075])
    assert got[6:] == pytest.approx([0.1] * (len(got) - 6))
    note = "the warm-up of 1000 updates ended after 6: it takes at most a tenth of the training time"
    assert capfd.readouterr().err.count(note) == 1


def test_an_interrupted_run_goes_on_for_the_remaining_time(make_timed, new_line, metric_lines, capfd):
    schedule = ScheduleConfig(warmup_steps=1000)
    options = {"minutes": 0.1, "log_every": 1, "save_every": 5, "schedule": schedule}
    make_timed("whole", **options).fit(show=False)
    broken = make_timed("broken", **options)
    update = broken.learner.update

    def until_seven(batch, step, *args, **kwargs):
        if step == 7:
            raise ConnectionError
        return update(batch, step, *args, **kwargs)

    broken.learner.update = until_seven
    with pytest.raises(ConnectionError):
        broken.fit(show=False)
    capfd.readouterr()
    resumed = make_timed("broken", **options)
    resumed.fit(resume=True)
    assert resumed.steps == 12
    assert metric_lines(resumed.run) == metric_lines(make_timed("whole", **options).run)
    shown = capfd.readouterr().err
    assert "resumed after step 5\n" in shown
    assert "warm-up" not in shown, "printed when it ended"
    # Finished, it is evaluated again and takes no further step.
    again = make_timed("broken", **options)
    again.fit(resume=True, show=False)
    assert again.steps == 12


def test_the_time_of_a_resumed_run_counts(make_trainer, new_line):
    """With the real clock: two runs of a part of the time make one whole run."""

    class Slow(type(new_line())):
        def before_step(self, step, steps):
            super().before_step(step, steps)
            time.sleep(0.02)

    options = {"minutes": 0.01, "eval_every": 0, "save_every": 10}  # 0.6 s
    trainer = make_trainer(task=Slow(), **options)
    update = trainer.learner.update

    def until_fifteen(batch, step, *args, **kwargs):
        if step == 15:
            raise ConnectionError
        return update(batch, step, *args, **kwargs)

    trainer.learner.update = until_fifteen
    with pytest.raises(ConnectionError):
        trainer.fit(show=False)
    resumed = make_trainer(task=Slow(), **options)
    resumed.fit(resume=True, show=False)
    assert 15 < resumed.steps <= 30
    assert 0.6 <= resumed.seconds < 1.5
    state = json.loads((last_checkpoint(resumed.run.checkpoints) / "state.json").read_text())["state"]
    assert state["steps"] == resumed.steps


def test_evaluation_does_not_count(make_trainer, new_line):
    class Slow(type(new_line())):
        def evaluate(self, loader, device):
            time.sleep(0.2)
            return super().evaluate(loader, device)

        def before_step(self, step, steps):
            super().before_step(step, steps)
            time.sleep(0.01)

    trainer = make_trainer(task=Slow(), minutes=0.005, eval_every=3, save_every=0)  # 0.3 s
    trainer.fit(show=False)
    assert trainer.steps > 6


def test_a_task_sees_the_share_of_the_time(make_timed, new_line):
    task = new_line()
    make_timed(task=task, minutes=0.1).fit(show=False)
    assert task.steps == [(0, 1), *((step, 12) for step in range(1, 12))]


def test_a_run_has_a_step_however_short_the_time(make_timed):
    trainer = make_timed(minutes=1e-6, schedule=ScheduleConfig(warmup_steps=5))
    trainer.fit(show=False)
    assert trainer.steps == 1


# Runs that are made longer.


@pytest.mark.parametrize("first", [{"steps": 4}, {"epochs": 0.8}])
def test_a_finished_run_with_a_constant_schedule_goes_on_exactly(first, make_trainer, checkpoint_content, metric_lines):
    longer = {name: 2.5 * value if name == "epochs" else 10 for name, value in first.items()}
    options = {"schedule": CONSTANT, "ema_decay": 0.9, "log_every": 2}
    make_trainer("long", **first, **options).fit(show=False)
    trainer = make_trainer("long", **longer, **options)
    evaluation = trainer.fit(resume=True, show=False)
    assert trainer.steps == 10
    whole = make_trainer("whole", **longer, **options)
    assert whole.fit(show=False).metrics == evaluation.metrics
    one, _ = checkpoint_content(whole.run.checkpoints / "step_00000010")
    other, _ = checkpoint_content(trainer.run.checkpoints / "step_00000010")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metric_lines(whole.run, "train") == metric_lines(trainer.run, "train")


def test_a_shortened_warmup_stays_so_in_a_longer_run(make_trainer, metric_lines):
    schedule = ScheduleConfig(sched="constant", warmup_steps=8)
    make_trainer(steps=10, log_every=1, schedule=schedule).fit(show=False)
    trainer = make_trainer(steps=20, log_every=1, schedule=schedule)
    trainer.fit(resume=True, show=False)
    assert rates(trainer, metric_lines)[1:] == pytest.approx([0.1] * 19)


def test_a_run_by_time_goes_on_for_more_minutes(make_timed):
    make_timed(minutes=0.05, schedule=CONSTANT).fit(show=False)
    trainer = make_timed(minutes=0.1, schedule=CONSTANT)
    trainer.fit(resume=True, show=False)
    assert trainer.steps == 12


@pytest.mark.parametrize(
    ("before", "after", "sched", "message"),
    [
        (
            {"steps": 4},
            {"steps": 8},
            "cosine",
            "train.steps was 4 and cannot become 8: the cosine schedule decays over the planned length down to "
            "schedule.min_lr; only a constant schedule can go on, else start a new run from these weights",
        ),
        ({"minutes": 1}, {"minutes": 2}, "linear", "train.minutes was 1 and cannot become 2: the linear schedule"),
        ({"epochs": 2}, {"epochs": 1}, "constant", "train.epochs was 2 and cannot become 1: .* longer, not shorter"),
        (
            {"epochs": 2},
            {"steps": 50},
            "constant",
            "train.epochs was 2 and cannot become train.steps 50: give a run that is resumed a larger train.epochs",
        ),
    ],
)
def test_other_lengths_are_refused(before, after, sched, message, make_trainer):
    nothing = dict.fromkeys(("epochs", "steps", "minutes"))
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        check_longer(nothing | before, nothing | after, sched)
    assert "\n" not in str(caught.value)


def test_a_finished_run_with_a_decayed_rate_cannot_go_on(make_trainer):
    make_trainer(steps=4).fit(show=False)
    with pytest.raises(ValueError, match=re.escape("train.steps was 4 and cannot become 8: the cosine schedule")):
        make_trainer(steps=8).fit(resume=True, show=False)


def test_a_task_with_a_schedule_of_its_own_cannot_go_on(make_trainer, new_line):
    class Scheduled(type(new_line())):
        schedules_over_run = True

    make_trainer(task=Scheduled(), steps=4, schedule=CONSTANT).fit(show=False)
    with pytest.raises(ValueError, match="cannot be made longer: Scheduled has a schedule of its own over the planned"):
        make_trainer(task=Scheduled(), steps=8, schedule=CONSTANT).fit(resume=True, show=False)
    make_trainer(task=Scheduled(), steps=4, schedule=CONSTANT).fit(resume=True, show=False)


@pytest.mark.parametrize("sched", ["cosine", "linear", "constant"])
def test_the_rate_at_the_end_of_the_time(sched):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    config = ScheduleConfig(sched=sched, min_lr=0.0 if sched == "constant" else 0.1)
    length = create_length(TrainConfig(minutes=1), config, 10)
    schedule = create_schedule(optimizer, config, length.schedule_length, length.schedule_warmup)
    found = []
    for step, seconds in enumerate((0.0, 59.999, 60.0, 75.0)):
        schedule.step_update(length.position(step, seconds))
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([1.0] * 4 if sched == "constant" else [1.0, 0.1, 0.1, 0.1], abs=1e-4)


def test_a_longer_run_changes_nothing_else(make_trainer):
    make_trainer(steps=3, schedule=CONSTANT).fit(show=False)
    with pytest.raises(ValueError, match=r"optim.lr was 0.1 and is now 0.2"):
        make_trainer(steps=6, schedule=CONSTANT, optim=OptimConfig(lr=0.2)).fit(resume=True, show=False)
