from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparse_mlp.engine import CheckpointError, RunFolder, last_checkpoint, list_checkpoints
from sparse_mlp.engine.checkpoint import (
    checkpoint_step,
    clean,
    join_tensors,
    load_state,
    load_tensors,
    save_checkpoint,
    split_tensors,
)

STATE = {"step": 4, "numbers": [0.1, 1e-300, 3], "nothing": None}


@pytest.fixture
def tensors():
    return {
        "task.weight": torch.arange(6.0).view(2, 3).t(),  # not contiguous
        "optimizer.step": torch.tensor(3.0),
        "task.half": torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
        "task.count": torch.tensor([7], dtype=torch.int64),
        "task.none": torch.zeros(0, 4),
    }


@pytest.fixture
def folder(tmp_path, tensors):
    folder = tmp_path / "checkpoints"
    for step in (2, 4):
        weights = {"model.safetensors": {"weight": "task.weight"}}
        save_checkpoint(folder, step, tensors, weights, {**STATE, "step": step}, keep=2)
    return folder


def test_everything_comes_back(folder, tensors):
    path = last_checkpoint(folder)
    assert path == folder / "step_00000004"
    assert load_state(path) == STATE
    found = {name: torch.full_like(tensor, 9) for name, tensor in tensors.items()}
    load_tensors(path, found)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert torch.equal(load_file(path / "model.safetensors")["weight"], tensors["task.weight"])


def test_tied_weights(tmp_path):
    whole = torch.arange(4.0)
    tensors = {"a": whole, "b": whole, "half": whole[:2]}
    path = save_checkpoint(tmp_path, 1, tensors, {"model.safetensors": {name: name for name in tensors}}, STATE, keep=1)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_tensors(path, found)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert torch.equal(load_file(path / "model.safetensors")["half"], whole[:2])


def test_only_the_newest_are_kept(folder, tensors):
    save_checkpoint(folder, 10, tensors, {}, STATE, keep=2)
    assert [checkpoint_step(path) for path in list_checkpoints(folder)] == [4, 10]
    assert len(list(folder.iterdir())) == 2


def test_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "step_12").mkdir()
    (tmp_path / ".step_00000012.tmp").mkdir()
    assert list_checkpoints(tmp_path) == []
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_12"]


def test_nothing_in_a_checkpoint_is_a_pickle(folder):
    for path in last_checkpoint(folder).rglob("*"):
        if path.is_file():
            with path.open("rb") as file, pytest.raises(Exception):  # noqa: B017
                pickle.load(file)
            assert path.suffix in (".json", ".safetensors")


def files_of(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("kind", ["flip", "truncate", "remove"])
def test_damage_is_named_and_never_passed_over(kind, folder):
    path = last_checkpoint(folder)
    for name in files_of(path):
        file = path / name
        content = file.read_bytes()
        if kind == "flip":
            file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        elif kind == "truncate":
            file.write_bytes(content[: len(content) // 2])
        else:
            file.unlink()
        with pytest.raises(CheckpointError) as caught:
            load_state(path)
        message = str(caught.value)
        assert message.startswith(f"checkpoint {path} is damaged: {name} ")
        assert message.endswith("; remove that folder to go on from step_00000002")
        assert "\n" not in message
        file.write_bytes(content)
    load_state(path)


@pytest.mark.parametrize("name", ["state/shard-00002.safetensors", "state/more/a.txt", "model_ema.safetensors"])
def test_a_file_that_was_not_saved_with_it_is_refused(name, folder):
    path = last_checkpoint(folder)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes((path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=rf"is damaged: {name} is not one of the files it was saved with; remove"):
        load_state(path)


def declare(shape, data=b""):
    """A safetensors file whose header declares a float32 tensor of this shape."""
    size = 4 * math.prod(shape)
    header = json.dumps({"task.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (declare([10**5, 10**5]), "is damaged: state cannot be read"),  # 40 GB
        (struct.pack("<Q", 40 * 2**30) + b"{", "is damaged: state cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "is damaged: state cannot be read"),
        (b"", "is damaged: state cannot be read"),
        (declare([2], b"\0" * 8), "does not fit this model and optimiser: 0 matched"),
    ],
)
def test_a_header_that_lies_is_one_line(content, message, tmp_path):
    (tmp_path / "step_00000001/state").mkdir(parents=True)
    (tmp_path / "step_00000001/state/shard.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tensors(tmp_path / "step_00000001", {"task.weight": torch.zeros(3, 2)})
    assert "\n" not in str(caught.value)


def test_edited_numbers_are_noticed(folder):
    path = last_checkpoint(folder) / "state.json"
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(CheckpointError, match=r"state.json does not match its checksum"):
        load_state(path.parent)


def test_another_format(folder):
    path = last_checkpoint(folder) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match=r"has format 99; this version reads 2"):
        load_state(path.parent)


def test_a_foreign_checkpoint_lists_what_fits(folder, tensors):
    wanted = {name: tensors[name] for name in ("task.weight", "optimizer.step")}
    wanted |= {"task.half": torch.zeros(3), "task.other": torch.zeros(1)}
    expected = (
        "does not fit this model and optimiser: 2 matched, 1 missing (task.other), "
        "2 unexpected (task.count, task.none), 1 of another shape (task.half"
    )
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        load_tensors(last_checkpoint(folder), wanted)


def test_a_failed_save_leaves_the_others_alone(folder, tensors, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(folder, 6, tensors, {}, STATE, keep=1)
    assert str(caught.value) == (
        f"could not save {folder}/step_00000006: No space left on device; "
        f"the last good checkpoint is {folder}/step_00000004"
    )
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert {path: after.get(path) for path in before} == before
    assert len(list(folder.iterdir())) == 2, "the unfinished one is removed"


def test_a_save_over_a_damaged_checkpoint_of_the_same_step(folder, tensors):
    (folder / "step_00000004/state.json").unlink()
    save_checkpoint(folder, 4, tensors, {}, STATE, keep=2)
    assert load_state(folder / "step_00000004") == STATE
    assert len(list(folder.iterdir())) == 2


def test_split_and_join():
    tree = {"state": {"a.b": {"x": torch.ones(2), "n": 3}}, "groups": [{"betas": (0.9, 0.99), "step": torch.zeros(())}]}
    tensors: dict[str, torch.Tensor] = {}
    rest = json.loads(json.dumps(split_tensors(tree, "o", tensors)))
    assert tensors.keys() == {"o.state.a.b.x", "o.groups.0.step"}
    back = join_tensors(rest, tensors)
    assert back["state"]["a.b"]["x"] is tree["state"]["a.b"]["x"]
    assert back["groups"][0] == {"betas": [0.9, 0.99], "step": torch.zeros(())}


def test_a_full_disk_stops_training_and_spares_the_last_checkpoint(train_digits, checkpoint_content):
    """With the size of files limited (EFBIG), each write to the new checkpoint fails, whatever library does it."""
    train = {"steps": 6, "save_every": 2}
    run, _ = train_digits("whole", train={**train, "keep": 9})
    path = run.checkpoints / "step_00000004"
    sizes = sorted({file.stat().st_size for file in path.rglob("*") if file.is_file()})
    for number, size in enumerate(sizes):  # each file in turn is the one that no longer fits
        errors: list[str] = []
        broken, code = train_digits(f"{number}", train=train, full_at=2, full_bytes=size - 1, errors=errors)
        assert code == 2
        last = errors[0].splitlines()[-1]
        assert re.fullmatch(
            r"error: could not save \S+/step_00000004: .+; the last good checkpoint is \S+/step_00000002", last
        ), errors[0]
        assert "Traceback" not in errors[0]
        assert [path.name for path in broken.checkpoints.iterdir()] == ["step_00000002"]
        load_state(last_checkpoint(broken.checkpoints))
    resumed, code = train_digits("0", train=train, resume=True)
    assert code == 0
    one, _ = checkpoint_content(run.checkpoints / "step_00000006")
    other, _ = checkpoint_content(resumed.checkpoints / "step_00000006")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resuming_from_damage(make_trainer):
    make_trainer(steps=4, save_every=2).fit(show=False)
    trainer = make_trainer(steps=4, save_every=2)
    (last_checkpoint(trainer.run.checkpoints) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is damaged: model.safetensors .* to go on from step_00000002"):
        trainer.fit(resume=True, show=False)


def test_resuming_another_model(make_trainer, new_line):
    make_trainer(steps=2).fit(show=False)

    class Wider(type(new_line())):
        def __init__(self):
            super().__init__()
            self.line.extra = nn.Linear(1, 2)

    with pytest.raises(CheckpointError, match=r"does not fit this model and optimiser: .* missing .*line.extra"):
        make_trainer(steps=2, task=Wider()).fit(resume=True, show=False)


def test_weights_for_use_elsewhere(make_trainer, tmp_path: Path):
    trainer = make_trainer(steps=2)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        trainer.run.weights()
    trainer.fit(show=False)
    model = nn.Linear(1, 1)
    model.load_state_dict(load_file(trainer.run.weights()))
    assert torch.equal(model.weight, trainer.learner.task.line.weight)
    with pytest.raises(FileNotFoundError, match="the run kept no average of its weights"):
        RunFolder.open(tmp_path / "run").weights(ema=True)


CONSOLIDATE = """
import sys, threading, time
from pathlib import Path
from sparse_mlp.engine.consolidate import consolidate

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

state, target = Path(sys.argv[1]), Path(sys.argv[2])
consolidate(state, {"0": "task.0"}, target)  # whatever is allocated once
before, peak, ended = anonymous(), 0.0, False

def watch():
    global peak
    while not ended:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
consolidate(state, {str(i): f"task.{i}" for i in range(32)}, target, buffer=16 * 2**20)
ended = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_one_file_of_a_large_checkpoint_is_written_in_little_memory(tmp_path):
    """256 MiB in tensors of 8, read 16 at a time."""
    tensors = {f"task.{i}": torch.full((2 * 2**20,), float(i)) for i in range(32)}
    path = save_checkpoint(tmp_path, 1, tensors, {}, STATE, keep=1)
    command = [sys.executable, "-c", CONSOLIDATE, str(path / "state"), str(tmp_path / "model.safetensors")]
    result = subprocess.run(command, text=True, capture_output=True, check=True)
    assert float(result.stdout) < 2 * 16 + 4, "MiB: what is read, twice, and some more"
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[str(i)], tensors[f"task.{i}"]) for i in range(32))
