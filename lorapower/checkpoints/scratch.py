"""Folders for what is too large to hold in memory, gone with whatever they belong to."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path


def folder(owner: object) -> Path:
    """A new empty folder that is removed with its owner, or when the program ends."""
    place = Path(tempfile.mkdtemp(prefix="lorapower-"))
    weakref.finalize(owner, shutil.rmtree, place, ignore_errors=True)
    return place
