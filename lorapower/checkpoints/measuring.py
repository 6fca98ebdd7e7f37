"""The error that matters: the part of the tuning's effect that an adapted network loses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from .. import randomness
from . import scratch
from .families import Task
from .texts import Batch

CONFIDENCE = 0.95
DRAWS = 4000
# Of the bootstrap, in place of 0.05: errors of texts are skewed, and with log-normal ones of
# σ = 1.5, 60 or 120 of them, a limit from this part of the draws holds in 95% of cases.
TAIL = 0.0125


class Measured(NamedTuple):
    """What an adapted network loses on some texts, and how sure that is.

    Attributes
    ----------
    error : float
        ``η``, the part of the tuning's effect that is lost, ``(Σ‖f̂ − f̄‖² / Σ‖f_0 − f̄‖²)^{1/2}``
        over texts: 0 of the tuned network ``f̄``, 1 of the base ``f_0``. Outputs are logits about
        their mean over classes or tokens, last hidden states where there is no head.
    error_upper : float
        An upper limit of it for texts of this kind, at 95% (`upper`).
    agreement : float
        Share of equal decisions: of classes, or of next tokens; NaN without a head.
    agreement_lower : float
        A lower limit of it at 95% (`lower`).
    kl : float
        Mean divergence ``KL(f̄ ‖ f̂)`` of the distributions, in nats; NaN without a head.
    texts : int
        How many were measured.
    """

    error: float
    error_upper: float
    agreement: float
    agreement_lower: float
    kl: float
    texts: int


class Reference:
    """Outputs of the tuned network and of the base on some texts, to measure others against.

    Those of the tuned network are kept in files, as those of language models are large.
    """

    def __init__(self, batches: Sequence[Batch], task: Task) -> None:
        self.batches, self.task = batches, task
        self._folder = scratch.folder(self)
        #: Of each text ``‖f_0 − f̄‖²``.
        self.effect: NDArray[np.float64] = np.zeros(0)

    def tuned(self, network: Any) -> None:
        """Keep what the tuned network gives."""
        for i, (_, outputs) in enumerate(self._outputs(network)):
            np.save(self._file(i), outputs.numpy())

    def base(self, network: Any) -> None:
        """Take in what the base gives."""
        self.effect = self._squares(network)[0]

    def outputs(self, i: int) -> Tensor:
        """Those of the tuned network for a batch: a row for each text, or each token."""
        return torch.from_numpy(np.load(self._file(i)))

    def error(self, network: Any) -> float:
        """``η`` alone."""
        return ratio(self._squares(network)[0], self.effect)

    def measure(self, network: Any, *, seed: int = 0) -> Measured:
        """All that `Measured` says of a network."""
        squares, equal, divergence, sizes = self._squares(network)
        return Measured(
            ratio(squares, self.effect),
            upper(squares, self.effect, seed=seed),
            float(equal.sum() / sizes.sum()),
            lower(equal, sizes),
            float(divergence.sum() / sizes.sum()),
            len(squares),
        )

    def _squares(self, network: Any) -> tuple[NDArray[np.float64], ...]:
        """Of each text: squared distance, equal decisions, divergence, number of decisions."""
        rows: list[NDArray[np.float64]] = []
        for i, (batch, outputs) in enumerate(self._outputs(network)):
            wanted = self.outputs(i)
            columns = [(outputs - wanted).double().square().sum(-1)]
            if self.task == "encoder" or outputs.shape[-1] == 1:
                columns += [torch.full_like(columns[0], math.nan)] * 2
            else:
                theirs, ours = (x.double().log_softmax(-1) for x in (wanted, outputs))
                columns += [
                    (outputs.argmax(-1) == wanted.argmax(-1)).double(),
                    (theirs.exp() * (theirs - ours)).sum(-1),
                ]
            columns.append(torch.ones_like(columns[0]))
            rows.append(summed(torch.stack(columns, -1), batch, self.task).numpy())
        return tuple(np.concatenate(rows).T)

    def _outputs(self, network: Any) -> Iterator[tuple[Batch, Tensor]]:
        with torch.no_grad():
            for batch in self.batches:
                yield batch, outputs(network, batch, self.task)

    def _file(self, i: int) -> Path:
        return self._folder / f"{i}.npy"


def outputs(network: Any, batch: Batch, task: Task) -> Float[Tensor, "rows columns"]:
    """Those that count: a row for each text, or for each token of a text, about the row's mean.

    Nothing is subtracted from hidden states, and from outputs of regression.
    """
    found = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    if task == "encoder":
        return found.last_hidden_state[batch.there]
    logits = found.logits if task == "classification" else found.logits[batch.there]
    return logits - logits.mean(-1, keepdim=True) if logits.shape[-1] > 1 else logits


def summed(
    rows: Float[Tensor, "rows columns"], batch: Batch, task: Task
) -> Float[Tensor, "texts columns"]:
    """Rows of each token, added up over each text; rows of texts as they are."""
    if task == "classification":
        return rows
    return torch.stack([part.sum(0) for part in rows.split(batch.attention_mask.sum(1).tolist())])


def ratio(squares: NDArray[np.float64], effect: NDArray[np.float64]) -> float:
    """``(Σ e / Σ d)^{1/2}``; 0 where nothing was lost of nothing."""
    lost, all_of_it = squares.sum(), effect.sum()
    if all_of_it == 0:
        return 0.0 if lost == 0 else math.inf
    return float(math.sqrt(lost / all_of_it))


def upper(squares: NDArray[np.float64], effect: NDArray[np.float64], *, seed: int = 0) -> float:
    """An upper limit of ``η`` over all texts of a kind, from some: bootstrap-t at 95%.

    Texts are drawn anew, and the logarithm of ``Σe/Σd`` is taken in units of its standard error in
    each draw (Efron and Tibshirani, 1993). It is approximate: the `TAIL` that is cut off allows for
    errors of some skewness; where one or two texts hold most of the error it is too low more often
    than in 5% of cases. It is meant for one adapter, fixed before these texts were seen. At least
    ``η`` itself.
    """
    found = ratio(squares, effect)
    if found in (0, math.inf) or len(squares) < 2:
        return found
    draw = np.random.default_rng(randomness.number(seed, "bootstrap"))
    chosen = draw.integers(len(squares), size=(DRAWS, len(squares)))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, errors = _log_ratio(squares[chosen], effect[chosen])
        log, error = _log_ratio(squares, effect)
        scores = (logs - log) / errors
    scores = np.sort(np.where(np.isnan(scores), -math.inf, scores))
    lowest = scores[math.floor(TAIL * DRAWS)]
    if not math.isfinite(lowest):
        return math.inf
    return max(found, float(math.exp((log - lowest * error) / 2)))


def _log_ratio(squares: Any, effect: Any) -> tuple[Any, Any]:
    """``ln(Σe/Σd)`` over the last axis, and its standard error to first order."""
    lost, whole = squares.mean(-1, keepdims=True), effect.mean(-1, keepdims=True)
    terms = squares / lost - effect / whole
    n = squares.shape[-1]
    return np.log(lost / whole)[..., 0], np.sqrt(terms.var(-1, ddof=1) / n)


def lower(equal: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    """A lower limit of a share at 95%.

    Of whole texts, Clopper's and Pearson's, which is exact. Where each text has several decisions,
    which depend on one another, Student's for the mean over texts, and never above the share.
    """
    from scipy import stats

    share, n = equal.sum() / sizes.sum(), len(equal)
    if not math.isfinite(share):
        return math.nan
    if share == 0:
        return 0.0
    if (sizes == 1).all():
        return float(stats.beta.ppf(1 - CONFIDENCE, equal.sum(), n - equal.sum() + 1))
    terms = (equal - share * sizes) / sizes.mean()
    error = terms.std(ddof=1) / math.sqrt(n)
    if error == 0:
        # All alike: as of so many texts with one decision each.
        return float((1 - CONFIDENCE) ** (1 / n)) * share
    return max(0.0, float(share - stats.t.ppf(CONFIDENCE, n - 1) * error))
