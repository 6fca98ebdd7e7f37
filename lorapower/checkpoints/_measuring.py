"""How much of the tuning's effect a network loses on texts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ._limits import DOUBT, Evidence, quantile_limit, ratio
from ._models import has_bfloat16
from ._texts import Batch
from .pair import Task

# Rows of a head that are taken at a time.
_WORDS = 2**13
# And so many rows of logits.
_ROWS = 64


class Measured(NamedTuple):
    """What an adapted network loses on some texts, and how sure that is.

    All is computed in float32 on texts as they are given; none is generated. Decisions are classes
    or next tokens; without a head what is said of them is NaN.

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
    certified, own_effect : float
        At least 90% of texts like these lose at most this part of what tuning typically changes in
        a text, or of what it changes in that text: at a confidence of 95% and for any
        distribution, if texts (or groups) were drawn independently and decided on no adapter
        [prop-certificate]. A text loses ``‖f̂ − f̄‖``; typical is the root mean square of
        ``‖f_0 − f̄‖`` over the texts by which a plan was selected or, without a plan, over these.
    decisions : int
        The number of decisions: of texts or, for a language model, of tokens.
    variation : float
        The mean total variation ``½‖p̄ − p̂‖₁`` of the distributions, averaged over each text and
        then over texts: of draws from both, coupled at best, this share differs.
    accuracy, base_accuracy, tuned_accuracy : float
        The share of right decisions of the adapted network, of the base and of the tuned network;
        NaN without labels.
    evidence, kept : Evidence, optional, and bool
        What all texts that were ever checked say of the certificate in an adapter's
        ``report.json``, and whether that has it now, so that the next check goes on from there.
    bfloat16, tuned_bfloat16 : float
        The error of the adapter, merged, and of the tuned network with weights and values in
        bfloat16, against the tuned outputs in float32; NaN unless asked for, and where peft cannot
        merge the adapter.
    differing : dict
        Entries of the configuration, which an adapted network has from the base, of which the tuned
        model has others, with both values: the loss counts them.
    """

    error: float
    agreement: float
    kl: float
    texts: int
    certified: float = math.inf
    own_effect: float = math.inf
    decisions: int = 0
    variation: float = math.nan
    accuracy: float = math.nan
    base_accuracy: float = math.nan
    tuned_accuracy: float = math.nan
    evidence: Evidence | None = None
    kept: bool = False
    bfloat16: float = math.nan
    tuned_bfloat16: float = math.nan
    differing: Mapping[str, tuple[Any, Any]] = {}


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
        mean = torch.cat([each.mean(0, dtype=torch.float64) for each in (self._weight, columns)])
        # Some words at a time, as a whole copy would need as much memory as the network.
        for part, more in zip(self._weight.split(_WORDS), columns.split(_WORDS), strict=True):
            rows = torch.cat([part, more], 1).float() - mean.float()
            total = total + (rows.mT @ rows).double()
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
        logits = torch.nn.functional.linear(states.to(self._weight), self._weight, self._bias)
        return self._capped(logits)

    def _capped(self, logits: Float[Tensor, "rows words"]) -> Float[Tensor, "rows words"]:
        return _centre(self._cap * (logits / self._cap).tanh() if self._cap else logits)

    def missed(self, network: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
        """How a network's states and the tuned ones become rows with the distances of outputs.

        ``None`` if the network's head differs in more than the weight, or caps logits: then only
        outputs tell.
        """
        if self.root is None:
            return torch.sub
        head = network.get_output_embeddings()
        if self._bias is not None and not head.bias.equal(self._bias):
            return None
        if head.weight.equal(self._weight):
            return lambda states, target: self.rows(states) - self.rows(target)
        if self._cap:
            return None
        # W h − W̄ h̄ = W̄ (h − h̄) + (W − W̄) h.
        root = self.root_with(head.weight - self._weight.to(head.weight))
        return lambda states, target: self.rows(torch.cat([states - target, states], -1), root)


class Reference:
    """The tuned network's states, and ``effect``, ``‖f_0 − f̄‖²`` of each text."""

    def __init__(self, batches: Sequence[Batch], readout: Readout) -> None:
        self.batches, self.readout = batches, readout
        self.effect: NDArray[np.float64] = np.zeros(0)
        #: The typical effect that losses of texts are parts of, NaN for that of these texts.
        self.typical = math.nan
        self._states: list[Tensor] = []
        # Shares of right decisions of the base and of the tuned network.
        self._accuracies = math.nan, math.nan

    @torch.no_grad()
    def record_tuned(self, network: Any) -> None:
        """Keep the states of the tuned network."""
        self._states = [self.readout.states(network, batch).cpu() for batch in self.batches]

    def record_base(self, network: Any) -> None:
        """Compute the tuning's effect from the base's outputs."""
        labels = torch.cat([batch.labels for batch in self.batches])
        if (labels < 0).any():
            self.effect = self.squares(network)
            return
        compared = self.compare(network)
        decided = torch.cat(self._states).argmax(-1) == labels
        self.effect = compared.squares
        self._accuracies = float(compared.right.mean()), float(decided.double().mean())

    def longest(self, part: float) -> Reference:
        """Take the batches of the longest texts that are at least this part of all."""
        sizes = np.cumsum([len(batch.input_ids) for batch in reversed(self.batches)])
        number = 1 + int(np.searchsorted(sizes, part * sizes[-1]))
        some = Reference(self.batches[-number:], self.readout)
        some._states = self._states[-number:]
        return some

    @torch.no_grad()
    def rounding(self) -> float:
        """How far outputs of all texts are off together, when each is rounded once."""
        values = (self.readout.outputs(states).cpu().double() for states in self._states)
        squares = sum(float(each.square().sum()) for each in values)
        return torch.finfo(torch.float32).eps * math.sqrt(squares)

    def error(self, network: Any) -> float:
        """Measure ``η`` of a network of transformers."""
        return ratio(self.squares(network), self.effect)

    def summarize(self, compared: Compared, doubt: float = DOUBT) -> Measured:
        """Measure what a network loses, from what it does on each text (`compare`).

        Limits are wrong in a share ``doubt`` of cases at most.
        """
        squares, equal, divergence, decisions, variation, right = compared
        return Measured(
            ratio(squares, self.effect),
            float(equal.sum() / decisions.sum()),
            float(divergence.sum() / decisions.sum()),
            len(squares),
            quantile_limit(self.losses(squares), doubt),
            quantile_limit(_parts(squares, self.effect), doubt),
            int(decisions.sum()),
            float((variation / decisions).mean()),
            float(right.mean()),
            *self._accuracies,
        )

    def losses(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """The part of the tuning's typical effect that each text loses."""
        typical = math.sqrt(self.effect.mean()) if math.isnan(self.typical) else self.typical
        return _parts(squares, np.full_like(squares, typical**2))

    def squares(self, network: Any) -> NDArray[np.float64]:
        """Measure the squared distance of each text from the tuned network's outputs."""
        if (missed := self.readout.missed(network)) is None:
            return self.compare(network).squares
        parts = []
        with torch.no_grad():
            for batch, target in zip(self.batches, self._states, strict=True):
                states = self.readout.states(network, batch)
                rows = missed(states, target.to(states)).cpu().double()
                column = rows.square().sum(-1, keepdim=True)
                parts.append(sum_by_text(column, batch, self.readout.task)[:, 0].numpy())
        return np.concatenate(parts)

    def rounded(self, network: Any) -> NDArray[np.float64]:
        """Measure squared distances in bfloat16, to which a network's weights are rounded.

        Frequencies of rotations are no weights, and stay in float32 as servers have them.
        """
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16()
        try:
            return self.compare(network).squares
        finally:
            for parameter in network.parameters():
                parameter.data = parameter.data.float()

    def compare(self, network: Any) -> Compared:
        """Compare a network, of transformers or peft, with the tuned one on each text."""
        task = self.readout.task
        parts: list[NDArray[np.float64]] = []
        with torch.no_grad():
            for batch, states in zip(self.batches, self._states, strict=True):
                values = outputs(network, batch, task)
                target = self.readout.outputs(states.to(values))
                # Other rows are of tokens, and have no labels.
                by_text = task == "classification"
                labels = batch.labels if by_text else torch.full((len(values),), -1)
                # Some rows at a time, as logits in float64 need much memory.
                some = zip(*(rows.split(_ROWS) for rows in (values, target, labels)), strict=True)
                columns = torch.cat([_contrast(x, y, known, task) for x, y, known in some])
                parts.append(sum_by_text(columns, batch, task).numpy())
        return Compared(*np.concatenate(parts).T)


def _parts(squares: NDArray[np.float64], wholes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Square roots of quotients; 0 where nothing is lost of nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares == 0, 0.0, np.sqrt(squares / wholes))


def _contrast(values: Tensor, target: Tensor, labels: Tensor, task: Task) -> Tensor:
    """A row of what `Compared` sums for each row of outputs, and the tuned ones."""
    if values.device.type == "mps":
        # Which has no float64.
        values, target = values.cpu(), target.cpu()
    squares = (values - target).double().square().sum(-1)
    ones, nothing = torch.ones_like(squares), torch.full_like(squares, math.nan)
    if task == "encoder" or values.shape[-1] == 1:
        return torch.stack([squares, nothing, nothing, ones, nothing, nothing], -1).cpu()
    log, log_target = (x.double().log_softmax(-1) for x in (values, target))
    p, p_target = log.exp(), log_target.exp()
    decided = values.argmax(-1)
    labels = labels.to(decided)
    equal = (decided == target.argmax(-1)).double()
    divergence = (p_target * (log_target - log)).sum(-1)
    right = (decided == labels).double().where(labels >= 0, nothing)
    varied = (p_target - p).abs().sum(-1) / 2
    return torch.stack([squares, equal, divergence, ones, varied, right], -1).cpu()


def outputs(network: Any, batch: Batch, task: Task) -> Float[Tensor, "rows columns"]:
    """A row for each text, or each token, minus its mean; hidden states as they are."""
    result = network(**batch.on(network.device))
    if task == "encoder":
        return batch.rows(result.last_hidden_state).float()
    return _centre(batch.rows(result.logits).float())


def _centre(logits: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    return logits - logits.mean(-1, keepdim=True) if logits.shape[-1] > 1 else logits


@contextmanager
def watch(network: Any, modules: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect inputs and outputs of modules in the order of their calls; gradients may be on."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, _: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = inputs[0].detach(), output

    def start(_: Any, __: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(torch.is_grad_enabled())

    with ExitStack() as stack:
        # Before the others, as what it gives is what follows depends on.
        first = network.get_input_embeddings()
        stack.callback(first.register_forward_hook(start).remove)
        for name in modules:
            module = network.get_submodule(name)
            stack.callback(module.register_forward_hook(functools.partial(keep, name)).remove)
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
