"""Texts in three parts, and how much of the tuning's effect an adapted network loses on them."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from .. import _checks, randomness
from ..errors import InputError
from . import _libraries
from .pair import Pair, Task

#: Texts that each part needs. If two models agree on 59, the lower limit of their agreement is .95
#: at a confidence of 95%; and fewer say little about the inputs of modules.
LEAST_TEXTS = 60
# At most so many texts of each part are used, as time grows with them.
MOST = 256
# The part of the texts for planning by which candidates are selected.
SELECTING = 0.25
BATCH = 32
# Texts are cut off after so many tokens.
TOKENS = 128
# About how many numbers a network may keep for one batch: a quarter of a gigabyte.
LOAD = 2**26
# Rows of a head that are taken at a time.
WORDS = 2**13
CONFIDENCE = 0.95
DRAWS = 4000
# The part of the bootstrap that is cut, not 0.05: errors of texts are skewed. For 60 or 120
# log-normal ones of σ = 1.5 this limit holds in 95% of cases.
TAIL = 0.0125


class Batch(NamedTuple):
    """Texts as a network takes them, ``[texts, tokens]``, with 1 for tokens and 0 for padding."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def there(self) -> Tensor:
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
    """Number of texts."""
    return sum(len(batch.input_ids) for batch in batches)


def read_texts(path: Path | str) -> list[str]:
    """Read the texts of a file: one a line, or of ``.jsonl`` the field ``text`` of each line."""
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        allowed = "a file in UTF-8 with a text a line"
        raise InputError("texts", allowed=allowed, given=f"{path} ({error})") from error
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
    pair: Pair, texts: Sequence[str], test: Sequence[str] | None, *, tokens: int, seed: int
) -> Texts:
    """Divide texts in three parts; without texts for ``test``, half of them are that part."""
    order = np.random.default_rng(randomness.number(seed, "planning texts"))
    planning = _shuffle("texts", texts, order)
    if test is None:
        _require("texts", len(planning), 2 * LEAST_TEXTS)
        half = len(planning) // 2
        planning, stated = planning[half:], planning[:half]
    else:
        stated = _shuffle("held_out", test, order)
        if both := set(planning) & set(stated):
            raise InputError(
                "held_out",
                allowed="of texts that are not among those for planning",
                given=f"{len(both)} that are, such as {min(both)!r}",
                remedy="take them out of either file: what is stated would be too good",
            )
        _require("texts", len(planning), LEAST_TEXTS)
        _require("held_out", len(stated), LEAST_TEXTS)
    planning, stated = planning[:MOST], stated[:MOST]
    limit = _limit(pair, tokens)
    with _libraries.quiet():
        tokenized = pair.tokenizer([*planning, *stated])["input_ids"]
    lengths = [len(ids) for ids in tokenized]
    unknown = sum(ids.count(pair.tokenizer.unk_token_id) for ids in tokenized)
    first = round(SELECTING * len(planning))
    parts = (planning[first:], planning[:first], stated)
    fit, select, rest = ([*_batches(pair, part, limit)] for part in parts)
    cut = sum(length > limit for length in lengths)
    return Texts(fit, select, rest, cut, unknown / sum(lengths))


def prepare_all(pair: Pair, texts: Sequence[str], *, tokens: int, seed: int) -> list[Batch]:
    """Batches of all texts, or of `MOST` of them."""
    order = np.random.default_rng(randomness.number(seed, "checked texts"))
    shuffled = _shuffle("texts", texts, order)
    _require("texts", len(shuffled), LEAST_TEXTS)
    return [*_batches(pair, shuffled[:MOST], _limit(pair, tokens))]


def _shuffle(name: str, given: Sequence[str], order: np.random.Generator) -> list[str]:
    """The different texts that are not empty, in random order."""
    texts = _checks.items(name, given, what="texts")
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise InputError(name, allowed="texts", value=wrong[0])
    different = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    return [different[i] for i in order.permutation(len(different))]


def _require(name: str, number: int, needed: int) -> None:
    if number < needed:
        raise InputError(
            name,
            allowed=f"at least {needed} different texts, as a part to plan with and one to state "
            f"errors with need {LEAST_TEXTS} each (on fewer no agreement shows that there is 95%)",
            given=f"{number} different ones",
        )


def _limit(pair: Pair, tokens: int) -> int:
    """Tokens of a text at most: so many, or as many as the model takes."""
    config = pair.tuned.config
    places = int(getattr(config, "max_position_embeddings", 0))
    if config.model_type in ("camembert", "roberta", "xlm-roberta"):
        # They count positions from the one after the padding's.
        places -= int(config.pad_token_id) + 1
    return min(_checks.integer("tokens", tokens, 8), places)


def load(config: Any) -> int:
    """About how many numbers a network keeps of one token while it is differentiated."""
    wide = int(config.hidden_size) * int(config.num_hidden_layers)
    return 30 * wide + 3 * int(config.vocab_size)


def _batches(pair: Pair, texts: Sequence[str], limit: int) -> Iterator[Batch]:
    """Batches of texts of similar length, as padding costs as much as text."""
    encoded = pair.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    # A text without tokens has no output.
    ordered = sorted((ids for ids in encoded if ids), key=len)
    if not ordered:
        allowed = "texts that the model's tokenizer makes tokens of"
        raise InputError("texts", allowed=allowed, given="none")
    most = LOAD // load(pair.tuned.config)
    while ordered:
        size = 1
        while size < min(BATCH, len(ordered)) and (size + 1) * len(ordered[size]) <= most:
            size += 1
        some, ordered = ordered[:size], ordered[size:]
        ids = torch.full((size, len(some[-1])), pair.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(some):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        yield Batch(ids, mask)


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
        The cautious number: an approximate upper limit at 95% of ``η`` for all texts of this kind.
        It cuts 1.25% of a bootstrap, not 5%, since errors of texts are skewed. Where one or two
        texts hold most of the error it is still too low in more than 5% of cases.
    """

    error: float
    error_upper: float
    agreement: float
    agreement_lower: float
    kl: float
    texts: int


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
    logits, as many of which there are as words.
    """

    def __init__(self, network: Any, task: Task) -> None:
        self.task = task
        self.root: Tensor | None = None
        if task == "language":
            head = network.get_output_embeddings()
            self._weight = head.weight.detach().clone()
            self._bias = None if head.bias is None else head.bias.detach().clone()
            self.root = self.root_with(self._weight[:, :0])

    def root_with(self, columns: Float[Tensor, "words more"]) -> Float[Tensor, "all all"]:
        """``root`` of this head, with more columns that logits are made of beside its own."""
        total: Any = 0.0
        mean = torch.cat([self._weight, columns], 1).mean(0).double()
        # Some words at a time, as a whole copy would need as much memory as the network.
        for part, more in zip(self._weight.split(WORDS), columns.split(WORDS), strict=True):
            rows = torch.cat([part, more], 1).double() - mean
            total = total + rows.mT @ rows
        values, vectors = torch.linalg.eigh(total.cpu())
        return (values.clamp(0).sqrt()[:, None] * vectors.mT).to(self._weight)

    def states(self, network: Any, batch: Batch) -> Float[Tensor, "rows columns"]:
        """The states of a network of transformers."""
        if self.task == "language":
            hidden = network.base_model(**batch.on(network.device)).last_hidden_state
            return hidden[batch.there.to(hidden.device)]
        return outputs(network, batch, self.task)

    def rows(self, states: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Rows with the distances of outputs of this head."""
        return states if self.root is None else states @ self.root.to(states).mT

    def outputs(self, states: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Outputs of this head."""
        if self.root is None:
            return states
        return _centre(torch.nn.functional.linear(states, self._weight, self._bias))

    def heads(self, network: Any) -> bool:
        """Whether a network has this head, so that states tell its outputs."""
        if self.root is None:
            return True
        head = network.get_output_embeddings()
        pairs = (head.weight, self._weight), (head.bias, self._bias)
        return all(a is b or (a is not None and b is not None and a.equal(b)) for a, b in pairs)


class Reference:
    """The tuned network's states, in files, and ``effect``, ``‖f_0 − f̄‖²`` of each text."""

    def __init__(self, batches: Sequence[Batch], readout: Readout) -> None:
        self.batches, self.readout = batches, readout
        self._folder = scratch_folder(self)
        self.effect: NDArray[np.float64] = np.zeros(0)

    def record_tuned(self, network: Any, only: int | None = None) -> None:
        """Keep the states of the tuned network, for one batch or all."""
        with torch.no_grad():
            for i in range(len(self.batches)) if only is None else [only]:
                np.save(self._file(i), self.readout.states(network, self.batches[i]).cpu().numpy())

    def record_base(self, network: Any) -> None:
        """Compute the tuning's effect from the base's outputs."""
        self.effect = self._distances(network)

    def tuned_rows(self, i: int) -> Tensor:
        """The tuned network's outputs for a batch, as `Readout.rows`."""
        return self.readout.rows(self._tuned(i))

    def rows(self, network: Any, batch: Batch) -> Tensor:
        """A network's outputs as `Readout.rows`, as if it had the tuned head."""
        return self.readout.rows(self.readout.states(network, batch))

    def error(self, network: Any) -> float:
        """``η`` of a network of transformers."""
        return ratio(self._distances(network), self.effect)

    def measure(self, network: Any, *, seed: int = 0) -> Measured:
        """The `Measured` of a network, of transformers or peft."""
        return self.measure_texts(network, seed=seed)[0]

    def measure_texts(self, network: Any, *, seed: int = 0) -> tuple[Measured, NDArray[np.float64]]:
        """The `Measured` of a network, and the squared error of each text."""
        squares, equal, divergence, decisions = self.compare(network)
        measured = Measured(
            ratio(squares, self.effect),
            upper_limit(squares, self.effect, seed=seed),
            float(equal.sum() / decisions.sum()),
            lower_limit(equal, decisions),
            float(divergence.sum() / decisions.sum()),
            len(squares),
        )
        return measured, squares

    def _distances(self, network: Any) -> NDArray[np.float64]:
        """The squared distance of each text from the tuned network's outputs."""
        if not self.readout.heads(network):
            return self.compare(network).squares
        parts = []
        with torch.no_grad():
            for i, batch in enumerate(self.batches):
                off = self.rows(network, batch) - self.tuned_rows(i).to(network.device)
                column = off.cpu().double().square().sum(-1, keepdim=True)
                parts.append(sum_by_text(column, batch, self.readout.task)[:, 0].numpy())
        return np.concatenate(parts)

    def compare(self, network: Any) -> Compared:
        """What a network loses on each text."""
        task = self.readout.task
        parts: list[NDArray[np.float64]] = []
        with torch.no_grad():
            for i, batch in enumerate(self.batches):
                values = outputs(network, batch, task)
                target = self.readout.outputs(self._tuned(i).to(values))
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

    def _tuned(self, i: int) -> Tensor:
        return torch.from_numpy(np.load(self._file(i)))

    def _file(self, i: int) -> Path:
        return self._folder / f"{i}.npy"


def free_memory() -> float:
    """About how many bytes this machine has free."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        # Not every system says.
        return 2.0**31


def scratch_folder(owner: object) -> Path:
    """An empty folder that is removed with its owner, or when the program ends."""
    place = Path(tempfile.mkdtemp(prefix="lorapower-"))
    weakref.finalize(owner, shutil.rmtree, place, ignore_errors=True)
    return place


def outputs(network: Any, batch: Batch, task: Task) -> Float[Tensor, "rows columns"]:
    """A row for each text, or each token, minus its mean; hidden states as they are."""
    result = network(**batch.on(network.device))
    if task == "encoder":
        return result.last_hidden_state[batch.there.to(result.last_hidden_state.device)]
    logits = result.logits
    return _centre(logits if task == "classification" else logits[batch.there.to(logits.device)])


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
    if not (squares.any() and others.any()):
        return (0.0,) * 3 if others.any() else (math.nan,) * 3
    return ratio(squares, others), *_limits(squares, others, seed)


def _limits(
    squares: NDArray[np.float64], others: NDArray[np.float64], seed: int
) -> tuple[float, float]:
    """Limits of ``(Σ e / Σ d)^{1/2}`` by bootstrap-t, each with `TAIL` of it beyond."""
    log, deviation = _log_ratio(squares, others)
    if deviation == 0:
        return (math.exp(log / 2),) * 2
    draw = np.random.default_rng(randomness.number(seed, "bootstrap"))
    drawn = draw.integers(len(squares), size=(DRAWS, len(squares)))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, deviations = _log_ratio(squares[drawn], others[drawn])
        scores = (logs - log) / deviations
    order = math.floor(TAIL * DRAWS)
    # What cannot be told is as far off as can be, on either side.
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
        return float(stats.beta.ppf(1 - CONFIDENCE, equal.sum(), n - equal.sum() + 1))
    terms = (equal - share * sizes) / sizes.mean()
    deviation = terms.std(ddof=1) / math.sqrt(n)
    if deviation == 0:
        # All texts agree equally: as if each had one decision.
        return float((1 - CONFIDENCE) ** (1 / n)) * share
    return max(0.0, float(share - stats.t.ppf(CONFIDENCE, n - 1) * deviation))


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace numbers that JSON does not have by ``None``."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def megabytes(size: int) -> str:
    """A size in bytes for people."""
    return f"{size / 1e6:.3g} MB"


def percent(share: float) -> str:
    """A share for people."""
    return f"{share:.1%}" if math.isfinite(share) else "–"
