"""Folders for results: checked before any work, and complete or not there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import InputError, ResultsError

#: A file with the digests and the names of those that were written to its folder with it.
WRITTEN = ".lorapower"


def digest(file: Path) -> str:
    """Compute the SHA-256 digest of a file, again only if its size or time has changed."""
    about = file.stat()
    return _digest(file, about.st_size, about.st_mtime_ns)


@functools.cache
def _digest(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sample(folder: Path) -> str:
    """Compute a digest of configurations and of pieces of all weights in a folder.

    Of each file of weights 64 pieces of 4 kB are read, evenly spaced, besides its name and size.
    """
    found = hashlib.sha256()
    for file in sorted([*folder.glob("*config.json"), *folder.glob("adapter_model.bin")]):
        found.update(file.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for k in range(64):
                opened.seek(k * max(size - 4096, 0) // 63)
                found.update(opened.read(4096))
    return found.hexdigest()[:16]


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
    if changed := [file for file, unchanged in _written(folder).items() if not unchanged]:
        given, remedy = f"{folder}, where {changed[0]} is another", "move that, or name another"
        allowed = "a folder whose files are as this command wrote them"
        raise InputError(name, allowed=allowed, given=given, remedy=remedy)
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
                files = sorted(file for file in new.rglob("*") if file.is_file())
                lines = (f"{digest(file)}  {file.relative_to(new).as_posix()}\n" for file in files)
                (new / WRITTEN).write_text("".join(lines), encoding="utf-8")
            if folder.exists():
                _keep_others(folder, new)
                folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:  # an interrupt too
                if old.exists():
                    old.rename(folder)
                raise


def rewrite(folder: Path, name: str, text: str) -> None:
    """Replace a file in a folder, as a whole or not at all.

    If it was as this command wrote it, the list in the folder follows, so that it still is.
    """
    listing, unchanged = folder / WRITTEN, _written(folder).get(name)
    with writing(folder):
        _replace(folder / name, text)
        if unchanged:
            lines = listing.read_text("utf-8").splitlines()
            own = f"{digest(folder / name)}  {name}"
            kept = (own if line.partition("  ")[2] == name else line for line in lines)
            _replace(listing, "\n".join(kept) + "\n")


def _replace(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def _written(folder: Path) -> dict[str, bool]:
    """Which files of a folder were written with its list, and whether they are as they were."""
    listing = folder / WRITTEN
    lines = listing.read_text("utf-8", "replace").splitlines() if listing.is_file() else []
    known = {name: kept for kept, _, name in (line.partition("  ") for line in lines)}
    return {n: digest(folder / n) == kept for n, kept in known.items() if (folder / n).is_file()}


def _keep_others(old: Path, new: Path) -> None:
    """Copy to a new folder what others have put in the old one."""
    own = {WRITTEN, *(name for name, unchanged in _written(old).items() if unchanged)}
    for file in sorted(old.rglob("*")):
        place = new / file.relative_to(old)
        if file.is_dir() and not file.is_symlink():
            place.mkdir(exist_ok=True)
        elif file.relative_to(old).as_posix() not in own:
            if place.exists():
                problem = f"has {file.name}, which this command has not written"
                raise ResultsError(old, problem, remedy="move it, or name another folder")
            shutil.copy2(file, place, follow_symlinks=False)
