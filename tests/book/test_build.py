"""What the Makefile promises, on a small book; and one such book that is really built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import execute
import nbformat
import pytest
from conftest import ROOT, Make
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

Tool = Callable[..., tuple[int, Path]]

PARAMETERS = 'profile: str = "quick"  # quick or paper'

CLAIM = """\
from IPython.display import display

claim = {
    "statement": "One and one make $2$",
    "label": "thm-sum",
    "predicted": "2",
    "measured": str(1 + 1),
    "holds": HOLDS,
}
display({"application/vnd.lorapower.claim+json": claim, "text/plain": "claim"}, raw=True)"""

FIGURE = """\
%config InlineBackend.figure_formats = ["svg"]
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "fixed"
plt.plot([1, 2])
plt.show()"""

THEOREM = """\
# A sum

:::{prf:theorem}
:label: thm-sum
$1 + 1 = 2$.
:::"""

TOC = """\
format: jb-book
root: index
chapters:
  - file: chapters/01-sum
  - file: chapters/02-other
  - file: chapters/scorecard
"""

# The package of the small book, and what its second chapter imports besides.
PACKAGE = {
    "__init__": "",
    "errors": "",
    "unused": "",
    "wing/__init__": "from lorapower import errors",
    "wing/common": "",
    "wing/images": "import records\n\n\ndef read():\n    from . import common",
}

# In place of the tool that executes: it says what it does, and may fail.
EXECUTE = """\
import os
import sys
from pathlib import Path

source, target, _, profile, *_ = sys.argv[1:]
with Path(os.environ["RUNS"]).open("a") as log:
    print(Path(source).stem, profile, file=log)
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


def write_chapter(folder: Path, name: str, text: str, *code: str) -> Path:
    cells = [
        new_markdown_cell(text),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        *map(new_code_cell, code),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel}
    path = folder / "chapters" / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    return path


class Book:
    """A small book in `folder`, made by the project's own Makefile; chapters are not executed."""

    def __init__(self, folder: Path, run_make: Make) -> None:
        self.folder = folder
        self.page = folder / "_build" / "html" / "index.html"
        self._make = run_make
        self.log = folder.parent / "runs"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return self._make(self.folder, *arguments, RUNS=str(self.log), **environment)

    def make(self, *arguments: str, status: int = 0, **environment: str) -> str:
        """Run make to its end, expect the exit status, return what it printed."""
        self.log.unlink(missing_ok=True)
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == status, output
        return output

    def executed(self) -> list[str]:
        """List what the last make executed, with the profile."""
        return sorted(self.log.read_text().splitlines()) if self.log.exists() else []


@pytest.fixture
def small(tmp_path: Path, run_make: Make) -> Book:
    folder = tmp_path / "a book"
    for name in ("api", "chapters", "lorapower/wing"):
        (folder / name).mkdir(parents=True)
    for name in ("_ext", "_static", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "_config.yml", "constraints.txt", "pyproject.toml", "references.bib"):
        shutil.copy(ROOT / name, folder / name)
    for module, text in PACKAGE.items():
        (folder / "lorapower" / f"{module}.py").write_text(text)
    (folder / "records" / "sweeps").mkdir(parents=True)
    for name in ("__init__.py", "table.csv.gz", "sweeps/other-runs.jsonl.gz"):
        (folder / "records" / name).touch()
    (folder / "tools" / "execute.py").write_text(EXECUTE)
    (folder / "tools" / "build_html.py").write_text(BUILD)
    (folder / "_toc.yml").write_text(TOC)
    (folder / "index.md").write_text("# A book\n\nSee {prf:ref}`thm-sum`.\n")
    shutil.copy(ROOT / "chapters" / "scorecard.md", folder / "chapters")
    write_chapter(folder, "01-sum", THEOREM, "import lorapower.wing")
    write_chapter(
        folder,
        "02-other",
        "# Another",
        "%time\nfrom lorapower.wing import images, os\nimages.read('other-runs')",
    )
    return Book(folder, run_make)


FIRST, SECOND = "01-sum quick", "02-other quick"


def test_only_chapters_that_depend_on_what_changed_are_executed(small: Book) -> None:
    assert "make book" in small.make("help")
    small.make("book")
    assert small.executed() == [FIRST, SECOND]
    small.make("book")
    assert small.executed() == []
    for changed, executed in {
        "index.md": [],
        "lorapower/unused.py": [],
        "lorapower/wing/common.py": [SECOND],
        "chapters/02-other.ipynb": [SECOND],
        "lorapower/errors.py": [FIRST, SECOND],
        "records/table.csv.gz": [SECOND],
        "records/sweeps/other-runs.jsonl.gz": [SECOND],
        "tools/execute.py": [FIRST, SECOND],
    }.items():
        (small.folder / changed).touch()
        small.make("book")
        assert small.executed() == executed, f"after a change of {changed}"
    common = small.folder / "lorapower" / "wing" / "common.py"
    common.write_text("from .. import unused")
    small.make("book")
    (small.folder / "lorapower" / "unused.py").touch()
    small.make("book")
    assert small.executed() == [SECOND]
    common.unlink()
    small.make("book")
    assert small.executed() == [SECOND], "a module that is gone has changed"
    (small.folder / "chapters" / "02-other.ipynb").touch()
    assert "02-other.ipynb does not hold" in small.make("book", status=2, FAILING="02-other")
    small.make("book")
    assert small.executed() == [SECOND]


@pytest.fixture
def run_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Execute a chapter with the project's tool: the exit status, and the target."""
    (tmp_path / "chapters").mkdir()
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(source: Path, profile: str = "quick", *options: str) -> tuple[int, Path]:
        target = tmp_path / "executed" / source.name
        given = ["", str(source), str(target), "--profile", profile, *options]
        monkeypatch.setattr(sys, "argv", given)
        return execute.main(), target

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
    source = write_chapter(tmp_path, "01-sum", THEOREM, FIGURE, noise)
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
            CLAIM.replace("HOLDS", "False") + "\nimport os\n\nos.getcwd()",
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
    status, target = run_tool(write_chapter(tmp_path, "01-sum", THEOREM, code))
    failed = target.with_suffix(".failed.ipynb")
    said = capsys.readouterr().err
    assert status == 1
    assert all(reason in said for reason in [*reasons, str(failed)])
    assert list(target.parent.iterdir()) == [failed]


@pytest.mark.programs
def test_new_words_repeat_no_run(run_tool: Tool, tmp_path: Path) -> None:
    source = write_chapter(tmp_path, "01-sum", THEOREM, "1 + 1")
    status, target = run_tool(source, "paper")
    before = nbformat.read(target, as_version=4)
    notebook = nbformat.read(source, as_version=4)
    notebook.cells[0].source += "\n\nThat is all."
    nbformat.write(notebook, source)
    status, target = run_tool(source, "paper", "--reworded")
    after = nbformat.read(target, as_version=4)
    assert status == 0
    assert after.cells[0].source == notebook.cells[0].source
    assert after.cells[1:] == before.cells[1:]
    assert after.cells[2].id == "injected-parameters"
    notebook.cells[2].source = "1 + 2"
    nbformat.write(notebook, source)
    _, target = run_tool(source, "paper", "--reworded")
    assert nbformat.read(target, as_version=4).cells[-1].outputs[0].data["text/plain"] == "3"


def test_progress_counts_what_is_older_than_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    done = tmp_path / "_build" / "quick"
    assert execute.progress(done, 2) == ""
    done.mkdir(parents=True)
    names = ("01-new", "02-old", "03-missing")
    rules = [f"$(out)/chapters/{name}.ipynb: module.py" for name in names]
    rules += ["executed := $(out)/chapters/01-new.ipynb", "module.py:"]
    (tmp_path / "_build" / "chapters.mk").write_text("\n".join(rules))
    for moment, name in enumerate(("02-old.ipynb", "module.py", "01-new.ipynb")):
        path = tmp_path / name if name == "module.py" else done / name
        path.touch()
        os.utime(path, (moment, moment))
    for name, seconds in (("01-new", 60), ("02-old", 120)):
        (done / f"{name}.json").write_text(json.dumps({"seconds": seconds}))
    # 120 s for the old one, 90 for the missing one, in two processes.
    assert execute.progress(done, 2) == ": 1 of 3 done, about 1.8 minutes to go"


def test_book_is_built_and_a_warning_fails_the_build(small: Book) -> None:
    """By the project's own tools."""
    for name in ("execute.py", "build_html.py"):
        shutil.copy(ROOT / "tools" / name, small.folder / "tools" / name)
    write_chapter(small.folder, "01-sum", THEOREM, CLAIM.replace("HOLDS", "True"))
    write_chapter(small.folder, "02-other", "# Another", "print(profile)")
    said = small.make("book")
    assert str(small.page.resolve()) in said
    assert "One and one make" in (small.page.parent / "chapters" / "scorecard.html").read_text()
    built = small.page.stat().st_mtime_ns
    index = small.folder / "index.md"
    index.write_text("# A broken book\n\nSee {prf:ref}`thm-nowhere`, {quoted}`01-sum::nothing`.\n")
    said = small.make("book", status=2)
    assert "thm-nowhere" in said
    assert "{quoted}`01-sum::nothing` quotes nothing" in said
    assert small.page.stat().st_mtime_ns == built
