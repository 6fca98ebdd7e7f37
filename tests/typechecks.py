"""Annotations that are checked when the package's functions return, shapes by name included.

This is a plugin, ``pytest -p typechecks``; `test_annotations` runs it on some tests. Functions that
are given what their annotations exclude refuse it themselves. So arguments are checked only once a
function has returned: what is found then is an annotation that is not true.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import get_annotations, isclass, signature
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Self, Union, get_args, get_origin

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

PACKAGE = Path(__file__).resolve().parent.parent / "lorapower"
INTEGERS_ARE_FLOATS = BeartypeConf(is_pep484_tower=True)
# Whether annotations are checked in this run.
installed = False
# Compiled functions are no Python functions.
UNCHECKED = {"lorapower.training._compiled"}


def modules() -> list[str]:
    """The modules whose annotations are checked; packages have no functions of their own."""
    paths = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths}
    return sorted(names - UNCHECKED)


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin of pytest: check the annotations of all modules, none of which is there yet."""
    global installed
    # Beartype picks items of lists by it, also where a strategy draws.
    config.addinivalue_line(
        "filterwarnings", "ignore:Do not use the `random` module inside strategies"
    )
    jaxtyping.install_import_hook(modules(), f"{__name__}.checked")
    installed = True


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of the two functions that jaxtyping makes of each, check the one called after its return."""
    *_, last = "", *signature(function).parameters
    if not (last.startswith("ret") and last[3:].isdigit()):
        return function
    hints = get_annotations(function).items()
    function.__annotations__ = {name: _known(hint) for name, hint in hints}
    return beartype(conf=INTEGERS_ARE_FLOATS)(function)


def _known(hint: Any) -> Any:
    """``hint``, or any value's where beartype does not know it, or one of several that it is."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType) and Any in map(_known, get_args(hint)):
        return Any
    generic_tuple = isclass(kind) and issubclass(kind, tuple) and issubclass(kind, Generic)
    protocol = getattr(kind, "_is_protocol", False)
    # `Self` it knows only within classes that it decorates.
    return Any if hint is Self or generic_tuple or protocol else hint
