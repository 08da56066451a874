"""Any mesh of gloo processes trains as one process does with the same global batch."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file

from sparse_mlp.distributed import MeshConfig, create_mesh
from sparse_mlp.errors import UserError

# Everything that could differ: noise, drop path, accumulation, clipping, an average, experts of both kinds of mixing.
SPARSE = {
    "model": "sparse_mlp_t4_32",
    "args": {"sparse_blocks": 1, "num_experts": (4, 4), "top_k": (2, 1), "balance_weight": 0.1},
    "optim": {"lr": 3e-3},
    "batch_size": 200,
    "train": {"steps": 20, "log_every": 1, "ema_decay": 0.5, "clip_grad": 0.5, "grad_accum": 2, "save_every": 5},
}
CAPACITY = {**SPARSE, "args": {**SPARSE["args"], "capacity_ratio": 1.0, "prioritized": True}}
SGD = {**SPARSE, "optim": {"opt": "sgd", "lr": 0.03}}
slow = pytest.mark.slow
MESHES = [
    pytest.param(2, {}, SPARSE, id="DDP", marks=slow),
    pytest.param(2, {"expert": 2, "shard": True}, SPARSE, id="experts and FSDP"),
    pytest.param(2, {"shard": True}, SPARSE, id="FSDP", marks=slow),
    pytest.param(
        2, {"expert": 2, "shard": True}, {**SPARSE, "optim": {"opt": "sgd", "lr": 0.03}}, id="SGD", marks=slow
    ),
    pytest.param(2, {"expert": 2}, CAPACITY, id="experts with a capacity", marks=slow),
    pytest.param(4, {}, SPARSE, id="four, DDP", marks=slow),
    pytest.param(4, {"shard": True}, CAPACITY, id="four, FSDP with a capacity", marks=slow),
    pytest.param(4, {"expert": 4}, SPARSE, id="four, an expert each", marks=slow),
    pytest.param(4, {"expert": 2}, CAPACITY, id="two by two with a capacity", marks=slow),
    pytest.param(4, {"data": 2, "expert": 2, "shard": True}, SPARSE, id="two by two and FSDP", marks=slow),
]


def assert_same_training(one, other, metric_lines, rel=1e-5):
    """Loss, norm of the gradients and balance of every step."""
    for a, b in zip(metric_lines(one, "train"), metric_lines(other, "train"), strict=True):
        for name in ("loss", "grad_norm", "balance"):
            assert b[name] == pytest.approx(a[name], rel=rel, abs=1e-8), (a, b)
    for a, b in zip(metric_lines(one, "eval"), metric_lines(other, "eval"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)  # an item may be routed otherwise


@pytest.mark.parametrize(("ranks", "mesh", "spec"), MESHES)
def test_a_mesh_is_one_process(ranks, mesh, spec, train_digits, metric_lines):
    one, code = train_digits("one", **spec)
    assert code == 0
    errors: list[str] = []
    other, code = train_digits("other", ranks=ranks, errors=errors, mesh=mesh, **spec)
    assert code == 0, errors[0][-3000:]
    assert_same_training(one, other, metric_lines)
    whole, part = (load_file(run.weights()) for run in (one, other))
    assert whole.keys() == part.keys()
    distance = sum((part[name] - weight).square().sum() for name, weight in whole.items()).sqrt()
    assert distance < 1e-3 * sum(weight.square().sum() for weight in whole.values()).sqrt()


@slow
def test_the_balance_loss_of_each_rank(train_digits, metric_lines):
    """With mesh.balance rank it is another loss, and the same one whether experts are split or not."""
    spec = {**SPARSE, "train": {**SPARSE["train"], "steps": 5}}
    runs = {}
    for name, mesh in (("copies", {}), ("split", {"expert": 2}), ("global", None)):
        balance = {} if mesh is None else {"balance": "rank", **mesh}
        runs[name], code = train_digits(name, ranks=2, mesh=balance, **spec)
        assert code == 0
    assert_same_training(runs["copies"], runs["split"], metric_lines)
    one, other = (metric_lines(runs[name], "train")[-1]["balance"] for name in ("copies", "global"))
    assert one != pytest.approx(other, rel=1e-4)


PATHS = [
    pytest.param([(2, {"expert": 2, "shard": True}), (1, {})], id="2 to 1"),
    pytest.param(
        [(4, {"expert": 2, "shard": True}), (1, {}), (2, {"expert": 2}), (4, {"shard": True})],
        id="4, 1, 2, 4",
        marks=slow,
    ),
    pytest.param([(1, {}), (2, {"shard": True}), (4, {"expert": 4})], id="1, 2, 4", marks=slow),
]


@pytest.mark.parametrize("path", PATHS)
def test_killed_and_resumed_on_other_meshes(path, train_digits, metric_lines):
    """Weights, optimiser, average and position in the data go from one mesh to the other."""
    whole, code = train_digits("whole", **SPARSE)
    assert code == 0
    for number, (ranks, mesh) in enumerate(path):
        last = number == len(path) - 1
        kill = {} if last else {"signal_at": 5 * (number + 1) + 2, "signal": signal.SIGKILL}
        errors: list[str] = []
        spec = {**SPARSE, **kill, "mesh": mesh, "resume": number > 0}
        run, code = train_digits("run", ranks=ranks, errors=errors, **spec)
        assert (code == 0) == last, errors[0][-3000:]
    assert_same_training(whole, run, metric_lines)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"expert": 3}, "mesh.expert 3 does not fit 2 processes: start torchrun with another number"),
        ({"data": 4, "expert": 2}, "mesh.expert 2 x mesh.data 4 does not fit 2 processes"),
    ],
)
def test_meshes_that_do_not_fit(mesh, message, train_digits):
    errors: list[str] = []
    _, code = train_digits("run", ranks=2, train={"steps": 1}, mesh=mesh, errors=errors)
    assert code == 2
    assert message in errors[0].splitlines()[-1]


def test_values_that_no_mesh_has():
    with pytest.raises(UserError, match=r"unknown mesh.balance 'batch'; allowed are global, rank"):
        MeshConfig(balance="batch")
    with pytest.raises(UserError, match=r"mesh.expert 0 is below 1"):
        MeshConfig(expert=0)
    with pytest.raises(UserError, match=r"mesh.expert 2 does not fit 1 process: start torchrun"):
        create_mesh(MeshConfig(expert=2), torch.device("cpu"))
    with pytest.raises(UserError, match=r"mesh.shard would be ignored: there is one process"):
        create_mesh(MeshConfig(shard=True), torch.device("cpu"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": "mixer_t4_32"}, "mesh.expert 2 would be ignored: the model has no experts"),
        (
            {"args": {"sparse_blocks": 1, "num_experts": (4, 3)}},
            "the 3 experts of model.blocks.1.mlp_channels do not divide over mesh.expert 2",
        ),
        ({"train": {"steps": 1, "amp": "fp16"}}, "train.amp fp16 scales each process's loss apart"),
        (
            {"optim": {"opt": "lamb"}},
            "optim.opt lamb does not take weights that are split over processes; allowed are",
        ),
    ],
)
def test_models_that_do_not_fit_a_mesh(spec, message, train_digits):
    errors: list[str] = []
    spec = {"model": "sparse_mlp_t4_32", "train": {"steps": 1}, **spec}
    _, code = train_digits("run", ranks=2, mesh={"expert": 2}, errors=errors, **spec)
    assert code == 2
    assert message in errors[0].splitlines()[-1], errors[0]
