from __future__ import annotations

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparse_mlp.engine import (
    Evaluation,
    Loaders,
    NonFiniteError,
    OptimConfig,
    ScheduleConfig,
    last_checkpoint,
    list_checkpoints,
)
from sparse_mlp.moe import MoeMlp


def weight(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.learner.task.parameters()])


def test_learns_and_reports(make_trainer, metric_lines, capfd):
    trainer = make_trainer(epochs=20, log_every=10)
    evaluation = trainer.fit()
    assert evaluation.metrics["loss"] < 0.01
    assert trainer.learner.task.steps == [(step, 100) for step in range(100)]
    train = metric_lines(trainer.run, "train")
    assert [line["step"] for line in train] == list(range(10, 101, 10))
    assert train[-1]["epoch"] == 20
    assert train[0].keys() == {"kind", "step", "epoch", "loss", "error", "lr", "grad_norm"}
    assert [line["step"] for line in metric_lines(trainer.run, "eval")] == list(range(5, 101, 5))
    assert metric_lines(trainer.run, "eval")[-1]["split"] == "test"
    assert metric_lines(trainer.run, "event")[-1]["what"] == "finished"
    raw = [json.loads(line) for line in trainer.run.metrics_path.read_text().splitlines()]
    assert all(line["items_per_s"] > 0 and 0 <= line["data_time"] <= 1 for line in raw if line["kind"] == "train")
    times = [line["time"] for line in raw]
    assert times == sorted(times)
    captured = capfd.readouterr()
    assert captured.out == ""
    last = r"step 100/100  epoch 20.00  loss 0\.\d+  error 0\.\d+  [\d,]+ items/s  0:00:00 left"
    assert re.search(last, captured.err)
    assert "step 100/100  test  loss" in captured.err


def test_train_line_is_the_mean_over_its_steps(make_trainer, metric_lines):
    trainer = make_trainer(steps=5, log_every=4, clip_grad=1e9)
    losses, norms = [], []
    update = trainer.learner.update

    def watched(*args, **kwargs):
        values = update(*args, **kwargs)
        losses.append(values["loss"].item())
        norms.append(values["grad_norm"].item())
        return values

    trainer.learner.update = watched
    trainer.fit(show=False)
    first, last = metric_lines(trainer.run, "train")
    assert first["loss"] == pytest.approx(sum(losses[:4]) / 4, rel=1e-6)
    assert first["grad_norm"] == pytest.approx(sum(norms[:4]) / 4, rel=1e-6)
    assert (last["step"], last["loss"]) == (5, pytest.approx(losses[4], rel=1e-6))


def test_accumulation_is_one_large_batch(make_trainer):
    whole = make_trainer("whole", steps=3)
    whole.fit(show=False)
    parts = make_trainer("parts", steps=3, grad_accum=3)  # 8 points: micro-batches of 2, 3 and 3
    parts.fit(show=False)
    torch.testing.assert_close(weight(parts), weight(whole), rtol=1e-5, atol=1e-6)


def test_clipping(make_trainer):
    optim = OptimConfig(opt="momentum", lr=1.0, momentum=0.5, weight_decay=0.0)
    trainer = make_trainer(steps=1, clip_grad=0.01, optim=optim)
    trainer.fit(show=False)
    assert weight(trainer).norm().item() == pytest.approx(0.01, rel=1e-4)  # from zero, a step as long as the gradient


def test_moving_average(make_trainer, metric_lines):
    trainer = make_trainer(steps=4, ema_decay=0.5)
    history = []
    update = trainer.learner.update

    def watched(*args, **kwargs):
        values = update(*args, **kwargs)
        history.append(weight(trainer).clone())
        return values

    trainer.learner.update = watched
    evaluation = trainer.fit(show=False)
    average = history[0]
    for value in history[1:]:
        average = 0.5 * average + 0.5 * value
    saved = load_file(trainer.run.weights())
    torch.testing.assert_close(torch.cat([saved["weight"].flatten(), saved["bias"]]), average)
    assert load_file(trainer.run.weights(ema=False))["weight"].item() == history[-1][0].item()
    plain, averaged = metric_lines(trainer.run, "eval")
    assert (plain["ema"], averaged["ema"]) == (False, True)
    assert plain["loss"] != averaged["loss"]
    assert evaluation.metrics["loss"] == averaged["loss"]


def test_checkpoints_are_made_and_dropped(make_trainer):
    trainer = make_trainer(steps=10, save_every=2, keep=3)
    trainer.fit(show=False)
    assert [path.name for path in list_checkpoints(trainer.run.checkpoints)] == [
        "step_00000006",
        "step_00000008",
        "step_00000010",
    ]
    assert not list(trainer.run.checkpoints.glob(".*"))


def test_a_finished_run_is_evaluated_again_but_not_logged_again(make_trainer, metric_lines):
    first = make_trainer(steps=3).fit(show=False)
    trainer = make_trainer(steps=3)
    before = metric_lines(trainer.run)
    assert trainer.fit(resume=True, show=False).metrics == first.metrics
    assert metric_lines(trainer.run) == before


def test_a_run_is_not_begun_twice_nor_resumed_as_another(make_trainer):
    make_trainer(steps=3).fit(show=False)
    with pytest.raises(ValueError, match="has checkpoints; resume it or train in another folder"):
        make_trainer(steps=3).fit(show=False)
    with pytest.raises(ValueError, match=r"go on as it began: optim.lr was 0.1 and is now 0.2; train.seed was 0"):
        make_trainer(steps=3, seed=1, optim=OptimConfig(lr=0.2)).fit(resume=True, show=False)
    make_trainer(steps=3, log_every=1, keep=5).fit(resume=True, show=False)  # these do not change the weights


@pytest.mark.parametrize("poison", ["weight", "loss"])
def test_a_loss_that_is_not_finite_stops_the_run(poison, make_trainer, new_line, metric_lines):
    class Poisoned(type(new_line())):
        def forward(self, batch):
            factor = math.inf if poison == "loss" and self.steps[-1][0] == 6 else 1.0
            return {"loss": super().forward(batch)["loss"] * factor}

        def before_step(self, step, steps):
            super().before_step(step, steps)
            if poison == "weight" and step == 6:
                nn.init.constant_(self.line.weight, math.nan)

    trainer = make_trainer(task=Poisoned(), steps=20, save_every=5, log_every=4)
    message = r"^the loss is (nan|inf) at step 7; the last good checkpoint is .*step_00000005; "
    with pytest.raises(NonFiniteError, match=message) as caught:
        trainer.fit(show=False)
    assert "\n" not in str(caught.value)
    assert last_checkpoint(trainer.run.checkpoints).name == "step_00000005"
    assert metric_lines(trainer.run, "train")[-1]["step"] == 4
    assert metric_lines(trainer.run, "event")[-1]["reason"].startswith("the loss is")


def test_weights_that_are_not_finite_are_not_saved(make_trainer, new_line):
    class Bad(type(new_line())):
        def forward(self, batch):  # the loss stays finite, its gradient is not
            return {"loss": super().forward(batch)["loss"].detach() + (self.line.weight * math.nan).sum().nan_to_num()}

    trainer = make_trainer(task=Bad(), steps=1)
    with pytest.raises(NonFiniteError, match=r"line.weight is not finite after step 1; there is no checkpoint yet"):
        trainer.fit(show=False)
    assert list_checkpoints(trainer.run.checkpoints) == []


def test_data_that_end_early(make_trainer, line_loaders):
    short = Loaders(
        train=lambda **options: line_loaders.train(**{**options, "steps": 3}),
        evaluate=line_loaders.evaluate,
        batch_size=8,
        steps_per_epoch=5,
    )
    with pytest.raises(ValueError, match="the training data ended after step 3 of 5"):
        make_trainer(steps=5, loaders=short).fit(show=False)


def test_batches_too_small_for_their_parts(make_trainer):
    with pytest.raises(ValueError, match=r"train.grad_accum 9 exceeds the 8 items of each process"):
        make_trainer(steps=1, grad_accum=9)


def test_recomputation_needs_a_model_that_can(make_trainer):
    with pytest.raises(ValueError, match=r"train.grad_checkpointing is set, but Linear cannot do it"):
        make_trainer(steps=1, grad_checkpointing=True)


def test_a_task_with_a_momentum_encoder(make_trainer, new_line, checkpoint_content):
    """What MoCo needs: a second encoder that the task moves by itself inside a step, and that a checkpoint holds."""

    class Teacher(type(new_line())):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(1, 1).requires_grad_(False)
            self.register_buffer("queue", torch.zeros(4))
            with torch.no_grad():
                for parameter in self.teacher.parameters():
                    parameter.fill_(0.0)

        def before_step(self, step, steps):
            super().before_step(step, steps)
            self.momentum = 1 - 0.5 * (1 + math.cos(math.pi * step / steps)) / 2

        def forward(self, batch):
            with torch.no_grad():
                for target, source in zip(self.teacher.parameters(), self.line.parameters(), strict=True):
                    target.lerp_(source, 1 - self.momentum)
                self.queue = torch.cat([self.queue[1:], self.teacher.weight[0]])
            gap = (self.line(batch["x"]) - self.teacher(batch["x"])).square().mean()
            return {"loss": super().forward(batch)["loss"] + gap, "gap": gap.detach()}

    make_trainer("whole", task=Teacher(), steps=6).fit(show=False)
    stopping = make_trainer("parts", task=Teacher(), steps=6, save_every=3)
    advance = stopping.learner.update

    def until_four(batch, step, *args, **kwargs):
        if step == 4:
            raise ConnectionError
        return advance(batch, step, *args, **kwargs)

    stopping.learner.update = until_four
    with pytest.raises(ConnectionError):
        stopping.fit(show=False)
    resumed = make_trainer("parts", task=Teacher(), steps=6, save_every=3)
    resumed.fit(resume=True, show=False)
    one, _ = checkpoint_content(resumed.run.path.parent / "whole/checkpoints/step_00000006")
    other, _ = checkpoint_content(resumed.run.checkpoints / "step_00000006")
    assert one["state/task.queue"].count_nonzero() == 4
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_model_side_randomness_depends_on_the_step_alone(make_trainer, new_line):
    class Noisy(type(new_line())):
        def __init__(self):
            super().__init__()
            self.drawn = {}

        def forward(self, batch):
            if self.training:
                self.drawn.setdefault(self.steps[-1][0], []).append(torch.rand(()).item())
            return super().forward(batch)

    def drawn(name, **options):
        task = Noisy()
        torch.rand(len(name))  # another state of the generator
        make_trainer(name, task=task, **options).fit(show=False)
        return task.drawn

    first = drawn("a", steps=4, grad_accum=2)
    assert len({value for values in first.values() for value in values}) == 8
    assert drawn("bb", steps=4, grad_accum=2, eval_every=1) == first
    assert drawn("c", steps=4, grad_accum=2, seed=1) != first


@pytest.mark.parametrize("amp", [None, "fp16"])
def test_the_balance_gradient_is_scaled_like_the_loss(amp, make_trainer, new_line, metric_lines):
    """Accumulation and loss scaling change neither the task's gradient nor the balance loss's."""

    class Sparse(type(new_line())):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.line = nn.Sequential(
                nn.Linear(1, 8), MoeMlp(8, 8, 4, noise_std=0.0, balance_weight=0.5), nn.Linear(8, 1)
            )
            self.seen = None

        def before_step(self, step, steps):
            super().before_step(step, steps)
            router = self.line[1].router
            self.handle = [p.register_post_accumulate_grad_hook(self.note) for p in router.parameters()]

        def note(self, parameter):
            self.seen = parameter.grad.clone()

    gradients = {}
    for parts in (1, 2):
        # Twice each point, so that every other one has the balance statistics of the whole.
        loaders = Loaders(
            train=lambda **_: [
                {"x": torch.tensor([[1.0], [-1.0], [2.0], [0.5]]).repeat_interleave(2, 0), "y": torch.ones(8, 1)}
            ],
            evaluate=lambda **_: [{"x": torch.ones(8, 1), "y": torch.ones(8, 1)}],
            batch_size=8,
            steps_per_epoch=1,
        )
        task = Sparse()
        trainer = make_trainer(f"{parts}", task=task, loaders=loaders, steps=1, grad_accum=parts, amp=amp)
        trainer.fit(show=False)
        gradients[parts] = task.seen / (65536.0 if amp else 1.0)
        assert metric_lines(trainer.run, "train")[0]["balance"] > 0
        routing = metric_lines(trainer.run, "routing")[0]
        assert (routing["layer"], len(routing["load"]), routing["dropped"]) == ("1", 4, 0.0)
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(gradients[2], gradients[1], rtol=2e-2 if amp else 1e-5, atol=1e-4 if amp else 1e-7)


def test_schedule_is_applied_per_step(make_trainer, metric_lines):
    trainer = make_trainer(steps=6, log_every=1, schedule=ScheduleConfig(sched="linear", warmup_steps=2, warmup_lr=0.0))
    trainer.fit(show=False)
    rates = [line["lr"] for line in metric_lines(trainer.run, "train")]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.075, 0.05, 0.025])


def test_evaluation_without_predictions_is_enough():
    assert Evaluation({"loss": 1.0}).predictions == {}


@pytest.mark.slow  # the compiler takes half a minute
def test_compiled_training_is_close_to_eager(train_digits, metric_lines):
    runs = {}
    for compiled in (False, True):
        train = {"steps": 3, "log_every": 1, "compile": compiled, "ema_decay": 0.9}
        run, code = train_digits(f"{compiled}", train=train, args={"drop_path_rate": 0.0})
        assert code == 0
        runs[compiled] = [line["loss"] for line in metric_lines(run, "train")]
    assert runs[True] == pytest.approx(runs[False], rel=1e-4)
