from __future__ import annotations

import errno
import os

import pytest

from sparse_mlp.files import replacing, write_json, writing_into


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"^could not write {path}: No space left on device$"):
        write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'


def test_a_full_disk_is_named_by_the_folder(tmp_path):
    with pytest.raises(OSError, match=r"could not write into .*: No space left"), writing_into(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match=r"^no images$"), writing_into(tmp_path):
        raise FileNotFoundError("no images")


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "x.csv").write_text("old")
    with (
        pytest.raises(OSError, match=r"could not write .*x\.csv: No space left"),
        replacing(tmp_path / "x.csv") as temporary,
    ):
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "x.csv").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with replacing(tmp_path / "x.csv") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x.csv").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
