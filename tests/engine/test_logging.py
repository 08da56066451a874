from __future__ import annotations

import errno
import json
import math
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_mlp.engine import RunFolder
from sparse_mlp.engine.logging import Meter, MetricsLog


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def open_log(run, step, warn=pytest.fail):
    return MetricsLog(run, step, warn)


def write(log, step, kind="train", **values):
    log.write(kind, step, step / 2, float(step), values or {"loss": float(step)})


def steps(run):
    return [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()]


def test_lines_behind_the_checkpoint_are_cut(run):
    with open_log(run, 0) as log:
        for step in (2, 4, 6):
            write(log, step)
            write(log, step, "eval")
    whole = run.metrics_path.read_text()
    with open_log(run, 4) as log:
        assert steps(run) == [2, 2, 4, 4]
        assert log.has("eval", 4)
        assert not log.has("eval", 6)
        write(log, 6)
        write(log, 6, "eval")
    assert run.metrics_path.read_text() == whole


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "step": 2}', "\x00\x00", "{"])
def test_a_line_that_was_being_written_is_cut(torn, run):
    with open_log(run, 0) as log:
        write(log, 1)
    with run.metrics_path.open("a") as file:
        file.write(torn)
    with open_log(run, 2):
        assert steps(run) == [1]
    assert run.metrics_path.read_text().endswith("}\n")


def test_a_foreign_file_is_not_touched(run):
    run.metrics_path.write_text('{"kind": "train", "step": 1}\nhello\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is not a line of metrics: 'hello'"):
        open_log(run, 0)
    assert "hello" in run.metrics_path.read_text()


def test_not_a_number_is_never_written(run):
    with open_log(run, 0) as log, pytest.raises(ValueError, match="Out of range float"):
        write(log, 1, loss=math.nan)


def test_events_behind_the_checkpoint_are_purged(run):
    with open_log(run, 0) as log:
        for step in (1, 2, 3, 4):
            write(log, step)
        write(log, 4, "eval", loss=0.5, images=3, ema=True, split="test")
        write(log, 4, "routing", layer="b.1", load=[0.5, 0.5, 0.0], importance=[1.0], dropped=0.25, entropy=0.7)
    # TensorBoard reads the files by name: second, host, process, counter. Within a second 10 comes before 9.
    (first,) = run.tensorboard.iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001.host.1.0"))
    with open_log(run, 2) as log:
        write(log, 3, loss=30.0)
        write(log, 4, "eval", loss=0.6, images=3, ema=True, split="test")
        write(log, 4, "routing", layer="b.1", load=[0.5, 0.5, 0.0], importance=[1.0], dropped=0.25, entropy=0.7)
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [event.value for event in events.Scalars("eval_ema/loss")] == pytest.approx([0.6])
    values = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if "b.1" in tag}
    assert values == pytest.approx(
        {
            "routing_load_entropy/b.1": math.log(2) / math.log(3),
            "routing_max_load/b.1": 0.5,
            "routing_dropped/b.1": 0.25,
            "routing_entropy/b.1": 0.7,
        }
    )


def test_meter_averages_what_is_there():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(math.inf)})
    meter.add({"loss": torch.tensor(2.0), "grad_norm": torch.tensor(3.0)})
    meter.flush()
    meter.add({"loss": torch.tensor(6.0)})
    meter.flush()
    assert meter.steps[0] == {"loss": 1.0}
    assert meter.take() == {"loss": 3.0, "grad_norm": 3.0}
    assert meter.take() == {}


def fail_on_write(monkeypatch, method):
    """TensorBoard's file as on a full disk, whichever of its methods meets it."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gfile.GFile, method, full)


@pytest.mark.parametrize("method", ["write", "flush"])
def test_tensorboard_on_a_full_disk_is_one_line_and_the_metrics_go_on(method, run, monkeypatch, capfd):
    fail_on_write(monkeypatch, method)
    lines: list[str] = []
    with open_log(run, 0, lines.append) as log:
        for step in range(1, 30):
            write(log, step)
            log.sync()
    assert lines == ["no more TensorBoard events: could not write them: No space left on device"]
    assert steps(run) == list(range(1, 30))
    assert "Traceback" not in capfd.readouterr().err


def test_tensorboard_folder_that_cannot_be_created(run):
    run.tensorboard.write_text("a file")
    lines: list[str] = []
    with open_log(run, 0, lines.append) as log:
        write(log, 1)
    assert lines == ["no more TensorBoard events: could not write them: File exists"]
    assert steps(run) == [1]
