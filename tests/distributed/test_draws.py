from __future__ import annotations

from pathlib import Path

import torch


def test_two_ranks_draw_what_one_process_draws(launch, tmp_path):
    found = []
    for ranks in (1, 2, 4):
        errors: list[str] = []
        spec = {"out": str(tmp_path / str(ranks))}
        assert launch(Path(__file__).with_name("draws_of_ranks.py"), spec, ranks=ranks, errors=errors) == [0] * ranks, (
            errors
        )
        found.append(torch.load(spec["out"], weights_only=True))
    for other in found[1:]:
        for name, drawn in found[0].items():
            assert torch.equal(other[name], drawn), name
    assert 0 < (found[0]["dropout"] == 0).float().mean() < 1
