from __future__ import annotations

import io
import sys
import warnings

import pytest
from rich.console import Console

from sparse_mlp.engine import progress
from sparse_mlp.engine.progress import ProgressBar


def show(monkeypatch, *, terminal=False, jupyter=False, names=("loss", "accuracy"), steps=200):
    """What 200 steps print; `steps` None is a run by time."""
    out = io.StringIO()

    def console(**options):
        return Console(
            file=out, force_terminal=terminal, force_jupyter=jupyter, width=80, **{**options, "stderr": False}
        )

    monkeypatch.setattr(progress, "Console", console)
    with ProgressBar(steps_per_epoch=50, items="images", show=True) as bar:
        for step in range(1, 201):
            bar.advance(step, steps if step < 200 else 200, step / 200)
            if step % 10 == 0:
                values = dict(zip(names, (0.1234567, 0.5), strict=True)) | {"items_per_s": 1234.5, "lr": 1e-3}
                bar.train(values, 0.5 * (200 - step))
        if not terminal:
            bar.status("evaluating")
        bar.evaluation({"top1": 0.98765, "images": 50000}, False)
    return out.getvalue()


def test_lines_at_intervals_without_a_terminal(monkeypatch):
    assert show(monkeypatch).splitlines() == [
        "step 10/200  epoch 0.20  loss 0.123  accuracy 0.500  1,234 images/s  0:01:35 left",
        "step 200/200  epoch 4.00  loss 0.123  accuracy 0.500  1,234 images/s  0:00:00 left",
        "step 200/200  test  top1 0.9877  50,000 images",
    ]


def test_a_run_by_time_shows_its_number_of_steps_at_the_end(monkeypatch):
    first, *_, last = show(monkeypatch, steps=None).splitlines()
    assert first.startswith("step 10  epoch 0.20 ")
    assert last.startswith("step 200/200  test ")


def test_the_bar_fits_a_terminal(monkeypatch):
    text = show(monkeypatch, terminal=True)
    assert "200/200" in text
    assert "loss 0.123  accuracy 0.500  1,234 images/s" in text
    assert "0:00:00" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_square_brackets_are_shown_as_they_are(terminal, monkeypatch):
    assert "[/red] 0.123  [b]cat 0.500" in show(monkeypatch, terminal=terminal, names=("[/red]", "[b]cat"))


def test_a_notebook_without_ipywidgets_has_lines(monkeypatch):
    shown = []
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: shown.append(text))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # rich's advice to install it
        show(monkeypatch, jupyter=True)
    assert len(shown) == 3
    assert shown[-1].strip() == "step 200/200  test  top1 0.9877  50,000 images"


def test_silence(capfd):
    with ProgressBar(steps_per_epoch=1, items="images", show=False) as bar:
        bar.print("nothing")
    assert capfd.readouterr() == ("", "")
