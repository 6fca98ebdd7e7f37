"""Texts to plan and measure with, and how much of the tuning's effect a network loses on them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import _checks, randomness
from ..errors import InputError
from ._models import has_bfloat16, quiet
from .pair import Pair, Task

#: Texts that each part needs. If two models agree on 59, the lower limit of their agreement is .95
#: at a confidence of 95%; and fewer say little about the inputs of modules.
LEAST_TEXTS = 60
# At most so many texts of each part are used, as time grows with them.
_MOST = 256
#: At most so many tokens of each part, unless `LEAST_TEXTS` have more.
BUDGET = 4096
# The part of the texts for planning by which candidates are selected.
_SELECTING = 0.25
_BATCH = 32
#: Texts are cut off after so many tokens.
TOKENS = 128
# About how many numbers a network may keep for one batch: a quarter of a gigabyte.
_LOAD = 2**26
# Rows of a head that are taken at a time.
_WORDS = 2**13
_CONFIDENCE = 0.95
#: The share of texts that a certificate speaks of.
SHARE = 0.9
# The part of its capital that a bet on a mean risks at most.
_RISKED = 0.9


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

    def rows(self, values: Tensor) -> Float[Tensor, "rows columns"]:
        """A row for each token, or for each text where there is one value for a text."""
        return values[self.is_token.to(values.device)] if values.ndim == 3 else values


class About(NamedTuple):
    """What is known of the texts of batches: the places of those drawn first to last, and classes.

    Bets need the order in which texts were drawn, since batches have those of similar length.
    """

    drawn: NDArray[np.int64]
    labels: list[int] | None = None


class Texts(NamedTuple):
    """Texts to fit to, to select candidates by and to state errors with.

    ``cut`` were cut off, and ``unknown`` is the share of tokens that stand for any unknown word.
    """

    fit: list[Batch]
    select: list[Batch]
    test: list[Batch]
    about_test: About
    cut: int
    unknown: float


def _size(batch: Batch) -> int:
    """The number of texts of a batch."""
    return len(batch.input_ids)


def count(batches: Sequence[Batch]) -> int:
    """Count the texts of batches."""
    return sum(map(_size, batches))


def read_texts(path: Path | str) -> list[str] | dict[str, Any]:
    """Read the texts of a file: one a line, or of ``.jsonl`` the field ``text`` of each line.

    If all lines of JSON have a field ``label`` too, the texts are returned with their labels.
    Raises `InputError` for a file that is not in UTF-8 and for lines of JSON without a text.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        allowed = "a text file in UTF-8, one text per line"
        raise InputError("texts", allowed=allowed, given=f"{path} ({reason})") from error
    if file.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = None
        with suppress(ValueError):
            entry = json.loads(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            allowed = "lines of JSON with a field text, a text"
            raise InputError("texts", allowed=allowed, given=f"{path}, line {number}: {line}")
        entries.append(entry)
    if entries and all("label" in entry for entry in entries):
        return {entry["text"]: entry["label"] for entry in entries}
    return [entry["text"] for entry in entries]


def prepare(
    pair: Pair,
    texts: Sequence[str] | Mapping[str, Any],
    held_out: Sequence[str] | Mapping[str, Any] | None,
    *,
    tokens: int,
    budget: float | None = None,
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
    labels = _classes(pair, texts if held_out is None else held_out)
    limit = _limit(pair, tokens)
    encoded = _encode(pair, planning, limit)
    number = _afford(encoded, budget)
    parts = encoded[:number], _encode(pair, stated[:number], limit)
    whole = [encoded for part in parts for encoded in part]
    unknown = sum(ids.count(pair.tokenizer.unk_token_id) for _, ids, _ in whole)
    cut = sum(length > limit for *_, length in whole)
    first = round(_SELECTING * len(parts[0]))
    three = parts[0][first:], parts[0][:first], parts[1]
    fit, select, test = ([*_batches(pair, part)] for part in three)
    share = unknown / sum(len(ids) for _, ids, _ in whole)
    return Texts(fit, select, test, _about(labels, parts[1]), cut, share)


def prepare_all(
    pair: Pair, texts: Sequence[str] | Mapping[str, Any], *, tokens: int, seed: int
) -> tuple[list[Batch], About]:
    """Make batches of all texts, or of 256 of them."""
    order = np.random.default_rng(randomness.number(seed, "checked texts"))
    shuffled = _shuffle("texts", texts, order, LEAST_TEXTS)
    labels = _classes(pair, texts)
    encoded = _encode(pair, shuffled, _limit(pair, tokens))
    return [*_batches(pair, encoded)], _about(labels, encoded)


def _shuffle(
    name: str, given: Sequence[str] | Mapping[str, Any], order: np.random.Generator, needed: int
) -> list[str]:
    """The different texts that are not empty, in random order; refuses too few."""
    if isinstance(given, str):
        raise InputError(name, allowed="a list of texts", given="one text")
    different = list(dict.fromkeys(text.strip() for text in given if text.strip()))
    if len(different) < needed:
        allowed = f"at least {needed} different texts"
        if needed > LEAST_TEXTS:
            allowed += f": {LEAST_TEXTS} to plan with and as many to measure with"
        raise InputError(name, allowed=allowed, given=len(different))
    return [different[i] for i in order.permutation(len(different))]


def _classes(pair: Pair, texts: Sequence[str] | Mapping[str, Any]) -> dict[str, int] | None:
    """The classes of labelled texts; ``None`` without labels, and for models without classes."""
    if not isinstance(texts, Mapping) or pair.task != "classification":
        return None
    number, names = pair.tuned.config.num_labels, pair.tuned.config.label2id
    if number < 2:
        return None
    found = {}
    for text, label in texts.items():
        place = names.get(label) if isinstance(label, str) else label
        if type(place) is not int or not 0 <= place < number:
            allowed = f"a class, 0 to {number - 1}, or its name ({', '.join(map(str, names))})"
            remedy = "or leave labels out"
            given = f"{label!r} of {text[:40]!r}"
            raise InputError("label", allowed=allowed, given=given, remedy=remedy)
        found[text.strip()] = place
    return found


# A text, its tokens, and how many it had before it was cut off.
_Encoded = tuple[str, list[int], int]


def _encode(pair: Pair, texts: Sequence[str], limit: int) -> list[_Encoded]:
    """The first texts, at most 256, as tokens; those without any have no output."""
    texts = texts[:_MOST]
    with quiet():
        tokenized = pair.tokenizer(list(texts))["input_ids"]
        kept = pair.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    each = zip(texts, kept, map(len, tokenized), strict=True)
    encoded = [(text, ids, length) for text, ids, length in each if ids]
    if not encoded:
        allowed = "texts that the model's tokenizer makes tokens of"
        raise InputError("texts", allowed=allowed, given="none")
    return encoded


def _afford(texts: Sequence[_Encoded], budget: float | None) -> int:
    """How many texts of the mean length of these a budget of tokens allows, at least 60.

    The number of texts to state errors with must not depend on their own lengths: to stop before
    the budget is exceeded would draw short ones too often.
    """
    mean = sum(len(ids) for _, ids, _ in texts) / len(texts)
    needed = math.ceil(LEAST_TEXTS * mean)
    if budget is not None and budget < needed:
        allowed = f"at least {needed:,} tokens, for {LEAST_TEXTS} texts like these"
        remedy = "or cut the texts (--tokens)"
        raise InputError("budget", allowed=allowed, given=f"{budget:,}", remedy=remedy)
    return min(_MOST, max(LEAST_TEXTS, int(min((budget or BUDGET) / mean, _MOST))))


def _by_length(texts: Iterable[_Encoded]) -> list[_Encoded]:
    """Texts in the order of batches: of similar length, as padding costs as much as text."""
    return sorted(texts, key=lambda encoded: len(encoded[1]))


def _about(labels: dict[str, int] | None, texts: Sequence[_Encoded]) -> About:
    """Where texts are in the order of batches, and their classes in it."""
    order = np.argsort([len(ids) for _, ids, _ in texts], kind="stable")
    classes = None if labels is None else [labels[texts[i][0]] for i in order]
    return About(np.argsort(order), classes)


def activations_per_token(config: Any) -> int:
    """About how many numbers a network keeps of one token while it is differentiated."""
    width = int(config.hidden_size) * int(config.num_hidden_layers)
    return 30 * width + 3 * int(config.vocab_size)


def _limit(pair: Pair, tokens: int) -> int:
    """Tokens of a text at most: so many, or as many as the model takes."""
    config = pair.tuned.config
    places = int(getattr(config, "max_position_embeddings", 0))
    if config.model_type in ("camembert", "roberta", "xlm-roberta"):
        # They count positions from the one after the padding's.
        places -= int(config.pad_token_id) + 1
    return min(_checks.integer("tokens", tokens, 8), places)


def _batches(pair: Pair, texts: Iterable[_Encoded]) -> Iterator[Batch]:
    """Batches of texts, as large as memory allows."""
    ordered = [ids for _, ids, _ in _by_length(texts)]
    most = _LOAD // activations_per_token(pair.tuned.config)
    while ordered:
        size = 1
        while size < min(_BATCH, len(ordered)) and (size + 1) * len(ordered[size]) <= most:
            size += 1
        ids, ordered = [torch.tensor(text) for text in ordered[:size]], ordered[size:]
        mask = [torch.ones_like(text) for text in ids]
        padding = pair.tokenizer.pad_token_id
        yield Batch(pad_sequence(ids, True, padding), pad_sequence(mask, True))


class Measured(NamedTuple):
    """What an adapted network loses on some texts, and how sure that is.

    Limits hold at a confidence of 95% for any distribution of texts, if the adapter was chosen
    without these [prop-certificate, prop-mean-limit]. Decisions are classes or next tokens; without
    a head what is said of them is NaN.

    Attributes
    ----------
    error : float
        ``η = (Σ‖f̂ − f̄‖² / Σ‖f_0 − f̄‖²)^{1/2}`` over texts, the part of the tuning's effect that
        is lost: 0 for the tuned network ``f̄``, 1 for the base ``f_0``. Outputs are logits minus
        their mean over classes or tokens or, without a head, last hidden states.
    agreement, agreement_lower : float
        The share of equal decisions; and the lower limit of its mean over texts.
    kl : float
        The mean divergence ``KL(f̄ ‖ f̂)`` of the distributions, in nats.
    texts : int
        The number of texts.
    certified : float
        At least 90% of different texts like these lose at most this part of the tuning's typical
        effect. A text loses ``‖f̂ − f̄‖``; the typical effect is the root mean square of
        ``‖f_0 − f̄‖`` over the texts by which a plan was selected or, without a plan, over these.
        Infinite for fewer than 29 texts.
    decisions : int
        The number of decisions: of texts or, for a language model, of tokens.
    variation, variation_upper : float
        The mean total variation ``½‖p̄ − p̂‖₁`` of the distributions, averaged over each text and
        then over texts, and its upper limit: of draws from both, coupled at best, this share
        differs.
    accuracy, base_accuracy, tuned_accuracy : float
        The share of right decisions of the adapted network, of the base and of the tuned network;
        NaN without labels.
    verdict : str
        What these texts say of the certificate in an adapter's ``report.json``, empty without one:
        ``"confirmed"`` if they certify it by themselves, ``"failed"`` if so many lose more that,
        were it true, this would happen in at most 5% of cases, and otherwise ``"consistent"``.
    exceeding : int
        How many of these texts lose more than that certificate says.
    """

    error: float
    agreement: float
    agreement_lower: float
    kl: float
    texts: int
    certified: float = math.inf
    decisions: int = 0
    variation: float = math.nan
    variation_upper: float = math.nan
    accuracy: float = math.nan
    base_accuracy: float = math.nan
    tuned_accuracy: float = math.nan
    verdict: str = ""
    exceeding: int = 0


class Compared(NamedTuple):
    """What is summed over each text: squared distances, equal decisions, divergences, and more.

    The others are the number of decisions, total variations, and right decisions.
    """

    squares: NDArray[np.float64]
    equal: NDArray[np.float64]
    divergence: NDArray[np.float64]
    decisions: NDArray[np.float64]
    variation: NDArray[np.float64]
    right: NDArray[np.float64]


class Readout:
    """The head of a network of transformers, by which states become outputs.

    ``states`` have a row for each text, or each token: last hidden states, or a classifier's logits
    minus their mean. A language model's logits minus their mean are linear in its states, so that
    their distances are those of ``states @ root.T`` with few columns. Their second moments need no
    logits, as many of which there are as words. Only where the model caps logits, as Gemma 2 does,
    is ``root`` the weight of the head itself.
    """

    def __init__(self, network: Any, task: Task) -> None:
        self.task = task
        self.root: Tensor | None = None
        if task == "language":
            head = network.get_output_embeddings()
            self._weight = head.weight.detach().clone()
            self._bias = None if head.bias is None else head.bias.detach().clone()
            self._cap = getattr(network.config, "final_logit_softcapping", None)
            self.root = self.root_with(self._weight[:, :0])

    def root_with(self, columns: Float[Tensor, "words more"]) -> Float[Tensor, "all all"]:
        """``root`` of this head, with more columns that logits are made of beside its own."""
        columns = columns.to(self._weight)
        if self._cap:
            return torch.cat([self._weight, columns], 1) if columns.numel() else self._weight
        total: Any = 0.0
        mean = torch.cat([self._weight, columns], 1).mean(0).double()
        # Some words at a time, as a whole copy would need as much memory as the network.
        for part, more in zip(self._weight.split(_WORDS), columns.split(_WORDS), strict=True):
            rows = torch.cat([part, more], 1).double() - mean
            total = total + rows.mT @ rows
        values, vectors = torch.linalg.eigh(total.cpu())
        return (values.clamp(0).sqrt()[:, None] * vectors.mT).to(self._weight)

    def states(self, network: Any, batch: Batch) -> Float[Tensor, "rows columns"]:
        """The states of a network of transformers."""
        if self.task == "language":
            return batch.rows(network.base_model(**batch.on(network.device)).last_hidden_state)
        return outputs(network, batch, self.task)

    def rows(
        self, states: Float[Tensor, "rows columns"], root: Tensor | None = None
    ) -> Float[Tensor, "rows columns"]:
        """Rows with the distances of outputs of this head, or of another ``root``."""
        root = self.root if root is None else root
        if root is None:
            return states
        values = states @ root.to(states).mT
        return self._capped(values) if self._cap else values

    def outputs(self, states: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Outputs of this head."""
        if self.root is None:
            return states
        return self._capped(torch.nn.functional.linear(states, self._weight, self._bias))

    def _capped(self, logits: Float[Tensor, "rows words"]) -> Float[Tensor, "rows words"]:
        return _centre(self._cap * (logits / self._cap).tanh() if self._cap else logits)

    def is_head_of(self, network: Any) -> bool:
        """Whether a network has this head, so that its states determine its outputs."""
        if self.root is None:
            return True
        head = network.get_output_embeddings()
        return head.weight.equal(self._weight) and (
            self._bias is None or head.bias.equal(self._bias)
        )


class Reference:
    """The tuned network's states, and ``effect``, ``‖f_0 − f̄‖²`` of each text."""

    def __init__(
        self, batches: Sequence[Batch], readout: Readout, about: About | None = None
    ) -> None:
        self.batches, self.readout = batches, readout
        self.effect: NDArray[np.float64] = np.zeros(0)
        #: The typical effect that losses of texts are parts of; by default that of these texts.
        self.typical: float | None = None
        self._states: list[Tensor] = []
        about = about or About(np.arange(count(batches)))
        self._drawn = about.drawn
        self._labels = None if about.labels is None else torch.tensor(about.labels)
        # Shares of right decisions of the base and of the tuned network.
        self._accuracies = math.nan, math.nan

    @torch.no_grad()
    def record_tuned(self, network: Any) -> None:
        """Keep the states of the tuned network."""
        self._states = [self.readout.states(network, batch).cpu() for batch in self.batches]

    def record_base(self, network: Any) -> None:
        """Compute the tuning's effect from the base's outputs."""
        if self._labels is None:
            self.effect = self.squares(network)
            return
        compared = self.compare(network)
        decided = torch.cat(self._states).argmax(-1) == self._labels
        self.effect = compared.squares
        self._accuracies = float(compared.right.mean()), float(decided.double().mean())

    def every(self, step: int) -> tuple[Reference, NDArray[np.int64]]:
        """Take one in so many batches, from the longest texts on, and the places of their texts."""
        places = np.split(np.arange(len(self.effect)), np.cumsum([*map(_size, self.batches)])[:-1])
        which = np.concatenate(places[::-step])
        some = Reference(self.batches[::-step], self.readout)
        some._states, some.effect = self._states[::-step], self.effect[which]
        return some, which

    def tuned_rows(self, i: int) -> Tensor:
        """The tuned network's outputs for a batch, as `Readout.rows`."""
        return self.readout.rows(self._states[i])

    def rows(self, network: Any, batch: Batch) -> Tensor:
        """A network's outputs as `Readout.rows`, as if it had the tuned head."""
        return self.readout.rows(self.readout.states(network, batch))

    def error(self, network: Any) -> float:
        """Measure ``η`` of a network of transformers."""
        return ratio(self.squares(network), self.effect)

    def measure(self, network: Any) -> Measured:
        """Measure what a network loses, of transformers or peft."""
        return self.summarize(self.compare(network))

    def summarize(self, compared: Compared) -> Measured:
        """Measure what a network loses from what it does on each text."""
        squares, equal, divergence, decisions, variation, right = compared
        differing, varied = ((x / decisions)[self._drawn] for x in (decisions - equal, variation))
        return Measured(
            ratio(squares, self.effect),
            float(equal.sum() / decisions.sum()),
            1 - mean_limit(differing, binary=bool((decisions == 1).all())),
            float(divergence.sum() / decisions.sum()),
            len(squares),
            quantile_limit(self.losses(squares)),
            int(decisions.sum()),
            float(varied.mean()),
            mean_limit(varied),
            float(right.mean()),
            *self._accuracies,
        )

    def losses(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """The part of the tuning's typical effect that each text loses."""
        typical = self.typical
        if typical is None:
            typical = math.sqrt(self.effect.mean())
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(squares == 0, 0.0, np.sqrt(squares) / typical)

    def squares(self, network: Any) -> NDArray[np.float64]:
        """Measure the squared distance of each text from the tuned network's outputs."""
        if not self.readout.is_head_of(network):
            return self.compare(network).squares
        parts = []
        with torch.no_grad():
            for i, batch in enumerate(self.batches):
                missed = self.rows(network, batch) - self.tuned_rows(i).to(network.device)
                column = missed.cpu().double().square().sum(-1, keepdim=True)
                parts.append(sum_by_text(column, batch, self.readout.task)[:, 0].numpy())
        return np.concatenate(parts)

    def compare(self, network: Any) -> Compared:
        """Compare a network with the tuned one on each text."""
        task = self.readout.task
        parts: list[NDArray[np.float64]] = []
        labels = [] if self._labels is None else self._labels.split([*map(_size, self.batches)])
        with torch.no_grad():
            for i, (batch, states) in enumerate(zip(self.batches, self._states, strict=True)):
                values = outputs(network, batch, task)
                target = self.readout.outputs(states.to(values))
                if values.device.type == "mps":
                    # Which has no float64.
                    values, target = values.cpu(), target.cpu()
                squares = (values - target).double().square().sum(-1)
                ones, nothing = torch.ones_like(squares), torch.full_like(squares, math.nan)
                if task == "encoder" or values.shape[-1] == 1:
                    columns = [squares, nothing, nothing, ones, nothing, nothing]
                else:
                    log, log_target = (x.double().log_softmax(-1) for x in (values, target))
                    decided = values.argmax(-1)
                    columns = [
                        squares,
                        (decided == target.argmax(-1)).double(),
                        (log_target.exp() * (log_target - log)).sum(-1),
                        ones,
                        (log_target.exp() - log.exp()).abs().sum(-1) / 2,
                        (decided == labels[i].to(decided)).double() if labels else nothing,
                    ]
                stacked = torch.stack(columns, -1).cpu()
                parts.append(sum_by_text(stacked, batch, task).numpy())
        return Compared(*np.concatenate(parts).T)


def outputs(network: Any, batch: Batch, task: Task) -> Float[Tensor, "rows columns"]:
    """A row for each text, or each token, minus its mean; hidden states as they are."""
    result = network(**batch.on(network.device))
    if task == "encoder":
        return batch.rows(result.last_hidden_state)
    return _centre(batch.rows(result.logits))


def _centre(logits: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    return logits - logits.mean(-1, keepdim=True) if logits.shape[-1] > 1 else logits


@contextmanager
def watch(network: Any, modules: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect inputs and outputs of modules in the order of their calls; gradients may be on."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0].detach(), output

        return hook

    def start(_: Any, __: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(torch.is_grad_enabled())

    with ExitStack() as stack:
        # Before the others, as what it gives is what follows depends on.
        first = network.get_input_embeddings()
        stack.callback(first.register_forward_hook(start).remove)
        for name in modules:
            module = network.get_submodule(name)
            stack.callback(module.register_forward_hook(keep(name)).remove)
        yield seen


def fast(network: Any, readout: Readout) -> AbstractContextManager[Any]:
    """Make products of a language model in bfloat16, where the processor has it."""
    kind = network.device.type
    fits = readout.task == "language" and has_bfloat16(kind)
    return torch.autocast(kind, torch.bfloat16, enabled=fits)


def sum_by_text(
    rows: Float[Tensor, "rows columns"], batch: Batch, task: Task
) -> Float[Tensor, "texts columns"]:
    """Rows of tokens, summed over each text; rows of texts as they are."""
    if task == "classification":
        return rows
    return torch.stack([part.sum(0) for part in rows.split(batch.attention_mask.sum(1).tolist())])


def ratio(squares: NDArray[np.float64], effect: NDArray[np.float64]) -> float:
    """``(Σ e / Σ d)^{1/2}``; 0 where nothing was lost of nothing."""
    lost, whole = squares.sum(), effect.sum()
    if whole == 0:
        return 0.0 if lost == 0 else math.inf
    return float(math.sqrt(lost / whole))


def largest_share(squares: NDArray[np.float64], part: float = 0.05) -> float:
    """The share of a sum that its largest terms hold, a part of all; NaN if the sum is 0."""
    largest = np.sort(squares)[-math.ceil(part * len(squares)) :]
    return float(largest.sum() / squares.sum()) if squares.sum() else math.nan


def quantile(losses: NDArray[np.float64], share: float = SHARE) -> float:
    """The least loss that at least this share of texts does not exceed."""
    return float(np.quantile(losses, share, method="inverted_cdf"))


def quantile_limit(losses: NDArray[np.float64], share: float = SHARE) -> float:
    """An upper limit of a quantile at 95%, for any distribution [prop-certificate].

    It is the k-th smallest of the losses with the least k such that a binomial number of ``n``
    draws with probability ``share`` is at least k in at most 5% of cases (Wilks, 1941); infinite
    where there is no such k up to ``n``.
    """
    from scipy import stats

    found = stats.quantile_test(losses, p=share, alternative="less")
    limit = float(found.confidence_interval(_CONFIDENCE).high)
    return math.inf if math.isnan(limit) else limit


def judge(losses: NDArray[np.float64], limit: float, share: float = SHARE) -> tuple[str, int]:
    """Judge a certified limit by fresh texts: ``verdict`` and ``exceeding`` of `Measured`."""
    from scipy import stats

    # Merged and unmerged adapters differ by rounding.
    limit = 1.001 * limit + 1e-5
    exceeding = int((~(losses <= limit)).sum())
    if quantile_limit(losses, share) <= limit:
        return "confirmed", exceeding
    chance = stats.binom.cdf(len(losses) - exceeding, len(losses), share)
    return "failed" if chance <= 1 - _CONFIDENCE else "consistent", exceeding


def texts_for(losses: NDArray[np.float64], limit: float, share: float = SHARE) -> float:
    """How many texts like these would certify a limit; infinite if no number that is used does."""
    from scipy import stats

    within = float((losses <= limit).mean())
    numbers = np.arange(LEAST_TEXTS, _MOST + 1)
    enough = stats.binom.ppf(_CONFIDENCE, numbers, share) + 1 <= within * numbers
    return float(numbers[enough][0]) if enough.any() else math.inf


def mean_limit(values: NDArray[np.float64], *, binary: bool = False) -> float:
    """An upper limit of a mean at 95%, for any distribution on [0, 1] [prop-mean-limit].

    Values are in the order in which they were drawn. The limit is the least ``m`` at which a
    gambler who bets that they are below ``m`` on average would have had 20 times the capital that
    he began with (Waudby-Smith and Ramdas, 2024); for ``binary`` ones it is Clopper's and
    Pearson's. NaN for values that are.
    """
    from scipy import stats

    n, total = len(values), float(values.sum())
    if math.isnan(total):
        return math.nan
    if binary:
        return float(stats.beta.ppf(_CONFIDENCE, total + 1, n - total)) if total < n else 1.0
    before = np.arange(2, n + 2)
    mean = (0.5 + values.cumsum()) / before
    spread = (0.25 + np.square(values - mean).cumsum()) / before
    wanted = math.log(1 / (1 - _CONFIDENCE))
    stake = np.sqrt(2 * wanted / (n * np.array([0.25, *spread[:-1]])))[:, None]
    m = np.arange(1, 1000) / 1000
    gain = np.minimum(stake, _RISKED / (1 - m)) * (m - values[:, None])
    won = (np.log1p(gain).cumsum(0).max(0) >= wanted).nonzero()[0]
    return float(m[won[0]]) if len(won) else 1.0
