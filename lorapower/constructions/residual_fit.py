"""Segments of a residual transformer fitted to sequences, each repairing the stream of tokens.

What a block adds is fitted to what its tokens lack, so that later parts make good what earlier ones
have missed. All is done on the fused network (`fused.fuse`), read with the target's gains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from .. import lowrank
from ..adapters.core import Adapters
from ..networks.residual.network import ACTIVATIONS, ResidualTransformer
from . import residual
from ._layer import fit_layer
from .attention import Builder, columns, sequences
from .fused import Fused


def candidates(fused: Fused, x: Tensor, select: Tensor) -> Iterator[tuple[Adapters, list[str]]]:
    """Adapters of the fused network: the theorem's, and those that are fitted."""
    network, goal = fused.network, fused.goal
    assert isinstance(network, ResidualTransformer)
    assert isinstance(goal, ResidualTransformer)
    named = zip(network.weight_names, fused.fused_ranks, strict=True)
    ranks = {name.split()[0]: rank for name, rank in named}
    # Heads that are too narrow for it are adapted as well as they are, and lose the comparison.
    theorem = residual.adapt(network, goal, ranks, throw=False).adapters
    yield theorem, ["theorem"]
    builder = _Builder(network, goal, theorem.merge(network), ranks, [x, select])
    yield builder.adapters(fused.fused_ranks), builder.chosen


class _Builder(Builder[ResidualTransformer]):
    """Blocks in turn; ``streams`` are the adapted network's tokens, ``targets`` the target's."""

    sends: ClassVar[str] = "b_O"

    def __init__(
        self,
        frozen: ResidualTransformer,
        goal: ResidualTransformer,
        theorem: ResidualTransformer,
        ranks: Mapping[str, int],
        x: list[Tensor],
    ) -> None:
        super().__init__(frozen, goal, theorem, ranks)
        self.streams, self.targets = x, x
        for l in range(frozen.depth):
            self._adapt(l)

    def _adapt(self, l: int) -> None:
        goal, act = self.goal, ACTIVATIONS[self.goal.activation]
        attending = [goal.scores(l, goal.reads(z, "1", l)) for z in self.targets]
        self.tokens = [goal.reads(z, "1", l) for z in self.streams]
        self.fit_scores(l, attending)
        middle = [
            goal.attended(l, z, goal.patterns(s))
            for z, s in zip(self.targets, attending, strict=True)
        ]
        added = self.fit_values(l, self._lacking(middle))
        self._add(added)
        hidden = [goal.hidden(l, u) for u in middle]
        own = [columns(goal.reads(u, "2", l)) for u in self.streams]
        ours = self._layer("1", l, own, [columns(p) for p in hidden])
        self.targets = [goal.fed_forward(l, u, p) for u, p in zip(middle, hidden, strict=True)]
        self._add(self._layer("2", l, [act(p) for p in ours], self._lacking(self.targets)))

    def _lacking(self, wanted: list[Tensor]) -> list[Float[Tensor, "width columns"]]:
        return [columns(y - z) for y, z in zip(wanted, self.streams, strict=True)]

    def _add(self, added: list[Float[Tensor, "width columns"]]) -> None:
        self.streams = [z + sequences(part, z) for z, part in zip(self.streams, added, strict=True)]

    def _layer(
        self, name: str, l: int, own: list[Tensor], reach: list[Tensor]
    ) -> list[Float[Tensor, "out columns"]]:
        """``W_1`` or ``W_2`` fitted; what it makes of what enters it."""
        kind = f"W_{name}"
        W, rank = getattr(self.frozen, kind)[l], self.ranks[kind]
        theorem = lowrank.truncated_svd(getattr(self.theorem, kind)[l] - W, rank)
        bias = getattr(self.theorem, f"b_{name}")[l]
        target = getattr(self.goal, kind)[l]
        found, words = fit_layer(W, target, rank, own, reach, None, theorem, [bias])
        self.chosen.append(words)
        self.own[kind][l] = W + found.update.matrix()
        self.own[f"b_{name}"][l] = found.intercept
        return [self.own[kind][l] @ x + found.intercept[:, None] for x in own]

    def _query_bias(self, l: int, h: int) -> Float[Tensor, "size 1"]:
        return self.theorem.b_Q[l, h][:, None]

    def _patterns(self, scores: Tensor) -> Tensor:
        return self.goal.patterns(scores)
