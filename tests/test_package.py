"""What holds for the package and its documents as a whole."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from conftest import CHAPTERS, ROOT

MODULES = sorted((ROOT / "lorapower").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "index.md", *CHAPTERS]
CODE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


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
        "from lorapower import adapters, bounds, lowrank, networks, randomness, regions\n"
        "from lorapower.adapters import Adapters\n"
        "from lorapower.constructions import fnn, linear, partition, transformer\n"
        "from lorapower.experiments import synthetic\n"
        "from lorapower.experiments.synthetic import Setting\n"
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
