"""Match the classes of two data sets by name."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence

from sparse_mlp.errors import UserError


def match_classes(trained: Sequence[str], names: Sequence[str]) -> list[int]:
    """For each class in `names` its number in `trained`.

    `names` may lack classes. Raises UserError naming those that `trained` lacks. An accent counts the same whether the
    file system stores it as one character or two.
    """
    numbers = {_composed(name): number for number, name in enumerate(trained)}
    unknown = [name for name in names if _composed(name) not in numbers]
    if not unknown:
        return [numbers[_composed(name)] for name in names]
    parts = []
    for name in unknown[:5]:
        near = difflib.get_close_matches(name, trained, n=1, cutoff=0.6)
        parts.append(f"{name!r}" + (f" (nearest: {near[0]!r})" if near else ""))
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    known = ", ".join(map(repr, trained[:10])) + (", ..." if len(trained) > 10 else "")
    raise UserError(f"classes that the model was not trained on: {', '.join(parts)}{more}; it knows {known}")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
