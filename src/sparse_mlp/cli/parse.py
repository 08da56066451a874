"""Command lines to dataclasses with tyro; its errors become one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from sparse_mlp.errors import UserError

T = TypeVar("T")

HELP, HELP_ALL = ("-h", "--help"), "--help-all"


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, description: str = "", default: T | None = None) -> T:
    """`kind` filled from the command line; --help or --help-all prints and exits.

    UserError, one line, for a wrong command line; for an unknown option with the nearest names.
    """
    given, rest = parse_known(kind, arguments, prog=prog, description=description, default=default)
    if rest:
        raise UserError(_unknown(rest[0], given, prog))
    return given


def parse_known(
    kind: type[T], arguments: Sequence[str], *, prog: str, description: str = "", default: T | None = None
) -> tuple[T, list[str]]:
    """`kind` filled from the options that it knows, and the words that are left."""
    words = ["--help" if word == HELP_ALL else word for word in arguments]
    start: Any = tyro.MISSING_NONPROP if default is None else default
    options: Any = {"prog": f"sparse-mlp {prog}", "description": description, "default": start}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=words, return_unknown_args=True, **options)
    except SystemExit as exit_request:
        if not exit_request.code:
            raise
        raise UserError(f"{_first_message(errors.getvalue())} (see sparse-mlp {prog} --help)") from None
    finally:
        if not sys.exc_info()[0]:
            sys.stderr.write(errors.getvalue())


def split_names(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first option, and the rest."""
    count = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return list(arguments[:count]), list(arguments[count:])


def asks_help(arguments: Sequence[str]) -> bool:
    return any(word in (*HELP, HELP_ALL) for word in arguments)


def _first_message(box: str) -> str:
    """The text of a tyro error message up to its first horizontal rule, as one line."""
    # Inside a frame of lines, or indented by two where the terminal has no such characters.
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith(("│ ", "  "))]
    rule = next((i for i, line in enumerate(lines) if line and set(line) <= {"─", "-"}), len(lines))
    message = " ".join(line for line in lines[:rule] if line)
    wrong = re.match(r"Error parsing (--\S+): no type matching (.+?) could be instantiated from \[(.*?)\]\.", message)
    if wrong is not None:
        return f"{wrong[1]} {wrong[3]} is not {wrong[2]}"
    return re.sub(r"^Error parsing \w+: ", "", message)  # of an error of ours, which names its option itself


def _unknown(word: str, known: Any, prog: str) -> str:
    """The message for a word that is no option of a dataclass."""
    name = word.split("=")[0]
    if not name.startswith("-"):
        return f"{word!r} is no option of sparse-mlp {prog}"
    near = difflib.get_close_matches(name, _option_names(known), n=3, cutoff=0.6)
    return (
        f"unknown option {name}"
        + (f"; nearest: {', '.join(near)}" if near else "")
        + f" (see sparse-mlp {prog} --help)"
    )


def _option_names(value: Any, prefix: str = "--") -> list[str]:
    names = []
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        name = prefix + field.name.replace("_", "-")
        names += _option_names(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [name]
    return names
