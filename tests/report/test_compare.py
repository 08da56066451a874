"""Several runs side by side: the table's numbers, the scales of the curves, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparse_mlp.report import page as page_module
from sparse_mlp.report import read_run, write_comparison
from sparse_mlp.report.compare import QUANTITIES, compute, run_labels, scales

MakeRun = Callable[..., Path]


def rows(page: str) -> list[list[str]]:
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]
    return [[" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in row] for row in cells]


def test_table(make_run: MakeRun, tmp_path: Path) -> None:
    sparse, dense = make_run("sparse"), make_run("dense", layers={}, steps=200)
    page = write_comparison([sparse, dense], tmp_path / "out", [16_000_000, None]).read_text()
    busiest = max(float(r.final_load().max()) * r.num_experts for r in read_run(sparse).routing.values())
    top1 = f"{100 * read_run(sparse).top1:.2f} %"
    assert rows(page) == [
        ["sparse sparse_mlp_t4_32", top1, "17", "16.0 M", "1,055", "5.0 s", f"{busiest:.2f} {page_module.TIMES}", "0"],
        ["dense sparse_mlp_t4_32", top1, "17", page_module.NONE, "1,105", "10 s", "dense", page_module.NONE],
    ]
    assert "http" not in page
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_compute_counts_three_forwards_for_every_image_seen(make_run: MakeRun) -> None:
    run = read_run(make_run())  # batches of 64
    np.testing.assert_array_equal(compute(run, np.array([0.0, 10.0]), 1000), [0, 10 * 64 * 3 * 1000])
    assert compute(run, np.array([1.0]), None) is None


def test_curves_run_over_steps_time_and_compute(make_run: MakeRun) -> None:
    runs = [read_run(make_run("a")), read_run(make_run("b"))]
    accuracy, loss = QUANTITIES
    over = scales(runs, [10**9, None])
    assert [scale.name for scale in over] == ["step", "time", "compute"]
    steps, time, work = (accuracy.lines(runs, scale, ["a", "b"]) for scale in over)
    np.testing.assert_array_equal(steps[0].x, [20, 40, 60, 80, 100])
    np.testing.assert_array_equal(steps[0].y, runs[0].evals.get("top1"))
    np.testing.assert_allclose(time[1].x, [1, 2, 3, 4, 5])
    assert "(s)" in over[1].label
    np.testing.assert_allclose(work[0].x, np.array([20, 40, 60, 80, 100]) * 64 * 3 * 1e9 / 1e12)
    assert over[2].label.startswith("tera-multiply-adds")
    assert work[1] is None
    assert len(loss.lines(runs, over[0], ["a", "b"])[0].x) == 10


def test_without_multiply_adds_there_is_no_compute_axis(make_run: MakeRun, tmp_path: Path) -> None:
    page = write_comparison([make_run("a"), make_run("b")], tmp_path / "out").read_text()
    assert "multiply-adds of training" not in page
    assert not (tmp_path / "out" / "figures" / "accuracy_compute.png").exists()


def test_runs_of_the_same_name_are_told_apart(make_run: MakeRun) -> None:
    runs = [read_run(make_run(name)) for name in ("x/run", "y/run", "other")]
    assert run_labels(runs) == ["x/run", "y/run", "other"]


def test_unfinished_and_hostile_runs(make_run: MakeRun, tmp_path: Path) -> None:
    empty = make_run("<b>empty", metrics="", predictions=False, weights=False)
    config = json.loads((empty / "config.json").read_text())
    (empty / "config.json").write_text(json.dumps(config | {"model": {"name": "<script>"}, "data": {}}))
    page = write_comparison([empty, make_run("full")], tmp_path / "out", [5, 5]).read_text()
    assert "<b>" not in page and "<script>" not in page
    assert "&lt;b&gt;empty: There is no final evaluation yet" in page


@pytest.mark.parametrize("number", [0, 1, 7])
def test_two_to_six_runs(make_run: MakeRun, tmp_path: Path, number: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 6 runs; got {number}"):
        write_comparison([make_run(str(i)) for i in range(number)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_six_runs(make_run: MakeRun, tmp_path: Path) -> None:
    assert write_comparison([make_run(str(i)) for i in range(6)], tmp_path / "out").is_file()


def test_wrong_number_of_multiply_adds_and_wrong_folder(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(ValueError, match="2 runs need as many numbers of multiply-adds; got 1"):
        write_comparison([run, run], tmp_path / "out", [1])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_comparison([run, tmp_path / "nowhere"], tmp_path / "out")
