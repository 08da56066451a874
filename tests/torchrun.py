"""Starts torchrun, for tests of what only its processes do."""

from __future__ import annotations

import os
import subprocess
import sys


def torchrun(*words: object, ranks: int, options: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen[str]:
    """`torchrun OPTIONS --nproc-per-node RANKS WORDS...`, one thread each; its output is text in pipes."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, words)], env=environment, **pipes)


def finished(job: subprocess.Popen[str], seconds: float = 300) -> tuple[str, str]:
    """What a job that succeeds printed: standard output and standard error."""
    try:
        out, errors = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.terminate()  # it ends its processes
        raise
    assert job.returncode == 0, errors[:3000]
    return out, errors
