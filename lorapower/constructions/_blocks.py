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

from .. import _checks, lowrank
from ..adapters.core import Adapters
from ..errors import InputError
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
        """From sequences; keys and ``wanted`` scores are centred over each sequence's keys."""
        k, s = keys - keys.mean(-1, keepdim=True), wanted - wanted.mean(-2, keepdim=True)
        pairs = s.numel()
        of_keys, of_queries = k @ k.mT, queries @ queries.mT
        T = of_keys.flatten(1).mT @ of_queries.flatten(1) / pairs
        a, b = keys.shape[-2], queries.shape[-2]
        G = torch.einsum("nak,nkq,nbq->ab", k, s, queries) / pairs
        T = T.reshape(a, a, b, b).permute(0, 2, 1, 3).contiguous()
        return cls(T, G, s.square().mean())

    def left(self, K: Float[Tensor, "a b"]) -> Float[Tensor, ""]:
        """The sum at ``K``."""
        return (K * torch.tensordot(self.T, K, 2)).sum() - 2 * (K * self.G).sum() + self.size

    def free(self) -> Float[Tensor, "a b"]:
        """The smallest ``K`` of least sum, of any rank."""
        flat = self.T.flatten(2).flatten(0, 1)
        solution = torch.linalg.lstsq(flat, self.G.reshape(-1, 1), driver="gelsd").solution
        return solution.reshape(self.G.shape)

    def improved(self, K: Float[Tensor, "a b"], rank: int) -> Float[Tensor, "a b"]:
        """``K`` after exact half-steps in its factors, until it stands still [prop-scores]."""
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
        """``B`` of the least sum at ``K = U Bᵀ``."""
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
    """The matrix ``K`` of limited rank whose scores are nearest to those of ``E`` [prop-scores].

    ``K = (C_k^{1/2})⁺ U_r U_rᵀ C_k^{1/2} E``, with second moments ``C_k`` of keys, centred within
    their sequence, and ``C_q`` of queries, and the leading left singular vectors ``U_r`` of
    ``C_k^{1/2} E C_q^{1/2}``, minimizes ``E (k̃ᵀ(E − K) q)²`` where keys and queries are
    independent. Raises `InputError` for what does not fit.
    """
    E = _checks.real_tensor("E", E, min_dims=2)
    rank = _checks.integer("rank", rank, 0, min(E.shape[-2:]), limit="the smaller side")
    sides = []
    for name, x, side in (("keys", keys, 0), ("queries", queries, 1)):
        x = _checks.real_tensor(name, x, min_dims=3).to(E)
        if x.shape[-2] != E.shape[side]:
            raise InputError(name, allowed=f"of width {E.shape[side]}", given=x.shape[-2])
        sides.append(x)
    centred = _columns(sides[0] - sides[0].mean(-1, keepdim=True))
    metric = torch.linalg.qr(centred.mT, mode="r").R
    return truncate(E, rank, inputs=_columns(sides[1]), metric=metric).update.matrix()


def fit_blocks(
    frozen: Transformer,
    target: Transformer,
    theorem: Transformer,
    ranks: Sequence[int],
    inputs: Float[Tensor, "samples width tokens"],
    select: Float[Tensor, "others width tokens"],
) -> tuple[Adapters, list[str]]:
    """Adapters of a fused transformer fitted to sequences, and how each segment was adapted."""
    fit = _BlockFit(frozen, target, theorem, ranks)
    streams = targets = [inputs, select]
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
    """The best update of a weight, fitted to the first pair of data, by the second; its name."""
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


class _BlockFit:
    """``parts`` by kind and ``chosen`` by segment so far; data come as fit and select."""

    def __init__(
        self, frozen: Transformer, target: Transformer, theorem: Transformer, ranks: Sequence[int]
    ) -> None:
        self.frozen, self.target, self.theorem = frozen, target, theorem
        # Where only some weights of a kind are adapted, the last is.
        names = zip(frozen.weight_names, ranks, strict=True)
        self.ranks = {name.split()[0]: rank for name, rank in names}
        self.parts: dict[str, Any] = {
            kind: frozen.parts[kind].clone() for kind in frozen.weight_kinds
        }
        self.parts |= {kind: theorem.parts[kind].clone() for kind in frozen.bias_kinds}
        if frozen.is_plain:
            self.parts["b_2"] = target.b_2.clone()
        self.chosen: list[str] = []

    def adapters(self, ranks: Sequence[int]) -> Adapters:
        """The adapters found, for each weight in order."""
        tuned = Transformer(**self.parts, **self.frozen.settings)
        pairs = zip(tuned.weights, self.frozen.weights, ranks, strict=True)
        updates = tuple(lowrank.truncated_svd(new - old, rank) for new, old, rank in pairs)
        changes = zip(tuned.biases, self.frozen.biases, strict=True)
        return Adapters(updates, tuple(new - old for new, old in changes))

    def block(
        self, l: int, streams: list[Tensor], targets: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Fit block ``l`` to what enters it in both networks; returns what leaves it in both."""
        target, plain = self.target, self.frozen.is_plain
        scores = [target.scores(l, target.reads(z, "1", l)) for z in targets]
        tokens = [target.reads(z, "1", l) for z in streams]
        for h in range(self.frozen.heads):
            fit_scores = (
                self._narrow_scores if self.frozen.is_narrow("query size") else self._scores
            )
            fit_scores(l, h, tokens, [s[:, h] for s in scores])
        middle = [
            target.attend(l, z, target.patterns(s)) for z, s in zip(targets, scores, strict=True)
        ]
        hidden = [target.hidden(l, u) for u in middle]
        targets = [target.feed_forward(l, u, p) for u, p in zip(middle, hidden, strict=True)]
        if plain:
            # W_1 is the identity.
            received = self._send(l, tokens, [_columns(p) for p in hidden])
        else:
            streams = self._add(self._send(l, tokens, self._lacking(middle, streams)), streams)
            reads = [_columns(target.reads(u, "2", l)) for u in streams]
            received = self._layer("1", l, reads, [_columns(p) for p in hidden])
        active = [target.activate(p) for p in received]
        if plain and l + 1 < self.frozen.depth:
            W, b = self.frozen.W_2[l], target.b_2[l][:, None]
            sent = [W @ a + b for a in active]
        else:
            sent = self._layer("2", l, active, self._lacking(targets, streams))
        return self._add(sent, streams), targets

    def _lacking(self, wanted: list[Tensor], streams: list[Tensor]) -> list[Tensor]:
        """What has to be sent, as columns side by side."""
        if not self.frozen.residual:
            return [_columns(y) for y in wanted]
        return [_columns(y - z) for y, z in zip(wanted, streams, strict=True)]

    def _add(self, sent: list[Tensor], streams: list[Tensor]) -> list[Tensor]:
        """The tokens behind a part that sends these columns."""
        pairs = [(_sequences(part, z), z) for part, z in zip(sent, streams, strict=True)]
        return [z + part if self.frozen.residual else part for part, z in pairs]

    def _layer(
        self, name: str, l: int, reads: list[Tensor], wanted: list[Tensor]
    ) -> list[Float[Tensor, "out columns"]]:
        """Fit ``W_1`` or ``W_2``; returns its outputs."""
        kind, bias = f"W_{name}", f"b_{name}"
        W, rank = self.frozen.parts[kind][l], self.ranks[kind]
        theorem = lowrank.truncated_svd(self.theorem.parts[kind][l] - W, rank)
        fitted, words = fit_layer(
            W,
            self.target.parts[kind][l],
            rank,
            reads,
            wanted,
            None,
            theorem,
            [self.theorem.parts[bias][l]],
            {"repair": 0.0} if self.frozen.is_plain else SHRINKAGES,
        )
        self.chosen.append(words)
        self.parts[kind][l] = W + fitted.update.matrix()
        self.parts[bias][l] = fitted.intercept
        return [self.parts[kind][l] @ x + fitted.intercept[:, None] for x in reads]

    def _scores(self, l: int, h: int, tokens: list[Tensor], wanted: list[Tensor]) -> None:
        """Fit the product of a head as wide as the tokens, which stands in ``W_Q``."""
        frozen, W_K, rank = self.frozen.W_Q[l, h], self.frozen.W_K[l, h], self.ranks["W_Q"]
        keys, bias = [W_K @ z for z in tokens], self._query_bias(l, h)
        missing = [
            s - k.mT @ (frozen @ z + bias) for s, k, z in zip(wanted, keys, tokens, strict=True)
        ]
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

    def _narrow_scores(self, l: int, h: int, tokens: list[Tensor], wanted: list[Tensor]) -> None:
        """Fit both factors of a narrow head in turn, each by `Scores` with the other as it is."""
        z, left = tokens[0], torch.inf
        W_Q, W_K, bias = self.frozen.W_Q[l, h], self.frozen.W_K[l, h], self._query_bias(l, h)
        Q, K = W_Q, W_K
        for _ in range(_SWEEPS):
            keys = K @ z
            of_Q = Scores.of(keys, z, wanted[0] - keys.mT @ (W_Q @ z + bias))
            Q = W_Q + of_Q.improved(Q - W_Q, self.ranks["W_Q"])
            queries = Q @ z + bias
            of_K = Scores.of(z, queries, wanted[0] - (W_K @ z).mT @ queries)
            turned = of_K.improved((K - W_K).mT, self.ranks["W_K"])
            K, now = W_K + turned.mT, float(of_K.left(turned))
            if not now < left * (1 - _STILL):
                break
            left = now
        pairs = {
            "alternation": (Q, K),
            "theorem": (self.theorem.W_Q[l, h], self.theorem.W_K[l, h]),
        }

        def error(pair: tuple[Tensor, Tensor]) -> float:
            Q, K = pair
            return _spread(wanted[1] - (K @ tokens[1]).mT @ (Q @ tokens[1] + bias))

        self.parts["W_Q"][l, h], self.parts["W_K"][l, h] = self._best(pairs, error)

    def _send(
        self, l: int, tokens: list[Tensor], wanted: list[Tensor]
    ) -> list[Float[Tensor, "out columns"]]:
        """Fit all heads in turn until they stand still; what they send, with a bias."""
        bias_kind = "b_1" if self.frozen.is_plain else "b_O"
        mixes = [self._mix(l, z) for z in tokens]
        narrow = self.frozen.is_narrow("value size")
        step = self._step_of_factors if narrow else self._step_of_product
        heads, left = range(self.frozen.heads), torch.inf
        bias = self.target.parts[bias_kind][l]
        if not narrow:
            self.parts["W_O"][l] = self.theorem.W_O[l]
        for _ in range(_SWEEPS):
            for h in heads:
                others = [self._head(l, g) @ mixes[0][g] for g in heads if g != h]
                bias = step(l, h, mixes[0][h], wanted[0] - sum(others))
            now = float((wanted[0] - self._sum(l, mixes[0], bias)).square().mean())
            if not now < left * (1 - _STILL):
                break
            left = now
        fitted = {kind: self.parts[kind][l].clone() for kind in ("W_V", "W_O")}
        theorem = {kind: self.theorem.parts[kind][l] for kind in fitted}
        options = {
            "in turn": (fitted, bias),
            "theorem": (theorem, self.theorem.parts[bias_kind][l]),
        }

        def put(weights: Mapping[str, Tensor]) -> None:
            for kind, stack in weights.items():
                self.parts[kind][l] = stack

        def error(option: tuple[Mapping[str, Tensor], Tensor]) -> float:
            put(option[0])
            return float((wanted[1] - self._sum(l, mixes[1], option[1])).square().mean())

        weights, bias = self._best(options, error)
        put(weights)
        self.parts[bias_kind][l] = bias
        return [self._sum(l, mix, bias) for mix in mixes]

    def _step_of_product(self, l: int, h: int, mix: Tensor, lacking: Tensor) -> Tensor:
        """Fit ``W_O`` of a head, which holds the product, to what lacks; returns the bias."""
        # The frozen W_V does nothing, but to add zeros to heads wider than the tokens.
        frozen, values = self.frozen.W_O[l, h], self.frozen.W_V[l, h] @ mix
        E, rank = self.target.W_O[l, h] - frozen, self.ranks["W_O"]
        fitted = reduced_rank(lacking - frozen @ values, values, rank, towards=E)
        self.parts["W_O"][l, h] = frozen + fitted.update.matrix()
        return fitted.intercept

    def _step_of_factors(self, l: int, h: int, mix: Tensor, lacking: Tensor) -> Tensor:
        """Fit ``W_V`` and then ``W_O`` of a narrow head to what lacks; returns the bias."""
        O, V = self.parts["W_O"][l, h].clone(), self.frozen.W_V[l, h]
        inner = torch.linalg.pinv(O) @ lacking - V @ mix
        fitted = reduced_rank(inner, mix, self.ranks["W_V"], metric=O)
        self.parts["W_V"][l, h] = V + fitted.update.matrix()
        values, frozen = self.parts["W_V"][l, h] @ mix, self.frozen.W_O[l, h]
        fitted = reduced_rank(lacking - frozen @ values, values, self.ranks["W_O"])
        self.parts["W_O"][l, h] = frozen + fitted.update.matrix()
        return fitted.intercept

    def _best(self, options: dict[str, T], error: Callable[[T], float]) -> T:
        """The option that errs least; its name is noted."""
        name = min(options, key=lambda name: error(options[name]))
        self.chosen.append(name)
        return options[name]

    def _query_bias(self, l: int, h: int) -> Float[Tensor, "size 1"]:
        """What is added to the queries of a head."""
        if self.frozen.is_plain:
            return self.frozen.W_Q.new_zeros(self.frozen.W_Q.shape[-2], 1)
        return self.theorem.b_Q[l, h][:, None]

    def _mix(self, l: int, z: Tensor) -> Float[Tensor, "heads width columns"]:
        """``Z P_h`` of every head with the adapted scores, of all sequences side by side."""
        Q, K = (self.parts[kind][l] for kind in ("W_Q", "W_K"))
        tokens = z.unsqueeze(-3)
        bias = torch.stack([self._query_bias(l, h) for h in range(self.frozen.heads)])
        patterns = self.target.patterns((K @ tokens).mT @ (Q @ tokens + bias))
        return (tokens @ patterns).movedim(0, -2).flatten(-2)

    def _head(self, l: int, h: int) -> Tensor:
        return self.parts["W_O"][l, h] @ self.parts["W_V"][l, h]

    def _sum(self, l: int, mixes: Tensor, bias: Tensor) -> Tensor:
        sent = self.parts["W_O"][l] @ (self.parts["W_V"][l] @ mixes)
        return sent.sum(0) + bias[:, None]


def _columns(z: Float[Tensor, "samples width tokens"]) -> Float[Tensor, "width columns"]:
    """The tokens of all sequences side by side."""
    return z.movedim(-2, 0).flatten(1)


def _sequences(
    columns: Float[Tensor, "width columns"], like: Float[Tensor, "samples _ tokens"]
) -> Float[Tensor, "samples width tokens"]:
    """Tokens side by side as sequences again, as many and as long as others."""
    return columns.unflatten(1, (len(like), like.shape[-1])).movedim(0, 1)


def _spread(scores: Float[Tensor, "samples tokens tokens"]) -> float:
    """The mean square of scores about their means over keys."""
    return float((scores - scores.mean(-2, keepdim=True)).square().mean())
