from __future__ import annotations

import pytest

from experiments.headline.study import Arm, difference, spread


def test_spread_is_mean_and_sample_deviation():
    """Of 1, 2, 3: mean 2, deviation sqrt((1 + 0 + 1) / 2) = 1."""
    assert spread([0.01, 0.02, 0.03]) == "2.00 ± 1.00 %"
    assert spread([0.625]) == "62.50 %" and spread([]) == "-"


@pytest.mark.parametrize(("own", "expected"), [([0.03, 0.05], "+2.00 ± 1.41"), ([0.005], "-0.50")])
def test_differences_are_paired_by_seed(own: list[float], expected: str):
    """(3, 5) against (2, 2): +1 and +3, mean 2, deviation sqrt(2). Against (1, 2) of one seed: -0.5."""
    first = {2: [0.02, 0.02], 1: [0.01, 0.02]}[len(own)]
    assert difference(Arm("a", 1, 1, [], own), Arm("b", 1, 1, [], first)) == expected
