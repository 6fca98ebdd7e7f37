"""Folders for results: checked before any work, and complete or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import InputError, ResultsError

#: A file with the names of those that were written to its folder with it, one a line.
WRITTEN = ".lorapower"


def nearest(folder: Path) -> Path:
    """Find the folder, or the first above it that exists."""
    return next(part for part in (folder, *folder.parents) if part.exists())


def require_apart(name: str, place: Path | str, inputs: Iterable[Path | str]) -> None:
    """Refuse a folder to write to that is, has or lies in a folder or file that is read."""
    folder = Path(place).expanduser()
    for other in (Path(each).expanduser() for each in inputs):
        one, read = folder.resolve(), other.resolve()
        if one.is_relative_to(read) or read.is_relative_to(one):
            given = f"{folder}, where {other} is"
            raise InputError(name, allowed="apart from all that is read", given=given)


def require_free(name: str, place: Path | str, *, overwrite: bool) -> Path:
    """Find the folder to write to: a new or empty one or, to overwrite, one that has `WRITTEN`."""
    folder = Path(place).expanduser()
    above = nearest(folder.absolute().parent)
    if not above.is_dir() or not os.access(above, os.W_OK):
        allowed = "in a folder that can be written to"
        raise InputError(name, allowed=allowed, given=f"{folder}, in {above}")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    written = (folder / WRITTEN).is_file()
    if not written or not overwrite:
        allowed = "a new folder, or one that this command has written"
        remedy = "name another" + ", or replace it with --overwrite (overwrite=True)" * written
        raise InputError(name, allowed=allowed, given=str(folder), remedy=remedy)
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
def write_folder(folder: Path, *, listed: bool = False) -> Iterator[Path]:
    """Give a folder to fill, which takes its name when complete and is gone if anything fails.

    If it is ``listed`` what is written, another one may replace that, and keeps all else.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)
            if listed:
                names = sorted([WRITTEN, *(file.name for file in new.iterdir())])
                (new / WRITTEN).write_text("".join(f"{name}\n" for name in names))
            if folder.exists():
                _keep_others(folder, new)
                folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:  # an interrupt too
                if old.exists():
                    old.rename(folder)
                raise


def _keep_others(old: Path, new: Path) -> None:
    """Copy to a new folder what others have put in the old one."""
    listing = old / WRITTEN
    written = listing.read_text().splitlines() if listing.is_file() else []
    for file in old.iterdir():
        if file.name in written:
            continue
        if (new / file.name).exists():
            problem = f"has {file.name}, which this command has not written"
            raise ResultsError(old, problem, remedy="move it, or name another folder")
        if file.is_dir() and not file.is_symlink():
            shutil.copytree(file, new / file.name, symlinks=True)
        else:
            shutil.copy2(file, new / file.name, follow_symlinks=False)
