"""Several runs side by side: the table's numbers, the scales of the curves, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparse_mlp.report import page as page_module
from sparse_mlp.report import read_run, write_comparison
from sparse_mlp.report.compare_curves import QUANTITIES, Group, compute, scales
from sparse_mlp.report.compare_table import group_runs

MakeRun = Callable[..., Path]


def rows(page: str) -> list[list[str]]:
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]
    return [[" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in row] for row in cells]


def test_table(make_run: MakeRun, tmp_path: Path) -> None:
    sparse, dense = make_run("sparse"), make_run("dense", layers={}, steps=200, config={"name": "dense"})
    page = write_comparison([sparse, dense], tmp_path / "out", [16_000_000, None]).read_text()
    busiest = max(float(r.final_load().max()) * r.num_experts for r in read_run(sparse).routing.values())
    top1 = f"{100 * read_run(sparse).top1:.2f} %"
    assert rows(page) == [
        [
            "sparse sparse_mlp_t4_32",
            top1,
            "100",
            "17",
            "16.0 M",
            "1,055",
            "5.0 s",
            f"{busiest:.2f} {page_module.TIMES}",
            "0",
        ],
        ["dense sparse_mlp_t4_32", top1, "200", "17", page_module.NONE, "1,105", "10 s", "dense", page_module.NONE],
    ]
    assert "http" not in page
    assert "unequal numbers of steps: sparse 100; dense 200." in page
    for words in ("sparse-mlp train", "0123456789ab", "torch 2.11"):
        assert words in page
    assert (tmp_path / "out" / "comparison.svg").is_file()
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_another_kind_are_compared_by_their_own_score(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(name, config={"name": name, "kind": "segment"}) for name in ("first", "second")]
    for run in runs:
        (run / "predictions.npz").unlink()
        metrics = run / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace('"top1"', '"miou"'))
    page = write_comparison(runs, tmp_path / "out").read_text()
    score = f"{100 * read_run(runs[0]).evals.get('miou')[-1]:.2f} %"
    assert [row[1] for row in rows(page)] == [score, score]
    assert "Mean IoU over steps" in page and "Test accuracy" not in page and ">Top-1<" not in page


def test_compute_counts_three_forwards_for_every_image_seen(make_run: MakeRun) -> None:
    run = read_run(make_run())  # batches of 64
    np.testing.assert_array_equal(compute(run, np.array([0.0, 10.0]), 1000), [0, 10 * 64 * 3 * 1000])
    assert compute(run, np.array([1.0]), None) is None


def test_curves_run_over_steps_time_and_compute(make_run: MakeRun) -> None:
    groups = [Group("a", [read_run(make_run("a"))], 10**9), Group("b", [read_run(make_run("b"))], None)]
    accuracy, loss = QUANTITIES
    over = scales(groups)
    assert [scale.name for scale in over] == ["step", "time", "compute"]
    steps, time, work = ([accuracy.line(group, scale) for group in groups] for scale in over)
    np.testing.assert_array_equal(steps[0].x, [20, 40, 60, 80, 100])
    np.testing.assert_array_equal(steps[0].y, groups[0].runs[0].evals.get("top1"))
    np.testing.assert_allclose(time[1].x, [1, 2, 3, 4, 5])
    assert "(s)" in over[1].label
    np.testing.assert_allclose(work[0].x, np.array([20, 40, 60, 80, 100]) * 64 * 3 * 1e9 / 1e12)
    assert over[2].label.startswith("tera-multiply-adds")
    assert work[1] is None
    assert len(loss.line(groups[0], over[0]).x) == 10


def test_seeds_of_a_recipe_share_a_row_and_a_curve(make_run: MakeRun, tmp_path: Path) -> None:
    """Of 50, 75 and 100 %: mean 75, standard deviation 25; a recipe with another learning rate stays apart."""
    logits = np.eye(4, dtype=np.float32)
    runs = []
    for seed, wrong in enumerate((2, 1, 0)):
        target = np.arange(4)
        target[:wrong] = (target[:wrong] + 1) % 4
        runs.append(make_run(f"seed{seed}", classes=4, target=target, logits=logits, config={"train": {"seed": seed}}))
    other = make_run("other", classes=4, config={"train": {"seed": 0}, "optim": {"lr": 1.0}})
    page = write_comparison([*runs, other], tmp_path / "out", [5, 5, 5, 6]).read_text()
    first, second = rows(page)
    assert first[:3] == ["digits_sparse sparse_mlp_t4_32 · 3 seeds", "75.00 ± 25.00 %", "100"]
    assert second[0] == "other sparse_mlp_t4_32"
    with (tmp_path / "out" / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["group"], line["seed"], line["top1"]) for line in lines[:3]] == [
        ("digits_sparse", "0", "0.5"),
        ("digits_sparse", "1", "0.75"),
        ("digits_sparse", "2", "1.0"),
    ]
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert stored[0]["top1"] == {"mean": 0.75, "std": 0.25}
    assert [run["seed"] for run in stored[0]["runs"]] == [0, 1, 2]
    assert stored[1]["top1"]["std"] is None and stored[1]["multiply_adds"]["mean"] == 6


def test_a_curve_of_seeds_is_their_mean_between_lowest_and_highest(make_run: MakeRun) -> None:
    runs = [read_run(make_run(name)) for name in "ab"]
    runs[1].evals.values["top1"] = runs[0].evals.get("top1") / 2
    line = QUANTITIES[0].line(Group("both", runs, None), scales([Group("both", runs, None)])[0])
    top1 = runs[0].evals.get("top1")
    np.testing.assert_allclose(line.y, 0.75 * top1)
    np.testing.assert_allclose([line.low, line.high], [top1 / 2, top1])


def test_without_multiply_adds_there_is_no_compute_axis(make_run: MakeRun, tmp_path: Path) -> None:
    page = write_comparison([make_run("a"), make_run("b", config={"name": "b"})], tmp_path / "out").read_text()
    assert "multiply-adds of training" not in page
    assert not (tmp_path / "out" / "figures" / "accuracy_compute.png").exists()


def test_runs_of_the_same_name_are_told_apart(make_run: MakeRun) -> None:
    names = ("x/run", "y/run", "other")
    runs = [read_run(make_run(name, config={"optim": {"lr": i}})) for i, name in enumerate(names)]
    assert [group.name for group in group_runs(runs, [None] * 3)] == ["x/run", "y/run", "other"]


def test_experts_that_were_not_measured_are_not_dense(make_run: MakeRun, tmp_path: Path) -> None:
    routing = {"kind": "routing", "step": 1, "time": 0.0, "layer": "a", "load": [0.0], "importance": [0.0]}
    frozen = make_run("frozen", metrics=json.dumps(routing) + "\n")
    page = write_comparison([frozen, make_run("dense", layers={}, config={"name": "b"})], tmp_path / "out").read_text()
    assert [row[-2:] for row in rows(page)] == [[page_module.NONE] * 2, ["dense", page_module.NONE]]


def test_unfinished_and_hostile_runs(make_run: MakeRun, tmp_path: Path) -> None:
    empty = make_run("<b>empty", metrics="", predictions=False, weights=False)
    config = json.loads((empty / "config.json").read_text())
    (empty / "config.json").write_text(json.dumps(config | {"model": {"name": "<script>"}, "data": {}}))
    page = write_comparison([empty, make_run("full")], tmp_path / "out", [5, 5]).read_text()
    assert "<b>" not in page and "<script>" not in page
    assert "&lt;b&gt;empty: There is no final evaluation yet" in page


@pytest.mark.parametrize("number", [0, 1])
def test_two_runs_at_least(make_run: MakeRun, tmp_path: Path, number: int) -> None:
    with pytest.raises(ValueError, match=f"two or more runs; got {number}"):
        write_comparison([make_run(str(i)) for i in range(number)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_six_recipes_at_most(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(str(i), config={"name": str(i)}) for i in range(7)]
    with pytest.raises(ValueError, match="at most 6 recipes; got 7 in 7 runs"):
        write_comparison(runs, tmp_path / "out")
    assert write_comparison(runs[:6], tmp_path / "out").is_file()


def test_wrong_number_of_multiply_adds_and_wrong_folder(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(ValueError, match="2 runs need as many numbers of multiply-adds; got 1"):
        write_comparison([run, run], tmp_path / "out", [1])
    with pytest.raises(ValueError, match="is named twice"):
        write_comparison([run, run.parent / "." / run.name], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_comparison([run, tmp_path / "nowhere"], tmp_path / "out")
