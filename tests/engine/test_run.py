from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sparse_mlp.engine import RunFolder
from sparse_mlp.engine import run as run_module


def test_create_and_open(tmp_path):
    config = {"name": "x", "train": {"epochs": 2.0, "betas": [0.9, 0.99]}, "none": None}
    RunFolder.create(tmp_path / "deep/run", config)
    assert RunFolder.open(tmp_path / "deep/run").config() == config
    assert not list((tmp_path / "deep/run").glob(".*"))
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no config.json"):
        RunFolder.open(tmp_path / "deep")


def log(run, **line):
    run.metrics_path.write_text(json.dumps(line) + "\n")


def test_a_run_without_a_step_can_begin_again(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"steps": 1})
    log(run, kind="event", step=0, what="started")
    run.tensorboard.mkdir()
    (run.checkpoints / ".step_00000001.tmp/state").mkdir(parents=True)
    (run.path / "notes.txt").write_text("kept")
    again = RunFolder.create(tmp_path / "run", {"steps": 2})
    assert again.config() == {"steps": 2}
    assert not again.metrics_path.exists()
    assert not again.tensorboard.exists()
    assert list(again.checkpoints.iterdir()) == []
    assert (run.path / "notes.txt").exists()


@pytest.mark.parametrize("sign", ["checkpoint", "metrics", "unknown metrics"])
def test_a_run_with_a_step_is_not_overwritten(sign, tmp_path):
    run = RunFolder.create(tmp_path / "run", {"steps": 1})
    if sign == "checkpoint":
        (run.checkpoints / "step_00000003").mkdir(parents=True)
    elif sign == "metrics":
        log(run, kind="train", step=1)
    else:
        run.metrics_path.write_text("hello\n")
    with pytest.raises(FileExistsError, match=r"^\S+/run holds a run already; go on with --resume \S+/run or name"):
        RunFolder.create(run.path, {"steps": 2})
    assert run.config() == {"steps": 1}


def test_reading_a_run_writes_nothing(tmp_path):
    """A run on a read-only medium can be evaluated."""
    run = RunFolder.create(tmp_path / "run", {"steps": 1})
    (run.checkpoints / "step_00000003").mkdir(parents=True)
    (run.checkpoints / "step_00000003/model.safetensors").touch()
    before = sorted((path, path.stat().st_mtime_ns) for path in (run.path, *run.path.rglob("*")))
    opened = RunFolder.open(run.path)
    assert (opened.config(), opened.weights().name) == ({"steps": 1}, "model.safetensors")
    assert sorted((path, path.stat().st_mtime_ns) for path in (run.path, *run.path.rglob("*"))) == before


def test_one_process_at_a_time(tmp_path):
    """Another process cannot take the folder; killed in whatever way, it leaves no lock behind."""
    run = RunFolder.create(tmp_path / "run", {})
    program = (
        "import sys; from sparse_mlp.engine import RunFolder\n"
        "with RunFolder(__import__('pathlib').Path(sys.argv[1])).locked(): print('in', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program, run.path], stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(ValueError, match="is being trained by another process"), run.locked():
            pass
        with pytest.raises(ValueError, match="is being trained by another process"):
            RunFolder.create(run.path, {})
        other.kill()
    with run.locked():
        pass


def test_damaged_configuration(tmp_path):
    run = RunFolder.create(tmp_path, {"a": 1})
    run.config_path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON") as caught:
        run.config()
    assert "\n" not in str(caught.value)


def test_environment(tmp_path):
    environment = run_module.environment()
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert environment["hardware"]["cores"] >= 1
    assert environment["hardware"]["memory_gib"] > 0
    assert environment["date"].endswith("+00:00")


def test_commit_is_that_of_the_tracked_source(tmp_path, monkeypatch):
    def git(*arguments):
        return subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True, text=True).stdout

    source = tmp_path / "package.py"
    source.write_text("")
    monkeypatch.setattr(run_module, "__file__", str(source))
    nothing = {"git_commit": None, "git_changed": None}
    assert {k: v for k, v in run_module.environment().items() if "git" in k} == nothing
    git("init", "-q")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    # Installed inside somebody else's checkout: not their commit.
    assert {k: v for k, v in run_module.environment().items() if "git" in k} == nothing
    git("add", "package.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "second")
    head = git("rev-parse", "HEAD").strip()
    assert run_module.environment()["git_commit"] == head
    assert run_module.environment()["git_changed"] is False
    source.write_text("changed")
    assert run_module.environment()["git_changed"] is True
