"""What holds for the package and its documents as a whole."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from conftest import CHAPTERS, ROOT

# Each may import those before it.
ORDER = (
    "errors",
    "_checks",
    "lowrank",
    "regions",
    "networks",
    "adapters",
    "bounds",
    "constructions",
    "training",
    "sweeps",
    "experiments",
    "digits",
    "finetuning",
    "parameters",
    "claims",
    "figures",
)
MODULES = sorted((ROOT / "lorapower").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "index.md", *CHAPTERS]
CODE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def imported(path: Path) -> set[str]:
    """Modules of the package that the file imports, by their first name."""
    package = ["lorapower", *path.relative_to(ROOT / "lorapower").parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            source = [part for part in source if part][1:]
            found |= {source[0]} if source else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            assert "lorapower" not in ast.unparse(node), "imports within the package are relative"
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    first = path.relative_to(ROOT / "lorapower").parts[0].removesuffix(".py")
    if first == "__init__":
        return
    assert first in ORDER, f"give {first} its place in ORDER"
    for name in imported(path) - {first}:
        assert ORDER.index(name) < ORDER.index(first), f"{first} imports {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_code_in_the_text_runs(document: Path) -> None:
    if document.suffix == ".ipynb":
        cells = nbformat.read(document, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = document.read_text(encoding="utf-8")
    blocks = CODE.findall(text)
    assert blocks, "no code in the text"
    names: dict[str, object] = {}
    exec(
        "import torch\n"
        "from lorapower import adapters, bounds, experiments, lowrank, networks, regions\n"
        "from lorapower.adapters import Adapters\n"
        "from lorapower.constructions import fnn, linear, partition, transformer\n"
        "from lorapower.experiments import Setting\n"
        "from lorapower.lowrank import LowRank\n"
        "from lorapower.networks import FNN, LinearNetwork, Partition, Transformer\n"
        "from lorapower.regions import Ball, Box, Samples\n",
        names,
    )
    for indent, block in blocks:
        exec(re.sub(f"^{indent}", "", block, flags=re.MULTILINE), names)


def test_text_files_speak_of_the_project_alone() -> None:
    machine = re.compile(r"(?<![\w.])/(?:home|root|work|tmp)/|pypi\.org|pythonhosted|debian\.org")
    for path in [*DOCUMENTS, *MODULES, ROOT / "constraints.txt", ROOT / "pyproject.toml"]:
        found = machine.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.name} names {found and found.group()}"
