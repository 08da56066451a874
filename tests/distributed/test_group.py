from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_mlp import distributed
from sparse_mlp.distributed import group
from sparse_mlp.errors import UserError

PROGRAM = Path(__file__).with_name("collectives.py")


def test_collectives_on_two_ranks(launch):
    errors: list[str] = []
    assert launch(PROGRAM, {}, ranks=2, errors=errors) == [0, 0], errors


def test_a_single_process():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    with distributed.join("cpu") as device:
        assert device == torch.device("cpu")
    assert distributed.broadcast({"a": 1}) == {"a": 1}
    assert distributed.gather(3) == [3]
    assert distributed.on_main(lambda: 7) == 7
    assert torch.equal(distributed.mean(torch.ones(2)), torch.ones(2))
    module = torch.nn.Linear(1, 1)
    mesh = distributed.create_mesh(distributed.MeshConfig(), torch.device("cpu"))
    assert distributed.parallelize(module, mesh).module is module
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    stop = distributed.AsyncMax()
    assert [stop.reduce(0), stop.reduce(2), stop.wait()] == [0, 2, 0]


def test_incomplete_environment(monkeypatch):
    for name in group._TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "^some of torchrun's variables are set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with"
    with pytest.raises(ValueError, match=message), distributed.join("cpu"):
        pass


def test_one_device_for_many_processes(monkeypatch):
    for name in group._TORCHRUN_VARIABLES:
        monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="device 'cuda:1' is one GPU for 2 processes"), distributed.join("cuda:1"):
        pass


def test_devices(monkeypatch):
    assert distributed.resolve_device("cpu") == torch.device("cpu")
    assert distributed.resolve_device("cpu:0") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert distributed.resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda' does not exist: torch finds 0 GPUs"):
        distributed.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.resolve_device("auto", index=1) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device 'cuda:5' does not exist: torch finds 2 GPUs"):
        distributed.resolve_device("cuda:5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "unknown device 'gpu'; allowed are auto, cpu, cuda"),
        ("", "unknown device ''; allowed are auto, cpu, cuda"),
        ("cuda:", "unknown device 'cuda:'; allowed are"),
        ("mps", "device 'mps' is not supported for training; allowed are auto, cpu, cuda"),
        ("meta", "device 'meta' is not supported for training"),
        ("xla:0", "device 'xla:0' is not supported for training"),
        ("cpu:7", "device 'cpu:7' does not exist: torch has one CPU device, cpu"),
    ],
)
def test_devices_that_cannot_train(name, message):
    with pytest.raises(UserError, match=f"^{message}") as caught:
        distributed.resolve_device(name)
    assert "\n" not in str(caught.value)
