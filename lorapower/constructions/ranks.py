"""The rank that an error needs [def-needed-rank]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _checks
from ..bounds.fnn import fnn_error_on
from ..bounds.transformer import transformer_error, transformer_errors
from ..errors import InputError
from ..networks.base import Network
from ..networks.conversion import as_network
from ..networks.fnn import FNN, pad
from ..networks.gap import Gap
from ..networks.linear import LinearNetwork
from ..networks.partition import Partition
from ..networks.residual.network import ResidualTransformer
from ..networks.transformer import Transformer
from ..regions import Samples
from .general import adapt, kind_of

# The mean squared error at a rank, or a bound of it, for each member of the batch.
Measure = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class NeededRank:
    """The least rank that meets an error, with what the ranks below it leave.

    Attributes
    ----------
    rank : Tensor
        The least one tried whose error is small enough; where none is, the largest; ``[...]``. One
        is for all layers of a member; ``int(rank.max())`` is enough for all members.
    error : Tensor
        What it leaves, relative to the mean square of the target's outputs; ``[...]``.
    tried : Tensor
        All ranks that were tried, the least first.
    errors : Tensor
        What each of them leaves; ``[ranks, ...]``.
    success : Tensor
        Whether the error is met; ``[...]``.
    """

    rank: Int[Tensor, "*batch"]
    error: Float[Tensor, "*batch"]
    tried: Int[Tensor, " ranks"]
    errors: Float[Tensor, " ranks *batch"]
    success: Bool[Tensor, "*batch"]

    def __repr__(self) -> str:
        if not self.rank.ndim:
            verdict = "" if self.success else ", no success"
            return f"NeededRank(rank {int(self.rank)}, error {float(self.error):.3g}{verdict})"
        good, members = int(self.success.sum()), self.success.numel()
        return f"NeededRank(batch {list(self.rank.shape)}, success of {good} in {members})"


@torch.no_grad()
def rank_for_error(
    frozen: Any,
    target: Any,
    error: float,
    inputs: Any,
    *,
    by: Literal["bound", "trial"] = "bound",
    ranks: Sequence[int] | None = None,
    partition: Partition | None = None,
    throw: bool = True,
    seed: int = 0,
) -> NeededRank:
    """The least rank at which adapters leave at most a given error on given inputs.

    The error is the mean squared one, over outputs and inputs, divided by the mean square of the
    target's outputs. A rank is one for all layers, of which none takes more than its weight's
    smaller side. Ranks are tried from below until each member of the batch has its own.

    Raises `InputError` where no rank is enough, saying what the largest leaves; for unusable
    inputs, ranks and options; and for what the construction refuses.

    Source: [def-needed-rank].

    Parameters
    ----------
    frozen, target
        Networks of one kind, or what `networks.as_network` makes one from.
    error : float
        At least 0.
    inputs
        Columns ``[..., width, samples]``; of a transformer one sequence ``[width, tokens]``, or
        ``[..., sequences, width, tokens]``. Batch dimensions broadcast with the networks'.
    by : {"bound", "trial"}
        ``"bound"``: what the theorems promise on these inputs, that is, `bounds.fnn_error_on`, or
        `bounds.transformer_error`; of a linear network, the error itself. Where the construction's
        assumptions hold, which is not checked, it is met for certain, rounding apart; less rank may
        be enough. There is none for residual transformers. Or ``"trial"``: adapters are made, of a
        ReLU network for `Samples`, and the error is measured, rounding included. `adapt` may call
        the rounding unacceptable all the same: it then takes ``throw=False``, or a larger ``rtol``.
    ranks : sequence of int, optional
        Those to try; by default all from 0 on.
    partition : Partition, optional
        Of ReLU networks: the blocks, by default uniform.
    throw : bool
        Raise an error where no rank is enough, or else say so in ``success``.
    seed : int
        Of the construction's random rotations.
    """
    frozen, target = as_network(frozen, "frozen"), as_network(target, "target")
    kind = kind_of(frozen)
    _checks.kind(kind, target=target)
    error = _checks.tolerance("error", error)
    if by not in ("bound", "trial"):
        raise InputError("by", allowed='"bound" or "trial"', given=repr(by))
    if partition is not None and kind is not FNN:
        raise InputError("partition", allowed="left out but for ReLU networks", given=partition)
    if by == "bound" and kind not in _BOUNDS:
        raise InputError("by", allowed=f'"trial" for a {kind.__name__}', given=by)
    x = _grouped(inputs, frozen, target)
    signal = _mean_square(target(x))
    if by == "trial":
        squared = _trial(frozen, target, x, partition, seed)
    else:
        squared = _BOUNDS[kind](frozen, target, x, partition)

    tried: list[int] = []
    errors: list[Tensor] = []
    met: list[Tensor] = []
    for rank in _tried(frozen, ranks):
        left = squared(rank)
        # Nothing is no error even of a target that is 0 itself.
        relative = torch.where(left == 0, 0, left / signal).nan_to_num(torch.inf, torch.inf)
        tried.append(rank)
        errors.append(relative)
        met.append(relative <= error)
        if torch.stack(met).any(0).all():
            break

    stacked, enough = torch.stack(errors), torch.stack(met)
    success = enough.any(0)
    if throw and not success.all():
        most = float(stacked[-1][~success][0])
        raise InputError(
            "error",
            allowed="met by a rank that is tried",
            given=f"{error:.3g}, where rank {tried[-1]}, the largest, leaves {most:.3g}"
            f"{_checks.failed_members(~success)}",
        )
    place = torch.where(success, enough.long().argmax(0), len(tried) - 1)
    found = torch.tensor(tried, device=place.device)
    return NeededRank(found[place], stacked.gather(0, place[None])[0], found, stacked, success)


def _tried(frozen: Network, ranks: Sequence[int] | None) -> list[int]:
    largest = max(min(weight.shape[-2:]) for weight in frozen.weights)
    if ranks is None:
        return list(range(largest + 1))
    if not isinstance(ranks, Sequence) or not ranks:
        raise InputError("ranks", allowed="a list of ranks to try", given=repr(ranks))
    limit = "the largest smaller side"
    return sorted({_checks.integer("ranks", rank, 0, largest, limit=limit) for rank in ranks})


def _grouped(inputs: Any, frozen: Network, target: Network) -> Tensor:
    """Inputs ``[groups, ..., width, n]``, of a transformer a group for each sequence.

    The dimensions between are those of a batch, as many as the networks have at least.
    """
    x = _checks.real_tensor("inputs", inputs, min_dims=2)
    x = x.movedim(-3, 0) if target.sequences and x.ndim > 2 else x[None]
    groups, *batch = x.shape[:-2]
    missing = max(len(network.batch_shape) for network in (frozen, target)) - len(batch)
    x = target.as_inputs(x.reshape(groups, *[1] * missing, *batch, *x.shape[-2:]), "inputs")
    shapes = [tuple(batch), tuple(frozen.batch_shape), tuple(target.batch_shape)]
    _checks.common_shape("inputs, frozen and target", shapes)
    return x


def _mean_square(outputs: Tensor) -> Tensor:
    return outputs.square().mean((0, -2, -1))


def _trial(frozen: Network, target: Network, x: Tensor, partition: Any, seed: int) -> Measure:
    wanted = target(x)
    if isinstance(frozen, ResidualTransformer):
        padded = frozen.filled(x)
    else:
        padded = pad(x, frozen.weights[0].shape[-1])
    region = Samples(x[0]) if isinstance(frozen, FNN) else None
    options = {} if partition is None else {"partition": partition}

    def squared(rank: int) -> Tensor:
        found = adapt(frozen, target, rank, region, throw=False, seed=seed, **options)
        outputs = found.adapters.merge(frozen)(padded)
        return _mean_square(outputs[..., : wanted.shape[-2], :] - wanted)

    return squared


def _linear(frozen: Any, target: Any, x: Tensor, partition: None) -> Measure:
    gap = Gap(frozen, target)

    def squared(rank: int) -> Tensor:
        return _mean_square(gap.undone(sum(gap.ranks([rank] * frozen.depth))) @ x)

    return squared


def _fnn(frozen: Any, target: Any, x: Tensor, partition: Any) -> Measure:
    def squared(rank: int) -> Tensor:
        bound = fnn_error_on(frozen, target, rank, x[0], partition)
        return bound.square() / target.widths[-1]

    return squared


def _transformer(frozen: Any, target: Any, x: Tensor, partition: None) -> Measure:
    def squared(rank: int) -> Tensor:
        errors = transformer_errors(frozen, target, rank)
        bound = transformer_error(frozen, target, errors, x)
        # A softmax bounds what may come of a segment that cannot be adapted at all.
        bound = torch.where(errors.largest().isfinite(), bound, torch.inf)
        return bound.square().mean(0) / target.sizes["outputs"]

    return squared


_BOUNDS: dict[type[Network], Callable[..., Measure]] = {
    LinearNetwork: _linear,
    FNN: _fnn,
    Transformer: _transformer,
}
