"""How much of the tuning's effect an adapted network loses on texts, and limits of that."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from .. import randomness
from ._texts import Batch
from .pair import Task

# Rows of a head that are taken at a time.
_WORDS = 2**13
_CONFIDENCE = 0.95
_DRAWS = 4000
# The part of the bootstrap that is cut, not 0.05: errors of texts are skewed. For 60 or 120
# log-normal ones of σ = 1.5 this limit holds in 95% of cases.
_TAIL = 0.0125


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
        for part, more in zip(self._weight.split(_WORDS), columns.split(_WORDS), strict=True):
            rows = torch.cat([part, more], 1).double() - mean
            total = total + rows.mT @ rows
        values, vectors = torch.linalg.eigh(total.cpu())
        return (values.clamp(0).sqrt()[:, None] * vectors.mT).to(self._weight)

    def states(self, network: Any, batch: Batch) -> Float[Tensor, "rows columns"]:
        """The states of a network of transformers."""
        if self.task == "language":
            hidden = network.base_model(**batch.on(network.device)).last_hidden_state
            return hidden[batch.is_token.to(hidden.device)]
        return outputs(network, batch, self.task)

    def rows(self, states: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Rows with the distances of outputs of this head."""
        return states if self.root is None else states @ self.root.to(states).mT

    def outputs(self, states: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Outputs of this head."""
        if self.root is None:
            return states
        return _centre(torch.nn.functional.linear(states, self._weight, self._bias))

    def is_head_of(self, network: Any) -> bool:
        """Whether a network has this head, so that its states determine its outputs."""
        if self.root is None:
            return True
        head = network.get_output_embeddings()
        pairs = (head.weight, self._weight), (head.bias, self._bias)
        return all(a is b or (a is not None and b is not None and a.equal(b)) for a, b in pairs)


class Reference:
    """The tuned network's states, in files, and ``effect``, ``‖f_0 − f̄‖²`` of each text."""

    def __init__(self, batches: Sequence[Batch], readout: Readout) -> None:
        self.batches, self.readout = batches, readout
        self._folder = Path(tempfile.mkdtemp(prefix="lorapower-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.effect: NDArray[np.float64] = np.zeros(0)

    def record_tuned(self, network: Any) -> None:
        """Keep the states of the tuned network."""
        for i in range(len(self.batches)):
            self.record_batch(network, i)

    @torch.no_grad()
    def record_batch(self, network: Any, i: int) -> None:
        """Keep the states of the tuned network for one batch."""
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
        """Measure ``η`` of a network of transformers."""
        return ratio(self._distances(network), self.effect)

    def measure(self, network: Any, *, seed: int = 0) -> Measured:
        """Measure what a network loses, of transformers or peft."""
        return self.measure_texts(network, seed=seed)[0]

    def measure_texts(self, network: Any, *, seed: int = 0) -> tuple[Measured, NDArray[np.float64]]:
        """Measure what a network loses, and its squared error on each text."""
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


def outputs(network: Any, batch: Batch, task: Task) -> Float[Tensor, "rows columns"]:
    """A row for each text, or each token, minus its mean; hidden states as they are."""
    result = network(**batch.on(network.device))
    if task == "encoder":
        return result.last_hidden_state[batch.is_token.to(result.last_hidden_state.device)]
    logits = result.logits
    return _centre(logits if task == "classification" else logits[batch.is_token.to(logits.device)])


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
