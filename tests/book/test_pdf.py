"""The book as one PDF and the note as another, of small pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import print_pdf
import pytest
from browsing import chromium
from conftest import ROOT
from pypdf import PdfReader

PAGE = """<!DOCTYPE html><html><head><title>{0}</title></head><body>
<nav>Not printed</nav>
<article class="bd-article"><h1 id="top">{0}</h1><p>{1}</p></article>
</body></html>"""


@pytest.fixture
def pages(tmp_path: Path) -> list[Path]:
    texts = {
        "one": (
            "A heading",
            'See <a href="two.html#top">it</a>, <a href="api.html">not this</a>'
            " and <a href='https://example.org/'>that</a>.",
        ),
        "two": ("Another", 'Back to <a href="one.html">one</a>.'),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.html").write_text(PAGE.format(*text), encoding="utf-8")
    return [tmp_path / f"{name}.html" for name in texts]


def test_pages_become_one_document(pages: list[Path]) -> None:
    whole = print_pdf.document(pages)
    assert 'href="#page-1-top"' in whole
    assert 'href="#page-0"' in whole
    assert 'href="https://example.org/"' in whole
    assert "api.html" not in whole
    assert "Not printed" not in whole
    assert whole.count('id="page-0-top"') == whole.count('id="page-1-top"') == 1


def test_notes_are_printed_by_themselves_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed: dict[str, list[str]] = {}

    def take(pages: list[Path], target: Path, program: str) -> None:
        printed[target.name] = [page.stem for page in pages]

    monkeypatch.setattr(print_pdf, "chromium", lambda: "a browser")
    monkeypatch.setattr(print_pdf, "print_pages", take)
    monkeypatch.setattr(sys, "argv", ["print_pdf", str(tmp_path), str(tmp_path / "book.pdf")])
    assert print_pdf.main() == 0
    book = printed.pop("book.pdf")
    assert book[0] == "index"
    assert printed == {"whole-transformers.pdf": ["whole-transformers"]}
    assert "whole-transformers" in book


@pytest.mark.programs
def test_a_pdf_has_all_pages_and_bookmarks(pages: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "book.pdf"
    print_pdf.print_pages(pages, target, chromium())
    assert not list(tmp_path.glob("*.partial*"))
    pdf = PdfReader(target)
    text = "\n".join(page.extract_text() for page in pdf.pages)
    assert text.index("A heading") < text.index("Another")
    assert "Not printed" not in text
    assert str(tmp_path).encode() not in target.read_bytes()


@pytest.mark.programs
def test_without_chromium_one_line_says_what_to_install(tmp_path: Path) -> None:
    target = tmp_path / "book.pdf"
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "print_pdf.py", tmp_path, target],
        env=os.environ | {"PATH": str(tmp_path), "CHROMIUM": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr == f"{print_pdf.NO_CHROMIUM}\n"
    assert not target.exists()
