"""Texts that plans are made from and measured on: read, kept apart, and cut into tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _checks, randomness
from .. import _hub as hub
from ..errors import InputError, brief

#: Texts that each part needs. With 59 on which two models agree, the lower limit of the share on
#: which they do is .95 at a confidence of 95%; and fewer say little of what modules take in.
LEAST = 60
# Texts that are looked at, at most, of each part, as time grows with them.
MOST = 256
# Of the texts for planning, those by which candidates are chosen.
CHOOSING = 0.25
BATCH = 32
#: To which texts are cut off.
TOKENS = 128
# Numbers that a network may keep for one batch, about: a quarter of a gigabyte.
LOAD = 2**26


class Batch(NamedTuple):
    """Texts as a network takes them, ``[texts, tokens]``, with 1 for tokens and 0 for padding."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def there(self) -> Tensor:
        """Which entries are tokens."""
        return self.attention_mask.bool()


class Texts(NamedTuple):
    """Texts in three parts that share none; each part is a list of batches.

    Attributes
    ----------
    fitting : list of Batch
        For metrics and repair.
    choosing : list of Batch
        For choosing among candidates.
    held_out : list of Batch
        For what is stated; a plan for a stated error looks at them until it is reached, a few times
        at most.
    cut : int
        How many of all texts were longer than the model, or ``tokens``, allows, and were cut.
    """

    fitting: list[Batch]
    choosing: list[Batch]
    held_out: list[Batch]
    cut: int


def count(batches: Sequence[Batch]) -> int:
    """Number of texts."""
    return sum(len(batch.input_ids) for batch in batches)


def read(path: Path | str) -> list[str]:
    """The texts of a file: one a line, or of ``.jsonl`` the field ``text`` of each line.

    Raises `InputError` for a file that is missing, of another encoding than UTF-8, or without such
    fields.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "texts", allowed="a file in UTF-8 with a text a line", given=f"{path} ({error})"
        ) from error
    if file.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line)["text"])
        except (KeyError, TypeError, ValueError):
            found.append(None)
        if not isinstance(found[-1], str):
            raise InputError(
                "texts",
                allowed="lines of JSON with a field text, a text",
                given=f"{path}, line {number}: {line}",
            )
    return found


def prepared(
    texts: Sequence[str],
    held_out: Sequence[str] | None,
    words: Any,
    config: Any,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
) -> Texts:
    """Texts in three parts, as a network takes them.

    Raises `InputError` for fewer than `LEAST` different texts of a part, and for texts that are in
    both.

    Parameters
    ----------
    texts : sequence of str
        For planning; where there are no others, half of them are held out.
    held_out : sequence of str, optional
        For what is stated.
    words
        The tokenizer.
    config
        Of the model.
    tokens : int
        To which texts are cut off, if the model takes more.
    seed : int
        Draws the parts, and the texts where there are more than `MOST` of a part.
    """
    order = np.random.default_rng(randomness.number(seed, "planning texts"))
    limit = _limit(tokens, config)
    planning = _drawn("texts", texts, order)
    if held_out is None:
        _enough("texts", len(planning), 2 * LEAST)
        half = len(planning) // 2
        planning, stated = planning[half:], planning[:half]
    else:
        stated = _drawn("held_out", held_out, order)
        if both := set(planning) & set(stated):
            raise InputError(
                "held_out",
                allowed="of texts that are not among those for planning",
                given=f"{len(both)} that are, such as {brief(min(both))}",
                remedy="take them out of either file: what is stated would be too good",
            )
        _enough("texts", len(planning), LEAST)
        _enough("held_out", len(stated), LEAST)
    planning, stated = planning[:MOST], stated[:MOST]
    with hub.quiet():
        lengths = [len(ids) for ids in words([*planning, *stated])["input_ids"]]
    first = round(CHOOSING * len(planning))
    parts = (planning[first:], planning[:first], stated)
    fitting, choosing, rest = ([*_batches(part, words, limit, load(config))] for part in parts)
    return Texts(fitting, choosing, rest, sum(length > limit for length in lengths))


def whole(
    texts: Sequence[str],
    words: Any,
    config: Any,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
) -> list[Batch]:
    """All texts, or `MOST` of them, as a network of this configuration takes them.

    Raises `InputError` for fewer than `LEAST` different ones.
    """
    order = np.random.default_rng(randomness.number(seed, "checked texts"))
    found = _drawn("texts", texts, order)
    _enough("texts", len(found), LEAST)
    return [*_batches(found[:MOST], words, _limit(tokens, config), load(config))]


def tokenizer(source: str, place: str) -> Any:
    """The tokenizer of a checkpoint, which pads texts on the right."""
    words = hub.tokenizer(place)
    if words.pad_token is None:
        if words.eos_token is None:
            raise InputError(
                "tuned", allowed="with a tokenizer that has a token to pad with", given=source
            )
        words.pad_token = words.eos_token
    words.padding_side = "right"
    return words


def load(config: Any) -> int:
    """Numbers that a network keeps of one token while it is differentiated, about."""
    wide = int(config.hidden_size) * int(config.num_hidden_layers)
    return 30 * wide + 3 * int(config.vocab_size)


def _limit(tokens: int, config: Any) -> int:
    """Tokens of a text: so many, or as many as a model of this configuration takes."""
    places = int(getattr(config, "max_position_embeddings", 0))
    if config.model_type in ("camembert", "roberta", "xlm-roberta"):
        # They count positions from behind the one for padding.
        places -= int(config.pad_token_id) + 1
    return min(_checks.integer("tokens", tokens, 8), places)


def _drawn(name: str, given: Sequence[str], order: np.random.Generator) -> list[str]:
    """Different texts that say something, in random order."""
    found = _checks.items(name, given, what="texts")
    if wrong := [one for one in found if not isinstance(one, str)]:
        raise InputError(name, allowed="texts", given=brief(wrong[0]))
    there = list(dict.fromkeys(text.strip() for text in found if text.strip()))
    return [there[i] for i in order.permutation(len(there))]


def _enough(name: str, there: int, needed: int) -> None:
    if there < needed:
        raise InputError(
            name,
            allowed=f"at least {needed} different texts, as a part to plan with and one to state "
            f"errors with need {LEAST} each (on fewer no agreement shows that there is 95%)",
            given=f"{there} different ones",
        )


def _batches(texts: Sequence[str], words: Any, limit: int, load: int) -> Iterator[Batch]:
    """Texts of about one length together, as padding costs as much as text."""
    encoded = words(list(texts), truncation=True, max_length=limit)["input_ids"]
    # A model says nothing of an empty text.
    ordered = sorted((ids for ids in encoded if ids), key=len)
    if not ordered:
        raise InputError(
            "texts", allowed="texts that the model's tokenizer makes tokens of", given="none"
        )
    while ordered:
        size = 1
        while size < min(BATCH, len(ordered)) and (size + 1) * len(ordered[size]) * load <= LOAD:
            size += 1
        some, ordered = ordered[:size], ordered[size:]
        width = len(some[-1])
        ids = torch.full((size, width), words.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, each in enumerate(some):
            ids[row, : len(each)] = torch.tensor(each)
            mask[row, : len(each)] = 1
        yield Batch(ids, mask)
