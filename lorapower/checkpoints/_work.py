"""Results of finished stages, kept in a folder so that a run that was killed goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from ._folders import writing

# What results in a folder are of.
_ABOUT = "about.json"
_Kept = TypeVar("_Kept")


class Work:
    """Tensors by name in a folder, each written whole or not at all; without a folder nothing.

    Raises `InputError` for a folder with something else than results ``about`` the same, and
    `ResultsError` for one that cannot be written.
    """

    def __init__(self, folder: Path | str | None, about: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder).expanduser()
        if self._folder is None:
            return
        text = json.dumps(about, sort_keys=True, indent=2)
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / _ABOUT
            there = file.read_text("utf-8") if file.is_file() else None
            others = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
            if there != text and others:
                allowed = "a new folder, or that of a run with these models, texts and options"
                remedy = "name another folder, or remove this one"
                raise InputError("work", allowed=allowed, given=str(folder), remedy=remedy)
            if there is None:
                partial = file.with_name(f".{_ABOUT}.{os.getpid()}")
                partial.write_text(text, encoding="utf-8")
                partial.replace(file)

    def find(self, name: str) -> Any:
        """Find what was saved by a name; ``None`` if nothing was."""
        file = self._folder and self._folder / f"{name}.pt"
        if file and file.is_file():
            # One that is damaged is computed again.
            with suppress(EOFError, OSError, RuntimeError, UnpicklingError):
                return torch.load(file, weights_only=True)
        return None

    def save(self, name: str, value: Any) -> None:
        """Save tensors, in place of what was saved by this name."""
        if self._folder is None:
            return
        with writing(self._folder):
            partial = self._folder / f".{name}.{os.getpid()}"
            try:
                torch.save(value, partial)
                partial.replace(self._folder / f"{name}.pt")
            except RuntimeError as error:
                # As torch says it of a disk that is full.
                raise OSError(str(error).splitlines()[0]) from error
            finally:
                partial.unlink(missing_ok=True)

    def keep(self, name: str, compute: Callable[[], _Kept]) -> _Kept:
        """Compute something once."""
        found = self.find(name)
        if found is None:
            found = compute()
            self.save(name, found)
        return found


def digest(tensors: Iterable[Tensor]) -> str:
    """A short digest of numbers."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
