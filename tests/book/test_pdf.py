"""Pages of the book as one PDF."""

from __future__ import annotations

from pathlib import Path

import print_pdf
import pytest
from playwright.sync_api import Browser
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
    base, whole = print_pdf.document(pages)
    assert base == pages[0]
    assert 'href="#page-1-top"' in whole
    assert 'href="#page-0"' in whole
    assert 'href="https://example.org/"' in whole
    assert "api.html" not in whole
    assert "Not printed" not in whole
    assert whole.count('id="page-0-top"') == whole.count('id="page-1-top"') == 1


def test_a_pdf_has_all_pages(browser: Browser, pages: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "book.pdf"
    print_pdf.print_pages(browser, pages, target)
    text = "\n".join(page.extract_text() for page in PdfReader(target).pages)
    assert text.index("A heading") < text.index("Another")
    assert str(tmp_path).encode() not in target.read_bytes()
