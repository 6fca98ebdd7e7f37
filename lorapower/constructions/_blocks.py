"""Blocks of a transformer fitted to sequences: scores, attention, and layers.

Blocks of the fused network (`fused.fuse`) are fitted in turn on the adapted network's own tokens,
so later parts correct what earlier ones missed. The softmax ignores what a column of scores has in
common, so keys are centred within their sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .. import lowrank
from ..adapters import Adapters
from ..networks.transformer import Transformer
from ..regression import Regression, reduced_rank, truncate

_SWEEPS, _STILL = 30, 1e-5
# Beyond this the moments of the scores, width⁴ numbers, are not formed.
_WIDEST = 64

# Shrinkages towards the error matrix, in mean variances of an input.
SHRINKAGES = (0.0, 0.01, 0.1, 1.0, inf)

T = TypeVar("T")


class Scores(NamedTuple):
    """``E (s − k̃ᵀ K q)² = ⟨K, T K⟩ − 2 ⟨K, G⟩ + size``, summed over keys and queries."""

    # E[k̃ k̃ᵀ ⊗ q qᵀ] and E[k̃ s qᵀ].

    T: Float[Tensor, "a b a b"]
    G: Float[Tensor, "a b"]
    size: Float[Tensor, ""]

    @classmethod
    def of(
        cls,
        keys: Float[Tensor, "samples a tokens"],
        queries: Float[Tensor, "samples b tokens"],
        wanted: Float[Tensor, "samples tokens tokens"],
    ) -> Scores:
        """Compute the moments of sequences; keys and ``wanted`` scores are centred over keys."""
        k, s = keys - keys.mean(-1, keepdim=True), wanted - wanted.mean(-2, keepdim=True)
        pairs = s.numel()
        of_keys, of_queries = k @ k.mT, queries @ queries.mT
        T = of_keys.flatten(1).mT @ of_queries.flatten(1) / pairs
        a, b = keys.shape[-2], queries.shape[-2]
        G = torch.einsum("nak,nkq,nbq->ab", k, s, queries) / pairs
        T = T.reshape(a, a, b, b).permute(0, 2, 1, 3).contiguous()
        return cls(T, G, s.square().mean())

    def left(self, K: Float[Tensor, "a b"]) -> Float[Tensor, ""]:
        """Compute the sum at ``K``."""
        return (K * torch.tensordot(self.T, K, 2)).sum() - 2 * (K * self.G).sum() + self.size

    def free(self) -> Float[Tensor, "a b"]:
        """Find the smallest ``K`` of least sum, of any rank."""
        flat = self.T.flatten(2).flatten(0, 1)
        solution = torch.linalg.lstsq(flat, self.G.reshape(-1, 1), driver="gelsd").solution
        return solution.reshape(self.G.shape)

    def improved(self, K: Float[Tensor, "a b"], rank: int) -> Float[Tensor, "a b"]:
        """Improve ``K`` by exact half-steps in its factors, until it stands still [prop-scores]."""
        if not rank:
            return torch.zeros_like(K)
        best, found = self.left(K), K
        for _ in range(_SWEEPS):
            U = lowrank.svd(found).U[:, :rank]
            Q = torch.linalg.qr(self._other(U)).Q
            other = Scores(self.T.permute(1, 0, 3, 2), self.G.mT, self.size)
            trial = (Q @ other._other(Q).mT).mT
            left = self.left(trial)
            if not left < best - _STILL * best.abs():
                break
            best, found = left, trial
        return found

    def _other(self, U: Float[Tensor, "a r"]) -> Float[Tensor, "b r"]:
        """Find ``B`` of the least sum at ``K = U Bᵀ``."""
        (_, b), r = self.G.shape, U.shape[-1]
        T = torch.einsum("aicj,ar,cs->irjs", self.T, U, U).reshape(b * r, b * r)
        wanted = (self.G.mT @ U).reshape(-1, 1)
        return torch.linalg.lstsq(T, wanted, driver="gelsd").solution.reshape(b, r)


def nearest_scores(
    E: Float[Tensor, "a b"],
    keys: Float[Tensor, "samples a tokens"],
    queries: Float[Tensor, "samples b tokens"],
    rank: int,
) -> Float[Tensor, "a b"]:
    """Find the matrix of limited rank whose scores are nearest to those of ``E`` [prop-scores].

    ``K = (C_k^{1/2})⁺ U_r U_rᵀ C_k^{1/2} E``, with second moments ``C_k`` of keys, centred within
    their sequence, and ``C_q`` of queries, and the leading left singular vectors ``U_r`` of
    ``C_k^{1/2} E C_q^{1/2}``, minimizes ``E (k̃ᵀ(E − K) q)²`` where keys and queries are
    independent.
    """
    centred = _columns(keys - keys.mean(-1, keepdim=True))
    metric = torch.linalg.qr(centred.mT, mode="r").R
    return truncate(E, rank, inputs=_columns(queries), metric=metric).update.matrix()


def fit_blocks(
    frozen: Transformer,
    target: Transformer,
    theorem: Transformer,
    ranks: Sequence[int],
    inputs: Float[Tensor, "samples width tokens"],
    select: Float[Tensor, "others width tokens"],
) -> Adapters:
    """Fit adapters of a fused transformer to sequences.

    Each part of a block is fitted to ``inputs`` in several ways, the ``theorem``'s among them, and
    the way that errs least on ``select`` is kept.
    """
    fit = _BlockFit(frozen, target, theorem, ranks)
    streams = targets = (inputs, select)
    for l in range(frozen.depth):
        streams, targets = fit.block(l, streams, targets)
    pairs = zip(fit.adapted.weights, frozen.weights, ranks, strict=True)
    updates = tuple(lowrank.truncated_svd(new - old, rank) for new, old, rank in pairs)
    biases = zip(fit.adapted.biases, frozen.biases, strict=True)
    return Adapters(updates, tuple(new - old for new, old in biases))


def fit_layer(
    weights: tuple[Tensor, Tensor],
    rank: int,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    theorem: Regression,
    *,
    metric: Tensor | None = None,
    bias: bool = True,
    shrinkages: Sequence[float] = SHRINKAGES,
) -> Regression:
    """Fit a weight towards the target's by the first data; choose the way by the second."""
    W, W_target = weights
    missing = outputs[0] - W @ inputs[0]
    fit = partial(reduced_rank, missing, inputs[0], rank, towards=W_target - W, metric=metric)
    candidates = [fit(shrinkage=shrinkage, intercept=bias) for shrinkage in shrinkages]

    def error(found: Regression) -> float:
        missed = outputs[1] - (W + found.update.matrix()) @ inputs[1] - found.intercept[:, None]
        return float((missed if metric is None else metric @ missed).square().mean())

    return min((*candidates, theorem), key=error)


#: What is fitted to, and what ways are compared on.
_Data = tuple[Tensor, Tensor]


class _BlockFit:
    """The network ``adapted`` so far; data come as fit and select."""

    def __init__(
        self, frozen: Transformer, target: Transformer, theorem: Transformer, ranks: Sequence[int]
    ) -> None:
        self.frozen, self.target, self.theorem = frozen, target, theorem
        # Where only some weights of a kind are adapted, the last is.
        self.ranks = dict(zip(frozen.kind_of_weight, ranks, strict=True))
        parts = {kind: frozen.parameters[kind] for kind in frozen.weight_kinds}
        if frozen.is_plain:
            parts["b_2"] = target.b_2
        self.adapted = theorem.replace(**parts)

    def block(self, l: int, streams: _Data, targets: _Data) -> tuple[_Data, _Data]:
        """Fit block ``l`` to the tokens that enter it in both networks; return those that leave."""
        target, adapted, plain = self.target, self.adapted, self.frozen.is_plain

        def missing(wanted: Tensor, stream: Tensor) -> Tensor:
            return _columns(wanted - stream if self.frozen.settings.residual else wanted)

        scores = _both(lambda z: target.scores(l, z), targets)
        tokens = _both(lambda z: adapted.norm_1(l, z), streams)
        for h in range(self.frozen.heads):
            self._scores(l, h, tokens, (scores[0][:, h], scores[1][:, h]))
        middle = _both(lambda z, s: target.attend(l, z, target.patterns(s)), targets, scores)
        hidden = _both(lambda u: target.hidden(l, u), middle)
        targets = _both(lambda u, p: target.feed_forward(l, u, p), middle, hidden)
        patterns = _both(lambda z: adapted.patterns(adapted.scores(l, z)), streams)
        mixes = _both(lambda z, P: _columns(z.unsqueeze(-3) @ P), tokens, patterns)
        # If plain W_1 is the identity.
        wanted = _both(_columns, hidden) if plain else _both(missing, middle, streams)
        self._attention(l, mixes, wanted)
        streams = _both(lambda z, P: adapted.attend(l, z, P), streams, patterns)
        if not plain:
            read = _both(lambda u: _columns(adapted.norm_2(l, u)), streams)
            self._layer("W_1", "b_1", l, read, _both(_columns, hidden))
        hidden = _both(lambda u: adapted.hidden(l, u), streams)
        if not plain or l + 1 == self.frozen.depth:
            active = _both(lambda p: _columns(adapted.activate(p)), hidden)
            self._layer("W_2", "b_2", l, active, _both(missing, targets, streams))
        return _both(lambda u, p: adapted.feed_forward(l, u, p), streams, hidden), targets

    def _layer(self, kind: str, bias: str, l: int, read: _Data, wanted: _Data) -> None:
        """Fit ``W_1`` or ``W_2``."""
        W, rank = self.frozen.parameters[kind][l], self.ranks[kind]
        theorem = lowrank.truncated_svd(self.theorem.parameters[kind][l] - W, rank)
        fitted = fit_layer(
            (W, self.target.parameters[kind][l]),
            rank,
            read,
            wanted,
            Regression(theorem, self.theorem.parameters[bias][l]),
            shrinkages=[0.0] if self.frozen.is_plain else SHRINKAGES,
        )
        self.adapted.parameters[kind][l] = W + fitted.update.matrix()
        self.adapted.parameters[bias][l] = fitted.intercept

    def _scores(self, l: int, h: int, tokens: _Data, wanted: _Data) -> None:
        """Fit the product of a head's factors, which is in ``W_Q``; if narrow, both in turn."""
        z, W_Q, W_K = tokens[0], self.frozen.W_Q[l, h], self.frozen.W_K[l, h]
        bias = torch.zeros_like(W_Q[:, :1])
        if not self.frozen.is_plain:
            bias = self.adapted.b_Q[l, h][:, None]
        rank, keys = self.ranks["W_Q"], W_K @ z
        pairs = [(self.theorem.W_Q[l, h], self.theorem.W_K[l, h])]
        if self.frozen.is_narrow("query size"):
            pairs.insert(0, self._alternate(W_Q, W_K, bias, z, wanted[0]))
        else:
            nearest = nearest_scores(self.target.W_Q[l, h] - W_Q, keys, z, rank)
            pairs.append((W_Q + nearest, W_K))
            if self.frozen.width <= _WIDEST:
                moments = Scores.of(keys, z, wanted[0] - keys.mT @ (W_Q @ z + bias))
                changes = nearest_scores(moments.free(), keys, z, rank), pairs[0][0] - W_Q, nearest
                start = min(changes, key=lambda change: float(moments.left(change)))
                pairs.append((W_Q + moments.improved(start, rank), W_K))

        def error(pair: tuple[Tensor, Tensor]) -> float:
            Q, K = pair
            missed = wanted[1] - (K @ tokens[1]).mT @ (Q @ tokens[1] + bias)
            return float((missed - missed.mean(-2, keepdim=True)).square().mean())

        self.adapted.W_Q[l, h], self.adapted.W_K[l, h] = min(pairs, key=error)

    def _alternate(
        self, W_Q: Tensor, W_K: Tensor, bias: Tensor, z: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fit both factors of a narrow head in turn, each by `Scores` with the other as it is."""
        Q, K = W_Q, W_K

        def sweep() -> float:
            nonlocal Q, K
            keys = K @ z
            of_Q = Scores.of(keys, z, wanted - keys.mT @ (W_Q @ z + bias))
            Q = W_Q + of_Q.improved(Q - W_Q, self.ranks["W_Q"])
            queries = Q @ z + bias
            of_K = Scores.of(z, queries, wanted - (W_K @ z).mT @ queries)
            change = of_K.improved((K - W_K).mT, self.ranks["W_K"])
            K = W_K + change.mT
            return float(of_K.left(change))

        _repeat(sweep)
        return Q, K

    def _attention(self, l: int, mixes: _Data, wanted: _Data) -> None:
        """Fit values and outputs of all heads in turn, and a bias, to their mixes of tokens."""
        kinds = ("W_V", "W_O", "b_1" if self.frozen.is_plain else "b_O")
        V, O, bias = (self.adapted.parameters[kind][l] for kind in kinds)
        theorem = [self.theorem.parameters[kind][l] for kind in kinds]
        if not self.frozen.is_narrow("value size"):
            O.copy_(theorem[1])

        def sent(V: Tensor, O: Tensor, mix: Tensor) -> Tensor:
            return (O @ (V @ mix)).sum(0)

        def sweep() -> float:
            for h in range(len(V)):
                others = sent(V, O, mixes[0]) - O[h] @ (V[h] @ mixes[0][h])
                bias.copy_(self._fit_head(l, h, mixes[0][h], wanted[0] - others))
            return float((wanted[0] - sent(V, O, mixes[0]) - bias[:, None]).square().mean())

        _repeat(sweep)

        def error(option: Iterable[Tensor]) -> float:
            V, O, bias = option
            return float((wanted[1] - sent(V, O, mixes[1]) - bias[:, None]).square().mean())

        in_turn = [V.clone(), O.clone(), bias.clone()]
        for part, best in zip((V, O, bias), min([in_turn, theorem], key=error), strict=True):
            part.copy_(best)

    def _fit_head(self, l: int, h: int, mix: Tensor, missing: Tensor) -> Tensor:
        """Fit ``W_O`` of a head, if narrow ``W_V`` first, to what is missing; return a bias."""
        W_O, towards = self.frozen.W_O[l, h], None
        V, O = self.adapted.W_V[l, h], self.adapted.W_O[l, h]
        if self.frozen.is_narrow("value size"):
            inner = torch.linalg.pinv(O) @ missing - self.frozen.W_V[l, h] @ mix
            fitted = reduced_rank(inner, mix, self.ranks["W_V"], metric=O)
            V.copy_(self.frozen.W_V[l, h] + fitted.update.matrix())
        else:
            # W_O holds the product; W_V does nothing, but to add zeros to wide heads.
            towards = self.target.W_O[l, h] - W_O
        values = V @ mix
        fitted = reduced_rank(missing - W_O @ values, values, self.ranks["W_O"], towards=towards)
        O.copy_(W_O + fitted.update.matrix())
        return fitted.intercept


def _both(function: Callable[..., Tensor], *data: _Data) -> _Data:
    """Apply a function to what is fitted to, and to what is compared on."""
    return function(*(part[0] for part in data)), function(*(part[1] for part in data))


def _repeat(sweep: Callable[[], float]) -> None:
    """Repeat a sweep, which returns its error, until that hardly falls."""
    least = inf
    for _ in range(_SWEEPS):
        error = sweep()
        if not error < least * (1 - _STILL):
            return
        least = error


def _columns(z: Float[Tensor, "samples *heads width tokens"]) -> Float[Tensor, "*heads width n"]:
    """Put the tokens of all sequences side by side."""
    return z.movedim(0, -2).flatten(-2)
