"""Folders for results: checked before any work, and complete or not there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

from ._errors import InputError, ResultsError


def digest(file: Path) -> str:
    """Compute the SHA-256 digest of a file, again only if its size or time has changed."""
    about = file.stat()
    return _digest(file, about.st_size, about.st_mtime_ns)


@functools.cache
def _digest(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Find the versions of the packages on which results depend."""
    names = "loraplan", "torch", "transformers", "peft"
    return {name: metadata.version(name) for name in names}


def nearest(folder: Path) -> Path:
    """Find the folder, or the first above it that exists."""
    return next(part for part in (folder, *folder.parents) if part.exists())


def require_apart(name: str, place: Path | str, inputs: Iterable[Path | str]) -> None:
    """Refuse a folder to write to that is, has or lies in a folder or file that is read."""
    folder = Path(place).expanduser()
    for other in (Path(each).expanduser() for each in inputs):
        one, read = folder.resolve(), other.resolve()
        if one.is_relative_to(read) or read.is_relative_to(one):
            raise InputError(name, "apart from all that is read", f"{folder}, where {other} is")


def require_free(
    name: str, place: Path | str, *, overwrite: bool, own: Collection[str] = ()
) -> Path:
    """Find the folder to write to: new, empty or, to overwrite, with all ``own`` files alone."""
    folder = Path(place).expanduser()
    above = nearest(folder.absolute().parent)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(name, "in a folder that can be written to", f"{folder}, in {above}")
    names = _names(folder)
    if names and not (overwrite and names == {*own}):
        others = sorted(names - {*own})
        given = f"{folder}, with {others[0]}" if others and folder.is_dir() else folder
        remedy = "name another"
        if names == {*own}:
            remedy += ", or replace it with --overwrite (overwrite=True)"
        raise InputError(name, "a new folder, or one that this command has written", given, remedy)
    return folder


def _names(folder: Path) -> set[str]:
    """Name what is in a folder; a file names itself."""
    if not folder.is_dir():
        return {folder.name} if folder.exists() else set()
    return {path.name for path in folder.iterdir()}


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise `ResultsError` for a folder that cannot be written."""
    try:
        yield
    except ResultsError:
        raise
    except (OSError, SafetensorError) as error:
        problem = f"cannot be written ({getattr(error, 'strerror', None) or error})"
        remedy = "make room or give access, or name another folder"
        raise ResultsError(folder, problem, remedy=remedy) from error


@contextlib.contextmanager
def write_folder(folder: Path, *, own: Collection[str] = ()) -> Iterator[Path]:
    """Give a folder to fill, which takes its name when complete and is gone if anything fails.

    It takes the place of one with all ``own`` files and nothing else.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)
            if folder.exists():
                if (names := _names(folder)) and names != {*own}:
                    problem = f"has {', '.join(sorted(names))}, which this command has not written"
                    raise ResultsError(folder, problem, remedy="move it, or name another folder")
                folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:  # an interrupt too
                if old.exists():
                    old.rename(folder)
                raise
