"""What the Makefile promises, on a book of two tiny chapters."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, Make
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = 'profile: str = "quick"  # quick or paper'

# Each run leaves a line outside the book, by which the tests count the runs.
RECORD_RUN = """\
import os

with open(os.environ["RUNS"], "a") as runs:
    print("{name}", profile, os.getpid(), file=runs)"""

CLAIM = """\
from IPython.display import display

claim = {
    "statement": "One and one make $2$",
    "label": "thm-sum",
    "predicted": "2",
    "measured": str(1 + 1),
    "criterion": "equal",
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


class Book:
    """A small book in `folder`, made by the project's own Makefile and tools."""

    def __init__(self, folder: Path, make: Make, runs: Path) -> None:
        self.folder = folder
        self.executed = folder / "_build" / "quick" / "chapters" / "01-sum.ipynb"
        self.page = folder / "_build" / "html" / "index.html"
        self._make = make
        self._runs = runs

    def write_chapter(self, name: str, text: str, *code: str) -> None:
        cells = [
            new_markdown_cell(text),
            new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
            *map(new_code_cell, (RECORD_RUN.format(name=name), *code)),
        ]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, self.folder / "chapters" / f"{name}.ipynb")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return self._make(self.folder, *arguments, RUNS=str(self._runs), **environment)

    def make(self, *arguments: str, status: int = 0, **environment: str) -> str:
        """Run make to its end, expect the exit status, return what it printed."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == status, output
        return output

    def execute(self, status: int = 0) -> str:
        return self.make(str(self.executed.relative_to(self.folder)), status=status)

    def runs(self) -> list[list[str]]:
        """Name, profile and process of each run so far."""
        return [line.split() for line in self._runs.read_text().splitlines()]

    def count_runs(self) -> int:
        return len(self.runs()) if self._runs.exists() else 0


@pytest.fixture
def small(tmp_path: Path, make: Make) -> Book:
    folder = tmp_path / "a book"
    for name in ("_ext", "_static", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "_config.yml", "constraints.txt", "pyproject.toml", "references.bib"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("chapters", "lorapower"):
        (folder / name).mkdir()
    (folder / "lorapower" / "__init__.py").touch()
    (folder / "_toc.yml").write_text(TOC)
    (folder / "index.md").write_text("# A book\n\nSee {prf:ref}`thm-sum`.\n")
    (folder / "chapters" / "scorecard.md").write_text("# Scorecard\n\n```{scorecard}\n```\n")
    book = Book(folder, make, tmp_path / "runs")
    book.write_chapter("01-sum", THEOREM, CLAIM.replace("HOLDS", "True"))
    book.write_chapter("02-other", "# Another")
    return book


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_only_what_changed_is_made_again(small: Book) -> None:
    first = small.make("-j2", "book")
    assert small.page.resolve().as_uri() in first
    assert sorted(name for name, *_ in small.runs()) == ["01-sum", "02-other"]
    built = small.page.stat().st_mtime_ns

    second = small.make("book")
    assert "up to date" in second
    assert small.page.resolve().as_uri() in second
    assert small.count_runs() == 2
    assert small.page.stat().st_mtime_ns == built

    (small.folder / "index.md").write_text("# A better book\n")
    small.make("book")
    assert small.count_runs() == 2
    assert "A better book" in small.page.read_text()

    (small.folder / "lorapower" / "__init__.py").touch()
    small.make("book")
    assert small.count_runs() == 4


def test_profiles_are_kept_apart(small: Book) -> None:
    target = "_build/{}/chapters/01-sum.ipynb"
    for profile in ("quick", "paper", "quick"):
        small.make(f"PROFILE={profile}", target.format(profile))
    assert [profile for _, profile, _ in small.runs()] == ["quick", "paper"]
    for profile, hidden in (("quick", True), ("paper", False)):
        notebook = nbformat.read(small.folder / target.format(profile), as_version=4)
        (injected,) = (
            cell
            for cell in notebook.cells
            if "injected-parameters" in cell.metadata.get("tags", [])
        )
        assert f'profile = "{profile}"' in injected.source
        assert ("remove-cell" in injected.metadata.tags) is hidden, "hidden if it is the default"


def test_executed_chapter_holds_only_its_results(small: Book) -> None:
    small.write_chapter("01-sum", THEOREM, "import sys\n\nprint('noise', file=sys.stderr)")
    assert "noise" in small.execute()
    notebook = nbformat.read(small.executed, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert [set(cell.metadata) - {"tags"} for cell in notebook.cells] == [set()] * 5
    assert "noise" not in str([cell.get("outputs") for cell in notebook.cells])
    assert str(small.folder) not in small.executed.read_text()


def test_executed_chapter_is_the_same_in_every_run(small: Book) -> None:
    small.write_chapter("01-sum", THEOREM, FIGURE)
    small.execute()
    first = small.executed.read_text()
    assert "<svg" in first
    small.executed.unlink()
    small.execute()
    assert small.executed.read_text() == first


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('raise ValueError("no such thing")', "no such thing"),
        (CLAIM.replace("HOLDS", "False"), "claim fails: One and one make $2$"),
        ("import os\n\nos.getcwd()", "machine"),
        ("import os\n\nos._exit(1)", "died"),
    ],
    ids=["raises", "claims-falsely", "shows-a-path", "dies"],
)
def test_failing_chapter_leaves_no_finished_file(small: Book, code: str, reason: str) -> None:
    small.write_chapter("01-sum", THEOREM, code)
    output = small.execute(status=2)
    assert reason in output
    assert not small.executed.exists()
    failed = small.executed.with_suffix(".failed.ipynb")
    assert failed.exists()
    assert str(failed) in output

    small.write_chapter("01-sum", THEOREM)
    small.execute()
    assert small.executed.exists()
    assert not failed.exists()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_interrupted_run_leaves_no_finished_file(small: Book, blow: signal.Signals) -> None:
    patient = 'import os, time\n\nif os.environ.get("WAIT"):\n    time.sleep(300)'
    small.write_chapter("01-sum", THEOREM, patient, CLAIM.replace("HOLDS", "True"))
    process = small.start("_build/quick/chapters/01-sum.ipynb", WAIT="yes")
    wait_for(small.count_runs, "the chapter's first cell")
    ((_, _, kernel),) = small.runs()
    os.killpg(process.pid, blow)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not small.executed.exists()
    wait_for(lambda: not alive(int(kernel)), "the end of the kernel")

    small.execute()
    assert small.executed.exists()
    assert small.count_runs() == 2


def test_change_during_the_run_is_not_missed(small: Book) -> None:
    touching = (
        'import os\nfrom pathlib import Path\n\nPath(os.environ["RUNS"]).with_name("a book")'
        '.joinpath("lorapower", "__init__.py").touch()'
    )
    small.write_chapter("01-sum", THEOREM, touching)
    small.execute()
    small.execute()
    assert small.count_runs() == 2


def test_warning_fails_every_build_until_it_is_mended(small: Book) -> None:
    small.make("book")
    index = small.folder / "index.md"
    index.write_text("# A broken book\n\nSee {prf:ref}`thm-nowhere`.\n")
    for _ in range(2):
        assert "thm-nowhere" in small.make("book", status=2)
        assert "A broken book" not in small.page.read_text()
    index.write_text("# A mended book\n")
    small.make("book")
    assert "A mended book" in small.page.read_text()


def test_unknown_profile_is_refused(small: Book) -> None:
    output = small.make("book", "PROFILE=fast", status=2)
    assert "PROFILE must be quick or paper; got 'fast'" in output
    assert output.count("\n") == 1


def write_program(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of programs for PATH: a machine that has what make needs and no more."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("chmod", "echo", "expand", "find", "make", "mkdir", "rm", "sed", "sh", "touch"):
        program = shutil.which(name)
        assert program
        (folder / name).symlink_to(program)
    return folder


OLD = "import sys; sys.version_info = (3, 10, 14); exec(sys.argv[2])"


@pytest.mark.parametrize("installed", ["none", "old"])
def test_unsuitable_python_is_one_line(small: Book, bare: Path, installed: str) -> None:
    if installed == "old":
        write_program(bare / "python3", f"exec '{sys.executable}' -c '{OLD}' \"$@\"")
    output = small.make("VENV=no", "ready=no/.ready", "no/.ready", status=2, PATH=str(bare))
    line, stop = output.splitlines()
    assert "Python 3.11 or newer" in line
    assert "apt-get install python3 python3-venv" in line
    assert stop.startswith("make: ***")


# Makes an environment whose pip fails.
BROKEN = (
    '[ "$1" = -m ] || exit 0',
    "mkdir -p no/bin",
    "echo 'echo pip was here; exit 1' >no/bin/python",
    'exec chmod 755 "$PWD/no/bin/python"',
)


def test_failed_installation_is_done_again_and_says_what_may_lack(small: Book, bare: Path) -> None:
    write_program(bare / "python3", *BROKEN)
    for _ in range(2):
        output = small.make("VENV=no", "ready=no/.ready", "no/.ready", status=2, PATH=str(bare))
        assert "pip was here" in output
        assert "apt-get install build-essential" in output


def test_interrupted_installation_is_done_again(small: Book, bare: Path) -> None:
    (bare / "sleep").symlink_to(str(shutil.which("sleep")))
    write_program(bare / "python3", '[ "$1" = -m ] || exit 0', "touch started", "sleep 300")
    arguments = ("VENV=no", "ready=no/.ready", "no/.ready")
    process = small.start(*arguments, PATH=str(bare))
    wait_for((small.folder / "started").exists, "the installation")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (small.folder / "no" / "left").touch()

    write_program(bare / "python3", *BROKEN)
    assert "pip was here" in small.make(*arguments, status=2, PATH=str(bare))
    assert not (small.folder / "no" / "left").exists()


def test_installation_spares_a_folder_that_is_no_environment(small: Book) -> None:
    chapters = set((small.folder / "chapters").iterdir())
    for target in ("chapters/.ready", "distclean"):
        output = small.make("VENV=chapters", "ready=chapters/.ready", target, status=2)
        assert "no Python environment" in output
    assert set((small.folder / "chapters").iterdir()) == chapters


def test_help_names_every_command(small: Book) -> None:
    output = small.make()
    for command in ("book", "test", "lab", "serve", "tidy", "clean", "distclean"):
        assert f"make {command}" in output
