from __future__ import annotations

import pytest

from sparse_mlp.moe import kernels
from sparse_mlp.moe.kernels import library

BACKENDS = ("C", "grouped", "plain")


def use_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a compiler, on one without, and with SPARSE_MLP_KERNELS=plain."""
    monkeypatch.setenv(kernels.VARIABLE, "plain" if name == "plain" else "auto")
    if name == "C":
        library.load.cache_clear()
        if isinstance(library.load(), str):
            pytest.skip(f"C kernels: {library.load()}")
    else:
        monkeypatch.setattr(library, "load", lambda: "none, for a test")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with each backend in turn."""
    use_backend(request.param, monkeypatch)
    return request.param
