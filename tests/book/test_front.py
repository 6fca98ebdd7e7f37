"""The pages that a reader meets first: with real output, and true to the command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from browsing import soup
from conftest import CHAPTERS, ROOT

from lorapower.checkpoints import _command as _cli

FIRST = [ROOT / "README.md", ROOT / "index.md", ROOT / "chapters" / "quickstart.md"]


@pytest.mark.parametrize("page", FIRST, ids=lambda path: path.stem)
def test_commands_that_are_shown_are_understood(page: Path) -> None:
    commands = typer.main.get_command(_cli.app).commands  # type: ignore[attr-defined]
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")  # lines that go on
    lines = re.findall(r"^lorapower (.*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        if arguments != ["--help"]:
            commands[name].make_context(name, arguments)


def test_front_page_leads_everywhere(book: Path) -> None:
    page = soup(book, "index")
    links = {str(link["href"]).partition("#")[0] for link in page.select("article a[href]")}
    doors = {f"chapters/{name}.html" for name in ("quickstart", "map", "answers", "built")}
    assert doors | {f"chapters/{chapter.stem}.html" for chapter in CHAPTERS} <= links
    assert len(page.select("article figure img")) == 2


def test_answers_are_one_line_and_say_what_they_rest_on(book: Path) -> None:
    """With numbers of the run, all of which are shown."""
    page = soup(book, "chapters/answers")
    for question in page.select("article h3"):
        answer = question.find_next_sibling("p")
        assert answer is not None
        (bold,) = answer.select(":scope > strong")
        assert answer.get_text() == bold.get_text()
        details = answer.find_next_sibling("details")
        assert details is not None
        assert details.select("a.reference.internal")
    numbers = [number.get_text() for number in page.select("span.pasted-text")]
    assert numbers
    assert all(re.search(r"\d", number) and "nan" not in number for number in numbers)


def test_quick_start_shows_every_command_and_its_output(book: Path) -> None:
    page = soup(book, "chapters/quickstart")
    blocks = [block.get_text() for block in page.select("article div.highlight pre")]
    outputs = [block.get_text() for block in page.select("article div.terminal pre")]
    for name in ("plan", "extract", "check", "shrink"):
        # Of plans the last asks for an error; the first lists prices.
        *_, at = (k for k, text in enumerate(blocks) if text.startswith(f"lorapower {name} "))
        assert blocks[at + 1] in outputs
        found = re.search(r"Estimate +([\d.]+)% lost over all \d+ texts", blocks[at + 1])
        assert found
        assert 4 <= float(found[1]) <= 6, "the page says that it is about half of the 10% stated"
