"""What an installation has: the package alone, and what needs an extra says so without it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from conftest import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "lorapower").rglob("*.py")
    if not re.search(r"/_|^_", str(path.relative_to(ROOT / "lorapower")))
]
NEEDY = {name for name in MODULES if re.match(r"lorapower\.book\b", name)}
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


def distributions(requirements: Iterable[str]) -> set[str]:
    found = (re.match(r"[\w-]+", each) for each in requirements)
    return {name[0].lower().replace("_", "-") for name in found if name}


def test_without_extras_each_module_is_imported_or_says_what_to_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (distributions(each) for each in project["optional-dependencies"].values())
    wanted = set[str]().union(*extras) - distributions(project["dependencies"]) - {"lorapower"}
    given = metadata.packages_distributions().items()
    hidden = sorted(module for module, of in given if wanted & distributions(of))
    command = [sys.executable, "-c", FAILURES, json.dumps([MODULES, hidden])]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    raised: dict[str, str] = json.loads(found.stdout)
    told = re.compile(r"MissingError: the extra `\w+` must be installed; got no \w+: ")
    assert all(told.match(said) for said in raised.values()), raised
    assert raised.keys() == NEEDY


def test_a_wheel_has_the_package_alone(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("lorapower", "records", "tests", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lorapower"}
    kinds = {Path(name).suffix for name in names if name.startswith("lorapower/")}
    # Of data only what figures show: no texts, no weights.
    assert kinds == {".py", ".typed", ".css", ".js"}
