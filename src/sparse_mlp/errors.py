"""The exception for a user's mistake."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake: the message is one line that names the value, what is allowed and the nearest valid name.

    On the command line it is printed as that line with exit code 2. A plain ValueError is a bug of this package and
    keeps its traceback. `moe/`, `mixing/` and `models/` are called like any torch module and raise ValueError as torch
    does; `jobs.build_model` turns those into UserError.
    """
