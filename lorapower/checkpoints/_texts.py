"""Texts to plan and to measure with: read from files, divided in three parts, as batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _checks, randomness
from ..errors import InputError
from ._libraries import quiet
from .pair import Pair

#: Texts that each part needs. If two models agree on 59, the lower limit of their agreement is .95
#: at a confidence of 95%; and fewer say little about the inputs of modules.
LEAST_TEXTS = 60
# At most so many texts of each part are used, as time grows with them.
_MOST = 256
# The part of the texts for planning by which candidates are selected.
_SELECTING = 0.25
_BATCH = 32
#: Texts are cut off after so many tokens.
TOKENS = 128
# About how many numbers a network may keep for one batch: a quarter of a gigabyte.
_LOAD = 2**26


class Batch(NamedTuple):
    """Texts as a network takes them, ``[texts, tokens]``, with 1 for tokens and 0 for padding."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def is_token(self) -> Tensor:
        """Which entries are tokens."""
        return self.attention_mask.bool()

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments of a network on a device."""
        return {name: values.to(device) for name, values in self._asdict().items()}


class Texts(NamedTuple):
    """Texts to fit to, to select candidates by and to state errors with.

    ``cut`` were cut off, and ``unknown`` is the share of tokens that stand for any unknown word.
    """

    fit: list[Batch]
    select: list[Batch]
    test: list[Batch]
    cut: int
    unknown: float


def count(batches: Sequence[Batch]) -> int:
    """Count the texts of batches."""
    return sum(len(batch.input_ids) for batch in batches)


def read_texts(path: Path | str) -> list[str]:
    """Read the texts of a file: one a line, or of ``.jsonl`` the field ``text`` of each line.

    Raises `InputError` for a file that is not in UTF-8 and for lines of JSON without this field.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        allowed = "a text file in UTF-8, one text per line"
        raise InputError("texts", allowed=allowed, given=f"{path} ({reason})") from error
    if file.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (KeyError, TypeError, ValueError):
            text = None
        if not isinstance(text, str):
            allowed = "lines of JSON with a field text, a text"
            raise InputError("texts", allowed=allowed, given=f"{path}, line {number}: {line}")
        texts.append(text)
    return texts


def prepare(
    pair: Pair, texts: Sequence[str], held_out: Sequence[str] | None, *, tokens: int, seed: int
) -> Texts:
    """Divide texts in three parts; without ``held_out``, half of them are to state errors with."""
    order = np.random.default_rng(randomness.number(seed, "planning texts"))
    planning = _shuffle("texts", texts, order)
    if held_out is None:
        _require("texts", len(planning), 2 * LEAST_TEXTS)
        half = len(planning) // 2
        planning, stated = planning[half:], planning[:half]
    else:
        stated = _shuffle("held_out", held_out, order)
        if both := set(planning) & set(stated):
            raise InputError(
                "held_out",
                allowed="of texts that are not among those for planning",
                given=f"{len(both)} that are, such as {min(both)!r}",
                remedy="take them out of either file: what is stated would be too good",
            )
        _require("texts", len(planning), LEAST_TEXTS)
        _require("held_out", len(stated), LEAST_TEXTS)
    planning, stated = planning[:_MOST], stated[:_MOST]
    limit = _limit(pair, tokens)
    with quiet():
        tokenized = pair.tokenizer([*planning, *stated])["input_ids"]
    lengths = [len(ids) for ids in tokenized]
    unknown = sum(ids.count(pair.tokenizer.unk_token_id) for ids in tokenized)
    first = round(_SELECTING * len(planning))
    parts = (planning[first:], planning[:first], stated)
    fit, select, test = ([*_batches(pair, part, limit)] for part in parts)
    cut = sum(length > limit for length in lengths)
    return Texts(fit, select, test, cut, unknown / sum(lengths))


def prepare_all(pair: Pair, texts: Sequence[str], *, tokens: int, seed: int) -> list[Batch]:
    """Make batches of all texts, or of 256 of them."""
    order = np.random.default_rng(randomness.number(seed, "checked texts"))
    shuffled = _shuffle("texts", texts, order)
    _require("texts", len(shuffled), LEAST_TEXTS)
    return [*_batches(pair, shuffled[:_MOST], _limit(pair, tokens))]


def activations_per_token(config: Any) -> int:
    """About how many numbers a network keeps of one token while it is differentiated."""
    width = int(config.hidden_size) * int(config.num_hidden_layers)
    return 30 * width + 3 * int(config.vocab_size)


def _shuffle(name: str, given: Sequence[str], order: np.random.Generator) -> list[str]:
    """The different texts that are not empty, in random order."""
    if isinstance(given, str):
        raise InputError(name, allowed="a list of texts", given="one text")
    different = list(dict.fromkeys(text.strip() for text in given if text.strip()))
    return [different[i] for i in order.permutation(len(different))]


def _require(name: str, number: int, needed: int) -> None:
    if number < needed:
        allowed = f"at least {needed} different texts"
        if needed > LEAST_TEXTS:
            allowed += f": {LEAST_TEXTS} to plan with and as many to measure with"
        raise InputError(name, allowed=allowed, given=number)


def _limit(pair: Pair, tokens: int) -> int:
    """Tokens of a text at most: so many, or as many as the model takes."""
    config = pair.tuned.config
    places = int(getattr(config, "max_position_embeddings", 0))
    if config.model_type in ("camembert", "roberta", "xlm-roberta"):
        # They count positions from the one after the padding's.
        places -= int(config.pad_token_id) + 1
    return min(_checks.integer("tokens", tokens, 8), places)


def _batches(pair: Pair, texts: Sequence[str], limit: int) -> Iterator[Batch]:
    """Batches of texts of similar length, as padding costs as much as text."""
    encoded = pair.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    # A text without tokens has no output.
    ordered = sorted((ids for ids in encoded if ids), key=len)
    if not ordered:
        allowed = "texts that the model's tokenizer makes tokens of"
        raise InputError("texts", allowed=allowed, given="none")
    most = _LOAD // activations_per_token(pair.tuned.config)
    while ordered:
        size = 1
        while size < min(_BATCH, len(ordered)) and (size + 1) * len(ordered[size]) <= most:
            size += 1
        batch, ordered = ordered[:size], ordered[size:]
        ids = torch.full((size, len(batch[-1])), pair.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(batch):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        yield Batch(ids, mask)
