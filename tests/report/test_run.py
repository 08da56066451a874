"""Reading a run folder: what an interruption leaves is read, what is foreign is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparse_mlp.report import read_run

MakeRun = Callable[..., Path]


def test_series_and_headline_numbers(make_run: MakeRun) -> None:
    run = read_run(make_run(steps=100, every=10, evals=5))
    np.testing.assert_array_equal(run.train.step, np.arange(10, 101, 10))
    np.testing.assert_array_equal(run.evals.step, [20, 40, 60, 80, 100])
    assert run.seconds == 5.0
    assert run.items_per_s == 1055.0  # median of 1010, 1020, ... 1100
    assert run.parameters == 3 * 4 + 5
    assert run.last_step == 100
    assert run.notes == []


def test_top1_counts_the_predictions_by_hand(make_run: MakeRun) -> None:
    logits = np.array([[2, 1, 0], [0, 1, 2], [0, 3, 1], [5, 0, 0]], np.float32)
    run = read_run(make_run(classes=3, target=np.array([0, 2, 0, 1]), logits=logits))
    assert run.predictions is not None
    np.testing.assert_array_equal(run.predictions.predicted, [0, 2, 1, 0])
    assert run.top1 == 0.5
    e = np.exp(1.0)
    np.testing.assert_allclose(run.predictions.probability[0], e**2 / (e**2 + e + 1), rtol=1e-12)


def test_top5_is_the_share_with_fewer_than_five_larger_logits(make_run: MakeRun) -> None:
    logits = np.tile(np.arange(8, dtype=np.float32), (8, 1))  # class 7 first, class 3 fifth
    run = read_run(make_run(classes=8, target=np.arange(8), logits=logits))
    assert run.predictions is not None
    assert run.predictions.top5 == 5 / 8


def test_many_predictions_reduce_in_chunks_as_at_once(make_run: MakeRun) -> None:
    rng = np.random.default_rng(1)
    logits, target = rng.normal(size=(9000, 4)).astype(np.float32), rng.integers(4, size=9000)
    run = read_run(make_run(classes=4, target=target, logits=logits))
    assert run.predictions is not None
    softmax = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1, keepdims=True)
    np.testing.assert_array_equal(run.predictions.predicted, logits.argmax(1))
    np.testing.assert_allclose(run.predictions.probability, softmax.max(1), rtol=1e-12)


def test_averaged_weights_are_the_ones_evaluated(make_run: MakeRun) -> None:
    lines = [
        {"kind": "eval", "step": 5, "time": 1.0, "loss": 1.0, "top1": 0.5, "ema": False},
        {"kind": "eval", "step": 5, "time": 1.0, "loss": 0.8, "top1": 0.7, "ema": True},
    ]
    run = read_run(make_run(metrics="\n".join(map(json.dumps, lines)) + "\n", predictions=False))
    assert run.evals.get("top1").tolist() == [0.7]
    assert run.top1 == 0.7


def test_a_line_cut_short_is_left_out_and_said(make_run: MakeRun) -> None:
    folder = make_run(predictions=False)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: len(text) // 2].rsplit("\n", 1)[0] + '\n{"kind": "tr')
    run = read_run(folder)
    assert 0 < len(run.train) < 10
    assert any("cut short" in note for note in run.notes)


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(make_run: MakeRun) -> None:
    folder = make_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3] = "{oops"
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 4 is not JSON"):
        read_run(folder)


@pytest.mark.parametrize("line", ["[1, 2]", '{"loss": 1}', '{"kind": "train"}', '{"kind": "train", "step": "x"}'])
def test_foreign_lines_are_refused(make_run: MakeRun, line: str) -> None:
    with pytest.raises(ValueError, match="line 1 is not a metrics line"):
        read_run(make_run(metrics=line + "\n"))


def test_a_layer_that_changes_its_experts_is_refused(make_run: MakeRun) -> None:
    routing = {"kind": "routing", "time": 0.0, "layer": "a", "dropped": 0.0, "entropy": 1.0}
    lines = [
        routing | {"step": 1, "load": [0.5, 0.5], "importance": [0.5, 0.5]},
        routing | {"step": 2, "load": [1.0], "importance": [1.0]},
    ]
    with pytest.raises(ValueError, match="layer a changes its number of experts"):
        read_run(make_run(metrics="\n".join(map(json.dumps, lines)) + "\n"))


def test_routing_without_its_numbers_is_refused(make_run: MakeRun) -> None:
    line = {"kind": "routing", "step": 1, "time": 0.0, "layer": "a", "load": [1.0]}
    with pytest.raises(ValueError, match=r"line 1 does not fit: importance should be a list"):
        read_run(make_run(metrics=json.dumps(line) + "\n"))


def test_values_that_are_no_numbers_are_refused(make_run: MakeRun) -> None:
    line = {"kind": "train", "step": 1, "time": 0.0, "loss": "low"}
    with pytest.raises(ValueError, match=r"line 1 does not fit: loss is 'low', not a number"):
        read_run(make_run(metrics=json.dumps(line) + "\n"))


def test_missing_folder_and_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff\xfe\x00"),
        ("environment.json", b"no"),
        ("inputs.json", b"1"),
        ("predictions.npz", b"PK\x03\x04 not really"),
        ("predictions.npz", b""),
        ("model.safetensors", b"short"),
    ],
)
def test_damaged_files_are_one_line_errors_that_name_them(make_run: MakeRun, name: str, content: bytes) -> None:
    folder = make_run()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        read_run(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"index": [0], "target": [0]}, "logits"),
        ({"index": [0], "target": [0, 1], "logits": [[0.0, 1.0]]}, "do not fit"),
        ({"index": [0], "target": [2], "logits": [[0.0, 1.0]]}, "targets 2 to 2 do not fit 2 classes"),
        ({"index": [0], "target": [0], "logits": [[0.0, 1.0]], "files": ["a", "b"]}, "do not fit"),
    ],
)
def test_predictions_that_do_not_fit(make_run: MakeRun, arrays: dict[str, list[object]], message: str) -> None:
    folder = make_run()
    np.savez(folder / "predictions.npz", **{name: np.array(value) for name, value in arrays.items()})
    with pytest.raises(ValueError, match=message):
        read_run(folder)


def test_pickled_predictions_are_not_executed(make_run: MakeRun) -> None:
    folder = make_run()
    np.savez(folder / "predictions.npz", index=np.array([{}], dtype=object), target=[0], logits=[[0.0]])
    with pytest.raises(ValueError, match=r"predictions\.npz is not a predictions file"):
        read_run(folder)


def test_weights_of_an_interrupted_run_are_counted_in_its_checkpoint(make_run: MakeRun) -> None:
    folder = make_run(predictions=False)
    checkpoint = folder / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    (folder / "model.safetensors").rename(checkpoint / "model.safetensors")
    assert read_run(folder).parameters == 17


def test_items_without_a_label_are_left_out_and_said(make_run: MakeRun) -> None:
    logits = np.array([[2, 1], [2, 1], [0, 1]], np.float32)
    run = read_run(make_run(classes=2, target=np.array([0, -1, -100]), logits=logits))
    assert run.top1 == 1.0 and run.predictions is not None and len(run.predictions.target) == 1
    assert run.notes == ["2 of 3 predictions are of items without a label and not counted."]


@pytest.mark.parametrize("load", [[0.0, 0.0], [None, None]])
def test_layers_that_never_ran_in_training_have_no_load(make_run: MakeRun, load: list[float | None]) -> None:
    line = {"kind": "routing", "step": 1, "time": 0.0, "layer": "a", "load": load, "importance": load, "entropy": 0.0}
    run = read_run(make_run(metrics=json.dumps(line) + "\n"))
    assert run.routing == {} and run.has_experts
    assert not read_run(make_run("dense", layers={})).has_experts


def test_throughput_by_either_name_and_every_logged_number(make_run: MakeRun) -> None:
    lines = [
        {"kind": "train", "step": 5, "time": 1.0, "loss": 1.0, "items_per_s": 7.0, "nll": 0.5, "per_class": [1, 2]},
        {"kind": "train", "step": 6, "time": 1.0, "loss": None, "items_per_s": 9.0},
    ]
    run = read_run(make_run(metrics="\n".join(map(json.dumps, lines)) + "\n"))
    assert run.items_per_s == 8.0
    assert set(run.train.values) == {"loss", "items_per_s", "nll"}
    np.testing.assert_array_equal(run.train.get("nll"), [0.5, np.nan])
