"""What the Makefile and its tools promise, on a small book."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import execute
import nbformat
import pytest
from conftest import CHAPTERS, ROOT, Make
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from sphinx_external_toc.parsing import parse_toc_yaml

from lorapower.book._executed import read_claims

Tool = Callable[..., tuple[Any, Any]]

PARAMETERS = 'profile: str = "quick"  # quick or paper'

CLAIM = """\
from IPython.display import display

claim = {"statement": "One and one make $2$", "label": "thm-sum", "holds": False}
claim |= {"predicted": "2", "measured": "3"}
display({"application/vnd.lorapower.claim+json": claim}, raw=True)"""

FIGURE = """\
%config InlineBackend.figure_formats = ["svg"]
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "fixed"
plt.plot([1, 2])
plt.show()"""

# In place of the tool that executes: it says what it does, and may fail.
EXECUTE = """\
import os
import sys
from pathlib import Path

source, target, profile, _, *options = sys.argv[1:]
with Path("runs").open("a") as log:
    print(Path(source).stem, profile, *options, file=log)
if Path(source).stem == os.environ.get("FAILING"):
    sys.exit(f"{source} does not hold")
Path(target).parent.mkdir(parents=True, exist_ok=True)
Path(target).write_text("executed")
"""

# In place of the tool that builds the pages.
BUILD = """\
import sys
from pathlib import Path

html = Path(sys.argv[1], "html")
html.mkdir(exist_ok=True)
(html / "index.html").write_text(Path("index.md").read_text())
"""


# The files of the small book that are not the project's, besides its chapters.
FILES = {
    "_toc.yml": "format: jb-book\nroot: index\nchapters: [{glob: chapters/*}]\n",
    "index.md": "# A book",
    "lorapower/__init__.py": "",
    "lorapower/errors.py": "",
    "lorapower/unused.py": "",
    "lorapower/wing/__init__.py": "from lorapower import errors",
    "lorapower/wing/common.py": "",
    "lorapower/wing/images.py": "import records\n\n\ndef read():\n    from . import common",
    "records/__init__.py": "",
    "records/table.csv.gz": "",
    "records/sweeps/other-runs.jsonl.gz": "",
    "tools/build_html.py": BUILD,
    "tools/execute.py": EXECUTE,
}


def write_chapter(folder: Path, name: str, text: str, *code: str) -> Path:
    cells = [
        new_markdown_cell(text),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        *map(new_code_cell, code),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "chapters" / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of a small book, whose chapters are not executed."""
    folder = tmp_path / "a book"
    for name in ("_static", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "_config.yml", "constraints.txt", "pyproject.toml", "references.bib"):
        shutil.copy(ROOT / name, folder)
    for name in ("chapters", "lorapower/wing", "records/sweeps"):
        (folder / name).mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    shutil.copy(ROOT / "chapters" / "scorecard.md", folder / "chapters")
    write_chapter(folder, "01-sum", "# A sum", "import lorapower.wing")
    other = "%time\nfrom lorapower.wing import images, os\nimages.read('other-runs')"
    write_chapter(folder, "02-other", "# Another", other)
    return folder


@pytest.fixture
def make(folder: Path, run_make: Make) -> Tool:
    """Make the small book: what is printed, and what was executed, with profile and options."""
    log = folder / "runs"

    def run(*arguments: str, status: int = 0, **environment: str) -> tuple[str, list[str]]:
        log.write_text("")
        process = run_make(folder, *arguments, **environment)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == status, said
        return said, sorted(log.read_text().splitlines())

    return run


FIRST, SECOND = "01-sum quick", "02-other quick"
PAGE = Path("_build", "quick", "html", "index.html")


def test_only_chapters_that_depend_on_what_changed_are_executed(folder: Path, make: Tool) -> None:
    assert "make book" in make("help")[0]
    said, executed = make("book")
    assert str((folder / PAGE).resolve()) in said
    assert executed == [FIRST, SECOND]
    assert make("book")[1] == []
    for changed, executed in {
        "index.md": [],
        "lorapower/unused.py": [],
        "lorapower/wing/common.py": [SECOND],
        "chapters/02-other.ipynb": [f"{SECOND} --reworded"],
        "lorapower/errors.py": [FIRST, SECOND],
        "records/table.csv.gz": [SECOND],
        "records/sweeps/other-runs.jsonl.gz": [SECOND],
        "tools/execute.py": [FIRST, SECOND],
    }.items():
        (folder / changed).touch()
        assert make("book")[1] == executed, f"after a change of {changed}"
    common = folder / "lorapower" / "wing" / "common.py"
    common.write_text("from .. import unused")
    make("book")
    (folder / "lorapower" / "unused.py").touch()
    assert make("book")[1] == [SECOND]
    common.unlink()
    assert make("book")[1] == [SECOND], "a module that is gone has changed"
    (folder / "chapters" / "02-other.ipynb").touch()
    said, _ = make("book", status=2, FAILING="02-other")
    assert "02-other.ipynb does not hold" in said
    assert make("book")[1] == [f"{SECOND} --reworded"]


def test_a_warning_leaves_the_book_as_it_was(folder: Path, make: Tool) -> None:
    """By the project's own tool, which says what is wrong."""
    make("book")
    shutil.copy(ROOT / "tools" / "build_html.py", folder / "tools")
    executed = folder / "_build" / "quick" / "chapters"
    for source in (folder / "chapters").glob("*.ipynb"):
        shutil.copy(source, executed)
        (executed / source.name).with_suffix(".json").write_text("{}")
    broken = "# A broken book\n\nSee {prf:ref}`thm-nowhere`, {quoted}`01-sum::nothing`.\n"
    (folder / "index.md").write_text(broken)
    said, repeated = make("book", status=2)
    assert not repeated
    assert "thm-nowhere" in said
    assert "{quoted}`01-sum::nothing` quotes nothing" in said
    assert "broken" not in (folder / PAGE).read_text()


@pytest.fixture
def run_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Execute a chapter with the project's tool: the exit status, and the target."""
    (tmp_path / "chapters").mkdir()
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(source: Path, profile: str = "quick", reworded: bool = False) -> tuple[int, Path]:
        target = tmp_path / "executed" / source.name
        return execute.main(source, target, profile, 1, reworded), target

    return run


@pytest.mark.programs
def test_executed_chapter_holds_only_its_results(
    run_tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are the same in every run, and older than what changed while it ran."""
    noise = (
        "import sys\nfrom pathlib import Path\n\nprint('noise', file=sys.stderr)\n"
        "Path('..', 'module.py').touch()"
    )
    source = write_chapter(tmp_path, "01-sum", "# A sum", FIGURE, noise)
    figures = []
    for profile in ("quick", "paper"):
        status, target = run_tool(source, profile)
        assert status == 0
        assert sorted(path.name for path in target.parent.iterdir()) == [
            "01-sum.ipynb",
            "01-sum.json",
        ]
        assert target.stat().st_mtime < (tmp_path / "module.py").stat().st_mtime
        assert capsys.readouterr().err == "noise\n"
        text = target.read_text()
        assert str(tmp_path) not in text
        notebook: NotebookNode = nbformat.reads(text, as_version=4)
        assert set(notebook.metadata) == {"kernelspec", "language_info"}
        assert not any(set(cell.metadata) - {"tags"} for cell in notebook.cells)
        outputs = [cell.outputs for cell in notebook.cells if cell.get("outputs")]
        assert "noise" not in str(outputs)
        figures.append(outputs[0])
        (injected,) = (cell for cell in notebook.cells if cell.id == "injected-parameters")
        assert f'profile = "{profile}"' in injected.source
        hidden = "remove-cell" in injected.metadata.tags
        assert hidden is (profile == "quick"), "hidden if it is the default"
        assert json.loads(target.with_suffix(".json").read_text())["profile"] == profile
    assert "<svg" in str(figures[0])
    assert figures[0] == figures[1]


@pytest.mark.programs
@pytest.mark.parametrize(
    ("code", "reasons"),
    [
        (
            f"{CLAIM}\nimport os\n\nos.getcwd()",
            ["claim fails: One and one make $2$", "print nothing that depends on the machine"],
        ),
        ("import os\n\nos._exit(1)", ["died"]),
    ],
    ids=["claims-falsely-and-shows-a-path", "dies"],
)
def test_failing_chapter_leaves_no_finished_file(
    run_tool: Tool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: str,
    reasons: list[str],
) -> None:
    status, target = run_tool(write_chapter(tmp_path, "01-sum", "# A sum", code))
    failed = target.with_suffix(".failed.ipynb")
    said = capsys.readouterr().err
    assert status == 1
    assert all(reason in said for reason in [*reasons, str(failed)])
    assert list(target.parent.iterdir()) == [failed]


NUMBERED = [path.stem for path in CHAPTERS if path.stem[0].isdigit()]
LAST, NEXT = NUMBERED[-1], f"{len(NUMBERED) + 1:02}-low-rank"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with what `make new` reads."""
    for name in ("Makefile", "_toc.yml", "tools/new.py", "chapters/TEMPLATE.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_a_new_chapter_is_listed_and_runs(
    copied: Path, run_make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = run_make(copied, "new", f"NAME={NEXT}")
    assert f"make _build/quick/chapters/{NEXT}.ipynb" in process.communicate(timeout=60)[0]
    made = copied / "chapters" / f"{NEXT}.ipynb"
    assert "TEMPLATE" not in made.read_text()
    before, after = ([*parse_toc_yaml(folder / "_toc.yml")] for folder in (ROOT, copied))
    after.remove(f"chapters/{NEXT}")
    assert after == before
    monkeypatch.setenv("IPYTHONDIR", str(copied / "ipython"))
    target = copied / "executed" / made.name
    assert execute.main(made, target, "quick", 1, False) == 0
    assert [claim.holds for claim in read_claims(target)] == [True]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "NAME must be a number or a capital"),
        ("low-rank", "NAME must be a number or a capital"),
        ("../15-up", "NAME must be a number or a capital"),
        (LAST, f"NAME must begin with {NEXT[:2]}-, which is the next"),
        ("A-again", "which is the next"),
        (NEXT, f"chapters/{NEXT}.ipynb exists"),
    ],
)
def test_a_chapter_of_a_bad_or_taken_name_is_refused(
    copied: Path, run_make: Make, name: str, reason: str
) -> None:
    taken = copied / "chapters" / f"{NEXT}.ipynb"
    taken.write_text("mine")
    process = run_make(copied, "new", f"NAME={name}")
    assert reason in process.communicate(timeout=60)[0]
    assert process.returncode
    assert taken.read_text() == "mine"
    assert (copied / "_toc.yml").read_bytes() == (ROOT / "_toc.yml").read_bytes()


def test_new_words_repeat_no_run(run_tool: Tool, tmp_path: Path) -> None:
    source = write_chapter(tmp_path, "01-sum", "# A sum", "1 + 1")
    notebook: NotebookNode = nbformat.read(source, as_version=4)
    notebook.cells[0].source += "\n\nThat is all."
    nbformat.write(notebook, source)
    before: NotebookNode = nbformat.reads(nbformat.writes(notebook), as_version=4)
    before.cells[0].source = "# A sum"
    given = new_code_cell('profile = "paper"', id="injected-parameters")
    before.cells.insert(2, given)
    for count, cell in enumerate(before.cells[1:]):
        cell.execution_count, cell.outputs = count, [new_output("stream", text="2")]
    (tmp_path / "executed").mkdir()
    nbformat.write(before, tmp_path / "executed" / source.name)
    status, target = run_tool(source, "paper", reworded=True)
    after = nbformat.read(target, as_version=4)
    assert status == 0
    assert after.cells[0].source == notebook.cells[0].source
    assert after.cells[1:] == before.cells[1:]
    notebook.cells[2].source = "1 + 2"
    nbformat.write(notebook, source)
    assert not execute.reword(source, target, target)
