"""Texts with their labels and groups, and the files that have them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError


class Text(NamedTuple):
    """A text, its class or the name of that, and which texts belong together, if any is known.

    Texts of one ``group``, such as lines of one document, are no independent draws: a group counts
    once where errors are certified.
    """

    text: str
    label: str | int | None = None
    group: str | None = None


def read_texts(path: Path | str, *, group: str | None = None) -> list[Text]:
    """Read the texts of a file: one a line, or of ``.jsonl`` the field ``text`` of each line.

    Lines of JSON may have a ``label``, and a field that says of which ``group`` they are. In other
    files lines between blank ones are a group, if any two lines are not separated by a blank one.
    Raises `InputError` for a file that is not in UTF-8, and for lines of JSON without a text or
    without the group.
    """
    file = Path(path)
    try:
        # Some editors begin files with a mark of their order of bytes.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        allowed = "a text file in UTF-8, one text per line"
        raise InputError("texts", allowed=allowed, given=f"{path} ({reason})") from error
    if file.suffix == ".jsonl":
        return [*_entries(path, lines, group)]
    if group is not None:
        allowed, given = "given for a file of JSON lines (.jsonl)", f"{path}"
        remedy = "separate documents by blank lines instead"
        raise InputError("group", allowed=allowed, given=given, remedy=remedy)
    return _documents(path, lines)


def _documents(path: Path | str, lines: list[str]) -> list[Text]:
    """One text a line; with the number of its document, if there are several and one has several.

    Blank lines separate documents.
    """
    texts, number, empty = list[Text](), 0, True
    for line in lines:
        if line.strip():
            number += empty
            texts.append(Text(line, group=f"document {number} of {path}"))
        empty = not line.strip()
    if 1 < number < len(texts):
        return texts
    return [text._replace(group=None) for text in texts]


def _entries(path: Path | str, lines: list[str], group: str | None) -> Iterator[Text]:
    """A text of each line of JSON, with its label and its group."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry: Any = None
        with suppress(ValueError):
            entry = json.loads(line)
        given = f"{path}, line {number}: {line}"
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            allowed = "lines of JSON with a field text"
            remedy = "write what the model is given (for chats apply_chat_template makes it)"
            raise InputError("texts", allowed=allowed, given=given, remedy=remedy)
        of = None if group is None else entry.get(group)
        if group is not None and not isinstance(of, str | int):
            allowed = f"lines of JSON with a field {group}, a name or a number"
            raise InputError("texts", allowed=allowed, given=given)
        yield Text(entry["text"], entry.get("label"), None if of is None else str(of))
