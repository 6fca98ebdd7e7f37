"""Segments of a transformer fitted to sequences: scores, the ReLU's arguments, outputs.

All is done on the fused network (`fused.fuse`), block by block, on the adapted network's own
tokens. What a column of scores has in common the softmax ignores, so keys are centred within their
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank
from ..adapters.core import Adapters
from ..errors import InputError
from ..networks.stacked import Stacked
from ..networks.transformer import Transformer, fed_forward, mixed, scores
from ..regression import reduced_rank
from . import transformer
from .fused import Fused, is_narrow

SWEEPS, STILL = 30, 1e-5
# Beyond this the moments of the scores, width⁴ numbers, are not formed.
WIDEST = 64

T = TypeVar("T")
N = TypeVar("N", bound=Stacked)


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
        """``K``, of that rank, after exact half-steps in its factors till it stands still.

        No step makes the sum larger [prop-scores].
        """
        if not rank:
            return torch.zeros_like(K)
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
    """``(C_k^{1/2})⁺ U_r U_rᵀ C_k^{1/2} E``, ``C_k`` of centred keys [prop-scores].

    ``U_r`` has the first left singular vectors of ``C_k^{1/2} E C_q^{1/2}``. Of rank ``r`` it has
    the least ``E (k̃ᵀ(E − K) q)²`` where keys and queries are independent. Raises `InputError` for
    what does not fit.
    """
    E = _checks.real_tensor("E", E, min_dims=2)
    rank = _checks.integer("rank", rank, 0, min(E.shape[-2:]), limit="the smaller side")
    roots = []
    for name, x, side, centred in (("keys", keys, 0, True), ("queries", queries, 1, False)):
        x = _checks.real_tensor(name, x, min_dims=3).to(E)
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
    assert isinstance(network, Transformer)
    assert isinstance(goal, Transformer)
    named = zip(network.weight_names, fused.fused_ranks, strict=True)
    # Of the kinds that are adapted in every block the last has the rank of all.
    by_kind = {name.split()[0]: rank for name, rank in named}
    ranks = {kind: by_kind[kind] for kind in transformer.ADAPTED}
    # Heads that are too narrow for it are adapted as well as they are, and lose the comparison.
    theorem = transformer.adapt(network, goal, ranks, throw=False).adapters
    yield theorem, ["theorem"]
    builder = _Builder(network, goal, theorem.merge(network), ranks, [x, select])
    yield builder.adapters(fused.fused_ranks), builder.chosen


class Builder(Generic[N]):
    """Adapts the heads of one block after the other, on what both networks make of sequences.

    Of all data there are two: those to fit, and others to choose by. The rest of a block is a
    subclass's matter, and so is what ``tokens`` attention reads.

    Attributes
    ----------
    own
        What was found so far, by kind of parameter.
    chosen
        How each segment was adapted.
    """

    # The bias that is added to what heads send.
    sends: ClassVar[str]

    def __init__(self, frozen: N, goal: N, theorem: N, ranks: Mapping[str, int]) -> None:
        self.frozen, self.goal, self.theorem, self.ranks = frozen, goal, theorem, ranks
        self.own = {kind: getattr(frozen, kind).clone() for kind in frozen.weight_kinds}
        self.own |= {kind: getattr(theorem, kind).clone() for kind in frozen.bias_kinds}
        self.chosen: list[str] = []
        self.tokens: list[Tensor] = []

    def adapters(self, ranks: Sequence[int]) -> Adapters:
        """What was found, for each weight in order."""
        flat = [
            [part for kind in kinds for part in self.own[kind].reshape(-1, *shape(kind))]
            for kinds, shape in (
                (self.frozen.weight_kinds, lambda kind: self.own[kind].shape[-2:]),
                (self.frozen.bias_kinds, lambda kind: self.own[kind].shape[-1:]),
            )
        ]
        tuned = self.frozen.holding(*flat)
        pairs = zip(tuned.weights, self.frozen.weights, ranks, strict=True)
        updates = tuple(lowrank.truncated_svd(new - old, rank) for new, old, rank in pairs)
        changes = zip(tuned.biases, self.frozen.biases, strict=True)
        return Adapters(updates, tuple(new - old for new, old in changes))

    def fit_scores(self, l: int, wanted: list[Float[Tensor, "samples heads n n"]]) -> None:
        """Scores of all heads of a block."""
        narrow = is_narrow(self.frozen, "query size")
        for h in range(self.frozen.heads):
            (self._narrow_scores if narrow else self._scores)(l, h, [s[:, h] for s in wanted])

    def fit_values(self, l: int, wanted: list[Tensor]) -> list[Float[Tensor, "out columns"]]:
        """What heads of adapted scores send, as near to ``wanted`` as they come; and what it is."""
        mixes = [self._patterned(l, z) for z in self.tokens]
        narrow = is_narrow(self.frozen, "value size")
        bias = (self._narrow_values if narrow else self._values)(l, mixes, wanted)
        self.own[self.sends][l] = bias
        return [self._sum(l, parts, bias) for parts in mixes]

    def _scores(self, l: int, h: int, wanted: list[Tensor]) -> None:
        frozen, W_K, rank = self.frozen.W_Q[l, h], self.frozen.W_K[l, h], self.ranks["W_Q"]
        keys, bias = [W_K @ z for z in self.tokens], self._query_bias(l, h)
        missing = [
            s - k.mT @ (frozen @ z + bias)
            for s, k, z in zip(wanted, keys, self.tokens, strict=True)
        ]
        E = self.goal.W_Q[l, h] - frozen
        found = {
            "theorem": self.theorem.W_Q[l, h] - frozen,
            "closed form": closed_form(E, keys[0], self.tokens[0], rank),
        }
        if self.frozen.width <= WIDEST:
            moments = Scores.of(keys[0], self.tokens[0], missing[0])
            start = closed_form(moments.free(), keys[0], self.tokens[0], rank)
            start = min((start, *found.values()), key=lambda one: float(moments.left(one)))
            found["alternation"] = moments.improved(start, rank)

        def error(change: Tensor) -> float:
            return _spread(missing[1] - keys[1].mT @ (change @ self.tokens[1]))

        self.own["W_Q"][l, h] = frozen + self._best(found, error)

    def _narrow_scores(self, l: int, h: int, wanted: list[Tensor]) -> None:
        """Both factors in turn, each a step of `Scores` with the other as it is."""
        z, left = self.tokens[0], torch.inf
        frozen = {kind: getattr(self.frozen, kind)[l, h] for kind in ("W_Q", "W_K")}
        Q, K, bias = frozen["W_Q"], frozen["W_K"], self._query_bias(l, h)
        for _ in range(SWEEPS):
            keys = K @ z
            of_Q = Scores.of(keys, z, wanted[0] - keys.mT @ (frozen["W_Q"] @ z + bias))
            Q = frozen["W_Q"] + of_Q.improved(Q - frozen["W_Q"], self.ranks["W_Q"])
            queries = Q @ z + bias
            of_K = Scores.of(z, queries, wanted[0] - (frozen["W_K"] @ z).mT @ queries)
            turned = of_K.improved((K - frozen["W_K"]).mT, self.ranks["W_K"])
            K, now = frozen["W_K"] + turned.mT, float(of_K.left(turned))
            if not now < left * (1 - STILL):
                break
            left = now
        found = {
            "alternation": (Q, K),
            "theorem": (self.theorem.W_Q[l, h], self.theorem.W_K[l, h]),
        }

        def error(pair: tuple[Tensor, Tensor]) -> float:
            Q, K = pair
            return _spread(wanted[1] - (K @ self.tokens[1]).mT @ (Q @ self.tokens[1] + bias))

        self.own["W_Q"][l, h], self.own["W_K"][l, h] = self._best(found, error)

    def _values(self, l: int, mixes: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """All heads in turn until they stand still, from the theorem's on; returns the bias."""

        def step(h: int, lacking: Tensor) -> Tensor:
            # These do nothing, but to add zeros to heads wider than the tokens.
            frozen, values = self.frozen.W_O[l, h], self.frozen.W_V[l, h] @ mixes[0][h]
            E, rank = self.goal.W_O[l, h] - frozen, self.ranks["W_O"]
            found = reduced_rank(lacking - frozen @ values, values, rank, towards=E)
            self.own["W_O"][l, h] = frozen + found.update.matrix()
            return found.intercept

        self.own["W_O"][l] = self.theorem.W_O[l]
        return self._in_turn(l, mixes, wanted, step)

    def _narrow_values(self, l: int, mixes: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """The same with the two factors of each head, from the frozen ones on."""

        def step(h: int, lacking: Tensor) -> Tensor:
            O, V, mix = self.own["W_O"][l, h].clone(), self.frozen.W_V[l, h], mixes[0][h]
            inner = torch.linalg.pinv(O) @ lacking - V @ mix
            found = reduced_rank(inner, mix, self.ranks["W_V"], metric=O)
            self.own["W_V"][l, h] = V + found.update.matrix()
            values, frozen = self.own["W_V"][l, h] @ mix, self.frozen.W_O[l, h]
            found = reduced_rank(lacking - frozen @ values, values, self.ranks["W_O"])
            self.own["W_O"][l, h] = frozen + found.update.matrix()
            return found.intercept

        return self._in_turn(l, mixes, wanted, step)

    def _in_turn(
        self,
        l: int,
        mixes: list[Tensor],
        wanted: list[Tensor],
        step: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        heads, left = range(self.frozen.heads), torch.inf
        bias = getattr(self.goal, self.sends)[l]
        for _ in range(SWEEPS):
            for h in heads:
                others = [self._head(l, g) @ mixes[0][g] for g in heads if g != h]
                bias = step(h, wanted[0] - sum(others))
            now = float((wanted[0] - self._sum(l, mixes[0], bias)).square().mean())
            if not now < left * (1 - STILL):
                break
            left = now
        fitted = {kind: self.own[kind][l].clone() for kind in ("W_V", "W_O")}
        theorem = {kind: getattr(self.theorem, kind)[l] for kind in fitted}
        found = {
            "in turn": (fitted, bias),
            "theorem": (theorem, getattr(self.theorem, self.sends)[l]),
        }

        def put(weights: Mapping[str, Tensor]) -> None:
            for kind, stack in weights.items():
                self.own[kind][l] = stack

        def error(option: tuple[Mapping[str, Tensor], Tensor]) -> float:
            put(option[0])
            return float((wanted[1] - self._sum(l, mixes[1], option[1])).square().mean())

        weights, bias = self._best(found, error)
        put(weights)
        return bias

    def _best(self, options: dict[str, T], error: Callable[[T], float]) -> T:
        name = min(options, key=lambda name: error(options[name]))
        self.chosen.append(name)
        return options[name]

    def _query_bias(self, l: int, h: int) -> Float[Tensor, "size 1"]:
        """What is added to the queries of a head."""
        return self.frozen.W_Q[l, h].new_zeros(self.frozen.W_Q.shape[-2], 1)

    def _patterned(self, l: int, z: Tensor) -> Float[Tensor, "heads width columns"]:
        """``Z P_h`` of every head with the adapted scores, of all sequences side by side."""
        Q, K = (self.own[kind][l] for kind in ("W_Q", "W_K"))
        tokens = z.unsqueeze(-3)
        bias = torch.stack([self._query_bias(l, h) for h in range(self.frozen.heads)])
        patterns = self._patterns((K @ tokens).mT @ (Q @ tokens + bias))
        return (tokens @ patterns).movedim(0, -2).flatten(-2)

    def _patterns(self, scores: Tensor) -> Tensor:
        return scores.softmax(-2)

    def _head(self, l: int, h: int) -> Tensor:
        return self.own["W_O"][l, h] @ self.own["W_V"][l, h]

    def _sum(self, l: int, mixes: Tensor, bias: Tensor) -> Tensor:
        return (self.own["W_O"][l] @ (self.own["W_V"][l] @ mixes)).sum(0) + bias[:, None]


class _Builder(Builder[Transformer]):
    """Of a transformer without residual connections."""

    sends: ClassVar[str] = "b_1"

    def __init__(
        self,
        frozen: Transformer,
        goal: Transformer,
        theorem: Transformer,
        ranks: Mapping[str, int],
        x: list[Tensor],
    ) -> None:
        super().__init__(frozen, goal, theorem, ranks)
        self.own["b_2"] = goal.b_2.clone()
        self.tokens, self.targets = x, x
        for l in range(frozen.depth):
            self._adapt(l)

    def _adapt(self, l: int) -> None:
        attending = [scores(self.goal, l, z) for z in self.targets]
        self.fit_scores(l, attending)
        pairs = zip(self.targets, attending, strict=True)
        hidden = [mixed(self.goal, l, z, s) for z, s in pairs]
        ours = [p.relu() for p in self.fit_values(l, [columns(p) for p in hidden])]
        self.targets = [fed_forward(self.goal, l, p) for p in hidden]
        if l + 1 == self.frozen.depth:
            self._outputs(l, ours, [columns(z) for z in self.targets])
        else:
            made = [self.frozen.W_2[l] @ a + self.goal.b_2[l][:, None] for a in ours]
            self.tokens = [sequences(part, z) for part, z in zip(made, self.tokens, strict=True)]

    def _outputs(self, l: int, ours: list[Tensor], wanted: list[Tensor]) -> None:
        frozen = self.frozen.W_2[l]
        E, rank = self.goal.W_2[l] - frozen, self.ranks["W_2"]
        fitted = reduced_rank(wanted[0] - frozen @ ours[0], ours[0], rank, towards=E)
        found = {
            "repair": (frozen + fitted.update.matrix(), fitted.intercept),
            "theorem": (self.theorem.W_2[l], self.theorem.b_2[l]),
        }

        def error(option: tuple[Tensor, Tensor]) -> float:
            W, bias = option
            return float((wanted[1] - W @ ours[1] - bias[:, None]).square().mean())

        self.own["W_2"][l], self.own["b_2"][l] = self._best(found, error)


def columns(z: Float[Tensor, "samples width tokens"]) -> Float[Tensor, "width columns"]:
    """The tokens of all sequences side by side."""
    return z.movedim(-2, 0).flatten(1)


def sequences(
    columns: Float[Tensor, "width columns"], like: Float[Tensor, "samples _ tokens"]
) -> Float[Tensor, "samples width tokens"]:
    """Tokens side by side as sequences again, as many and as long as others."""
    return columns.unflatten(1, (len(like), like.shape[-1])).movedim(0, 1)


def _spread(scores: Float[Tensor, "samples tokens tokens"]) -> float:
    """The mean square of scores about their mean over the keys."""
    return float((scores - scores.mean(-2, keepdim=True)).square().mean())
