"""How the verbs print: a console and a table."""

from __future__ import annotations

import os

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where a verb prints; wider than rich's 80 columns where no terminal says its width."""
    made = Console(stderr=stderr, quiet=quiet, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 160
    return made


def table(*columns: str, numbers: int = 0) -> Table:
    """A table whose first column is never cut and whose columns from the second on hold `numbers` numbers."""
    made = Table(*map(escape, columns), box=SIMPLE_HEAD, pad_edge=False)
    made.columns[0].overflow = "fold"
    for column in made.columns[1 : 1 + numbers]:
        column.justify = "right"
        column.no_wrap = True
    return made


def add_row(shown: Table, *cells: str) -> None:
    """A row of plain text: square brackets are not markup."""
    shown.add_row(*map(escape, cells))
