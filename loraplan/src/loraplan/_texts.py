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

from . import _checks
from ._errors import InputError
from ._limits import LEAST_TEXTS, fewest
from ._models import find, quiet, reason, tokenizer
from .pair import ANSWER, COUNTED_FROM_PADDING, Pair, Task

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
    once where promises are certified. A prompt may have the tuned model's greedy ``answer``, in
    words or as its tokens.
    """

    text: str
    label: str | int | None = None
    group: str | None = None
    answer: str | Sequence[int] | None = None


class Batch(NamedTuple):
    """Texts as a network takes them, ``[texts, tokens]``, with 1 for tokens and 0 for padding.

    Outputs count at the tokens ``counted``: at all, or at those by which an answer is given.
    ``places`` are those of the texts among all that were given, and ``order`` those by the digests
    of their words. ``labels`` has a class for each
    text or, for each output that counts at a token, the next token of the answer; -1 where it is
    not known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    counted: Tensor
    places: Tensor
    order: Tensor
    labels: Tensor

    def counts(self, task: Task) -> list[int]:
        """How many outputs of each text count."""
        if task == "classification":
            return [1] * len(self.places)
        return [*map(int, self.counted.sum(1))]

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments of a network on a device."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {name: values.to(device) for name, values in given.items()}

    def rows(self, values: Tensor) -> Float[Tensor, "rows columns"]:
        """A row for each token that counts, or for each text where it has one value."""
        return values[self.counted.bool().to(values.device)] if values.ndim == 3 else values

    def tokens(self, values: Tensor) -> Float[Tensor, "rows columns"]:
        """A row for each token, or for each text where it has one value."""
        return values[self.attention_mask.bool().to(values.device)] if values.ndim == 3 else values


#: Gives the answers to prompts, all as tokens.
Respond: TypeAlias = Callable[[Sequence[Sequence[int]]], Sequence[Sequence[int]]]


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
    """A text, its class, its places, its tokens, how many it had, and those of its answer."""

    text: str
    label: int
    place: int
    order: int
    ids: list[int]
    length: int
    answer: Sequence[int] | None


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
    respond: Respond | None = None,
) -> Texts:
    """Divide texts in three parts; without ``held_out``, half of them are to certify with.

    Groups are divided as wholes, before repetitions are left out of those to plan with: given
    these, the others are independent draws [prop-certificate]. Digests of texts say where each
    goes, so that nobody can draw until a promise
    holds. With ``respond`` all get answers.
    """
    if held_out is None:
        groups = _groups("texts", texts, 2 * LEAST_TEXTS)
        half = len(groups) // 2
        planning, certifying = groups[half:], groups[:half]
    else:
        planning = _groups("texts", texts, LEAST_TEXTS)
        certifying = _groups("held_out", held_out, LEAST_TEXTS)
        for name in ("text", "group"):
            one, other = (
                {getattr(text, name) for g in part for _, text in g}
                for part in (planning, certifying)
            )
            if both := (one & other) - {None}:
                allowed = f"of {name}s that are not among those for planning"
                given = f"{len(both)} that are, such as {min(both)!r}"
                remedy = "take them out here: the promise is then for other texts than those"
                raise InputError("held_out", allowed, given, remedy)
    # Of each group one text before any second one.
    lines = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*planning)))
    different = {line[1].text: line for line in lines}
    some = itertools.islice(different.values(), MOST_TEXTS)
    plan = _encode(pair, "different texts to plan with", some, tokens, respond)
    number = MOST_TEXTS
    if not thorough:
        # How many texts certify must not depend on their own lengths: to stop at a number of
        # tokens would draw short ones too often.
        mean = sum(len(text.ids) for text in plan) / len(plan)
        number = max(LEAST_TEXTS, min(int(_TOKENS_OF_PART / mean), MOST_TEXTS))
    plan = plan[:number]
    first_lines = (group[0] for group in certifying[:MOST_TEXTS])
    test = _encode(pair, "texts to certify with", first_lines, tokens, respond)
    # Those that come last are dropped, whatever they say.
    test = test[: fewest(min(number, len(test)))]
    plan, test = (_answer(part, respond) for part in (plan, test))
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


def prepare_all(
    pair: Pair, texts: Sequence[str | Text], tokens: int, respond: Respond | None = None
) -> tuple[list[Batch], int, int]:
    """Make batches of one text of each group; count those cut off, and those near another."""
    first_lines = (group[0] for group in _groups("texts", texts))
    encoded = _answer(_encode(pair, "texts", first_lines, tokens, respond, 1), respond)
    cut = sum(text.length > len(text.ids) for text in encoded)
    alike = count_alike([text.text for text in encoded])
    return [*_batches(pair, encoded, tight=True)], cut, alike


def _answer(texts: list[_Encoded], respond: Respond | None) -> list[_Encoded]:
    """Give answers to all that have none, if there is who does."""
    open_ = [k for k, text in enumerate(texts) if text.answer is None] if respond else []
    if respond and open_:
        for k, answer in zip(open_, respond([texts[k].ids for k in open_]), strict=True):
            texts[k] = texts[k]._replace(answer=answer)
    return texts


def drawn_order(batches: Sequence[Batch]) -> NDArray[np.int64]:
    """Find the order of digests in which all texts of batches stand.

    Batches are sorted by length and files may be in any order, either of which losses may follow.
    """
    order: NDArray[np.int64] = np.concatenate([batch.order for batch in batches]).argsort()
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


def _groups(name: str, given: Sequence[str | Text], needed: int = 1) -> list[_Group]:
    """Groups of texts that are not empty, in the order of their digests, and theirs too."""
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
        if text.text.strip():
            group = groups.setdefault(place if text.group is None else text.group, [])
            group.append((place, text))
    if len(groups) < needed:
        allowed, remedy = f"at least {needed} text{'s' * (needed > 1)}", ""
        if any(isinstance(key, str) for key in groups):
            allowed = f"of at least {needed} group{'s' * (needed > 1)}, which count once each"
            remedy = "give more documents, or no groups if every text was drawn independently"
        if needed > LEAST_TEXTS:
            allowed += f": {LEAST_TEXTS} to plan with and {LEAST_TEXTS} to certify with"
        raise InputError(name, allowed, len(groups), remedy)
    # Each repetition has a digest of its own, lest all of them go together.
    seen = Counter[str]()
    ordered: list[tuple[str, _Group]] = []
    for members in groups.values():
        drawn = dict[str, tuple[int, Text]]()
        for place, text in members:
            seen[text.text] += 1
            drawn[_digest(f"{seen[text.text]} {text.text}")] = place, text
        digests = sorted(drawn)
        # That of the whole, as the least of many would be small.
        ordered.append((_digest(" ".join(digests)), [drawn[digest] for digest in digests]))
    return [group for _, group in sorted(ordered, key=lambda each: each[0])]


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
    respond: Respond | None,
    needed: int = LEAST_TEXTS,
) -> list[_Encoded]:
    """Texts as tokens; those without any have no output."""
    places, texts = zip(*lines, strict=True)
    plain, config = [text.text for text in texts], pair.tuned.config
    # As many as are asked for, or as both models take.
    most = min(int(getattr(x, "max_position_embeddings", 0)) for x in (config, pair.config))
    most -= int(config.pad_token_id) + 1 if config.model_type in COUNTED_FROM_PADDING else 0
    answered = ANSWER if respond or any(text.answer is not None for text in texts) else 0
    most = min(_checks.integer("tokens", tokens, 8), most - answered)
    if most < 1:
        allowed = f"left out for a model of as few positions, as they take up to {ANSWER}"
        raise InputError("answers", allowed, most + answered)
    with quiet():
        whole = pair.tokenizer(plain)["input_ids"]
        kept = pair.tokenizer(plain, truncation=True, max_length=most)["input_ids"]
    classes = [_class(pair, text) for text in texts]
    answers = [_answer_tokens(pair, text.answer) for text in texts]
    about = classes, places, range(len(texts)), kept, map(len, whole), answers
    each = zip(plain, *about, strict=True)
    encoded = [text for text in map(_Encoded._make, each) if text.ids]
    if len(encoded) < needed:
        allowed = f"at least {needed} {purpose} that the tokenizer makes tokens of"
        raise InputError("texts", allowed, len(encoded))
    return encoded


def _answer_tokens(pair: Pair, answer: object) -> list[int] | None:
    """The tokens of an answer up to its end, which it has unless it is as long as may be."""
    if answer is None:
        return None
    if pair.task != "language":
        allowed = "left out where the model gives no next tokens"
        raise InputError("answer", allowed, value=answer)
    given = [*answer] if isinstance(answer, Sequence) else []
    if isinstance(answer, str):
        with quiet():
            given = pair.tokenizer(answer, add_special_tokens=False)["input_ids"]
    words = len(pair.tokenizer)
    known = all(type(token) is int and 0 <= token < words for token in given)
    if not known or (not given and answer != ""):
        allowed = f"words, or tokens of the model from 0 to {words - 1}, at least one"
        raise InputError("answer", allowed, value=answer)
    stop = next((k for k, token in enumerate(given) if token in pair.ends), len(given))
    return [*given[:stop], *(given[stop : stop + 1] or pair.ends[:1])][:ANSWER]


def _batches(pair: Pair, texts: Iterable[_Encoded], *, tight: bool = False) -> Iterator[Batch]:
    """Batches of texts of similar length, as padding costs as much as text.

    In ``tight`` ones it is at most a fifth.
    """
    # The last token of an answer is given, and says nothing.
    whole = ([*text.ids, *(text.answer or ())[:-1]] for text in texts)
    ordered = sorted(zip(whole, texts, strict=True), key=lambda each: len(each[0]))
    config, padding = pair.tuned.config, pair.padding
    # About 24 numbers of each unit are kept of a token while a block is differentiated.
    most = _LOAD // (24 * config.hidden_size)
    while ordered:
        size, filled = 1, len(ordered[0][0])
        for ids, _ in ordered[1:_BATCH]:
            filled += len(ids)
            padded = (size + 1) * len(ids)
            if padded > most or (tight and padded - filled > _PADDING * padded):
                break
            size += 1
        part, ordered = ordered[:size], ordered[size:]
        rows = [torch.tensor(ids) for ids, _ in part]
        counted = [torch.ones_like(ids) for ids in rows]
        labels = list[int]()
        for mask, (_, text) in zip(counted, part, strict=True):
            if text.answer is not None:
                mask[: len(text.ids) - 1] = 0
            unknown = [-1] * len(mask) if text.answer is None else text.answer
            labels += [text.label] if pair.task == "classification" else unknown
        yield Batch(
            pad_sequence(rows, True, padding),
            pad_sequence([torch.ones_like(ids) for ids in rows], True),
            pad_sequence(counted, True),
            torch.tensor([text.place for _, text in part]),
            torch.tensor([text.order for _, text in part]),
            torch.tensor(labels),
        )


def read_texts(
    path: Path | str, *, group: str | None = None, models: Sequence[str] = ()
) -> list[Text]:
    """Read the texts of a file: one a line, or of ``.jsonl`` and ``.csv`` the field ``text``.

    They may have a ``label``, an ``answer``, and a field that says of which ``group`` they are. In
    a file of text lines between blank ones are a group, if any two lines are not separated by a
    blank one. A line of JSON may have ``messages`` (and ``tools``) instead, a chat, which becomes a
    text by the template of the first of ``models`` that has a tokenizer; a last turn of the
    assistant is its answer. Raises `InputError` for a file of another kind or not in UTF-8, and for
    entries without a text or without the group.
    """
    content = _read(path, "texts", ("", ".txt", ".jsonl", ".csv"))
    kind = Path(path).suffix.lower()
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


def read_scores(path: Path | str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read scores of the tuned model and of a stand-in, a row for each prompt, from 0 to 1."""
    content = _read(path, "scores", (".jsonl", ".csv"))
    scores = []
    for where, row in (_json if Path(path).suffix.lower() == ".jsonl" else _csv)(path, content):
        try:
            scores.append([float(row["tuned"]), float(row["standin"])])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("scores", "rows with tuned and standin, numbers", where) from error
        if not all(0 <= score <= 1 for score in scores[-1]):
            raise InputError("scores", "from 0 to 1", where)
    if not scores:
        raise InputError("scores", "at least one row", str(path))
    tuned, standin = np.array(scores).T
    return tuned, standin


def _read(path: Path | str, name: str, kinds: tuple[str, ...]) -> str:
    """Read a text file of one of some kinds."""
    file = Path(path).expanduser()
    kind = file.suffix.lower()
    if kind not in kinds:
        remedy = "write .txt (one text a line), .jsonl or .csv (a field text, maybe label)"
        allowed = f"of a kind that is read: {', '.join(filter(None, kinds))}"
        raise InputError(name, allowed, path, _REMEDIES.get(kind, remedy))
    try:
        # Some editors begin files with a mark of their order of bytes.
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = "no such file" if isinstance(error, FileNotFoundError) else error
        raise InputError(name, "a text file in UTF-8", f"{path} ({said})") from error
    if "\0" in content:
        raise InputError(name, "a text file in UTF-8", f"{path} (it has bytes of zeros)")
    return content


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
            yield where, row | {name: row.get(name) or None for name in ("label", "answer")}
    except csv.Error as error:
        where = f"{path}, line {rows.line_num} ({error})"
        raise InputError("texts", "rows of .csv", where) from error


def _entry(where: str, row: Any, group: str | None, template: Callable[[], Any]) -> Text:
    """The text of one entry, with its label and its group."""
    fields = row if isinstance(row, Mapping) else {}
    text, answer = fields.get("text"), fields.get("answer")
    if text is None and "messages" in fields:
        text, answer = _write_chat(where, fields, template())
    if not isinstance(text, str):
        remedy = "name so what holds what the model is given; chats have a field messages"
        raise InputError("texts", "entries with a field text", where, remedy)
    of = None if group is None else fields.get(group)
    if group is not None and (not isinstance(of, str | int) or of == ""):
        raise InputError("texts", f"entries with a field {group}, a name or a number", where)
    return Text(text, fields.get("label"), None if of is None else str(of), answer)


def _write_chat(
    where: str, fields: Mapping[str, Any], template: Any
) -> tuple[str, str | Sequence[int] | None]:
    """Write a chat as a text, without what the tokenizer will put before it again.

    A last turn of the assistant is the answer to what is before it; else it is to be given.
    """
    chat, tools, said = fields["messages"], fields.get("tools"), ("content", "tool_calls")
    # Of what is missing most templates make nothing, silently.
    for one in chat if isinstance(chat, list) and chat else [None]:
        if not (isinstance(one, dict) and "role" in one and any(map(one.get, said))):
            allowed, remedy = "chats of one message or more", 'give each a "role" and a "content"'
            raise InputError("texts", allowed, where, remedy)
    answers = len(chat) > 1 and chat[-1]["role"] == "assistant"
    asked, answer = chat[:-1] if answers else chat, fields.get("answer")
    about: dict[str, Any] = {"tools": tools, "tokenize": False}
    try:
        text: str = template.apply_chat_template(asked, add_generation_prompt=True, **about)
        whole = template.apply_chat_template(chat, **about)
    except Exception as error:  # whatever a template raises
        allowed = "chats that the tuned model's template takes"
        raise InputError("texts", allowed, f"{where} ({reason(error)})") from error
    if answers and answer is None:
        # As the template writes it, calls of tools too.
        answer = whole.removeprefix(text) if whole.startswith(text) else chat[-1].get("content")
    first = template.bos_token_id
    begins = first is not None and template("").input_ids[:1] == [first]
    return text.removeprefix(template.bos_token) if begins else text, answer


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
