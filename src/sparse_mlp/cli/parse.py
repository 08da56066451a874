"""Command lines to dataclasses with tyro, whose error boxes become one-line messages."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import tyro

from sparse_mlp.errors import UserError

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """`kind` filled from the command line; --help prints and leaves. ValueError, one line, for a wrong command line."""
    errors = io.StringIO()
    start: Any = tyro.MISSING_NONPROP if default is None else default
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind, args=list(arguments), prog=f"sparse-mlp {prog}", description=description, default=start
            )
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise UserError(_one_line(errors.getvalue(), prog)) from None
    finally:
        if not sys.exc_info()[0]:
            sys.stderr.write(errors.getvalue())


def split_names(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first option, and the rest."""
    count = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return list(arguments[:count]), list(arguments[count:])


def run_action(
    command: str, actions: Mapping[str, Callable[[list[str]], None]], arguments: list[str], usage: str
) -> int:
    """Call the action of a command that its first word names. ValueError, with the nearest name, for an unknown one."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage)
        return 0 if arguments else 2
    if arguments[0] not in actions:
        near = difflib.get_close_matches(arguments[0], actions, 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise UserError(f"unknown action {arguments[0]!r} of {command}; allowed are {', '.join(actions)}{hint}")
    actions[arguments[0]](arguments[1:])
    return 0


def option(options: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE` before anything is parsed, for what other defaults depend on.

    ValueError if it is given twice.
    """
    found = [word.removeprefix(f"--{name}=") for word in options if word.startswith(f"--{name}=")]
    found += [after for word, after in pairwise(options) if word == f"--{name}"]
    if len(found) > 1:
        raise UserError(f"--{name} takes one value, not {len(found)} ({', '.join(found)})")
    return found[0] if found and not found[0].startswith("--") else None


def _one_line(box: str, prog: str) -> str:
    """The message of tyro's framed error, and the options it would rather have seen."""
    # Inside a frame of lines, or indented by two where the terminal has no such characters.
    framed = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines() if line.startswith(("│ ", "  "))]
    lines = [line.strip("│ ") for line in framed]
    ends = [i for i, line in enumerate(lines) if line and set(line) <= {"─", "-"}] or [len(lines)]
    message = " ".join(line for line in lines[: ends[0]] if line)
    if any(line.startswith("Perhaps you meant") for line in lines):
        near = [match[0] for line in lines[ends[0] :] if (match := re.match(r"--[a-z][\w.-]*", line))]
        message += f"; nearest: {', '.join(near[:3])}"
    return f"{message} (see sparse-mlp {prog} --help)"
