"""Texts to plan and measure with: read from files, drawn, divided, and made batches of."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import _checks, _randomness
from ._errors import InputError
from ._limits import LEAST_TEXTS, fewest
from ._models import find, quiet, reason, tokenizer
from .pair import COUNTED_FROM_PADDING, Pair

#: At most so many texts of each part are used, as time grows with them.
MOST_TEXTS = 256
# About so many tokens of each part, unless `LEAST_TEXTS` have more or all are to be used.
_TOKENS_OF_PART = 4096
# The part of the texts for planning by which candidates are selected.
_SELECTING = 0.25
_BATCH = 32
# The largest part of a tight batch that is padding.
_PADDING = 0.2
#: Texts are cut off after so many tokens.
TOKENS = 128
# What JSON may escape, but UTF-8 does not have.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# About how many numbers a block may keep for one batch. Small batches take longer, as all of its
# weights are read for each.
_LOAD = 2**26
# What to do with a file of another kind.
_REMEDIES = {
    ".json": "write each text as an object on a line of its own, to a .jsonl file",
    ".tsv": "save it with commas, as .csv",
}


class Text(NamedTuple):
    """A text, its class or the name of that, and which texts belong together, if any is known.

    Texts of one ``group``, such as lines of one document, are no independent draws: a group counts
    once where errors are certified.
    """

    text: str
    label: str | int | None = None
    group: str | None = None


class Batch(NamedTuple):
    """Texts as a network takes them, ``[texts, tokens]``, with 1 for tokens and 0 for padding.

    ``places`` are those of the texts among all that were given, and ``labels`` the classes, -1
    where they are not known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    places: Tensor
    labels: Tensor

    @property
    def is_token(self) -> Tensor:
        """Which entries are tokens."""
        return self.attention_mask.bool()

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments of a network on a device."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {name: values.to(device) for name, values in given.items()}

    def rows(self, values: Tensor) -> Float[Tensor, "rows columns"]:
        """A row for each token, or for each text where there is one value for a text."""
        return values[self.is_token.to(values.device)] if values.ndim == 3 else values


class Texts(NamedTuple):
    """Texts to fit to, to select candidates by and to certify with.

    ``cut`` were cut off, ``unknown`` is the share of tokens that stand for any unknown word, and
    ``alike`` are nearly the same as another; ``grouped`` says whether any were in groups.
    """

    fit: list[Batch]
    select: list[Batch]
    test: list[Batch]
    cut: int
    unknown: float
    alike: int
    grouped: bool


class _Encoded(NamedTuple):
    """A text, its class and place, its tokens, and how many it had before it was cut off."""

    text: str
    label: int
    place: int
    ids: list[int]
    length: int


# Texts of one group, or one text of none, each with its place among all that were given.
_Group: TypeAlias = list[tuple[int, Text]]


def count(batches: Sequence[Batch]) -> int:
    """Count the texts of batches."""
    return sum(len(batch.input_ids) for batch in batches)


def count_tokens(batches: Sequence[Batch]) -> int:
    """Count the tokens of batches."""
    return sum(int(batch.attention_mask.sum()) for batch in batches)


def prepare(
    pair: Pair,
    texts: Sequence[str | Text],
    held_out: Sequence[str | Text] | None,
    *,
    tokens: int,
    thorough: bool = False,
    seed: int,
) -> Texts:
    """Divide texts in three parts; without ``held_out``, half of them are to certify with.

    Groups are divided as wholes, before repetitions are left out of those to plan with: given
    these, the others are independent draws [prop-certificate].
    """
    order = np.random.default_rng(_randomness.number(seed, "planning texts"))
    if held_out is None:
        groups = _shuffle("texts", texts, order, 2 * LEAST_TEXTS)
        half = len(groups) // 2
        planning, certifying = groups[half:], groups[:half]
    else:
        planning = _shuffle("texts", texts, order, LEAST_TEXTS)
        certifying = _shuffle("held_out", held_out, order, LEAST_TEXTS)
        for name in ("text", "group"):
            one, other = (
                {getattr(text, name) for g in part for _, text in g}
                for part in (planning, certifying)
            )
            if both := (one & other) - {None}:
                allowed = f"of {name}s that are not among those for planning"
                given = f"{len(both)} that are, such as {min(both)!r}"
                remedy = "take them out here: the certificate is then for other texts than those"
                raise InputError("held_out", allowed, given, remedy)
    # Of each group one text before any second one.
    lines = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*planning)))
    different = {line[1].text: line for line in lines}
    some = itertools.islice(different.values(), MOST_TEXTS)
    plan = _encode(pair, "different texts to plan with", some, tokens)
    number = MOST_TEXTS
    if not thorough:
        # How many texts certify must not depend on their own lengths: to stop at a number of
        # tokens would draw short ones too often.
        mean = sum(len(text.ids) for text in plan) / len(plan)
        number = max(LEAST_TEXTS, min(int(_TOKENS_OF_PART / mean), MOST_TEXTS))
    plan = plan[:number]
    test = _encode(
        pair, "texts to certify with", (group[0] for group in certifying[:MOST_TEXTS]), tokens
    )
    # Those that were drawn last are dropped, whatever they say.
    test = test[: fewest(min(number, len(test)))]
    whole = [*plan, *test]
    unknown = sum(text.ids.count(pair.tokenizer.unk_token_id) for text in whole)
    first = round(_SELECTING * len(plan))
    return Texts(
        [*_batches(pair, plan[first:])],
        # Of other outputs than those of classes some are drawn, batch by batch.
        [*_batches(pair, plan[:first], tight=pair.task == "classification")],
        [*_batches(pair, test, tight=True)],
        sum(text.length > len(text.ids) for text in whole),
        unknown / sum(len(text.ids) for text in whole),
        count_alike([text.text for text in whole]),
        any(text.group is not None for group in certifying for _, text in group),
    )


def prepare_all(pair: Pair, texts: Sequence[str | Text], tokens: int) -> tuple[list[Batch], int]:
    """Make batches of one text of each group; count those that nearly are another."""
    first = (min(group, key=lambda each: _digest(each[1].text)) for group in _group("texts", texts))
    encoded = _encode(pair, "texts", first, tokens, 1)
    return [*_batches(pair, encoded, tight=True)], count_alike([text.text for text in encoded])


def mix(batches: Sequence[Batch]) -> NDArray[np.int64]:
    """Find an order of all texts of batches that is neither theirs nor their file's.

    Batches are sorted by length and files may be in any order, either of which losses may follow.
    """
    places = np.concatenate([batch.places for batch in batches])
    order: NDArray[np.int64] = places.argsort()[np.random.default_rng(0).permutation(len(places))]
    return order


def count_alike(texts: Sequence[str]) -> int:
    """Count texts that have half of all their triples of words in common with one before."""
    shared, places = Counter[tuple[int, int]](), defaultdict[tuple[str, ...], list[int]](list)
    words = [text.split() for text in texts]
    triples = [{tuple(w[k : k + 3]) for k in range(max(1, len(w) - 2))} for w in words]
    for i, each in enumerate(triples):
        for triple in each:
            shared.update((i, j) for j in places[triple])
            places[triple].append(i)
    sizes = [len(each) for each in triples]
    return len({i for (i, j), n in shared.items() if 3 * n >= sizes[i] + sizes[j]})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shuffle(
    name: str, given: Sequence[str | Text], order: np.random.Generator, needed: int
) -> list[_Group]:
    """Groups of texts in random order, and theirs too."""
    groups = _group(name, given, needed)
    mixed = (groups[i] for i in order.permutation(len(groups)))
    return [[group[i] for i in order.permutation(len(group))] for group in mixed]


def _group(name: str, given: Sequence[str | Text], needed: int = 1) -> list[_Group]:
    """Groups of texts that are not empty."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(name, "a list of texts", "one text" if isinstance(given, str) else given)
    groups: dict[str | int, _Group] = {}
    for place, each in enumerate(given):
        text = Text(each) if isinstance(each, str) else each
        if not (isinstance(text, Text) and isinstance(text.text, str)):
            raise InputError(name, "of str or Text", value=each, remedy="write Text(text, label)")
        if not isinstance(text.group, str | None):
            raise InputError(name, "of groups with a str for a name", value=text.group)
        if _SURROGATE.search(text.text):
            allowed = "of whole characters, not of halves of surrogate pairs"
            raise InputError(name, allowed, value=text.text)
        if stripped := text.text.strip():
            group = groups.setdefault(place if text.group is None else text.group, [])
            group.append((place, Text(stripped, text.label, text.group)))
    if len(groups) < needed:
        allowed, remedy = f"at least {needed} text{'s' * (needed > 1)}", ""
        if any(isinstance(key, str) for key in groups):
            allowed = f"of at least {needed} group{'s' * (needed > 1)}, which count once each"
            remedy = "give more documents, or no groups if every text was drawn independently"
        if needed > LEAST_TEXTS:
            allowed += f": {LEAST_TEXTS} to plan with and {LEAST_TEXTS} to certify with"
        raise InputError(name, allowed, len(groups), remedy)
    return [*groups.values()]


def _class(pair: Pair, text: Text) -> int:
    """The class of a text; -1 without a label, and for models without classes."""
    config: Any = pair.tuned.config
    if text.label is None or pair.task != "classification" or config.num_labels < 2:
        return -1
    number, names = config.num_labels, config.label2id
    place = text.label
    if isinstance(place, str):
        # In .csv all labels are words.
        place = names.get(place, int(place) if place.isdecimal() else None)
    if type(place) is int and 0 <= place < number:
        return place
    allowed = f"a class, 0 to {number - 1}, or its name ({', '.join(map(str, names))})"
    given, remedy = f"{text.label!r} of {text.text[:40]!r}", "leave labels out, or correct this one"
    raise InputError("label", allowed, given, remedy)


def _encode(
    pair: Pair,
    purpose: str,
    lines: Iterable[tuple[int, Text]],
    tokens: int,
    needed: int = LEAST_TEXTS,
) -> list[_Encoded]:
    """Texts as tokens; those without any have no output."""
    places, texts = zip(*lines, strict=True)
    plain, config = [text.text for text in texts], pair.tuned.config
    # As many as are asked for, or as both models take.
    most = min(int(getattr(x, "max_position_embeddings", 0)) for x in (config, pair.config))
    most -= int(config.pad_token_id) + 1 if config.model_type in COUNTED_FROM_PADDING else 0
    most = min(_checks.integer("tokens", tokens, 8), most)
    with quiet():
        whole = pair.tokenizer(plain)["input_ids"]
        kept = pair.tokenizer(plain, truncation=True, max_length=most)["input_ids"]
    classes = [_class(pair, text) for text in texts]
    each = zip(plain, classes, places, kept, map(len, whole), strict=True)
    encoded = [text for text in map(_Encoded._make, each) if text.ids]
    if len(encoded) < needed:
        allowed = f"at least {needed} {purpose} that the tokenizer makes tokens of"
        raise InputError("texts", allowed, len(encoded))
    return encoded


def _batches(pair: Pair, texts: Iterable[_Encoded], *, tight: bool = False) -> Iterator[Batch]:
    """Batches of texts of similar length, as padding costs as much as text.

    In ``tight`` ones it is at most a fifth.
    """
    ordered = sorted(texts, key=lambda text: len(text.ids))
    config, padding = pair.tuned.config, pair.padding
    # About 24 numbers of each unit are kept of a token while a block is differentiated.
    most = _LOAD // (24 * config.hidden_size)
    while ordered:
        size, filled = 1, len(ordered[0].ids)
        for text in ordered[1:_BATCH]:
            filled += len(text.ids)
            padded = (size + 1) * len(text.ids)
            if padded > most or (tight and padded - filled > _PADDING * padded):
                break
            size += 1
        part, ordered = ordered[:size], ordered[size:]
        ids = [torch.tensor(text.ids) for text in part]
        yield Batch(
            pad_sequence(ids, True, padding),
            pad_sequence([torch.ones_like(text) for text in ids], True),
            torch.tensor([text.place for text in part]),
            torch.tensor([text.label for text in part]),
        )


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
        remedy = "write .txt (one text a line), .jsonl or .csv (a field text, maybe label)"
        allowed = "of a kind that is read: .txt, .jsonl or .csv"
        raise InputError("texts", allowed, path, _REMEDIES.get(kind, remedy))
    try:
        # Some editors begin files with a mark of their order of bytes.
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = "no such file" if isinstance(error, FileNotFoundError) else error
        raise InputError("texts", "a text file in UTF-8", f"{path} ({said})") from error
    if "\0" in content:
        raise InputError("texts", "a text file in UTF-8", f"{path} (it has bytes of zeros)")
    if kind in (".jsonl", ".csv"):
        rows = (_json if kind == ".jsonl" else _csv)(path, content)
        template = functools.cache(functools.partial(_find_template, models))
        return [_entry(where, row, group, template) for where, row in rows]
    if group is not None:
        remedy = "separate documents by blank lines instead"
        raise InputError("group", "given for .jsonl or .csv", path, remedy)
    parts = itertools.groupby(content.split("\n"), lambda line: bool(line.strip()))
    documents = [[*lines] for full, lines in parts if full]
    groups = 1 < len(documents) < sum(map(len, documents))
    names = (f"document {k} of {path}" if groups else None for k in itertools.count(1))
    return [Text(x, group=n) for n, lines in zip(names, documents, strict=False) for x in lines]


def _json(path: Path | str, content: str) -> Iterator[tuple[str, Any]]:
    """Read what is on each line of JSON, and name the line."""
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}: {line}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                remedy = "write one object a line"
                raise InputError("texts", "lines of JSON", where, remedy) from error


def _csv(path: Path | str, content: str) -> Iterator[tuple[str, Any]]:
    """Read rows below a header, and name them; an empty label is none."""
    rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        if len({*(rows.fieldnames or ())}) < len(rows.fieldnames or ()):
            allowed = "a header that names each field once"
            raise InputError("texts", allowed, f"{path}: {rows.fieldnames}")
        for row in rows:
            where = f"{path}, line {rows.line_num}: {row}"
            if None in row or None in row.values():
                remedy = 'put fields with commas in quotation marks (")'
                raise InputError("texts", "rows of as many fields as the header has", where, remedy)
            yield where, row | {"label": row.get("label") or None}
    except csv.Error as error:
        where = f"{path}, line {rows.line_num} ({error})"
        raise InputError("texts", "rows of .csv", where) from error


def _entry(where: str, row: Any, group: str | None, template: Callable[[], Any]) -> Text:
    """The text of one entry, with its label and its group."""
    fields = row if isinstance(row, Mapping) else {}
    text = fields.get("text")
    if text is None and "messages" in fields:
        text = _write_chat(where, fields, template())
    if not isinstance(text, str):
        remedy = "name so what holds what the model is given; chats have a field messages"
        raise InputError("texts", "entries with a field text", where, remedy)
    of = None if group is None else fields.get(group)
    if group is not None and (not isinstance(of, str | int) or of == ""):
        raise InputError("texts", f"entries with a field {group}, a name or a number", where)
    return Text(text, fields.get("label"), None if of is None else str(of))


def _write_chat(where: str, fields: Mapping[str, Any], template: Any) -> str:
    """Write a chat as a text, without what the tokenizer will put before it again."""
    chat, tools, said = fields["messages"], fields.get("tools"), ("content", "tool_calls")
    # Of what is missing most templates make nothing, silently.
    for one in chat if isinstance(chat, list) and chat else [None]:
        if not (isinstance(one, dict) and "role" in one and any(map(one.get, said))):
            allowed, remedy = "chats of one message or more", 'give each a "role" and a "content"'
            raise InputError("texts", allowed, where, remedy)
    try:
        text: str = template.apply_chat_template(chat, tools=tools, tokenize=False)
    except Exception as error:  # whatever a template raises
        allowed = "chats that the tuned model's template takes"
        raise InputError("texts", allowed, f"{where} ({reason(error)})") from error
    first = template.bos_token_id
    begins = first is not None and template("").input_ids[:1] == [first]
    return text.removeprefix(template.bos_token) if begins else text


def _find_template(models: Sequence[str]) -> Any:
    """The tokenizer of the first model that has one, with its template for chats."""
    folders = (find("tuned", model) for model in models)
    place = next((f for f in folders if (f / "tokenizer_config.json").is_file()), None)
    made = None if place is None else tokenizer(str(place))
    if made is None or made.chat_template is None:
        allowed = "no chats, where the tuned model's tokenizer has no template for them"
        remedy = "write what the model is given to a field text, or save the template with the "
        remedy += "tokenizer (chat_template.jinja)"
        raise InputError("texts", allowed, f"chats and {place or 'no tokenizer'}", remedy)
    return made
