"""Blocks of a transformer fitted to sequences: scores, attention, and layers.

Blocks of the fused network (`fused.fuse`) are fitted in turn on the adapted network's own tokens,
so later parts correct what earlier ones missed. The softmax ignores what a column of scores has in
common, so keys are centred within their sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .. import lowrank
from ..adapters import Adapters
from ..lowrank import LowRank
from ..networks.transformer import Transformer
from ..regression import Regression, reduced_rank, truncate

_SWEEPS, _STILL = 30, 1e-5
# Beyond this the moments of the scores, width⁴ numbers, are not formed.
_WIDEST = 64

# Shrinkages towards the error matrix, in mean variances of an input, by the name of the fit.
SHRINKAGES = {"repair": 0.0, **{f"shrinkage {s}": s for s in (0.01, 0.1, 1.0)}, "inputs": inf}

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
) -> tuple[Adapters, list[str]]:
    """Fit adapters of a fused transformer to sequences; say how each segment was adapted.

    Each part of a block is fitted to ``inputs`` in several ways, the ``theorem``'s among them, and
    the way that errs least on ``select`` is kept.
    """
    fit = _BlockFit(frozen, target, theorem, ranks)
    streams = targets = (inputs, select)
    for l in range(frozen.depth):
        streams, targets = fit.block(l, streams, targets)
    return fit.adapters(ranks), fit.chosen


@torch.no_grad()
def fit_layer(
    W: Tensor,
    W_target: Tensor,
    rank: int,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    metric: Tensor | None,
    theorem: LowRank,
    bias: Sequence[Tensor],
    shrinkages: Mapping[str, float] = SHRINKAGES,
) -> tuple[Regression, str]:
    """Fit a weight's update to the first data; choose the way, named, by the second."""
    free = bool(bias)
    options: dict[str, Any] = {"towards": W_target - W, "metric": metric, "intercept": free}
    missing = outputs[0] - W @ inputs[0]
    candidates = {
        name: reduced_rank(missing, inputs[0], rank, shrinkage=shrinkage, **options)
        for name, shrinkage in shrinkages.items()
    }
    intercept = bias[0] if free else torch.zeros_like(W[:, 0])
    candidates["theorem"] = Regression(theorem, intercept)

    def error(name: str) -> float:
        update, intercept = candidates[name]
        missed = outputs[1] - (W + update.matrix()) @ inputs[1] - intercept[:, None]
        return float((missed if metric is None else metric @ missed).square().mean())

    best = min(candidates, key=error)
    return candidates[best], best


#: What is fitted to, and what ways are compared on.
_Data = tuple[Tensor, Tensor]


class _BlockFit:
    """``parts`` by kind and ``chosen`` ways by segment so far; data come as fit and select."""

    def __init__(
        self, frozen: Transformer, target: Transformer, theorem: Transformer, ranks: Sequence[int]
    ) -> None:
        self.frozen, self.target, self.theorem = frozen, target, theorem
        # Where only some weights of a kind are adapted, the last is.
        self.ranks = dict(zip(frozen.kind_of_weight, ranks, strict=True))
        self.parts = {kind: frozen.parameters[kind].clone() for kind in frozen.weight_kinds}
        self.parts |= {kind: theorem.parameters[kind].clone() for kind in frozen.bias_kinds}
        if frozen.is_plain:
            self.parts["b_2"] = target.b_2.clone()
        self.chosen: list[str] = []

    def adapters(self, ranks: Sequence[int]) -> Adapters:
        """Collect the adapters found, for each weight in order."""
        tuned = Transformer(self.parts, self.frozen.settings)
        pairs = zip(tuned.weights, self.frozen.weights, ranks, strict=True)
        updates = tuple(lowrank.truncated_svd(new - old, rank) for new, old, rank in pairs)
        changes = zip(tuned.biases, self.frozen.biases, strict=True)
        return Adapters(updates, tuple(new - old for new, old in changes))

    def block(self, l: int, streams: _Data, targets: _Data) -> tuple[_Data, _Data]:
        """Fit block ``l`` to the tokens that enter it in both networks; return those that leave."""
        target, plain = self.target, self.frozen.is_plain
        fit_scores = self._narrow_scores if self.frozen.is_narrow("query size") else self._scores
        scores = _both(lambda z: target.scores(l, z), targets)
        tokens = _both(lambda z: target.norm_1(l, z), streams)
        for h in range(self.frozen.heads):
            fit_scores(l, h, tokens, (scores[0][:, h], scores[1][:, h]))
        middle = _both(lambda z, s: target.attend(l, z, target.patterns(s)), targets, scores)
        hidden = _both(lambda u: target.hidden(l, u), middle)
        targets = _both(lambda u, p: target.feed_forward(l, u, p), middle, hidden)
        if plain:
            # W_1 is the identity.
            received = self._attention(l, tokens, _both(_columns, hidden))
        else:
            sent = self._attention(l, tokens, self._missing(middle, streams))
            streams = self._add(sent, streams)
            read = _both(lambda u: _columns(target.norm_2(l, u)), streams)
            received = self._layer("W_1", "b_1", l, read, _both(_columns, hidden))
        active = _both(target.activate, received)
        if plain and l + 1 < self.frozen.depth:
            W, b = self.frozen.W_2[l], target.b_2[l][:, None]
            sent = _both(lambda a: W @ a + b, active)
        else:
            sent = self._layer("W_2", "b_2", l, active, self._missing(targets, streams))
        return self._add(sent, streams), targets

    def _missing(self, wanted: _Data, streams: _Data) -> _Data:
        """Compute what has to be added to the stream, as columns side by side."""
        if not self.frozen.settings.residual:
            return _both(_columns, wanted)
        return _both(lambda y, z: _columns(y - z), wanted, streams)

    def _add(self, sent: _Data, streams: _Data) -> _Data:
        """Compute the tokens after a part that sends these columns."""

        def added(columns: Tensor, z: Tensor) -> Tensor:
            part = columns.unflatten(1, (len(z), z.shape[-1])).movedim(0, 1)
            return z + part if self.frozen.settings.residual else part

        return _both(added, sent, streams)

    def _layer(self, kind: str, bias: str, l: int, read: _Data, wanted: _Data) -> _Data:
        """Fit ``W_1`` or ``W_2``; return its outputs as columns."""
        W, rank = self.frozen.parameters[kind][l], self.ranks[kind]
        fitted, words = fit_layer(
            W,
            self.target.parameters[kind][l],
            rank,
            read,
            wanted,
            None,
            lowrank.truncated_svd(self.theorem.parameters[kind][l] - W, rank),
            [self.theorem.parameters[bias][l]],
            {"repair": 0.0} if self.frozen.is_plain else SHRINKAGES,
        )
        self.chosen.append(words)
        W, b = W + fitted.update.matrix(), fitted.intercept
        self.parts[kind][l], self.parts[bias][l] = W, b
        return _both(lambda x: W @ x + b[:, None], read)

    def _scores(self, l: int, h: int, tokens: _Data, wanted: _Data) -> None:
        """Fit the product of a head as wide as the tokens, which is in ``W_Q``."""
        frozen, rank = self.frozen.W_Q[l, h], self.ranks["W_Q"]
        bias = self._query_bias(l)[h]
        keys = _both(lambda z: self.frozen.W_K[l, h] @ z, tokens)
        missing = _both(lambda s, k, z: s - k.mT @ (frozen @ z + bias), wanted, keys, tokens)
        E = self.target.W_Q[l, h] - frozen
        changes = {
            "theorem": self.theorem.W_Q[l, h] - frozen,
            "closed form": nearest_scores(E, keys[0], tokens[0], rank),
        }
        if self.frozen.width <= _WIDEST:
            moments = Scores.of(keys[0], tokens[0], missing[0])
            start = nearest_scores(moments.free(), keys[0], tokens[0], rank)
            start = min((start, *changes.values()), key=lambda change: float(moments.left(change)))
            changes["alternation"] = moments.improved(start, rank)

        def error(change: Tensor) -> float:
            return _spread(missing[1] - keys[1].mT @ (change @ tokens[1]))

        self.parts["W_Q"][l, h] = frozen + self._best(changes, error)

    def _narrow_scores(self, l: int, h: int, tokens: _Data, wanted: _Data) -> None:
        """Fit both factors of a narrow head in turn, each by `Scores` with the other as it is."""
        z, W_Q, W_K = tokens[0], self.frozen.W_Q[l, h], self.frozen.W_K[l, h]
        Q, K, bias = W_Q, W_K, self._query_bias(l)[h]

        def sweep() -> float:
            nonlocal Q, K
            keys = K @ z
            of_Q = Scores.of(keys, z, wanted[0] - keys.mT @ (W_Q @ z + bias))
            Q = W_Q + of_Q.improved(Q - W_Q, self.ranks["W_Q"])
            queries = Q @ z + bias
            of_K = Scores.of(z, queries, wanted[0] - (W_K @ z).mT @ queries)
            change = of_K.improved((K - W_K).mT, self.ranks["W_K"])
            K = W_K + change.mT
            return float(of_K.left(change))

        _repeat(sweep)
        theorem = self.theorem.W_Q[l, h], self.theorem.W_K[l, h]

        def error(pair: tuple[Tensor, Tensor]) -> float:
            Q, K = pair
            return _spread(wanted[1] - (K @ tokens[1]).mT @ (Q @ tokens[1] + bias))

        pairs = {"alternation": (Q, K), "theorem": theorem}
        self.parts["W_Q"][l, h], self.parts["W_K"][l, h] = self._best(pairs, error)

    def _attention(self, l: int, tokens: _Data, wanted: _Data) -> _Data:
        """Fit values and outputs of all heads in turn; return what they send, with a bias."""
        bias_kind = "b_1" if self.frozen.is_plain else "b_O"
        mixes = _both(lambda z: self._mix(l, z), tokens)
        heads, V, O = range(self.frozen.heads), self.parts["W_V"][l], self.parts["W_O"][l]
        bias = self.target.parameters[bias_kind][l]
        theorem = [self.theorem.parameters[kind][l] for kind in ("W_V", "W_O", bias_kind)]
        if not self.frozen.is_narrow("value size"):
            O.copy_(theorem[1])

        def sent(V: Tensor, O: Tensor, bias: Tensor, mix: Tensor) -> Tensor:
            return (O @ (V @ mix)).sum(0) + bias[:, None]

        def sweep() -> float:
            nonlocal bias
            for h in heads:
                others = sum(O[g] @ V[g] @ mixes[0][g] for g in heads if g != h)
                bias = self._fit_head(l, h, mixes[0][h], wanted[0] - others)
            return float((wanted[0] - sent(V, O, bias, mixes[0])).square().mean())

        _repeat(sweep)

        def error(option: Sequence[Tensor]) -> float:
            V, O, bias = option
            return float((wanted[1] - sent(V, O, bias, mixes[1])).square().mean())

        options = {"in turn": [V.clone(), O.clone(), bias], "theorem": theorem}
        V, O, bias = best = self._best(options, error)
        for kind, part in zip(("W_V", "W_O", bias_kind), best, strict=True):
            self.parts[kind][l] = part
        return _both(lambda mix: sent(V, O, bias, mix), mixes)

    def _fit_head(self, l: int, h: int, mix: Tensor, missing: Tensor) -> Tensor:
        """Fit ``W_O`` of a head, if narrow ``W_V`` first, to what is missing; return a bias."""
        W_O, towards = self.frozen.W_O[l, h], None
        if self.frozen.is_narrow("value size"):
            O, V = self.parts["W_O"][l, h].clone(), self.frozen.W_V[l, h]
            inner = torch.linalg.pinv(O) @ missing - V @ mix
            fitted = reduced_rank(inner, mix, self.ranks["W_V"], metric=O)
            self.parts["W_V"][l, h] = V + fitted.update.matrix()
        else:
            # W_O holds the product; W_V does nothing, but to add zeros to wide heads.
            towards = self.target.W_O[l, h] - W_O
        values = self.parts["W_V"][l, h] @ mix
        fitted = reduced_rank(missing - W_O @ values, values, self.ranks["W_O"], towards=towards)
        self.parts["W_O"][l, h] = W_O + fitted.update.matrix()
        return fitted.intercept

    def _best(self, options: dict[str, T], error: Callable[[T], float]) -> T:
        """Choose the option that errs least, and note its name."""
        name = min(options, key=lambda name: error(options[name]))
        self.chosen.append(name)
        return options[name]

    def _query_bias(self, l: int) -> Float[Tensor, "heads size 1"]:
        """Get what is added to the queries of each head."""
        if self.frozen.is_plain:
            return torch.zeros_like(self.frozen.W_Q[l, ..., :1])
        return self.theorem.b_Q[l][..., None]

    def _mix(self, l: int, z: Tensor) -> Float[Tensor, "heads width columns"]:
        """Compute ``Z P_h`` of every head, adapted scores, and all sequences side by side."""
        tokens, Q, K = z.unsqueeze(-3), self.parts["W_Q"][l], self.parts["W_K"][l]
        patterns = self.target.patterns((K @ tokens).mT @ (Q @ tokens + self._query_bias(l)))
        return (tokens @ patterns).movedim(0, -2).flatten(-2)


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


def _columns(z: Float[Tensor, "samples width tokens"]) -> Float[Tensor, "width columns"]:
    """Put the tokens of all sequences side by side."""
    return z.movedim(-2, 0).flatten(1)


def _spread(scores: Float[Tensor, "samples tokens tokens"]) -> float:
    """Compute the mean square of scores about their means over keys."""
    return float((scores - scores.mean(-2, keepdim=True)).square().mean())
