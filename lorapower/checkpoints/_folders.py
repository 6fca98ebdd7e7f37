"""Folders for results: checked before any work, and complete or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import InputError, ResultsError


def nearest(folder: Path) -> Path:
    """Find the folder, or the first above it that exists."""
    return next(part for part in (folder, *folder.parents) if part.exists())


def require_free(name: str, place: Path | str, force: bool, sign: str) -> Path:
    """Find the folder to write to: a new one or, with ``force``, one with the file ``sign``."""
    folder = Path(place).expanduser()
    above = nearest(folder.absolute().parent)
    if not above.is_dir() or not os.access(above, os.W_OK):
        allowed = "in a folder that can be written to"
        raise InputError(name, allowed=allowed, given=f"{folder}, in {above}")
    if not folder.exists():
        return folder
    if not force:
        remedy = "name another, or replace it with --force (force=True)"
        allowed = "a folder that does not exist"
        raise InputError(name, allowed=allowed, given=str(folder), remedy=remedy)
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / sign).is_file()):
        allowed = f"a new folder, or one with {sign} to replace"
        raise InputError(name, allowed=allowed, given=str(folder))
    return folder


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise `ResultsError` for a folder that cannot be written."""
    try:
        yield
    except ResultsError:
        raise
    except (OSError, SafetensorError) as error:
        raise ResultsError(
            folder,
            f"cannot be written ({getattr(error, 'strerror', None) or error})",
            remedy="make room or give access, or name another folder",
        ) from error


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes its name when complete and is gone if anything fails."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
