"""The files of a folder, or of a ZIP archive, by their names in it."""

from __future__ import annotations

import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from sparse_mlp.data.decode import BadImageError, display_name
from sparse_mlp.data.files import is_hidden


class Tree:
    """The files below a folder, or in an archive; names are relative to it, with slashes.

    An archive whose files all lie in a folder of its own name, as val2017.zip has val2017/, is that folder. Copies in
    other processes open the archive anew: a file handle that two processes share has one position.
    """

    def __init__(self, path: Path) -> None:
        """BadImageError for an archive that cannot be read."""
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._process = -1
        self._prefix = ""
        if not path.is_dir():
            own, names = f"{path.stem}/", self._zip().namelist()
            self._prefix = own if all(name.startswith(own) for name in names) else ""

    @cached_property
    def names(self) -> list[str]:
        """All files in order, hidden ones left out."""
        if self.path.is_dir():
            found = [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]
        else:
            found = [name[len(self._prefix) :] for name in self._zip().namelist() if not name.endswith("/")]
        return sorted(name for name in found if not any(is_hidden(part) for part in name.split("/")))

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def open(self, name: str) -> IO[bytes]:
        """BadImageError naming the file if it cannot be opened; anything but a regular file is refused unopened."""
        try:
            if not self.path.is_dir():
                return self._zip().open(self._prefix + name)
            path = self.path / name
            if path.exists() and not path.is_file():
                raise OSError(0, "not a regular file")
            return path.open("rb")
        except (OSError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadImageError(f"cannot read image {self.display(name)}: {reason}") from error

    def display(self, name: str) -> str:
        """What an error calls a file."""
        return display_name(self.path / name)

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None or self._process != os.getpid():
            try:
                self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()
            except (OSError, zipfile.BadZipFile) as error:
                raise BadImageError(f"{display_name(self.path)} cannot be read as a zip: {error}") from error
        return self._archive

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_archive": None, "_process": -1, "_prefix": self._prefix}
