"""What an installation adds to the names that Python imports: the package alone."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's folders of Python, and what an installation reads."""
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("lorapower", "records", "tests", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(checkout: Path, kind: str, folder: Path) -> zipfile.ZipFile:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, check=True)
    (made,) = folder.glob("*.whl")
    return zipfile.ZipFile(made)


def test_a_wheel_has_the_package_alone(checkout: Path, tmp_path: Path) -> None:
    names = build(checkout, "wheel", tmp_path).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lorapower"}
    kinds = {Path(name).suffix for name in names if name.startswith("lorapower/")}
    # Of data only what figures show: no texts, no weights.
    assert kinds == {".py", ".typed", ".css", ".js"}


def test_an_editable_installation_finds_the_package_alone(checkout: Path, tmp_path: Path) -> None:
    files = build(checkout, "editable", tmp_path)
    (finder,) = (name for name in files.namelist() if name.endswith("_finder.py"))
    (path,) = (name for name in files.namelist() if name.endswith(".pth"))
    mapping = re.search(r"^MAPPING[^=]*= (\{.*\})$", files.read(finder).decode(), re.MULTILINE)
    assert mapping
    assert ast.literal_eval(mapping[1]) == {"lorapower": str(checkout / "lorapower")}
    # No folder that would be on the path as a whole.
    assert files.read(path).decode().startswith("import ")
