"""The numbers behind the figures, against counts and formulas done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from sparse_mlp.report import analysis
from sparse_mlp.report.predictions import Predictions


def predictions(target: list[int], predicted: list[int], probability: list[float] | None = None, classes: int = 3):
    return Predictions(
        index=np.arange(len(target)),
        target=np.array(target, dtype=np.int64),
        predicted=np.array(predicted, dtype=np.int64),
        probability=np.array(probability or [0.9] * len(target)),
        num_classes=classes,
    )


def test_confusion_matrix_counted_by_hand() -> None:
    found = analysis.confusion_matrix(predictions([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 0, 2]))
    assert found.tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 1]]  # rows are the true classes


def test_confusion_matrix_against_a_loop_over_many_classes() -> None:
    rng = np.random.default_rng(0)
    target, predicted = rng.integers(1000, size=5000), rng.integers(1000, size=5000)
    naive = np.zeros((1000, 1000), dtype=int)
    for t, p in zip(target, predicted, strict=True):
        naive[t, p] += 1
    found = analysis.confusion_matrix(predictions(target.tolist(), predicted.tolist(), classes=1000))
    np.testing.assert_array_equal(found, naive)


def test_class_accuracy_and_wilson_interval() -> None:
    found = analysis.class_accuracy(np.array([[8, 2, 0], [0, 10, 0], [0, 0, 0]]))
    assert found.order.tolist() == [1, 0]  # best first; class 2 has no image
    assert found.accuracy[:2].tolist() == [0.8, 1.0]
    assert math.isnan(found.accuracy[2])
    # 8 of 10: the textbook interval 0.490 to 0.943; 10 of 10: 0.722 to 1
    np.testing.assert_allclose([found.low[0], found.high[0]], [0.4902, 0.9433], atol=1e-4)
    np.testing.assert_allclose([found.low[1], found.high[1]], [0.7225, 1.0], atol=1e-4)


def test_worst_pairs_are_the_most_frequent_in_order() -> None:
    confusion = np.array([[50, 3, 0], [5, 40, 3], [0, 0, 30]])
    pairs = analysis.worst_pairs(confusion, 2)
    assert [(p.true, p.predicted, p.count, p.images) for p in pairs] == [(1, 0, 5, 48), (0, 1, 3, 53)]
    assert analysis.worst_pairs(np.diag([3, 4]), 5) == []


def test_confused_classes_takes_the_worst_whole_pairs() -> None:
    confusion = np.diag([9] * 6)
    confusion[4, 1], confusion[1, 4], confusion[0, 5] = 8, 7, 3
    assert analysis.confused_classes(confusion, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert analysis.confused_classes(confusion, 4).tolist() == [0, 1, 4, 5]
    assert analysis.confused_classes(confusion, 3).tolist() == [1, 4]


def test_mistakes_are_the_surest_first() -> None:
    found = predictions([0, 0, 0, 1], [1, 1, 0, 1], [0.4, 0.8, 0.9, 0.9])
    assert analysis.mistakes_of(found, analysis.Pair(0, 1, 2, 3), 5).tolist() == [1, 0]
    assert analysis.mistakes_of(found, analysis.Pair(0, 1, 2, 3), 1).tolist() == [1]


def test_calibration_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.05, 1, size=500).tolist()
    right = [bool(rng.random() < p) for p in probability]
    found = analysis.calibration(predictions([0] * 500, [0 if r else 1 for r in right], probability), bins=10)
    error = 0.0
    for b in range(10):
        inside = [i for i, p in enumerate(probability) if b / 10 <= p < (b + 1) / 10]
        assert found.images[b] == len(inside)
        if inside:
            confidence = sum(probability[i] for i in inside) / len(inside)
            accuracy = sum(right[i] for i in inside) / len(inside)
            np.testing.assert_allclose([found.confidence[b], found.accuracy[b]], [confidence, accuracy])
            error += abs(confidence - accuracy) * len(inside) / 500
    assert found.error == pytest.approx(error, abs=1e-12)
    reference = binary_calibration_error(torch.tensor(probability), torch.tensor(right), n_bins=10)
    assert found.error == pytest.approx(float(reference), abs=1e-6)


def test_a_model_sure_and_right_has_no_calibration_error() -> None:
    found = analysis.calibration(predictions([0, 1], [0, 1], [1.0, 1.0]))
    assert found.error == 0
    assert found.images.tolist() == [0] * 9 + [2]


@pytest.mark.parametrize(
    ("load", "busiest", "dead", "said"),
    [
        ([0.25] * 4, 1.0, [], "no expert is idle"),
        ([0.5, 0.3, 0.2, 0.0], 2.0, [3], "idle: expert 3"),
        ([0.5, 0.49, 0.01, 0.0], 2.0, [2, 3], "idle: expert 2, expert 3"),
        ([1.0], 1.0, [], "A single expert"),
    ],
)
def test_balance(load: list[float], busiest: float, dead: list[int], said: str) -> None:
    found = analysis.balance(load)
    assert found.busiest == pytest.approx(busiest)
    assert found.dead == dead
    assert said in found.sentence()
