"""The chapters as sources, and as they were executed for the book."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import matplotlib as mpl
import nbformat
import papermill
import pytest
import torch
from cells import CAPTION
from conftest import CHAPTERS, ROOT
from dependencies import code, imported
from nbformat import NotebookNode

from lorapower import InputError

IMAGES = {"image/png", "image/svg+xml"}
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}

PARAMETER_LINE = re.compile(r"\w+: [\w\[\], |]+ = [^#]+  # \S.*")


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def notebook(chapter: Path) -> NotebookNode:
    source: NotebookNode = nbformat.read(chapter, as_version=4)
    return source


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_source_holds_nothing_of_a_run_or_a_machine(notebook: NotebookNode) -> None:
    nbformat.validate(notebook)
    tidy = "run `make tidy`"
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "lorapower"}, tidy
    assert set(notebook.metadata.get("language_info", {})) <= {"name"}, tidy
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "mystnb"}, f"{cell.id}: {tidy}"
        ran = cell.get("outputs") or cell.get("execution_count")
        assert not ran, f"{cell.id}: {tidy}"
        assert "injected-parameters" not in cell.metadata.get("tags", []), cell.id


def private(code: ast.AST) -> set[str]:
    """The private names and modules that code imports."""
    return {name for name in imported(code) if re.search(r"(?:^|\.)_(?!_future__)", name)}


def test_no_chapter_imports_what_is_private(chapter: Path) -> None:
    """Import contracts do not see notebooks."""
    assert private(ast.parse("import a._b\nfrom a import _c, d\nfrom __future__ import e")) == {
        "a._b",
        "a._c",
    }
    assert not private(code(chapter))


def test_claims_and_figures_are_folded(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        if "mystnb" in cell.metadata or re.search(r"\b(claims|figures)\.\w+\(", cell.source):
            folded = FOLDED & {*cell.metadata.get("tags", [])}
            assert folded, f"fold cell {cell.id} by the tag hide-input"
        # What a cell shows, and so what counts, is the value of its last line.
        assert len(re.findall(r"\bclaims\.\w+\(", cell.source)) < 2, f"split cell {cell.id}"


def test_figures_are_described(book: Path, chapter: Path) -> None:
    executed = nbformat.read(book / "_sources" / "chapters" / chapter.name, as_version=4)
    for cell, after in pairwise(executed.cells):
        bundles = [set(output.get("data", {})) for output in cell.get("outputs", ())]
        # Figures to touch describe themselves.
        if not any(IMAGES & bundle and "text/html" not in bundle for bundle in bundles):
            continue
        image = cell.metadata.get("mystnb", {}).get("image", {})
        assert image.get("alt"), f"figure of cell {cell.id} has no alternative text"
        if "remove-cell" not in cell.metadata.get("tags", []):  # else another page shows it
            caption = CAPTION.fullmatch(after.source)
            assert caption, f"figure of cell {cell.id} has no caption below it"
            assert caption["name"].startswith("fig-"), f"name of figure {cell.id}"


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Those of a notebook, without a kernel."""
    module = ModuleType("a_chapter")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    shell = SimpleNamespace(user_ns=vars(module), run_line_magic=lambda *_: None)
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    threads = torch.get_num_threads()
    with mpl.rc_context():
        yield vars(module)
    torch.set_num_threads(threads)


def run_head(notebook: NotebookNode, variables: dict[str, Any], **given: object) -> None:
    """Run the cells with which a chapter begins, as papermill would run them."""
    parameters, first = (cell.source for cell in code_cells(notebook)[:2])
    injected = "".join(f"{name} = {value!r}\n" for name, value in given.items())
    variables["In"] = []
    for cell in (parameters, f"# Parameters\n{injected}", first):
        variables["In"].append(cell)
        exec(compile(cell, "a cell", "exec", dont_inherit=True), variables)


def test_a_chapter_declares_its_parameters_and_refuses_bad_values_in_its_first_line(
    chapter: Path, notebook: NotebookNode, variables: dict[str, Any]
) -> None:
    (cell,) = (c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", []))
    for line in cell.source.splitlines():
        assert PARAMETER_LINE.fullmatch(line), f"not `name: type = value  # comment`: {line}"
    run_head(notebook, variables)
    model, described = variables["Parameters"], papermill.inspect_notebook(chapter)
    assert list(described) == list(model.model_fields)
    assert len(described) == len(cell.source.splitlines())
    assert described["profile"]["default"] == '"quick"'
    for name, about in described.items():
        assert about["inferred_type_name"] != "None", about
        # The book's parameters; ranks may also reach the width.
        assert ast.literal_eval(about["default"]) == model.model_fields[name].default
        schema = model.model_json_schema()["properties"][name]
        for end in ("minimum", "maximum"):
            bound = schema.get("items", schema).get(end)
            stated = bound is None or re.search(rf"\b{bound}\b|to the width", about["help"])
            assert stated, f"say {end} {bound} of {name}: {about['help']}"
    with pytest.raises(InputError, match="nothing_of_the_kind"):
        run_head(notebook, variables, nothing_of_the_kind=1)
    for name, schema in model.model_json_schema()["properties"].items():
        bad = {
            "enum": "no such word",
            "minimum": schema.get("minimum", 0) - 1,
            "maximum": schema.get("maximum", 0) + 1,
            "items": [None],
        }
        for value in (bad[key] for key in bad if key in schema):
            with pytest.raises(InputError, match=rf"\b{name} must be .*; got ") as caught:
                run_head(notebook, variables, **{name: value})
            assert caught.value.name == name, f"{name} = {value!r}"


def snippets(chapter: Path) -> Iterator[str]:
    """What readers are told to run elsewhere: solutions, and cells on how to use it."""
    heading = ""
    for cell in nbformat.read(chapter, as_version=4).cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"(?m)^## (.+)$", cell.source) or [heading])[-1]
            yield from re.findall(r"```python\n(.*?)```", cell.source, flags=re.DOTALL)
        elif heading.startswith("Use it") and not cell.metadata.get("tags"):
            yield cell.source


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_snippets_run_when_copied(chapter: Path) -> None:
    for snippet in snippets(chapter):
        exec(compile(snippet, "a snippet", "exec", dont_inherit=True), {})


COMMANDS = [
    (document, line)
    for document in (ROOT / "README.md", *ROOT.glob("*.md"), *(ROOT / "chapters").iterdir())
    if document.suffix in (".md", ".ipynb")
    for line in re.findall(
        r"make chapter [^`\n]*?NAME=[^`\n]*|papermill chapters/[^`\n]*", document.read_text("utf-8")
    )
]


@pytest.mark.parametrize(
    ("document", "line"), sorted({*COMMANDS}), ids=lambda part: getattr(part, "stem", None)
)
def test_commands_of_the_text_name_a_chapter_and_its_parameters(document: Path, line: str) -> None:
    ending = r"\s*\\+n?\W*$"  # of a string, in a notebook
    tool, *words = shlex.split(re.sub(ending, "", line))
    if tool == "make":
        variables = dict(word.split("=", 1) for word in words if "=" in word)
        name, given = f"{variables['NAME']}*.ipynb", shlex.split(variables.get("ARGS", ""))
    else:
        name, given = Path(words[0]).name, words[2:]
    (named,) = (ROOT / "chapters").glob(name)
    assert given[::3] == ["-p"] * len(given[::3])
    assert {*given[1::3]} <= {*papermill.inspect_notebook(named)}
    if document.suffix == ".ipynb":
        assert named == document, "a chapter's own, so that no number is forgotten"
