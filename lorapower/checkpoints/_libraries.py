"""The libraries that the tool needs: named where they are missing, and silenced."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

from ..errors import InputError

# The libraries that the work of each extra imports.
_LIBRARIES = {"checkpoints": ("gguf", "peft", "transformers")}


def require(extra: str) -> None:
    """Raise `InputError` unless the libraries of an extra of this package are installed."""
    if missing := [name for name in _LIBRARIES[extra] if find_spec(name) is None]:
        raise InputError(
            f"libraries of the extra {extra}",
            allowed="installed",
            given=f"no {', no '.join(missing)}",
            remedy=f"install the extra `{extra}` of lorapower (pip install 'lorapower[{extra}]')",
        )
    with warnings.catch_warnings():
        # They import it, and without widgets in a notebook it warns of plain bars.
        warnings.filterwarnings("ignore", "IProgress not found")
        import tqdm.auto  # noqa: F401


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' bars and reports within a block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft uses a name that transformers has replaced.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
