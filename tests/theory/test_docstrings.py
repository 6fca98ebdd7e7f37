"""The examples in docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import lorapower

MODULES = [module.name for module in pkgutil.walk_packages(lorapower.__path__, "lorapower.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not result.failed
    assert result.attempted == inspect.getsource(module).count(">>> ")
