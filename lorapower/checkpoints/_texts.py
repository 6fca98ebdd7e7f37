"""Texts to plan and measure with: read, drawn, divided, and made batches of."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import _checks, randomness
from ..errors import InputError
from ._limits import fewest
from ._models import quiet
from ._reading import Text
from .pair import COUNTED_FROM_PADDING, Pair

#: Texts that each part needs, or groups of them: of 61 two may exceed what they certify, of fewer
#: one; and fewer say little about the inputs of modules.
LEAST_TEXTS = 61
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

    ``cut`` were cut off, and ``unknown`` is the share of tokens that stand for any unknown word;
    ``used`` has the digests of all, and ``grouped`` says whether any were in groups.
    """

    fit: list[Batch]
    select: list[Batch]
    test: list[Batch]
    cut: int
    unknown: float
    used: list[str]
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
    order = np.random.default_rng(randomness.number(seed, "planning texts"))
    if held_out is None:
        groups = _shuffle("texts", texts, order, 2 * LEAST_TEXTS)
        half = len(groups) // 2
        planning, certifying = groups[half:], groups[:half]
    else:
        planning = _shuffle("texts", texts, order, LEAST_TEXTS)
        certifying = _shuffle("held_out", held_out, order, LEAST_TEXTS)
        _require_apart(planning, certifying)
    # Of each group one text before any second one.
    lines = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*planning)))
    different = {line[1].text: line for line in lines}
    plan = _encode(pair, "different texts to plan with", different.values(), tokens)
    number = MOST_TEXTS
    if not thorough:
        # How many texts certify must not depend on their own lengths: to stop at a number of
        # tokens would draw short ones too often.
        mean = sum(len(text.ids) for text in plan) / len(plan)
        number = max(LEAST_TEXTS, min(int(_TOKENS_OF_PART / mean), MOST_TEXTS))
    plan = plan[:number]
    test = _encode(pair, "texts to certify with", (group[0] for group in certifying), tokens)
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
        sorted({_digest(text.text) for text in whole}),
        any(text.group is not None for group in certifying for _, text in group),
    )


def prepare_all(
    pair: Pair,
    texts: Sequence[str | Text],
    *,
    tokens: int,
    seed: int,
    used: Collection[str],
    certify: bool,
) -> tuple[list[Batch], list[str]]:
    """Make batches of at most 256 texts, one of each group without any that was ``used``.

    There must be one, or as many as ``certify`` a loss. Returns their digests too.
    """
    needed = LEAST_TEXTS if certify else 1
    order = np.random.default_rng(randomness.number(seed, "checked texts"))
    fresh = _shuffle("texts", texts, order, needed, used)
    encoded = _encode(pair, "fresh texts", (group[0] for group in fresh), tokens, needed)
    if certify:
        encoded = encoded[: fewest(len(encoded))]
    return [*_batches(pair, encoded, tight=True)], sorted({_digest(text.text) for text in encoded})


def mix(batches: Sequence[Batch], seed: int) -> NDArray[np.int64]:
    """Draw an order of all texts of batches that depends on their places alone.

    Batches are sorted by length and files may be in any order, either of which losses may follow.
    """
    places = np.concatenate([batch.places for batch in batches])
    draw = np.random.default_rng(randomness.number(seed, "order of checked texts"))
    order: NDArray[np.int64] = places.argsort()[draw.permutation(len(places))]
    return order


def _digest(text: str) -> str:
    """A short digest, by which a report can say which texts were used."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shuffle(
    name: str,
    given: Sequence[str | Text],
    order: np.random.Generator,
    needed: int,
    used: Collection[str] = (),
) -> list[_Group]:
    """Groups of texts that are not empty, none of them used, in random order, and theirs too."""
    if isinstance(given, str):
        raise InputError(name, allowed="a list of texts", given="one text")
    found: dict[str | int, _Group] = {}
    for place, each in enumerate(given):
        text = Text(each) if isinstance(each, str) else each
        if _SURROGATE.search(text.text):
            allowed = "of whole characters, not of halves of surrogate pairs"
            raise InputError(name, allowed=allowed, value=text.text)
        if stripped := text.text.strip():
            group = found.setdefault(place if text.group is None else text.group, [])
            group.append((place, Text(stripped, text.label, text.group)))
    groups = [*found.values()]
    if used:
        groups = [g for g in groups if not any(_digest(text.text) in used for _, text in g)]
    if len(groups) < needed:
        allowed, remedy = f"at least {needed} text{'s' * (needed > 1)}", ""
        if any(isinstance(key, str) for key in found):
            allowed = f"of at least {needed} group{'s' * (needed > 1)}, which count once each"
            remedy = "give more documents, or no groups if every text was drawn independently"
        if needed > LEAST_TEXTS:
            allowed += f": {LEAST_TEXTS} to plan with and {LEAST_TEXTS} to certify with"
        allowed += " that neither the adapter's plan nor a check has used" * bool(used)
        raise InputError(name, allowed=allowed, given=len(groups), remedy=remedy)
    mixed = (groups[i] for i in order.permutation(len(groups)))
    return [[group[i] for i in order.permutation(len(group))] for group in mixed]


def _require_apart(*parts: list[_Group]) -> None:
    """Refuse texts to certify with, and names of their groups, that are also planned with."""
    for name in ("text", "group"):
        one, other = ({getattr(text, name) for g in part for _, text in g} for part in parts)
        if both := (one & other) - {None}:
            allowed = f"of {name}s that are not among those for planning"
            given = f"{len(both)} that are, such as {min(both)!r}"
            remedy = "take them out here: the certificate is then for other texts than those"
            raise InputError("held_out", allowed=allowed, given=given, remedy=remedy)


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
    remedy = "leave labels out, or correct this one"
    given = f"{text.label!r} of {text.text[:40]!r}"
    raise InputError("label", allowed=allowed, given=given, remedy=remedy)


def _encode(
    pair: Pair,
    purpose: str,
    lines: Iterable[tuple[int, Text]],
    tokens: int,
    needed: int = LEAST_TEXTS,
) -> list[_Encoded]:
    """The first texts, at most 256, as tokens; those without any have no output."""
    places, texts = zip(*itertools.islice(lines, MOST_TEXTS), strict=True)
    plain = [text.text for text in texts]
    with quiet():
        whole = pair.tokenizer(plain)["input_ids"]
        kept = pair.tokenizer(plain, truncation=True, max_length=_limit(pair, tokens))["input_ids"]
    classes = [_class(pair, text) for text in texts]
    each = zip(plain, classes, places, kept, map(len, whole), strict=True)
    encoded = [text for text in map(_Encoded._make, each) if text.ids]
    if len(encoded) < needed:
        allowed = f"at least {needed} {purpose} that the tokenizer makes tokens of"
        raise InputError("texts", allowed=allowed, given=len(encoded))
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
    *,
    tight: bool = False,
) -> Iterator[Batch]:
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
