"""Segments of a transformer fitted to sequences: scores, the ReLU's arguments, outputs.

All is done on the fused network (`fused.fuse`), block by block, on the adapted network's own
tokens. What a column of scores has in common the softmax ignores, so keys are centred within their
sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank
from ..adapters import Adapters
from ..errors import InputError
from ..networks import Transformer
from ..regression import reduced_rank
from . import transformer
from .fused import Fused, is_narrow

SWEEPS, STILL = 30, 1e-7
# Beyond this the moments of the scores, width⁴ numbers, are not formed.
WIDEST = 64


class Scores(NamedTuple):
    """The sum ``E (s − k̃ᵀ K q)²`` over keys and queries as a function of ``K``.

    ``⟨K, T K⟩ − 2 ⟨K, G⟩ + size``: ``T = E[k̃ k̃ᵀ ⊗ q qᵀ]``, ``[a, b, a, b]``, and ``G = E[k̃ s qᵀ]``.
    """

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
        """From sequences; keys and what is wanted are centred over the keys of a sequence."""
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
        """The ``K`` of least sum, of any rank, and of these the smallest."""
        flat = self.T.flatten(2).flatten(0, 1)
        solution = torch.linalg.lstsq(flat, self.G.reshape(-1, 1), driver="gelsd").solution
        return solution.reshape(self.G.shape)

    def improved(self, K: Float[Tensor, "a b"], rank: int) -> Float[Tensor, "a b"]:
        """``K`` after exact half-steps in its two factors, until it stands still [prop-scores].

        No step makes the sum larger.
        """
        best, found = self.left(K), K
        for _ in range(SWEEPS):
            U = lowrank.svd(found).U[:, :rank]
            Q = torch.linalg.qr(self._other(U)).Q
            other = Scores(self.T.permute(1, 0, 3, 2), self.G.mT, self.size)
            trial = (Q @ other._other(Q).mT).mT
            left = self.left(trial)
            if not left < best - STILL * best.abs():
                break
            best, found = left, trial
        return found

    def _other(self, U: Float[Tensor, "a r"]) -> Float[Tensor, "b r"]:
        """``B`` of the least sum at ``K = U Bᵀ``."""
        (_, b), r = self.G.shape, U.shape[-1]
        T = torch.einsum("aicj,ar,cs->irjs", self.T, U, U).reshape(b * r, b * r)
        wanted = (self.G.mT @ U).reshape(-1, 1)
        return torch.linalg.lstsq(T, wanted, driver="gelsd").solution.reshape(b, r)


def closed_form(
    E: Float[Tensor, "a b"],
    keys: Float[Tensor, "samples a tokens"],
    queries: Float[Tensor, "samples b tokens"],
    rank: int,
) -> Float[Tensor, "a b"]:
    """``C_k^{-1/2} LR_r(C_k^{1/2} E C_q^{1/2}) C_q^{-1/2}``, ``C_k`` of centred keys [prop-scores].

    The least ``E (k̃ᵀ(E − K) q)²`` of rank ``r`` where keys and queries are independent. Where
    either does not span its space the inverse roots are pseudo-inverses.
    """
    E = _checks.real_tensor("E", E, min_dims=2)
    rank = _checks.integer("rank", rank, 0, min(E.shape[-2:]), limit="the smaller side")
    roots = []
    for name, x, side, centred in (("keys", keys, 0, True), ("queries", queries, 1, False)):
        x = _checks.real_tensor(name, x, min_dims=3)
        if x.shape[-2] != E.shape[side]:
            raise InputError(name, allowed=f"of width {E.shape[side]}", given=x.shape[-2])
        x = (x - x.mean(-1, keepdim=True) if centred else x).movedim(-2, 0).flatten(1)
        roots.append(x)
    # R E Z of data matrices: the left singular vectors need no inverse, and the right neither.
    R, Z = (torch.linalg.qr(part.mT, mode="r").R / part.shape[-1] ** 0.5 for part in roots)
    U = lowrank.svd(R @ E @ Z.mT).U[:, :rank]
    return torch.linalg.pinv(R) @ U @ (U.mT @ R @ E)


def candidates(fused: Fused, x: Tensor, select: Tensor) -> Iterator[tuple[Adapters, list[str]]]:
    """Adapters of the fused network: the theorem's, and those that are fitted."""
    network, goal = fused.network, fused.goal
    assert isinstance(network, Transformer) and isinstance(goal, Transformer)
    named = zip(network.weight_names, fused.fused_ranks, strict=True)
    # Of the kinds that are adapted in every block the last has the rank of all.
    by_kind = {name.split()[0]: rank for name, rank in named}
    ranks = {kind: by_kind[kind] for kind in transformer.ADAPTED}
    # Heads that are too narrow for it are adapted as well as they are, and lose the comparison.
    theorem = transformer.adapt(network, goal, ranks, throw=False).adapters
    yield theorem, ["theorem"]
    fitted = _Builder(fused, x, select)
    yield fitted.built(), fitted.chosen


class _Builder:
    """Adapts one block after the other, and keeps what both networks make of the sequences."""

    def __init__(self, fused: Fused, x: Tensor, select: Tensor) -> None:
        assert isinstance(fused.network, Transformer) and isinstance(fused.goal, Transformer)
        self.frozen, self.goal = fused.network, fused.goal
        self.rank = dict(zip(self.frozen.weight_names, fused.fused_ranks, strict=True))
        self.adapted = {name: W.clone() for name, W in zip(
            self.frozen.weight_names, self.frozen.weights, strict=True
        )}  # fmt: skip
        self.tokens = [x, select]
        self.targets = [x, select]
        self.chosen: list[str] = []

    def built(self) -> Adapters:
        L, H = self.frozen.depth, self.frozen.heads
        b_1, b_2 = [], [*self.goal.b_2[:-1]]
        for l in range(L):
            scores = [self.goal.scores(l, z) for z in self.targets]
            for h in range(H):
                self._scores(l, h, [s[:, h] for s in scores])
            wanted = [self.goal.mixed(l, z, s) for z, s in zip(self.targets, scores, strict=True)]
            b_1.append(self._values(l, wanted))
            ours = [self._mixed(l, z, b_1[-1]).relu() for z in self.tokens]
            if l + 1 < L:
                self.targets = [self.goal.fed_forward(l, p) for p in wanted]
                self.tokens = [self.frozen.W_2[l] @ a + self.goal.b_2[l][:, None] for a in ours]
            else:
                outputs = [self.goal.fed_forward(l, p) for p in wanted]
                b_2.append(self._outputs(ours, outputs))
        updates = [
            lowrank.truncated_svd(W - frozen, self.rank[name])
            for (name, W), frozen in zip(self.adapted.items(), self.frozen.weights, strict=True)
        ]
        biases = [*b_1, *b_2]
        changes = [new - old for new, old in zip(biases, self.frozen.biases, strict=True)]
        return Adapters(tuple(updates), tuple(changes))

    def _name(self, kind: str, l: int, h: int) -> str:
        return f"{kind} of block {l + 1}, head {h + 1}"

    def _scores(self, l: int, h: int, wanted: list[Tensor]) -> None:
        Q, K = (self._name(kind, l, h) for kind in ("W_Q", "W_K"))
        if is_narrow(self.frozen, "query size"):
            self._narrow_scores(Q, K, wanted)
            return
        frozen, W_K = self.adapted[Q], self.adapted[K]
        theorem = self._theorem("W_Q", l, h)
        rank = self.rank[Q]
        keys = [W_K @ z for z in self.tokens]
        missing = [
            s - k.mT @ (frozen @ z) for s, k, z in zip(wanted, keys, self.tokens, strict=True)
        ]
        E = self._target("W_Q", l, h) - frozen
        found = {"theorem": theorem, "closed form": closed_form(E, keys[0], self.tokens[0], rank)}
        if frozen.shape[-1] <= WIDEST:
            moments = Scores.of(keys[0], self.tokens[0], missing[0])
            start = closed_form(moments.free(), keys[0], self.tokens[0], rank)
            start = min((start, *found.values()), key=lambda one: float(moments.left(one)))
            found["alternation"] = moments.improved(start, rank)

        def error(name: str) -> float:
            left = missing[1] - keys[1].mT @ (found[name] @ self.tokens[1])
            return float((left - left.mean(-2, keepdim=True)).square().mean())

        best = min(found, key=error)
        self._take(Q, found[best], best)

    def _narrow_scores(self, Q: str, K: str, wanted: list[Tensor]) -> None:
        """Both factors in turn, each a step of `Scores` with the other as it is."""
        z = self.tokens[0]
        left = torch.inf
        for _ in range(SWEEPS):
            keys = self.adapted[K] @ z
            frozen = self._frozen(Q)
            of_Q = Scores.of(keys, z, wanted[0] - keys.mT @ (frozen @ z))
            change = of_Q.improved(self.adapted[Q] - frozen, self.rank[Q])
            if not self.rank[Q]:
                change = torch.zeros_like(frozen)
            self.adapted[Q] = frozen + change
            queries, frozen = self.adapted[Q] @ z, self._frozen(K)
            of_K = Scores.of(z, queries, wanted[0] - (frozen @ z).mT @ queries)
            turned = (self.adapted[K] - frozen).mT
            change = of_K.improved(turned, self.rank[K]) if self.rank[K] else 0 * turned
            self.adapted[K] = frozen + change.mT
            now = float(of_K.left(change))
            if not now < left - 1e-4 * abs(left):
                break
            left = now
        self.chosen.append("alternation of both factors")

    def _values(self, l: int, wanted: list[Tensor]) -> Tensor:
        """Adapts what all heads add up to before the ReLU; returns the bias."""
        heads = range(self.frozen.heads)
        mixes = [self._patterned(l, z) for z in self.tokens]
        names = [self._name("W_O", l, h) for h in heads]
        narrow = is_narrow(self.frozen, "value size")
        flat = [[_columns(part) for part in mix] for mix in mixes]
        y = [_columns(p) for p in wanted]
        bias = self.goal.b_1[l]
        if not narrow:
            start = {
                name: self._frozen(name) + self._theorem("W_O", l, h)
                for h, name in enumerate(names)
            }
            self.adapted |= start
        left = torch.inf
        for _ in range(SWEEPS):
            for h, name in enumerate(names):
                others = sum((self._head(l, g) @ flat[0][g] for g in heads if g != h), 0 * y[0])
                bias = self._one_head(l, h, name, y[0] - others, flat[0][h], narrow)
            now = float(self._missed(l, y[0], flat[0], bias))
            if not now < left * (1 - STILL):
                break
            left = now
        if not narrow:
            fitted = {name: self.adapted[name] for name in names}, bias
            errors = []
            for weights, b in (fitted, (start, self.goal.b_1[l])):
                self.adapted |= weights
                errors.append(float(self._missed(l, y[1], flat[1], b)))
            if errors[0] < errors[1]:
                self.adapted |= fitted[0]
            else:
                bias = self.goal.b_1[l]
            self.chosen.append("heads in turn" if errors[0] < errors[1] else "theorem")
        else:
            self.chosen.append("factors of heads in turn")
        return bias

    def _one_head(
        self, l: int, h: int, name: str, wanted: Tensor, mix: Tensor, narrow: bool
    ) -> Tensor:
        frozen = self._frozen(name)
        if not narrow:
            E = self._target("W_O", l, h) - frozen
            found = reduced_rank(wanted - frozen @ mix, mix, self.rank[name], towards=E)
            self.adapted[name] = frozen + found.change.matrix()
            return found.intercept
        of_V = self._name("W_V", l, h)
        O, V = self.adapted[name], self._frozen(of_V)
        inner = torch.linalg.pinv(O) @ wanted - V @ mix
        found = reduced_rank(inner, mix, self.rank[of_V], metric=O)
        self.adapted[of_V] = V + found.change.matrix()
        values = self.adapted[of_V] @ mix
        found = reduced_rank(wanted - frozen @ values, values, self.rank[name])
        self.adapted[name] = frozen + found.change.matrix()
        return found.intercept

    def _outputs(self, ours: list[Tensor], wanted: list[Tensor]) -> Tensor:
        l = self.frozen.depth - 1
        name = f"W_2 of block {l + 1}"
        frozen = self._frozen(name)
        theorem = _best(self.goal.W_2[l] - frozen, self.rank[name])
        a, y = [_columns(part) for part in ours], [_columns(part) for part in wanted]
        found = reduced_rank(
            y[0] - frozen @ a[0], a[0], self.rank[name], towards=self.goal.W_2[l] - frozen
        )
        options = {
            "repair": (found.change.matrix(), found.intercept),
            "theorem": (theorem, self.goal.b_2[l]),
        }

        def error(option: str) -> float:
            change, bias = options[option]
            return float((y[1] - (frozen + change) @ a[1] - bias[:, None]).square().mean())

        best = min(options, key=error)
        self._take(name, options[best][0], best)
        return options[best][1]

    def _take(self, name: str, change: Tensor, how: str) -> None:
        self.adapted[name] = self._frozen(name) + change
        self.chosen.append(how)

    def _frozen(self, name: str) -> Tensor:
        return self.frozen.weights[self.frozen.weight_names.index(name)]

    def _target(self, kind: str, l: int, h: int) -> Tensor:
        return self.goal.weights[self.goal.weight_names.index(self._name(kind, l, h))]

    def _theorem(self, kind: str, l: int, h: int) -> Tensor:
        name = self._name(kind, l, h)
        return _best(self._target(kind, l, h) - self._frozen(name), self.rank[name])

    def _patterned(self, l: int, z: Tensor) -> list[Tensor]:
        """``Z P_h`` of every head with the adapted scores."""
        found = []
        for h in range(self.frozen.heads):
            Q, K = (self.adapted[self._name(kind, l, h)] for kind in ("W_Q", "W_K"))
            found.append(z @ ((K @ z).mT @ (Q @ z)).softmax(-2))
        return found

    def _head(self, l: int, h: int) -> Tensor:
        O, V = (self.adapted[self._name(kind, l, h)] for kind in ("W_O", "W_V"))
        return O @ V

    def _mixed(self, l: int, z: Tensor, bias: Tensor) -> Tensor:
        mixes = self._patterned(l, z)
        heads = range(self.frozen.heads)
        return sum((self._head(l, h) @ mixes[h] for h in heads), bias[:, None])

    def _missed(self, l: int, y: Tensor, mixes: list[Tensor], bias: Tensor) -> Tensor:
        heads = range(self.frozen.heads)
        return (
            (y - sum((self._head(l, h) @ mixes[h] for h in heads), bias[:, None])).square().mean()
        )


def _columns(z: Float[Tensor, "samples width tokens"]) -> Float[Tensor, "width all"]:
    return z.movedim(-2, 0).flatten(1)


def _best(E: Tensor, rank: int) -> Tensor:
    return lowrank.truncated_svd(E, rank).matrix()
