"""Texts to plan and measure with, and how much of the tuning's effect a network loses on them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
from ._models import quiet
from .pair import Pair, Task

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
# Rows of a head that are taken at a time.
_WORDS = 2**13
_CONFIDENCE = 0.95
#: The share of texts that a certificate speaks of.
SHARE = 0.9
_DRAWS = 4000
# The part of the bootstrap that is cut, not 0.05: errors of texts are skewed. For 60 or 120
# log-normal ones of σ = 1.5 this limit holds in 95% of cases.
_TAIL = 0.0125


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
        text = None
        with suppress(KeyError, TypeError, ValueError):
            text = json.loads(line)["text"]
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
    shuffled = _shuffle("texts", texts, order, LEAST_TEXTS)
    return [*_batches(pair, shuffled[:_MOST], _limit(pair, tokens))]


def _shuffle(name: str, given: Sequence[str], order: np.random.Generator, needed: int) -> list[str]:
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
        ids, ordered = [torch.tensor(text) for text in ordered[:size]], ordered[size:]
        mask = [torch.ones_like(text) for text in ids]
        padding = pair.tokenizer.pad_token_id
        yield Batch(pad_sequence(ids, True, padding), pad_sequence(mask, True))


class Measured(NamedTuple):
    """What an adapted network loses on some texts, and how sure that is.

    ``agreement`` is the share of equal decisions (classes or next tokens), ``agreement_lower`` its
    lower limit at 95%, and ``kl`` the mean divergence ``KL(f̄ ‖ f̂)`` of the distributions in nats;
    without a head these are NaN.

    Attributes
    ----------
    error : float
        ``η = (Σ‖f̂ − f̄‖² / Σ‖f_0 − f̄‖²)^{1/2}`` over texts, the part of the tuning's effect that
        is lost: 0 for the tuned network ``f̄``, 1 for the base ``f_0``. Outputs are logits minus
        their mean over classes or tokens or, without a head, last hidden states.
    error_upper : float
        An approximate upper limit of ``η`` for all texts of this kind. It cuts 1.25% of a
        bootstrap, not 5%, since errors of texts are skewed. Where a few texts hold most of the
        error it is too low in more than 5% of cases.
    certified : float
        For an adapter that was chosen without these texts: at least 90% of different texts like
        these lose at most this part of the tuning's typical effect, at a confidence of 95% and
        whatever their distribution is [prop-certificate]. A text loses ``‖f̂ − f̄‖``; the typical
        effect is the root mean square of ``‖f_0 − f̄‖`` over the texts by which a plan was selected
        or, without a plan, over these. Infinite for fewer than 29 texts.
    decisions : int
        The number of decisions: of texts or, for a language model, of tokens.
    verdict : str
        What these texts say of the certificate in an adapter's ``report.json``, empty without one:
        ``"confirmed"`` if they certify it by themselves, ``"failed"`` if so many lose more that,
        were it true, this would happen in at most 5% of cases, and otherwise ``"consistent"``.
    exceeding : int
        How many of these texts lose more than that certificate says.
    """

    error: float
    error_upper: float
    agreement: float
    agreement_lower: float
    kl: float
    texts: int
    certified: float = math.inf
    decisions: int = 0
    verdict: str = ""
    exceeding: int = 0


class Compared(NamedTuple):
    """Squared distances, equal decisions, divergences and decisions, summed over each text."""

    squares: NDArray[np.float64]
    equal: NDArray[np.float64]
    divergence: NDArray[np.float64]
    decisions: NDArray[np.float64]


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

    def __init__(self, batches: Sequence[Batch], readout: Readout) -> None:
        self.batches, self.readout = batches, readout
        self.effect: NDArray[np.float64] = np.zeros(0)
        #: The typical effect that losses of texts are parts of; by default that of these texts.
        self.typical: float | None = None
        self._states: list[Tensor] = []

    @torch.no_grad()
    def record_tuned(self, network: Any) -> None:
        """Keep the states of the tuned network."""
        self._states = [self.readout.states(network, batch).cpu() for batch in self.batches]

    def record_base(self, network: Any) -> None:
        """Compute the tuning's effect from the base's outputs."""
        self.effect = self._distances(network)

    def tuned_rows(self, i: int) -> Tensor:
        """The tuned network's outputs for a batch, as `Readout.rows`."""
        return self.readout.rows(self._states[i])

    def rows(self, network: Any, batch: Batch) -> Tensor:
        """A network's outputs as `Readout.rows`, as if it had the tuned head."""
        return self.readout.rows(self.readout.states(network, batch))

    def error(self, network: Any) -> float:
        """Measure ``η`` of a network of transformers."""
        return ratio(self._distances(network), self.effect)

    def measure(self, network: Any, *, seed: int = 0) -> Measured:
        """Measure what a network loses, of transformers or peft."""
        return self.summarize(self.compare(network), seed=seed)

    def summarize(self, compared: Compared, *, seed: int = 0) -> Measured:
        """Measure what a network loses from what it does on each text."""
        squares, equal, divergence, decisions = compared
        return Measured(
            ratio(squares, self.effect),
            upper_limit(squares, self.effect, seed=seed),
            float(equal.sum() / decisions.sum()),
            lower_limit(equal, decisions),
            float(divergence.sum() / decisions.sum()),
            len(squares),
            quantile_limit(self.losses(squares)),
            int(decisions.sum()),
        )

    def losses(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """The part of the tuning's typical effect that each text loses."""
        typical = self.typical
        if typical is None:
            typical = math.sqrt(self.effect.mean())
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(squares == 0, 0.0, np.sqrt(squares) / typical)

    def _distances(self, network: Any) -> NDArray[np.float64]:
        """The squared distance of each text from the tuned network's outputs."""
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
        with torch.no_grad():
            for batch, states in zip(self.batches, self._states, strict=True):
                values = outputs(network, batch, task)
                target = self.readout.outputs(states.to(values))
                if values.device.type == "mps":
                    # Which has no float64.
                    values, target = values.cpu(), target.cpu()
                columns = [(values - target).double().square().sum(-1)]
                if task == "encoder" or values.shape[-1] == 1:
                    columns += [torch.full_like(columns[0], math.nan)] * 2
                else:
                    log, log_target = (x.double().log_softmax(-1) for x in (values, target))
                    columns += [
                        (values.argmax(-1) == target.argmax(-1)).double(),
                        (log_target.exp() * (log_target - log)).sum(-1),
                    ]
                columns.append(torch.ones_like(columns[0]))
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


def upper_limit(
    squares: NDArray[np.float64], effect: NDArray[np.float64], *, seed: int = 0
) -> float:
    """An upper limit of ``η``, about 95%, by bootstrap-t (Efron and Tibshirani, 1993)."""
    error = ratio(squares, effect)
    if error in (0, math.inf) or len(squares) < 2:
        return error
    return max(error, _limits(squares, effect, seed)[1])


def paired_ratio(
    squares: NDArray[np.float64], others: NDArray[np.float64], *, seed: int = 0
) -> tuple[float, float, float]:
    """``(Σ e / Σ e')^{1/2}`` of two errors on the same texts, and its limits, about 95%."""
    if not others.any():
        return math.nan, math.nan, math.nan
    if not squares.any():
        return 0.0, 0.0, 0.0
    return ratio(squares, others), *_limits(squares, others, seed)


def _limits(
    squares: NDArray[np.float64], others: NDArray[np.float64], seed: int
) -> tuple[float, float]:
    """Limits of ``(Σ e / Σ d)^{1/2}`` by bootstrap-t, each with `_TAIL` of it beyond."""
    log, deviation = _log_ratio(squares, others)
    if deviation == 0:
        return (math.exp(log / 2),) * 2
    draw = np.random.default_rng(randomness.number(seed, "bootstrap"))
    drawn = draw.integers(len(squares), size=(_DRAWS, len(squares)))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, deviations = _log_ratio(squares[drawn], others[drawn])
        scores = (logs - log) / deviations
    order = math.floor(_TAIL * _DRAWS)
    # A draw that determines nothing is as far off as can be, on either side.
    lowest = np.sort(np.where(np.isnan(scores), -math.inf, scores))[order]
    highest = np.sort(np.where(np.isnan(scores), math.inf, scores))[-1 - order]
    low = math.exp((log - highest * deviation) / 2) if math.isfinite(highest) else 0.0
    high = math.exp((log - lowest * deviation) / 2) if math.isfinite(lowest) else math.inf
    return low, high


def _log_ratio(squares: Any, effect: Any) -> tuple[Any, Any]:
    """``ln(Σe/Σd)`` over the last axis, and its standard error to first order."""
    lost, whole = squares.mean(-1, keepdims=True), effect.mean(-1, keepdims=True)
    terms = squares / lost - effect / whole
    n = squares.shape[-1]
    return np.log(lost / whole)[..., 0], np.sqrt(terms.var(-1, ddof=1) / n)


def lower_limit(equal: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    """A lower limit of a share at 95%: Clopper's and Pearson's, or Student's for several a text."""
    from scipy import stats

    share, n = equal.sum() / sizes.sum(), len(equal)
    if not math.isfinite(share):
        return math.nan
    if share == 0:
        return 0.0
    if (sizes == 1).all():
        return float(stats.beta.ppf(1 - _CONFIDENCE, equal.sum(), n - equal.sum() + 1))
    terms = (equal - share * sizes) / sizes.mean()
    deviation = terms.std(ddof=1) / math.sqrt(n)
    if deviation == 0:
        # All texts agree equally: as if each had one decision.
        return float((1 - _CONFIDENCE) ** (1 / n)) * share
    return max(0.0, float(share - stats.t.ppf(_CONFIDENCE, n - 1) * deviation))
