"""What becomes of a run when a process is killed or never comes. Under torchrun, with one agent and with two."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.torchrun import finished, torchrun

TRAIN = [
    "-m", "sparse_mlp", "train", "digits_sparse", "--train.steps", "24", "--train.epochs", "None",
    "--train.save-every", "6", "--train.eval-every", "0", "--data.batch-size", "64", "--mesh.expert", "2",
    "--model.args", "num_blocks=2", "sparse_blocks=1", "embed_dim=32",
]  # fmt: skip


def train(out: Path, *options: str, ranks: int = 2) -> subprocess.Popen[str]:
    return torchrun(*TRAIN, "--out", out, ranks=ranks, options=options)


def workers(agent: subprocess.Popen[str]) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == agent.pid:
            yield int(path.parent.name)


def kill_one(agent: subprocess.Popen[str], run: Path, step: int) -> float:
    """SIGKILL to the youngest worker of an agent once the run has saved `step`; returns when."""
    until = time.monotonic() + 240
    while not (run / f"checkpoints/step_{step:08d}").exists():
        assert time.monotonic() < until, "no checkpoint"
        assert agent.poll() is None, agent.communicate()
        time.sleep(0.02)
    os.kill(max(workers(agent)), signal.SIGKILL)
    return time.monotonic()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def events(run: Path) -> list[str]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line["what"] for line in lines if line["kind"] == "event"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finished(train(out, "--standalone"))
    return out


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_within_a_minute(tmp_path):
    agent = train(tmp_path / "run", "--standalone")
    killed = kill_one(agent, tmp_path / "run", 6)
    _, errors = agent.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert agent.returncode != 0
    assert "exitcode  : -9" in errors, "torchrun names the rank that was killed"


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_killed_rank_is_started_again_and_nothing_is_lost(hosts, whole, tmp_path):
    """The weights at the end are those of an undisturbed run. Two agents meet as two machines do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--max-restarts", "2", "--standalone"]
    if hosts == 2:
        options = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", *options[:2]]
    agents = [train(tmp_path / "run", *options, ranks=2 // hosts) for _ in range(hosts)]
    kill_one(agents[-1], tmp_path / "run", 6)
    for agent in agents:
        finished(agent)
    expected, found = weights(whole), weights(tmp_path / "run")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert events(tmp_path / "run").count("resumed") == 1


@pytest.mark.slow
def test_starting_again_touches_no_run_of_another_job(whole):
    """The first attempt refuses the folder, and so does the second."""
    before = (whole / "metrics.jsonl").read_text()
    other = train(whole, "--standalone", "--max-restarts", "1")
    _, errors = other.communicate(timeout=300)
    assert other.returncode != 0
    assert errors.count("holds a run already") >= 2
    assert (whole / "metrics.jsonl").read_text() == before


ALONE = """
from sparse_mlp import distributed
with distributed.join("cpu"):
    raise AssertionError("nobody else is there")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes(rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **group, "SPARSE_MLP_JOIN_SECONDS": "2"}
    result = subprocess.run([sys.executable, "-c", ALONE], env=environment, text=True, capture_output=True, timeout=100)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.endswith("RankLostError: not all of 2 processes came within 2 seconds (SPARSE_MLP_JOIN_SECONDS)")
