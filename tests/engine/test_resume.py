"""Training 6 steps equals training 3, being killed, and training the other 3: to the bit."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch

SPARSE = {"model": "sparse_mlp_t4_32", "args": {"sparse_blocks": 1, "num_experts": (4, 4)}}
CASES = {
    # 1,198 training images and 400 a step: an epoch has 2 steps, so step 3 is in the middle of the second one
    "sparse, average, clipping": {**SPARSE, "train": {"steps": 6, "ema_decay": 0.9, "clip_grad": 1.0}},
    "lamb, accumulation, workers, mixing": {
        "train": {"steps": 6, "grad_accum": 3},
        "optim": {"opt": "lamb"},
        "workers": 2,
        "augment": {"mixup": 0.2, "pad": 1},
    },
    "fp16, sgd": {"train": {"steps": 6, "amp": "fp16"}, "optim": {"opt": "sgd", "momentum": 0.9}},
    "bf16, layer decay, recomputation": {
        "train": {"steps": 6, "amp": "bf16", "grad_checkpointing": True},
        "optim": {"layer_decay": 0.8},
        "schedule": {"sched": "linear", "warmup_epochs": 0.5},
    },
}


def assert_same_run(one, other, checkpoint_content, metric_lines):
    tensors, numbers = checkpoint_content(one.checkpoints / "step_00000006")
    others, other_numbers = checkpoint_content(other.checkpoints / "step_00000006")
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert numbers == other_numbers
    assert metric_lines(one) == metric_lines(other)
    a, b = np.load(one.path / "predictions.npz"), np.load(other.path / "predictions.npz")
    assert all(np.array_equal(a[name], b[name]) for name in a.files)


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_uninterrupted(case, train_digits, checkpoint_content, metric_lines):
    spec = {**CASES[case]}
    train = {**spec.pop("train"), "save_every": 3, "eval_every": 2}
    whole, code = train_digits("whole", train=train, **spec)
    assert code == 0
    # Killed before its fifth step: it has written metrics of step 4, which the checkpoint of step 3 does not know.
    broken, code = train_digits("broken", train=train, signal_at=4, signal=signal.SIGKILL, **spec)
    assert code == -signal.SIGKILL
    assert json.loads(broken.metrics_path.read_text().splitlines()[-1])["step"] == 4
    with broken.metrics_path.open("a") as file:
        file.write('{"kind": "train", "st')  # a line that was being written
    resumed, code = train_digits("broken", train=train, resume=True, **spec)
    assert code == 0
    assert_same_run(whole, resumed, checkpoint_content, metric_lines)
    weights, _ = checkpoint_content(whole.checkpoints / "step_00000006")
    earlier, _ = checkpoint_content(whole.checkpoints / "step_00000003")
    assert any(not torch.equal(weights[name], earlier[name]) for name in weights), "the comparison could not fail"


def test_killed_before_the_first_checkpoint_starts_again(train_digits, checkpoint_content, metric_lines):
    whole, _ = train_digits("whole", train={"steps": 6})
    train_digits("broken", train={"steps": 6}, signal_at=5, signal=signal.SIGKILL)
    resumed, code = train_digits("broken", train={"steps": 6}, resume=True)
    assert code == 0
    assert_same_run(whole, resumed, checkpoint_content, metric_lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, train_digits, checkpoint_content, metric_lines):
    whole, _ = train_digits("whole", train={"steps": 6})
    errors = []
    run, code = train_digits("broken", train={"steps": 6}, signal_at=2, signal=number, errors=errors)
    assert code == 128 + number
    assert errors[0].splitlines()[-1] == f"error: stopped after step 3 of 6 and saved; go on with --resume {run.path}"
    assert "Traceback" not in errors[0]
    resumed, code = train_digits("broken", train={"steps": 6}, resume=True)
    assert code == 0
    assert_same_run(whole, resumed, checkpoint_content, metric_lines)
