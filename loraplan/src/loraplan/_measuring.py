"""How much of the tuning's effect a network loses on texts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from ._limits import (
    are_alike,
    binomial_limit,
    mean_limit,
    quantile,
    quantile_limit,
    ratio,
    repeated_limit,
)
from ._streams import Network, TextStates, advance, centre
from ._texts import Batch, drawn_order
from .pair import Task

# Rows of logits that are computed at a time.
_ROWS = 2**11
# Two logits nearer than this may change places on another machine.
_TIE = 1e-3
# Outputs of a network and of the tuned one.
_Two: TypeAlias = tuple[Tensor, Tensor]


class Measured(NamedTuple):
    """What a stand-in keeps of the tuned model on some texts, and how sure that is.

    All is computed on texts as they are given, and only on the answer of those that have one.
    Decisions are classes or next tokens; without a head what is said of them is NaN. Limits hold
    for texts like these, each at a confidence of 95% and for any distribution, if texts (or groups)
    were drawn independently and decided on no adapter; of a group they speak of a random text.
    Those ``repeated`` hold for all who look at one stand-in with ever more texts (or groups),
    however often [prop-certificate]. After a search only what it was asked for is a limit.

    Attributes
    ----------
    error : float
        ``η = (Σ‖f̂ − f̄‖² / Σ‖f_0 − f̄‖²)^{1/2}`` over texts, the part of the tuning's effect that
        is lost: 0 for the tuned network ``f̄``, 1 for the base ``f_0``. Outputs are logits minus
        their mean over classes or tokens or, without a head, last hidden states.
    agreement : float
        The share of equal decisions.
    kl : float
        The mean divergence ``KL(f̄ ‖ f̂)`` of the distributions, in nats.
    texts : int
        The number of texts; of each group there is one.
    own_effect, own_effect_repeated : float
        At least 90% of texts lose at most this part of what tuning changes in them,
        ``‖f̂ − f̄‖ / ‖f_0 − f̄‖``.
    same, same_repeated : float
        At least this share of a text's decisions is the tuned network's, on average over texts. So
        any score of decisions in [0, 1] that is averaged like this, such as the accuracy of
        classes, differs by at most ``1 − same``.
    same_answers, same_answers_repeated : float
        At least this share of prompts gets the tuned network's greedy answer, token for token, of
        longer ones the first 64; NaN without answers.
    first_tokens : float
        Nine of ten of these answers begin with so many of the same tokens, or are the same.
    verified : int
        How many answers are the tuned network's own; others count as different.
    in_bfloat16 : float
        The share of its own answers that the tuned network keeps in bfloat16, where that was asked.
    acceptance : float
        The mean of ``1 − ½‖p̄ − p̂‖₁``: the share of sampled decisions that speculative decoding
        would accept.
    decisions : int
        The number of decisions: of texts or, for a language model, of tokens.
    accuracy, base_accuracy, tuned_accuracy : float
        Shares of right decisions of the stand-in, the base and the tuned network; NaN without
        labels.
    cut : int
        The number of texts that were cut off.
    differing : dict
        Entries of the configuration, which an adapted network has from the base, of which the tuned
        model has others, with both values: the loss counts them.
    alike : int
        The number of texts that are nearly the same as another one.
    neighbours : bool
        Whether neighbours in the file lose alike, as lines of one document do, or those of a sorted
        file.
    """

    error: float
    agreement: float
    kl: float
    texts: int
    own_effect: float = math.inf
    own_effect_repeated: float = math.inf
    same: float = math.nan
    same_repeated: float = math.nan
    same_answers: float = math.nan
    same_answers_repeated: float = math.nan
    first_tokens: float = math.nan
    verified: int = 0
    in_bfloat16: float = math.nan
    acceptance: float = math.nan
    decisions: int = 0
    accuracy: float = math.nan
    base_accuracy: float = math.nan
    tuned_accuracy: float = math.nan
    cut: int = 0
    differing: Mapping[str, tuple[Any, Any]] = {}
    alike: int = 0
    neighbours: bool = False


class Compared(NamedTuple):
    """What is summed over each text: squared distances, equal decisions, divergences, and more.

    The others are the number of decisions, total variations, decisions that are as their label
    says, those that are in the tuned network too, and the first of these before any other.
    """

    squares: NDArray[np.float64]
    equal: NDArray[np.float64]
    divergence: NDArray[np.float64]
    decisions: NDArray[np.float64]
    variation: NDArray[np.float64]
    right: NDArray[np.float64]
    tuned_right: NDArray[np.float64]
    first: NDArray[np.float64]

    @property
    def differing(self) -> NDArray[np.float64]:
        """The share of each text's decisions that are not the tuned network's."""
        return 1 - self.equal / self.decisions

    @property
    def other_answers(self) -> NDArray[np.float64]:
        """1 for each text that gets another answer, and 0 for others."""
        return np.where(np.isnan(self.first), np.nan, self.first < self.decisions)


class Readout:
    """The tuned network's head, by which states become rows with the distances of outputs.

    ``states`` have a row for each text, or each token: last hidden states, or a classifier's logits
    minus their mean. A language model's logits minus their mean are linear in its states, so that
    their distances are those of ``states @ logit_metric.T`` with few columns. Their second moments
    need no logits, as many of which there are as words. Only where the model caps logits, as Gemma
    2 does, is ``logit_metric`` the weight of the head itself.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.task = network, network.task
        language = self.task == "language"
        self.logit_metric = self.logit_metric_with(None) if language else None

    def logit_metric_with(
        self, columns: Float[Tensor, "words more"] | None
    ) -> Float[Tensor, "all all"]:
        """Find the metric of logits of this head and of more columns that they are made of."""

        def rows() -> Iterator[Tensor]:
            done = 0
            for weight, _ in self.network.head_rows():
                more = None if columns is None else columns[done : done + len(weight)].to(weight)
                yield weight if more is None else torch.cat([weight, more], 1)
                done += len(weight)

        if self.network.cap:
            return torch.cat([*rows()])
        sums = torch.stack([each.sum(0, dtype=torch.float64) for each in rows()]).sum(0)
        mean = (sums / self.network.words).float()
        total: Any = 0.0
        for each in rows():
            centred = each - mean
            total = total + (centred.mT @ centred).double()
        values, vectors = torch.linalg.eigh(total.cpu())
        return (values.clamp(0).sqrt()[:, None] * vectors.mT).to(mean)

    def rows(self, states: Float[Tensor, "rows n"], metric: Tensor | None = None) -> Tensor:
        """Rows with the distances of outputs of this head, or of another metric."""
        metric = self.logit_metric if metric is None else metric
        if metric is None:
            return states
        values, cap = states @ metric.to(states).mT, self.network.cap
        return centre(cap * (values / cap).tanh()) if cap else values


class TunedOutputs:
    """The tuned network's states on some texts, and ``effect``, ``‖f_0 − f̄‖²`` of each text.

    That is NaN unless a base is recorded.
    """

    def __init__(self, batches: Sequence[Batch], readout: Readout, states: list[Tensor]) -> None:
        self.batches, self.readout, self.states = batches, readout, states
        self.effect: NDArray[np.float64] = np.full(sum(len(b.places) for b in batches), math.nan)
        self._labels = torch.cat([batch.labels for batch in batches]) if batches else torch.empty(0)
        self._base_accuracy = math.nan

    @property
    def is_answered(self) -> bool:
        """Whether each text of a language model has an answer."""
        return self.readout.task == "language" and not (self._labels < 0).any()

    def record(self, base: Network, states: list[Tensor]) -> None:
        """Compute the tuning's effect from the states of the base."""
        if self.readout.task != "classification" or (self._labels < 0).any():
            self.effect = self.squares(base, states)
            return
        compared = self.compare(base, states)
        self.effect, self._base_accuracy = compared.squares, float(compared.right.mean())

    def longest(self, part: float) -> TunedOutputs:
        """Take the batches of the longest texts that are at least this part of all."""
        sizes = np.cumsum([len(batch.input_ids) for batch in reversed(self.batches)])
        number = 1 + int(np.searchsorted(sizes, part * sizes[-1]))
        return TunedOutputs(self.batches[-number:], self.readout, self.states[-number:])

    @torch.no_grad()
    def rounding(self) -> float:
        """How far outputs of all texts are off together, when each is rounded once."""
        squares = 0.0
        for rows in torch.cat(self.states).split(_ROWS):
            outputs = self._outputs(self.readout.network, rows)
            squares += sum(float(each.double().square().sum()) for each in outputs)
        return torch.finfo(torch.float32).eps * math.sqrt(squares)

    def summarize(self, compared: Compared) -> Measured:
        """Measure what a network loses, from what it does on each text (`compare`)."""
        squares, equal, divergence, decisions, variation, right, tuned_right, first = compared
        own = self.own(squares)
        measured = Measured(
            ratio(squares, self.effect),
            float(equal.sum() / decisions.sum()),
            float(divergence.sum() / decisions.sum()),
            len(squares),
            quantile_limit(own),
            quantile_limit(own, repeated=True),
            acceptance=1 - float((variation / decisions).mean()),
            decisions=int(decisions.sum()),
            neighbours=len(squares) > 2 and self._neighbours(squares / decisions),
        )
        differing = compared.differing
        if np.isfinite(differing).all():
            same, often = 1 - self.limit(differing), 1 - repeated_limit(differing)
            measured = measured._replace(same=same, same_repeated=often)
        if self.readout.task == "classification":
            measured = measured._replace(
                accuracy=float(right.mean()),
                base_accuracy=self._base_accuracy,
                tuned_accuracy=float(tuned_right.mean()),
            )
        if self.is_answered:
            other = compared.other_answers
            measured = measured._replace(
                same_answers=1 - _count_limit(other),
                same_answers_repeated=1 - repeated_limit(other),
                first_tokens=-quantile(-np.where(other, first, decisions.max())),
                verified=int((tuned_right == decisions).sum()),
            )
        return measured

    def _neighbours(self, losses: NDArray[np.float64]) -> bool:
        """Whether neighbours in the file lose alike, beyond what their lengths explain."""
        order = np.concatenate([batch.places for batch in self.batches]).argsort()
        lengths = np.concatenate([batch.attention_mask.sum(1) for batch in self.batches])
        losses, lengths = (rankdata(each[order]) for each in (losses, lengths))
        slope = np.cov(losses, lengths)[0, 1] / max(np.var(lengths, ddof=1), 1e-9)
        return are_alike(losses - slope * lengths)

    def limit(self, differing: NDArray[np.float64]) -> float:
        """Compute the limit of the mean share of decisions that differ."""
        # The exact one is for what can only be 0 or 1.
        if self.readout.task == "classification":
            return _count_limit(differing)
        return mean_limit(differing[drawn_order(self.batches)])

    def error(self, squares: NDArray[np.float64]) -> float:
        """``η`` of a network with these squared distances."""
        return ratio(squares, self.effect)

    def own(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """The part that each text loses of what tuning changes in it; 0 of nothing is nothing."""
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = np.sqrt(squares / self.effect)
        return np.where(np.equal(squares, 0) & (self.effect >= 0), 0.0, parts)

    @torch.no_grad()
    def squares(self, network: Network, states: list[Tensor]) -> NDArray[np.float64]:
        """Measure the squared distance of each text's outputs from the tuned network's."""
        readout = self.readout
        if readout.logit_metric is None or (network.same_head and not readout.network.cap):
            # Of one head, so that states tell distances.
            offs = (x.float() - y for x, y in zip(states, self.states, strict=True))
            parts = (readout.rows(off).double().square().sum(-1) for off in offs)
        else:
            rows = (torch.cat(each).split(_ROWS) for each in (states, self.states))
            parts = (self._distances(network, *pair) for pair in zip(*rows, strict=True))
        return self._sum(torch.cat([*parts])[:, None])[:, 0]

    @functools.cached_property
    def _decided(self) -> Int[Tensor, " rows"]:
        return self._decide(self.readout.network, self.states)

    @torch.no_grad()
    def _decide(self, network: Network, states: list[Tensor]) -> Int[Tensor, " rows"]:
        """Find the decision of each row of states."""
        decided = []
        for rows in torch.cat(states).split(_ROWS):
            best = torch.full((len(rows),), -math.inf)
            place, words = torch.zeros(len(rows), dtype=torch.int64), 0
            for values in self._outputs(network, rows):
                most, where = (each.cpu() for each in values.max(-1))
                place = torch.where(most > best, words + where, place)
                best, words = torch.maximum(best, most), words + values.shape[-1]
            decided.append(place)
        return torch.cat(decided)

    def differing(self, network: Network, states: list[Tensor]) -> NDArray[np.float64]:
        """Compute the share of each text's decisions that are not the tuned network's."""
        other = self._decide(network, states) != self._decided
        counts = [size for batch in self.batches for size in batch.counts(self.readout.task)]
        parts = other.double().split(counts)
        return torch.stack([part.mean() for part in parts]).numpy()

    @torch.no_grad()
    def compare(self, network: Network, states: list[Tensor]) -> Compared:
        """Compare the outputs of a network with the tuned one's on each text, given its states."""
        found, target = torch.cat(states), torch.cat(self.states)
        # Some rows at a time, as logits need much memory.
        some = zip(*(rows.split(_ROWS) for rows in (found, target, self._labels)), strict=True)
        columns = torch.cat([self._contrast(network, *each) for each in some])
        sizes = [size for batch in self.batches for size in batch.counts(self.readout.task)]
        first = torch.stack([part.cumprod(0).sum() for part in columns[:, -2].split(sizes)])
        return Compared(*np.column_stack([self._sum(columns), first]).T)

    def _sum(self, columns: Float[Tensor, "rows columns"]) -> NDArray[np.float64]:
        """Rows of all batches, summed over each text."""
        sizes = [len(each) for each in self.states]
        parts = zip(columns.split(sizes), self.batches, strict=True)
        return torch.cat([sum_by_text(p, b, self.readout.task) for p, b in parts]).numpy()

    def _outputs(self, network: Network, states: Float[Tensor, "rows columns"]) -> Iterator[Tensor]:
        """Outputs of a network, some words at a time."""
        language = self.readout.task == "language"
        return network.logits(states) if language else iter([states.float()])

    def _both(self, network: Network, states: Tensor, target: Tensor) -> Iterator[_Two]:
        """Outputs of a network and of the tuned one, some words at a time."""
        pairs: Iterator[_Two]
        tuned = self.readout.network
        if network.same_head and self.readout.task == "language":
            # One reading of the head serves both.
            both = tuned.logits(torch.cat([states.float(), target]))
            pairs = ((each[: len(states)], each[len(states) :]) for each in both)
        else:
            pairs = zip(self._outputs(network, states), self._outputs(tuned, target), strict=True)
        # Some devices have no float64, in which all is summed.
        mps = tuned.device.type == "mps"
        return ((x.cpu(), y.cpu()) if mps else (x, y) for x, y in pairs)

    def _distances(
        self,
        network: Network,
        states: Tensor,
        target: Tensor,
        see: Callable[[int, _Two], None] = lambda *_: None,
    ) -> Float[Tensor, " rows"]:
        """The squared distance of each row of outputs from the tuned ones.

        ``see`` gets all outputs, of which so many words have been before. Logits of language models
        count up to a constant.
        """
        sums = squares = torch.zeros(len(states), dtype=torch.float64)
        words = 0
        for pair in self._both(network, states, target):
            see(words, pair)
            off, words = pair[0] - pair[1], words + pair[0].shape[-1]
            sums, squares = sums + _sum(off), squares + _sum(off.square())
        language = self.readout.task == "language"
        return (squares - sums.square() / words).clamp(0) if language else squares

    def _contrast(
        self, network: Network, states: Tensor, target: Tensor, labels: Tensor
    ) -> Float[Tensor, "rows columns"]:
        """A row of what `Compared` sums for each row of outputs, and the tuned ones."""
        levels = torch.full((2, len(states)), -math.inf, dtype=torch.float64)
        best, second = levels.clone(), levels.clone()
        decided = torch.zeros(2, len(states), dtype=torch.int64)
        shift, varied, nothing = torch.zeros(3, len(states), dtype=torch.float64)
        ones, nothing = nothing + 1, nothing + math.nan

        def see(words: int, pair: _Two) -> None:
            for one, values in enumerate(pair):
                most, place = values.max(-1)
                parts = _sum((values - most[:, None]).exp())
                # Of equal ones the first, as when answers are generated.
                two = values.topk(min(2, values.shape[-1])).values.cpu().double()
                most, place = most.cpu().double(), place.cpu()
                decided[one] = torch.where(most > best[one], words + place, decided[one])
                leading = torch.cat([best[one, :, None], second[one, :, None], two], 1)
                best[one], second[one] = leading.topk(2).values.unbind(1)
                levels[one] = torch.logaddexp(levels[one], most + parts.log())

        squares = self._distances(network, states, target, see)
        if self.readout.task == "encoder" or target.shape[-1] == 1:
            return torch.stack([squares, nothing, nothing, ones, *[nothing] * 3], -1)
        for pair in self._both(network, states, target):
            both = zip(pair, levels, strict=True)
            p, p_target = ((x - level.to(x)[:, None]).exp() for x, level in both)
            shift += _sum(p_target * (pair[1] - pair[0]))
            varied += _sum((p - p_target).abs()) / 2
        equal = (decided[0] == decided[1]).double()
        if self.readout.task == "language":
            # Any end of an answer is as good as another, if both take the same.
            ends = torch.tensor(self.readout.network.ends)
            both_end = torch.isin(labels, ends) & torch.isin(decided[1], ends)
            labels = torch.where(both_end, decided[1], labels)
        right, tuned_right = decided == labels
        if self.readout.task == "language":
            # Neither by a hair, and one that is not the tuned network's is no answer to keep.
            tuned_right = tuned_right & (best[1] - second[1] >= _TIE)
            right = right & tuned_right & (best[0] - second[0] >= _TIE)
        right, tuned_right = (x.double().where(labels >= 0, nothing) for x in (right, tuned_right))
        divergence = (shift + levels[0] - levels[1]).clamp(0)
        return torch.stack([squares, equal, divergence, ones, varied, right, tuned_right], -1)


def _sum(rows: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
    """Sum rows in double precision."""
    return rows.sum(-1, dtype=torch.float64).cpu()


class Measurement(NamedTuple):
    """What a network gives for texts of which the tuned network's states are known."""

    reference: TunedOutputs
    network: Network
    states: list[Tensor]

    @property
    def squares(self) -> NDArray[np.float64]:
        """The squared distance of each text's outputs from the tuned ones."""
        return self.reference.squares(self.network, self.states)

    @property
    def differing(self) -> NDArray[np.float64]:
        """The share of each text's decisions that are not the tuned ones."""
        return self.reference.differing(self.network, self.states)

    def compare(self) -> Compared:
        """What the network does on each text."""
        return self.reference.compare(self.network, self.states)


def measure_networks(networks: Sequence[tuple[Network, TunedOutputs]]) -> list[Measurement]:
    """Pass texts through networks, all together, block by block."""
    passes = [TextStates(network, reference.batches) for network, reference in networks]
    advance(passes)
    each = zip(networks, passes, strict=True)
    return [Measurement(reference, network, one.states) for (network, reference), one in each]


def _count_limit(losses: NDArray[np.float64]) -> float:
    """The limit of the mean of losses that can only be 0 or 1."""
    return binomial_limit(int(losses.sum()), len(losses))


def sum_by_text(
    rows: Float[Tensor, "rows columns"], batch: Batch, task: Task
) -> Float[Tensor, "texts columns"]:
    """Rows of tokens, summed over each text; rows of texts as they are."""
    if task == "classification":
        return rows
    return torch.stack([part.sum(0) for part in rows.split(batch.counts(task))])
