"""One file per published system; importing this package registers every model with timm."""

import timm
from timm.layers import register_notrace_module

from sparse_mlp.mixing.linear import Linear, Mlp
from sparse_mlp.models import as_mlp, cycle_mlp, hire_mlp  # noqa: F401
from sparse_mlp.models.sparse_mlp import SparseBlock, SparseMlp

__all__ = ["SparseBlock", "SparseMlp", "registered_names"]

# Their choice of a product is no part of a traced graph; what derives from them is a leaf of it too.
register_notrace_module(Linear)
register_notrace_module(Mlp)


def registered_names(pattern: str = "*") -> list[str]:
    """Return the names of this package's models that fit a pattern, as `timm.create_model` takes them."""
    return [
        name for name in timm.list_models(pattern) if timm.model_entrypoint(name).__module__.startswith(__name__ + ".")
    ]
