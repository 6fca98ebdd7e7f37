"""Texts with their labels and groups, and the files that have them."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ._models import find, reason, tokenizer

# What to do with a file of another kind.
_REMEDIES = {
    ".json": "write each text as an object on a line of its own, to a .jsonl file",
    ".tsv": "save it with commas, as .csv",
}
_REMEDY = "write .txt (one text a line), .jsonl or .csv (a field text, maybe label)"


class Text(NamedTuple):
    """A text, its class or the name of that, and which texts belong together, if any is known.

    Texts of one ``group``, such as lines of one document, are no independent draws: a group counts
    once where errors are certified.
    """

    text: str
    label: str | int | None = None
    group: str | None = None


def read_texts(
    path: Path | str, *, group: str | None = None, models: Sequence[str] = ()
) -> list[Text]:
    """Read the texts of a file: one a line, or of ``.jsonl`` and ``.csv`` the field ``text``.

    They may have a ``label``, and a field that says of which ``group`` they are. In a file of text
    lines between blank ones are a group, if any two lines are not separated by a blank one. A line
    of JSON may have ``messages`` (and ``tools``) instead, a chat, which becomes a text by the
    template of the first of ``models`` that has a tokenizer. Raises `InputError` for a file of
    another kind or not in UTF-8, and for entries without a text or without the group.
    """
    file = Path(path).expanduser()
    kind = file.suffix.lower()
    if kind not in ("", ".txt", ".jsonl", ".csv"):
        remedy = _REMEDIES.get(kind, _REMEDY)
        raise _refuse("of a kind that is read: .txt, .jsonl or .csv", str(path), remedy)
    try:
        # Some editors begin files with a mark of their order of bytes.
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = "no such file" if isinstance(error, FileNotFoundError) else error
        raise _refuse("a text file in UTF-8", f"{path} ({said})") from error
    if "\0" in content:
        raise _refuse("a text file in UTF-8", f"{path} (it has bytes of zeros)")
    if kind in (".jsonl", ".csv"):
        rows = _json(path, content) if kind == ".jsonl" else _csv(path, content)
        template = functools.cache(functools.partial(_find_template, models))
        return [_entry(where, row, group, template) for where, row in rows]
    if group is not None:
        allowed, remedy = "given for .jsonl or .csv", "separate documents by blank lines instead"
        raise InputError("group", allowed=allowed, given=str(path), remedy=remedy)
    return _documents(path, content.split("\n"))


def _refuse(allowed: str, given: str, remedy: str = "") -> InputError:
    return InputError("texts", allowed=allowed, given=given, remedy=remedy)


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


def _json(path: Path | str, content: str) -> Iterator[tuple[str, Any]]:
    """Read what is on each line of JSON, and name the line."""
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}: {line}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                allowed, remedy = "lines of JSON", "write one object a line"
                raise _refuse(allowed, where, remedy) from error


def _csv(path: Path | str, content: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read rows below a header, and name them; an empty label is none."""
    rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        if len({*(rows.fieldnames or ())}) < len(rows.fieldnames or ()):
            raise _refuse("a header that names each field once", f"{path}: {rows.fieldnames}")
        for row in rows:
            where = f"{path}, line {rows.line_num}: {row}"
            if None in row or None in row.values():
                allowed = "rows of as many fields as the header has"
                raise _refuse(allowed, where, 'put fields with commas in quotation marks (")')
            yield where, row | {"label": row.get("label") or None}
    except csv.Error as error:
        raise _refuse("rows of .csv", f"{path}, line {rows.line_num} ({error})") from error


def _entry(where: str, row: Any, group: str | None, template: Callable[[], Any]) -> Text:
    """The text of one entry, with its label and its group."""
    fields = row if isinstance(row, Mapping) else {}
    text = fields.get("text")
    if text is None and "messages" in fields:
        text = _write_chat(where, fields, template())
    if not isinstance(text, str):
        remedy = "name so what holds what the model is given; chats have a field messages"
        raise _refuse("entries with a field text", where, remedy)
    of = None if group is None else fields.get(group)
    if group is not None and (not isinstance(of, str | int) or of == ""):
        raise _refuse(f"entries with a field {group}, a name or a number", where)
    return Text(text, fields.get("label"), None if of is None else str(of))


def _write_chat(where: str, fields: Mapping[str, Any], template: Any) -> str:
    """Write a chat as a text, without what the tokenizer will put before it again."""
    chat, tools = fields["messages"], fields.get("tools")
    # Of what is missing most templates make nothing, silently.
    if not isinstance(chat, list) or not chat or not all(map(_is_message, chat)):
        remedy = 'give each a "role" and a "content"'
        raise _refuse("chats of one message or more", where, remedy)
    try:
        text: str = template.apply_chat_template(chat, tools=tools, tokenize=False)
    except Exception as error:  # whatever a template raises
        allowed = "chats that the tuned model's template takes"
        raise _refuse(allowed, f"{where} ({reason(error)})") from error
    first = template.bos_token_id
    begins = first is not None and template("").input_ids[:1] == [first]
    return text.removeprefix(template.bos_token) if begins else text


def _is_message(given: Any) -> bool:
    said = "content", "tool_calls"
    return isinstance(given, dict) and "role" in given and any(given.get(name) for name in said)


def _find_template(models: Sequence[str]) -> Any:
    """The tokenizer of the first model that has one, with its template for chats."""
    folders = (find("tuned", model) for model in models)
    place = next((f for f in folders if (f / "tokenizer_config.json").is_file()), None)
    made = None if place is None else tokenizer(str(place))
    if made is None or made.chat_template is None:
        allowed = "no chats, where the tuned model's tokenizer has no template for them"
        remedy = "write what the model is given to a field text, or save the template with the "
        remedy += "tokenizer (chat_template.jinja)"
        raise _refuse(allowed, f"chats and {place or 'no tokenizer'}", remedy)
    return made
