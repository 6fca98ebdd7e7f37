"""What holds for the package and its documents as a whole."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from pkgutil import resolve_name

import checkpoint_files as files
import nbformat
import pytest
import typer
from conftest import CHAPTERS, ROOT

from loraplan import _command
from records import pairs

MODULES = sorted((ROOT / "lorapower").rglob("*.py"))
# Chapters with code in their text, most of it in solutions of exercises.
CODED = [c for c in CHAPTERS if c.stem[0].isdigit() and "```python" in c.read_text("utf-8")]
DOCUMENTS = [ROOT / "README.md", ROOT / "chapters" / "reference" / "examples.md", *CHAPTERS]
FIRST = [
    ROOT / "README.md",
    ROOT / "loraplan" / "README.md",
    ROOT / "index.md",
    ROOT / "chapters" / "quickstart.md",
]
CODE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def small_example(folder: Path) -> Path:
    """What `loraplan example` makes, with checkpoints that take seconds less to plan for."""
    files.pair(folder)
    texts = (json.dumps({"text": text}) for text in files.texts())
    (folder / "texts.jsonl").write_text("\n".join(texts))
    return folder


@pytest.mark.parametrize("document", [*DOCUMENTS[:2], *CODED], ids=lambda path: path.stem)
def test_code_in_the_text_runs(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pairs, "example", lambda: small_example(tmp_path))
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
        "from lorapower.constructions import *\n"
        "from lorapower.lowrank import LowRank\n"
        "from lorapower.networks import FNN, Gap, LinearNetwork, Partition, Transformer\n"
        "from lorapower.regions import Ball, Box, Samples\n",
        names,
    )
    for indent, block in blocks:
        exec(re.sub(f"^{indent}", "", block, flags=re.MULTILINE), names)


def test_commands_of_the_text_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))
    given = re.findall(r"^(?:export )?(\w+) *\?=", makefile, re.MULTILINE)
    variables = {"ARGS", "DASK_SCHEDULER_ADDRESS", "LAB_ARGS", "NAME", *given}
    for document in (*ROOT.glob("*.md"), *ROOT.glob("chapters/*.md")):
        text = document.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:^ *|`)make ([a-z]+)", text, re.MULTILINE)) <= commands, (
            document.name
        )
        assert set(re.findall(r"(?<!--adapter )\b([A-Z_]{3,})=", text)) <= variables, document.name


@pytest.mark.parametrize("page", FIRST, ids=lambda path: path.stem)
def test_commands_that_are_shown_are_understood(page: Path) -> None:
    commands = typer.main.get_command(_command.app).commands  # type: ignore[attr-defined]
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")  # lines that go on
    lines = re.findall(r"^loraplan (.*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        if arguments != ["--help"]:
            commands[name].make_context(name, arguments)


def test_layout_of_the_text_is_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.MULTILINE))
    for path in re.findall(r"`([^`]+)`", " ".join(rows)):
        assert (ROOT / path).exists(), path
    modules = {path.relative_to(ROOT / "lorapower") for path in MODULES}
    top = {path.parts[0].removesuffix(".py") for path in modules}
    row = rows["`lorapower/`"]
    named = set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row)))
    assert named == {name for name in top if not name.startswith("_")}
    for wing, inside in re.findall(r"`(\w+)` \((`.*?)\)", row):
        for name in re.findall(r"`(\w+)`", inside):
            assert {Path(wing, name, "__init__.py"), Path(wing, f"{name}.py")} & modules, name
    for name in re.findall(r"`(lorapower(?:\.\w+)+)`", text):
        assert resolve_name(name), name


def test_text_files_speak_of_the_project_alone() -> None:
    machine = re.compile(r"(?<![\w.])/(?:home|root|work|tmp)/|pypi\.org|pythonhosted|debian\.org")
    for path in [*DOCUMENTS, *MODULES, ROOT / "constraints.txt", ROOT / "pyproject.toml"]:
        found = machine.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.name} names {found and found.group()}"


def test_modules_cite_statements_by_labels_that_exist() -> None:
    sources = "".join(chapter.read_text(encoding="utf-8") for chapter in CHAPTERS)
    known = re.findall(r":label: ([\w-]+)", sources)
    assert len(known) == len(set(known))
    modules = "".join(module.read_text(encoding="utf-8") for module in MODULES)
    cited = set(re.findall(r"\[((?:ass|cor|def|lem|obs|prop|rem|thm)-[a-z-]+)\]", modules))
    assert {"thm-optimal-adaptation", "thm-partition", "thm-transformer"} <= cited
    assert cited <= set(known), f"no statement is labelled {sorted(cited - set(known))}"


# What is defined, assumed or remarked is not checked.
STATED = re.compile(
    r"\{prf:(?:theorem|proposition|lemma|corollary|observation)\}[^\n]*\n:label: (\S+)"
)
CLAIM = re.compile("claims.(equal|at_most|at_least)")


def test_each_statement_has_a_claim() -> None:
    """In the chapters' sources; that it holds is a matter of their execution."""
    stated: set[str] = set()
    claimed: set[str] = set()
    for path in CHAPTERS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                stated.update(STATED.findall(source))
                continue
            for call in ast.walk(ast.parse(re.sub("(?m)^[%!].*", "", source))):
                if isinstance(call, ast.Call) and CLAIM.fullmatch(ast.unparse(call.func)):
                    assert isinstance(call.args[1], ast.Constant), ast.unparse(call)
                    claimed.add(str(call.args[1].value))
    assert len(stated) > 60
    assert not stated - claimed
