"""Texts to plan and measure with: read, drawn, divided, and made batches of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import _checks, randomness
from ..errors import InputError
from ._models import quiet
from ._reading import Text
from .pair import COUNTED_FROM_PADDING, Pair

#: Texts that each part needs. If two models agree on 59, the lower limit of their agreement is .95
#: at a confidence of 95%; and fewer say little about the inputs of modules.
LEAST_TEXTS = 60
#: At most so many texts of each part are used, as time grows with them.
MOST_TEXTS = 256
# About so many tokens of each part, unless `LEAST_TEXTS` have more or all are to be used.
_TOKENS_OF_PART = 3072
# The part of the texts for planning by which candidates are selected.
_SELECTING = 0.25
_BATCH = 32
# The largest part of a tight batch that is padding.
_PADDING = 0.2
#: Texts are cut off after so many tokens.
TOKENS = 128
# What JSON may escape, but UTF-8 does not have.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
#: About how many numbers a network may keep for one batch: half a gigabyte. Small batches take up
#: to three times as long, as all weights are read for each.
LOAD = 2**27


class Batch(NamedTuple):
    """Texts as a network takes them, ``[texts, tokens]``, with 1 for tokens and 0 for padding.

    ``drawn`` has each text's place in the order in which all were drawn, since batches are of
    similar length; and ``labels`` the classes, -1 where they are not known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    drawn: Tensor
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
    """Texts to fit to, to select candidates by and to state errors with.

    ``cut`` were cut off, and ``unknown`` is the share of tokens that stand for any unknown word;
    ``used`` has the digests of all.
    """

    fit: list[Batch]
    select: list[Batch]
    test: list[Batch]
    cut: int
    unknown: float
    used: list[str]


class _Encoded(NamedTuple):
    """A text, its tokens, how many it had before it was cut off, and when it was drawn."""

    text: str
    ids: list[int]
    length: int
    drawn: int


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
    """Divide texts in three parts; without ``held_out``, half of them are to state errors with."""
    order = np.random.default_rng(randomness.number(seed, "planning texts"))
    if held_out is None:
        planning = _shuffle("texts", texts, order, 2 * LEAST_TEXTS)
        half = len(planning) // 2
        planning, stated = planning[half:], planning[:half]
    else:
        planning = _shuffle("texts", texts, order, LEAST_TEXTS)
        stated = _shuffle("held_out", held_out, order, LEAST_TEXTS)
        if both := set(planning) & set(stated):
            raise InputError(
                "held_out",
                allowed="of texts that are not among those for planning",
                given=f"{len(both)} that are, such as {min(both)!r}",
                remedy="take them out of either file: what is stated would be too good",
            )
    classes = _classes(pair, texts if held_out is None else held_out)
    limit = _limit(pair, tokens)
    encoded = _encode(pair, planning, limit)
    number = MOST_TEXTS
    if not thorough:
        # How many texts state errors must not depend on their own lengths: to stop at a number of
        # tokens would draw short ones too often.
        mean = sum(len(text.ids) for text in encoded) / len(encoded)
        number = max(LEAST_TEXTS, min(int(_TOKENS_OF_PART / mean), MOST_TEXTS))
    plan, test = encoded[:number], _encode(pair, stated[:number], limit)
    whole = [*plan, *test]
    unknown = sum(text.ids.count(pair.tokenizer.unk_token_id) for text in whole)
    first = round(_SELECTING * len(plan))
    return Texts(
        [*_batches(pair, plan[first:])],
        # Of other outputs than those of classes some are drawn, batch by batch.
        [*_batches(pair, plan[:first], tight=pair.task == "classification")],
        [*_batches(pair, test, classes, tight=True)],
        sum(text.length > limit for text in whole),
        unknown / sum(len(text.ids) for text in whole),
        sorted(_digest(text.text) for text in whole),
    )


def prepare_all(
    pair: Pair,
    texts: Sequence[str | Text],
    *,
    tokens: int,
    seed: int,
    used: Collection[str] = (),
) -> list[Batch]:
    """Make batches of all texts but those of the digests ``used``, or of 256 of them."""
    order = np.random.default_rng(randomness.number(seed, "checked texts"))
    fresh = _shuffle("texts", texts, order, LEAST_TEXTS, used)
    encoded = _encode(pair, fresh, _limit(pair, tokens))
    return [*_batches(pair, encoded, _classes(pair, texts), tight=True)]


def _digest(text: str) -> str:
    """A short digest, by which a report can say which texts a plan has used."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shuffle(
    name: str,
    given: Sequence[str | Text],
    order: np.random.Generator,
    needed: int,
    used: Collection[str] = (),
) -> list[str]:
    """The different texts that are not empty or used, in random order; refuses too few."""
    if isinstance(given, str):
        raise InputError(name, allowed="a list of texts", given="one text")
    plain = [text if isinstance(text, str) else text.text for text in given]
    if broken := next(filter(_SURROGATE.search, plain), None):
        allowed = "of whole characters, not of halves of surrogate pairs"
        raise InputError(name, allowed=allowed, value=broken)
    different = list(dict.fromkeys(text.strip() for text in plain if text.strip()))
    if used:
        different = [text for text in different if _digest(text) not in used]
    if len(different) < needed:
        allowed = f"at least {needed} different texts"
        if needed > LEAST_TEXTS:
            allowed += f": {LEAST_TEXTS} to plan with and as many to measure with"
        allowed += " that the adapter's plan has not used" * bool(used)
        raise InputError(name, allowed=allowed, given=len(different))
    return [different[i] for i in order.permutation(len(different))]


def _classes(pair: Pair, texts: Sequence[str | Text]) -> dict[str, int] | None:
    """The classes of texts if all are labelled; ``None`` for models without classes."""
    labelled = [t for t in texts if isinstance(t, Text) and t.label is not None]
    if len(labelled) < len(texts) or pair.task != "classification":
        return None
    number, names = pair.tuned.config.num_labels, pair.tuned.config.label2id
    if number < 2:
        return None
    found = {}
    for text, label, _ in labelled:
        place = label
        if isinstance(label, str):
            # In .csv all labels are words.
            place = names.get(label, int(label) if label.isdecimal() else None)
        if type(place) is not int or not 0 <= place < number:
            allowed = f"a class, 0 to {number - 1}, or its name ({', '.join(map(str, names))})"
            remedy = "leave labels out, or correct this one"
            given = f"{label!r} of {text[:40]!r}"
            raise InputError("label", allowed=allowed, given=given, remedy=remedy)
        found[text.strip()] = place
    return found


def _encode(pair: Pair, texts: Sequence[str], limit: int) -> list[_Encoded]:
    """The first texts, at most 256, as tokens; those without any have no output."""
    texts = texts[:MOST_TEXTS]
    with quiet():
        tokenized = pair.tokenizer(list(texts))["input_ids"]
        kept = pair.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    each = zip(texts, kept, map(len, tokenized), range(len(texts)), strict=True)
    encoded = [text for text in map(_Encoded._make, each) if text.ids]
    if not encoded:
        allowed = "texts that the model's tokenizer makes tokens of"
        raise InputError("texts", allowed=allowed, given="none")
    return encoded


def _limit(pair: Pair, tokens: int) -> int:
    """Tokens of a text at most: so many, or as many as the model takes."""
    config = pair.tuned.config
    both = config, pair.config
    places = min(int(getattr(each, "max_position_embeddings", 0)) for each in both)
    if config.model_type in COUNTED_FROM_PADDING:
        places -= int(config.pad_token_id) + 1
    return min(_checks.integer("tokens", tokens, 8), places)


def _batches(
    pair: Pair,
    texts: Iterable[_Encoded],
    classes: Mapping[str, int] | None = None,
    *,
    tight: bool = False,
) -> Iterator[Batch]:
    """Batches of texts of similar length, as padding costs as much as text.

    In ``tight`` ones it is at most a fifth.
    """
    ordered = sorted(texts, key=lambda text: len(text.ids))
    config, padding = pair.tuned.config, pair.tokenizer.pad_token_id
    # About 16 numbers of each unit are kept of a token while a network is differentiated.
    most = LOAD // (16 * config.hidden_size * config.num_hidden_layers)
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
        labels = [-1 if classes is None else classes[text.text] for text in part]
        yield Batch(
            pad_sequence(ids, True, padding),
            pad_sequence([torch.ones_like(text) for text in ids], True),
            torch.tensor([text.drawn for text in part]),
            torch.tensor(labels),
        )
