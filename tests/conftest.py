"""Fixtures for all folders. One thread per test process: the suite runs in as many processes as there are cores."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import runpy
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sparse_mlp.moe import MoeMlp

torch.set_num_threads(1)

Launch = Callable[..., list[int]]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs a program in processes of its own, `ranks` of them as torchrun would; returns their exit codes.

    The program finds `spec` as the global SPEC. A process that a signal killed has the negative number of the signal.
    Standard error is appended to the list `errors` if one is given, one text a rank.
    """
    # A server that has torch imported already and forks: seconds less a process.
    context = multiprocessing.get_context("forkserver")
    heavy = ["timm", "torchvision", "torch.utils.tensorboard", "sklearn.datasets", "sklearn.model_selection"]
    context.set_forkserver_preload(["torch", *heavy, "sparse_mlp.tasks", "sparse_mlp.data"])
    folder = tmp_path_factory.mktemp("launch")
    numbers = itertools.count()

    def start(program: Path, spec: dict[str, Any], environment: dict[str, str], log: Path) -> BaseProcess:
        process = context.Process(target=_run, args=(str(program), spec, environment, str(log)))
        process.start()
        return process

    def run(program: Path, spec: dict[str, Any], *, ranks: int = 1, errors: list[str] | None = None) -> list[int]:
        # Kept here, as torchrun does, and its port by the system: one that was only looked up may be taken meanwhile.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        group = {}
        if store is not None:
            group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            group["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        number = next(numbers)
        logs = [folder / f"{number}_{rank}.txt" for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(start(program, spec, own, log))
        for process in processes:
            process.join(timeout=300)
            if process.exitcode is None:
                process.kill()
                process.join()
                pytest.fail(f"{program.name} did not end: {[log.read_text() for log in logs]}")
        if errors is not None:
            errors += [log.read_text() for log in logs]
        return [process.exitcode or 0 for process in processes]

    return run


def _run(program: str, spec: dict[str, Any], environment: dict[str, str], stderr: str) -> None:
    os.environ.update(environment)
    # The data workers of a killed process notice that it is gone only as its own children.
    multiprocessing.set_start_method("fork", force=True)
    warnings.filterwarnings("error", module="sparse_mlp")
    with Path(stderr).open("w") as file:
        os.dup2(file.fileno(), 2)
    runpy.run_path(program, init_globals={"SPEC": spec}, run_name="__main__")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets; tests that need it are skipped where it is not told."""
    root = os.environ.get("SPARSE_MLP_DATA")
    if not root:
        pytest.skip("SPARSE_MLP_DATA is not set: no real images to test on")
    return Path(root)


@pytest.fixture(scope="session")
def cifar10_root(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the official CIFAR-10; written once a session where only the strips of experiments/data are there."""
    from experiments.data.cifar10 import rebuild_cifar10

    source = data_root / "cifar10"
    if (source / "cifar-10-batches-py").is_dir():
        return source
    if not (source / "labels.npy").is_file():
        pytest.skip(f"there is no CIFAR-10 in {source}")
    folder = tmp_path_factory.mktemp("cifar10")
    rebuild_cifar10(source, folder)
    return folder


@pytest.fixture(scope="session")
def naive_moe() -> Callable[[MoeMlp, Tensor], Tensor]:
    """A mixture of experts in its plainest form, a loop per item without noise, to hold the fast ones against."""

    def run(layer: MoeMlp, x: Tensor) -> Tensor:
        fc1, fc2 = layer.experts.fc1, layer.experts.fc2
        out = []
        for item in x.reshape(-1, layer.dim):
            gates, chosen = (item @ layer.router.weight.t()).softmax(-1).topk(layer.top_k)
            mlp = [F.gelu(item @ fc1.weight[e] + fc1.bias[e]) @ fc2.weight[e] + fc2.bias[e] for e in chosen.tolist()]
            out.append(sum(gate * y for gate, y in zip(gates, mlp, strict=True)))
        return torch.stack(out).view(x.shape) if out else x * 1

    return run
