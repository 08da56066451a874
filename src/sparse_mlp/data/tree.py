"""The files of a folder, or of a ZIP archive, by their names in it."""

from __future__ import annotations

import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import IO

from sparse_mlp.data.decode import BadImageError, display_name
from sparse_mlp.data.files import is_hidden


class Tree:
    """The files below a folder, or in an archive; names are relative to it, with slashes.

    Copies in other processes open the archive anew: a file handle that two processes share has one position.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._process = -1

    @cached_property
    def names(self) -> list[str]:
        """All files in order, hidden ones left out."""
        if self.path.is_dir():
            found = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())
            names = [path.as_posix() for path in found]
        else:
            names = [name for name in self._zip().namelist() if not name.endswith("/")]
        return sorted(name for name in names if not any(is_hidden(part) for part in name.split("/")))

    def open(self, name: str) -> IO[bytes]:
        """BadImageError naming the file if it cannot be opened."""
        try:
            return (self.path / name).open("rb") if self.path.is_dir() else self._zip().open(name)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadImageError(f"cannot read {self.display(name)}: {reason}") from error

    def display(self, name: str) -> str:
        """What an error calls a file."""
        return display_name(self.path / name)

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None or self._process != os.getpid():
            try:
                self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()
            except zipfile.BadZipFile as error:
                raise BadImageError(f"cannot read {display_name(self.path)}: {error}") from error
        return self._archive

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_archive": None, "_process": -1}
