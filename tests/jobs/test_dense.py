"""What detection and segmentation share."""

from __future__ import annotations

from pathlib import Path

from sparse_mlp.jobs.dense import picture_names


def test_no_picture_overwrites_another():
    paths = [Path(name) for name in ("a/x.png", "b/x.png", "b/x-2.png", "a/x.mask.png", "y.mask.png", "y.png")]
    names = picture_names(paths)
    files = [file for name in names for file in (f"{name}.png", f"{name}.mask.png")]
    assert len(set(files)) == len(files)
    assert names[0] == "x" and names[1] == "x-2"
