"""What needs an extra says so where a library of it is missing; all else needs no extra."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata

from conftest import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "lorapower").rglob("*.py")
    if not re.search(r"/_|^_", str(path.relative_to(ROOT / "lorapower")))
]
# What each module raises where libraries are hidden from it.
FAILURES = """
import importlib, json, sys
modules, hidden = json.loads(sys.argv[1])
sys.modules |= dict.fromkeys(hidden)
raised = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raised[module] = f"{type(error).__name__}: {error}"
print(json.dumps(raised))
"""
NEEDY = {name for name in MODULES if re.match(r"lorapower\.(book|experiments)\b", name)}


def distributions(requirements: Iterable[str]) -> set[str]:
    found = (re.match(r"[\w-]+", each) for each in requirements)
    return {name[0].lower().replace("_", "-") for name in found if name}


def libraries() -> list[str]:
    """List the modules that extras install, without those of the package's own dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (distributions(each) for each in project["optional-dependencies"].values())
    wanted = set[str]().union(*extras) - distributions(project["dependencies"]) - {"lorapower"}
    given = metadata.packages_distributions().items()
    return sorted(module for module, of in given if wanted & distributions(of))


def test_without_extras_each_module_is_imported_or_says_what_to_install() -> None:
    command = [sys.executable, "-c", FAILURES, json.dumps([MODULES, libraries()])]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    raised: dict[str, str] = json.loads(found.stdout)
    told = re.compile(r"MissingError: the extra `\w+` must be installed; got no \w+: ")
    assert all(told.match(said) for said in raised.values()), raised
    assert raised.keys() == NEEDY
