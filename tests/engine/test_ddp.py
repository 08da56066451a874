"""Two gloo processes are one process with the same global batch; the number of ranks may change in between."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.torchrun import finished, torchrun

# No noise and no drop path: these draw other numbers on each rank.
SPARSE = {
    "model": "sparse_mlp_t4_32",
    "args": {
        "sparse_blocks": 1, "num_experts": (4, 4), "noise_std": 0.0, "drop_path_rate": 0.0, "balance_weight": 1.0
    },
}  # fmt: skip
SGD = {"opt": "momentum", "momentum": 0.5, "lr": 0.1, "weight_decay": 0.0}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one(accumulation, train_digits, checkpoint_content, metric_lines):
    spec = {**SPARSE, "optim": SGD, "train": {"steps": 3, "log_every": 1, "ema_decay": 0.5, "clip_grad": 10.0}}
    kinds = ("train", "routing", "eval")
    if accumulation == 2:  # balance and routing are those of a micro-batch, and the micro-batches are others
        spec["train"] |= {"grad_accum": 2}
        spec["args"] = {**spec["args"], "balance_weight": 0.0}
        kinds = ("eval",)
    one, code = train_digits("one", **spec)
    assert code == 0
    if accumulation == 1:  # recomputed activations sum the statistics over the ranks once more
        spec["train"] |= {"grad_checkpointing": True}
    two, code = train_digits("two", ranks=2, **spec)
    assert code == 0
    first, _ = checkpoint_content(one.checkpoints / "step_00000003")
    second, _ = checkpoint_content(two.checkpoints / "step_00000003")
    assert largest_difference(first, second) < 1e-6
    for a, b in zip(metric_lines(one, *kinds), metric_lines(two, *kinds), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float | list) else value), (a, b)
    a, b = np.load(one.path / "predictions.npz"), np.load(two.path / "predictions.npz")
    assert np.array_equal(a["index"], np.arange(599))
    assert np.array_equal(a["index"], b["index"])
    assert np.array_equal(a["target"], b["target"])
    np.testing.assert_allclose(a["logits"], b["logits"], atol=1e-4)


def test_resumed_on_another_number_of_ranks(train_digits, checkpoint_content, metric_lines):
    train = {"steps": 6, "save_every": 3, "log_every": 1, "ema_decay": 0.5}
    spec = {**SPARSE, "optim": SGD, "train": train}
    whole, _ = train_digits("whole", **spec)
    train_digits("changing", ranks=2, signal_at=4, signal=signal.SIGKILL, **spec)
    resumed, code = train_digits("changing", resume=True, **spec)
    assert code == 0
    for a, b in zip(metric_lines(whole, "train"), metric_lines(resumed, "train"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    first, _ = checkpoint_content(whole.checkpoints / "step_00000006")
    second, _ = checkpoint_content(resumed.checkpoints / "step_00000006")
    assert largest_difference(first, second) < 1e-4


def test_killed_and_resumed_on_two_ranks_to_the_bit(train_digits, checkpoint_content, metric_lines):
    spec = {"model": "sparse_mlp_t4_32", "args": {"sparse_blocks": 1}, "train": {"steps": 6, "save_every": 3}}
    whole, _ = train_digits("whole", ranks=2, **spec)
    broken, _ = train_digits("broken", ranks=2, signal_at=5, signal=signal.SIGKILL, **spec)
    broken, code = train_digits("broken", ranks=2, resume=True, **spec)
    assert code == 0
    first, _ = checkpoint_content(whole.checkpoints / "step_00000006")
    second, _ = checkpoint_content(broken.checkpoints / "step_00000006")
    assert largest_difference(first, second) == 0
    assert metric_lines(whole) == metric_lines(broken)


def test_all_ranks_stop_when_the_time_is_over(train_digits):
    errors: list[str] = []
    spec = {"train": {"minutes": 0.02, "log_every": 1}, "schedule": {"sched": "linear", "warmup_steps": 3}}
    run, code = train_digits("run", ranks=2, errors=errors, **spec)
    assert code == 0, errors
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    finished = lines[-1]
    assert (finished["what"], finished["seconds"] >= 1.2) == ("finished", True)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [finished["steps"]]
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step_{finished['steps']:08d}"]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(train_digits):
    errors: list[str] = []
    run, code = train_digits(
        "run", ranks=2, train={"steps": 9}, signal_at=2, signal=signal.SIGTERM, signal_rank=1, errors=errors
    )
    assert code == 143
    # Step 3 was under way when rank 1 got the signal; rank 0 heard of it one step later.
    expected = f"error: stopped after step 4 of 9 and saved; go on with --resume {run.path}"
    assert [error.splitlines()[-1] for error in errors] == [expected] * 2
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000004"]


def test_a_full_disk_is_an_error_on_every_rank(train_digits):
    errors: list[str] = []
    run, code = train_digits(
        "run", ranks=2, train={"steps": 6, "save_every": 2}, full_at=2, full_bytes=9000, errors=errors
    )
    assert code == 2
    for error in errors:
        assert re.match(r"error: could not save \S+4: .*; the last good checkpoint is \S+2$", error.splitlines()[-1])
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000002"]


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(train_digits):
    errors: list[str] = []
    spec = {"train": {"steps": 6, "log_every": 3}, "poison_at": 1, "signal_rank": 1}
    _, code = train_digits("run", ranks=2, errors=errors, **spec)
    assert code == 2
    assert all("error: the loss is nan at step 2; there is no checkpoint yet" in error for error in errors)


def test_batches_that_do_not_divide(train_digits):
    errors: list[str] = []
    _, code = train_digits("run", ranks=2, batch_size=399, train={"steps": 1}, errors=errors)
    assert code == 2
    assert errors[0].splitlines()[-1] == "error: a batch size of 399 is not divisible by the 2 processes"


@pytest.mark.slow  # torchrun and its two processes import torch: half a minute on one core
def test_torchrun(tmp_path):
    program = Path(__file__).with_name("train_digits.py")
    spec = f"SPEC = {{'run': {str(tmp_path / 'run')!r}, 'model': 'mixer_t4_32', 'train': {{'steps': 4}}}}\n"
    start = tmp_path / "start.py"
    start.write_text(f"import runpy\n{spec}runpy.run_path({str(program)!r}, {{'SPEC': SPEC}}, '__main__')\n")
    _, errors = finished(torchrun(start, ranks=2))
    assert (tmp_path / "run/checkpoints/step_00000004/model.safetensors").exists()
    assert errors.count("step 4/4  test") == 1, "only rank 0 shows progress"
    assert torch.isfinite(torch.from_numpy(np.load(tmp_path / "run/predictions.npz")["logits"])).all()
