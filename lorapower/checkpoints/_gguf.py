"""Models in GGUF, dequantized once to a folder that transformers loads."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, ResultsError
from ._folders import write_folder
from ._libraries import quiet, reason, require

# Notices on the stream for errors; a higher level of this logger silences them.
_LOG = logging.getLogger("lorapower")
# In the folder of a model that was dequantized: the digest of the file that it is from.
_SOURCE = "gguf.sha256"


def dequantize(file: Path, name: str) -> Path:
    """The folder with a file's model in float32, which is made once and kept beside Python.

    Where that cannot be written to, it is in the user's cache. A kept one from another file is made
    anew.
    """
    source = digest(file)
    beside, cache = _places()
    for folder in (beside / name, cache / name):
        if _kept_from(folder) == source:
            return folder
    require("checkpoints")
    import filelock

    above = next(part for part in (beside, *beside.parents) if part.exists())
    folder = (beside if os.access(above, os.W_OK) else cache) / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be at it.
        with filelock.FileLock(folder.with_name(f".{name}.lock")):
            if _kept_from(folder) != source:
                said = "Dequantizing %s to %s: once, about half a minute for a small model."
                _LOG.warning(said, file.name, folder)
                _keep(file, folder, source)
    except ResultsError:
        raise
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise ResultsError(folder, problem, remedy="make room, or give access") from error
    return folder


def _places() -> tuple[Path, Path]:
    """Where models are kept: beside the environment, and in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(sys.prefix, "share", "lorapower"), cache / "lorapower"


def is_dequantized(folder: Path) -> bool:
    """Whether the weights in a folder were dequantized to it."""
    return bool(_kept_from(folder))


def _kept_from(folder: Path) -> str:
    """The digest of the file that a kept model is from; empty if there is none."""
    with contextlib.suppress(OSError):
        return (folder / _SOURCE).read_text(encoding="utf-8").strip()
    return ""


def digest(file: Path) -> str:
    about = file.stat()
    return _digest_of(file, about.st_size, about.st_mtime_ns)


@functools.cache
def _digest_of(file: Path, size: int, changed: int) -> str:
    """The SHA-256 digest of a file, read again only if its size or time has changed."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _keep(file: Path, folder: Path, digest: str) -> None:
    """Write a file's model and tokenizer to a folder."""
    network, tokenizer = _read_gguf(file)
    with write_folder(folder) as partial:
        with quiet():
            network.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        (partial / _SOURCE).write_text(f"{digest}\n", encoding="utf-8")


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """The dequantized network of a file in GGUF, which can be saved, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        # A bar of tqdm's is not transformers' to silence.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
            read = AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=torch.float32, **where
            )
    except Exception as error:  # whatever the reader of a file like any other raises
        raise InputError(
            "model",
            allowed="a file in GGUF of a language model that transformers reads",
            given=f"{str(file)!r} ({type(error).__name__}: {reason(error)})",
        ) from error
    # What was read counts as quantized, which transformers does not save.
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    with torch.device("meta"):
        network = type(read)(type(read.config)(**values))
    network.load_state_dict(read.state_dict(), assign=True)
    network.tie_weights()
    return network, tokenizer
