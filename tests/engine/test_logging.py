from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_mlp.engine import RunFolder
from sparse_mlp.engine import logging as engine_logging
from sparse_mlp.engine.logging import Meter, MetricsLog, ProgressBar


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def write(log, step, kind="train", **values):
    log.write(kind, step, step / 2, float(step), values or {"loss": float(step)})


def steps(run):
    return [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()]


def test_lines_behind_the_checkpoint_are_cut(run):
    with MetricsLog(run, 0) as log:
        for step in (2, 4, 6):
            write(log, step)
            write(log, step, "eval")
    whole = run.metrics_path.read_text()
    with MetricsLog(run, 4) as log:
        assert steps(run) == [2, 2, 4, 4]
        assert log.has("eval", 4)
        assert not log.has("eval", 6)
        write(log, 6)
        write(log, 6, "eval")
    assert run.metrics_path.read_text() == whole


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "step": 2}', "\x00\x00", "{"])
def test_a_line_that_was_being_written_is_cut(torn, run):
    with MetricsLog(run, 0) as log:
        write(log, 1)
    with run.metrics_path.open("a") as file:
        file.write(torn)
    with MetricsLog(run, 2):
        assert steps(run) == [1]
    assert run.metrics_path.read_text().endswith("}\n")


def test_a_foreign_file_is_not_touched(run):
    run.metrics_path.write_text('{"kind": "train", "step": 1}\nhello\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is not a line of metrics: 'hello'"):
        MetricsLog(run, 0)
    assert "hello" in run.metrics_path.read_text()


def test_not_a_number_is_never_written(run):
    with MetricsLog(run, 0) as log, pytest.raises(ValueError, match="Out of range float"):
        write(log, 1, loss=math.nan)


def test_events_behind_the_checkpoint_are_purged(run):
    with MetricsLog(run, 0) as log:
        for step in (1, 2, 3, 4):
            write(log, step)
        write(log, 4, "eval", loss=0.5, images=3, ema=True, split="test")
        write(log, 4, "routing", layer="b.1", load=[0.5, 0.5, 0.0], importance=[1.0], dropped=0.25, entropy=0.7)
    # TensorBoard reads the files by name: second, host, process, counter. Within a second 10 comes before 9.
    (first,) = run.tensorboard.iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001.host.1.0"))
    with MetricsLog(run, 2) as log:
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


def show(terminal, monkeypatch):
    out = io.StringIO()

    def console(**options):
        return Console(file=out, force_terminal=terminal, width=80, **{**options, "stderr": False})

    monkeypatch.setattr(engine_logging, "Console", console)
    with ProgressBar(0, 200, 50, show=True) as bar:
        for step in range(1, 201):
            bar.advance(step)
            if step % 10 == 0:
                values = {"loss": 0.1234567, "accuracy": 0.5, "images_per_s": 1234.5, "lr": 1e-3}
                bar.train(step, values, 0.5)
        bar.note("evaluating")
        bar.evaluation(200, {"top1": 0.98765, "images": 50000}, False)
    return out.getvalue()


def test_plain_lines_come_now_and_then(monkeypatch):
    assert show(False, monkeypatch).splitlines() == [
        "step 10/200  epoch 0.20  loss 0.123  accuracy 0.500  1,234 images/s  0:01:35 left",
        "step 200/200  epoch 4.00  loss 0.123  accuracy 0.500  1,234 images/s  0:00:00 left",
        "step 200/200  test  top1 0.9877  50,000 images",
    ]


def test_the_bar_fits_a_terminal(monkeypatch):
    monkeypatch.setattr(ProgressBar, "note", lambda *_: None)
    text = show(True, monkeypatch)
    assert "200/200" in text
    assert "loss 0.123  accuracy 0.500  1,234 images/s" in text
    assert "0:00:00" in text


def test_silence(capfd):
    with ProgressBar(0, 1, 1, show=False) as bar:
        bar.say("nothing")
    assert capfd.readouterr() == ("", "")
