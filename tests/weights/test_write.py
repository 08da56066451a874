from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparse_mlp.weights import write
from sparse_mlp.weights.write import write_file


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.safetensors"
    write_file({"a": torch.ones(2)}, target)

    def cut_short(_: object, path: Path, __: object) -> None:
        path.write_bytes(b"x")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(write, "save_file", cut_short)
    with pytest.raises(OSError, match=r"could not write .*x\.safetensors: No space left"):
        write_file({"a": torch.zeros(2)}, target)
    assert list(tmp_path.iterdir()) == [target] and load_file(target)["a"].tolist() == [1, 1]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write"):
        write_file({"a": torch.ones(2)}, tmp_path / "file" / "x.safetensors")
