"""Console and tables that the verbs print with."""

from __future__ import annotations

import os

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def console() -> Console:
    """The console that verbs print to; 160 columns wide where neither a terminal nor COLUMNS sets the width."""
    output = Console(highlight=False)
    if not output.is_terminal and "COLUMNS" not in os.environ:
        output.width = 160
    return output


def table(*columns: str, numbers: int = 0) -> Table:
    """A table whose first column is never truncated; the `numbers` columns after it are right-aligned."""
    result = Table(*map(escape, columns), box=SIMPLE_HEAD, pad_edge=False)
    result.columns[0].overflow = "fold"
    for column in result.columns[1 : 1 + numbers]:
        column.justify = "right"
        column.no_wrap = True
    return result


def add_row(target: Table, *cells: str) -> None:
    """A row of plain text: square brackets are not markup."""
    target.add_row(*map(escape, cells))
