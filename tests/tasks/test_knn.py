"""Weighted kNN against a loop, and against numbers worked out by hand."""

import math

import pytest
import torch

from sparse_mlp.tasks.knn import nearest, weighted_knn


def test_hand_computed_votes():
    train = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    votes = weighted_knn(train, torch.tensor([0, 1, 2]), torch.tensor([[5.0, 0.0]]), 3, k=2, temperature=0.5)
    # cosines 1, 0, 1/sqrt(2); the two nearest vote for classes 0 and 2, relative to the nearest
    torch.testing.assert_close(votes, torch.tensor([[1.0, 0.0, math.exp((math.sqrt(0.5) - 1) / 0.5)]]))


def test_votes_are_those_of_a_loop_over_the_rows(monkeypatch):
    monkeypatch.setattr("sparse_mlp.tasks.knn._CHUNK", 7)
    torch.manual_seed(0)
    train, test, labels = torch.randn(60, 8), torch.randn(23, 8), torch.randint(0, 4, (60,))
    votes = weighted_knn(train, labels, test, 4, k=9, temperature=0.1)
    for row, vote in zip(test, votes, strict=True):
        cosines = torch.cosine_similarity(row[None], train)
        naive = torch.zeros(4)
        for i in cosines.argsort(descending=True)[:9]:
            naive[labels[i]] += math.exp(cosines[i] / 0.1)
        torch.testing.assert_close(vote / vote.sum(), naive / naive.sum())


def test_k_above_the_training_set_is_the_training_set():
    train, test, labels = torch.randn(5, 3), torch.randn(2, 3), torch.tensor([0, 1, 0, 1, 1])
    assert torch.equal(weighted_knn(train, labels, test, 2, k=99), weighted_knn(train, labels, test, 2, k=5))
    assert nearest(train, test, 99)[1].shape == (2, 5)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 0, 0], {}, "all 3 training images are of class 0"),
        ([0, 1, 5], {}, r"labels in 0\.\.2"),
        ([0, 1], {}, "labels \\(2,\\) for features"),
        ([0, 1, 2], {"k": 0}, "k = 0"),
        ([0, 1, 2], {"temperature": 0.0}, "temperature 0.0 is not positive"),
    ],
)
def test_mistakes_are_named(labels, options, message):
    with pytest.raises(ValueError, match=message):
        weighted_knn(torch.randn(3, 2), torch.tensor(labels), torch.randn(1, 2), 3, **options)


def test_widths_that_differ_are_named():
    with pytest.raises(ValueError, match="compares features"):
        nearest(torch.randn(3, 2), torch.randn(3, 4), 1)
