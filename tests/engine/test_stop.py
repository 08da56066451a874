from __future__ import annotations

import json
import os
import signal
import threading

import pytest

from sparse_mlp.engine import Loaders, TrainingStopped, last_checkpoint
from sparse_mlp.engine.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.agreed() == 0
        os.kill(os.getpid(), number)
        assert stop.agreed() == number
        os.kill(os.getpid(), signal.SIGTERM)  # again: already stopping
        assert stop.agreed() == number
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_nothing_is_caught():
    result = []

    def body():
        with StopRequest() as stop:
            result.append(stop.agreed())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert result == [0]


def test_a_forked_worker_does_not_raise():
    with StopRequest():
        child = os.fork()
        if child == 0:  # stands for a data worker
            code = 1
            try:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_left_to_the_training_process(number, train_digits):
    """As a terminal and a cluster's scheduler send it: the workers have to outlive the step that is under way."""
    errors: list[str] = []
    run, code = train_digits(
        "run", train={"steps": 6}, workers=2, signal_at=2, signal=number, signal_group=True, errors=errors
    )
    assert code == 128 + number, errors
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000003"]
    assert "Traceback" not in errors[0]


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_made_up(make_trainer, line_loaders, metric_lines):
    def interrupted(rank, world_size):
        yield from line_loaders.evaluate(rank=rank, world_size=world_size)[:1]
        os.kill(os.getpid(), signal.SIGTERM)
        yield from line_loaders.evaluate(rank=rank, world_size=world_size)[1:]

    loaders = Loaders(train=line_loaders.train, evaluate=interrupted, batch_size=8, steps_per_epoch=5)
    trainer = make_trainer(loaders=loaders, steps=10, save_every=0)
    with pytest.raises(TrainingStopped, match=r"^stopped after step 5 of 10 and saved; go on with --resume ") as caught:
        trainer.fit(show=False)
    assert caught.value.exit_code == 143
    assert last_checkpoint(trainer.run.checkpoints).name == "step_00000005"
    assert metric_lines(trainer.run, "eval") == []
    assert metric_lines(trainer.run, "event")[-1] == {
        "kind": "event",
        "step": 5,
        "epoch": 1.0,
        "what": "stopped",
        "signal": 15,
    }
    resumed = make_trainer(steps=10, save_every=0)
    resumed.fit(resume=True, show=False)
    whole = make_trainer("whole", steps=10, save_every=0)
    whole.fit(show=False)
    assert metric_lines(resumed.run) == metric_lines(whole.run)
    times = [json.loads(line)["time"] for line in resumed.run.metrics_path.read_text().splitlines()]
    assert times == sorted(times)


def test_a_signal_in_the_last_step_still_saves(make_trainer, new_line):
    class Last(type(new_line())):
        def before_step(self, step, steps):
            if step == steps - 1:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(task=Last(), steps=3)
    with pytest.raises(TrainingStopped) as caught:
        trainer.fit(show=False)
    assert caught.value.exit_code == 130
    assert make_trainer(steps=3).fit(resume=True, show=False).metrics["loss"] > 0
