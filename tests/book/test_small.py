"""Each page runs at the small size of its metadata, in the process of the tests.

What it proves must hold there; what it observes may fail, since it was observed at another size. A
page that has passed runs again once its code has changed, a module that it imports at any remove,
or the data beside one. A page without other sizes is left to the book, which has run it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from conftest import CHAPTERS, ROOT
from dependencies import beside, code, needs, recorded
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from nbformat import NotebookNode
from traitlets.config import Config

from lorapower.book.claims import MIME, Claim

PASSED = ROOT / "_build" / "small"
PAGES = {path: nbformat.read(path, as_version=4) for path in CHAPTERS}
SMALL = [path for path, page in PAGES.items() if page.metadata.lorapower.small]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """An IPython with a clean namespace, in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    threads = torch.get_num_threads()
    with mpl.rc_context({"backend": "agg"}):
        shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
        shell.display_trap.hook = display
        yield shell
        shell.reset()
        InteractiveShell.clear_instance()
        plt.close("all")
    torch.set_num_threads(threads)


def cells(notebook: NotebookNode) -> Iterator[str]:
    """Yield the code as papermill would run it, at the small size."""
    given = notebook.metadata.lorapower.small
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield cell.source
            if "parameters" in cell.metadata.get("tags", []):
                assigned = [f"{name} = {value!r}" for name, value in given.items()]
                yield "\n".join(["# Parameters", *assigned, ""])


def digested(chapter: Path) -> str:
    """Digest what a chapter computes with: metadata, code, modules and their data, and records."""
    modules = needs(chapter)
    digest = hashlib.blake2b(json.dumps(PAGES[chapter].metadata, sort_keys=True).encode())
    digest.update(ast.dump(code(chapter)).encode())
    for file in sorted(modules | beside(modules) | recorded(chapter)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@pytest.mark.book
@pytest.mark.filterwarnings("ignore")  # as in the book, whose pages show none
@pytest.mark.parametrize("chapter", SMALL, ids=lambda path: path.stem)
def test_page_runs_at_a_small_size(chapter: Path, shell: InteractiveShell) -> None:
    passed, computed = PASSED / chapter.stem, digested(chapter)
    if passed.is_file() and passed.read_text() == computed:
        pytest.skip("passed as it is")
    shell.display_pub = published = CapturingDisplayPublisher()
    for cell in cells(PAGES[chapter]):
        shell.run_cell(cell, store_history=True).raise_error()
        plt.close("all")
    shown = [output["data"] for output in published.outputs]
    claims = [Claim(**data[MIME]) for data in shown if MIME in data]
    assert not [claim.line for claim in claims if not (claim.holds or claim.observed)]
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.write_text(computed)
