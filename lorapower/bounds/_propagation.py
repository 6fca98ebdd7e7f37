"""What adapted segments lack, followed through a transformer [prop-transformer-error]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import lowrank
from ..networks._segments import Segments
from ..networks.transformer import Transformer

# At least the largest slopes of the activations.
_STEEPEST = {"relu": 1.0, "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1}


class Maps(NamedTuple):
    """The target's products of one kind of segment, and what those of the adapted network lack."""

    target: Float[Tensor, "*batch out in"]
    lacking: Float[Tensor, "*batch out in"]

    @property
    def reached(self) -> Float[Tensor, "*batch out in"]:
        """``M̂``."""
        return self.target - self.lacking

    def block(self, l: int, dims: int) -> Maps:
        """Those of one block; ``dims`` counts the dimensions behind it."""
        return Maps(*(part.select(-dims - 1, l) for part in self))

    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """``M̂ after − M before``."""
        return self.target @ (after - before) - self.lacking @ after


class Off(NamedTuple):
    """By what tokens differ from the target's: something known, and at most ``radius`` more."""

    known: Float[Tensor, "*batch size n"]
    radius: Float[Tensor, "*batch n"]

    @property
    def length(self) -> Float[Tensor, "*batch n"]:
        """The largest possible difference."""
        return _norm(self.known) + self.radius


def follow_plain(target: Transformer, maps: Segments[Maps], x: Tensor) -> Off:
    """How far outputs of a plain transformer are off."""
    shift = target.missing_shift()
    before, off = x, torch.zeros_like(x[..., 0, :])
    for l, block in enumerate(target.trace(x)):
        shifted = before + shift[..., l - 1, :, None] if l else before
        scores, values = maps.query_key.block(l, 3), maps.value_output.block(l, 3)
        known, radius = attend(target, multiply(scores, before, shifted), values, before, off)
        before, after = (target.activate(block.preactivations + k) for k in (0, known))
        radius = _STEEPEST[target.activation] * radius
        off = Off(after - before, radius).length
    end = maps.output
    return Off(end.change(before, after), lowrank.norm(end.reached)[..., None] * radius)


def follow_stream(target: Transformer, maps: Segments[Maps], z: Tensor) -> Off:
    """How far outputs of a transformer with residual connections or norms are off."""
    V = target.basis()
    read = V if target.norm is None else target.g_1[..., None, :, None] * V
    asked = target.b_Q[..., None]
    if target.norm is not None:
        asked = asked + target.W_Q @ target.s_1[..., None, :, None]
    if "query_key" in maps:
        asked = (target.W_K @ read).mT @ asked
    if "value_output" not in maps:
        maps = Segments({**maps, "value_output": _chain(target, maps.value, maps.sent)})
    # Under a final LayerNorm segments write in the coordinates of what it reads.
    written = maps.outer.target.shape[-2] < target.width
    off = torch.zeros_like(z[..., 0, :])
    for l, block in enumerate(target.trace(z)):
        n, turned = _normalize(target, z), turn(target, z, off)
        if "query_key" in maps:
            scores = multiply(maps.query_key.block(l, 3), n, n, asked[..., l, :, :, :])
        else:
            parts = maps.query.block(l, 3), maps.key.block(l, 3)
            scores = _meet(target, l, *parts, n, asked[..., l, :, :, :])
        known, radius = attend(target, scores, maps.value_output.block(l, 3), n, turned)
        u = target.attend(l, z, block.patterns)
        moved = u + (V @ known if written else known)
        if target.residual:
            radius = radius + off
        n, after_n = _normalize(target, u), _normalize(target, moved)
        inner, outer = maps.inner.block(l, 2), maps.outer.block(l, 2)
        hidden = block.preactivations
        before, after = (target.activate(hidden + k) for k in (0, inner.change(n, after_n)))
        turned = turn(target, moved, radius)
        active = _STEEPEST[target.activation] * lowrank.norm(inner.reached)[..., None] * turned
        if target.gated:
            up = maps.up.block(l, 2)
            factor = (
                target.W_3[..., l, :, :] @ target.reads(u, "2", l) + target.b_3[..., l, :, None]
            )
            after_factor = factor + up.change(n, after_n)
            by_factor = lowrank.norm(up.reached)[..., None] * turned
            active = active * (after_factor.abs().amax(-2) + by_factor)
            active = active + by_factor * after.abs().amax(-2)
            before, after = before * factor, after * after_factor
        added = lowrank.norm(outer.reached)[..., None] * active
        fed = outer.change(before, after)
        known, radius = (known + fed, radius + added) if target.residual else (fed, added)
        off, z = Off(known, radius).length, block.outputs
    if not target.final_norm:
        return Off(known, radius)
    moved = z + (V @ known if written else known)
    gains = target.g_f
    known = gains[..., None] * (target.normalize(moved) - target.normalize(z))
    return Off(known, gains.abs().amax(-1)[..., None] * turn(target, moved, radius))


class Scores(NamedTuple):
    """Scores of the target's tokens, and what errors of tokens make of them."""

    target: Float[Tensor, "*batch heads n n"]
    #: With the adapted network's products.
    reached: Float[Tensor, "*batch heads n n"]
    #: Differences of these columns multiply errors of queries.
    pulled: Float[Tensor, "*batch heads size n"]
    #: For each query, the most by which errors of keys are multiplied; and products of both.
    asked: Float[Tensor, "*batch heads n"]
    both: Float[Tensor, "*batch heads"]


def multiply(maps: Maps, keys: Tensor, queries: Tensor, constant: Tensor | float = 0) -> Scores:
    """``keysᵀ (M queries + constant)``."""
    keys, queries = keys.unsqueeze(-3), queries.unsqueeze(-3)
    asked = maps.target @ queries + constant
    reached, M = asked - maps.lacking @ queries, maps.reached
    products = keys.mT @ asked, keys.mT @ reached
    return Scores(*products, M.mT @ keys, _norm(reached), lowrank.norm(M))


def _meet(target: Transformer, l: int, Q: Maps, K: Maps, n: Tensor, asked: Tensor) -> Scores:
    """Scores of queries and keys with segments of their own, turned if positions are rotary."""
    told: Tensor | float = 0
    if target.rotary is not None:
        told = target.b_K[..., l, :, :, None]
        if target.norm is not None:
            told = told + target.W_K[..., l, :, :, :] @ target.s_1[..., l, None, :, None]
    n = n.unsqueeze(-3)

    def sides(Q: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = Q @ n + asked, K @ n + told
        if target.rotary is not None:
            queries, keys = target.turn(queries), target.turn(keys)
        return target.each_head(keys), queries

    keys, queries = sides(Q.target, K.target)
    scores = keys.mT @ queries
    keys, queries = sides(Q.reached, K.reached)
    of_query, of_key = lowrank.norm(Q.reached), target.each_head(lowrank.norm(K.reached), -1)
    pulled = of_query[..., None, None] * keys
    by_key = of_key[..., None] * _norm(queries)
    return Scores(scores, keys.mT @ queries, pulled, by_key, of_key * of_query)


def _chain(target: Transformer, first: Maps, second: Maps) -> Maps:
    """Products of values of groups of heads and what each head makes of them."""
    exact = second.target @ target.each_head(first.target)
    return Maps(exact, exact - second.reached @ target.each_head(first.reached))


def attend(
    target: Transformer,
    scores: Scores,
    values: Maps,
    read: Float[Tensor, "*batch size n"],
    off: Float[Tensor, "*batch n"],
) -> Off:
    """How far all heads together are off, where what they read is off by ``off``."""
    read = read.unsqueeze(-3)
    patterns = target.patterns(scores.reached)
    before, after = read @ target.patterns(scores.target), read @ patterns
    unseen = target.patterns(torch.zeros_like(patterns)) == 0

    by_key, by_query = off[..., None, :, None], off[..., None, None, :]
    moved = by_key * (scores.asked[..., None, :] + scores.both[..., None, None] * by_query)
    moved = moved + by_query * _distances(scores.pulled, scores.pulled @ patterns)
    low, high = intervals(scores.reached.masked_fill(unseen, -torch.inf), moved)

    M = values.reached
    apart = _distances(M @ read, M @ after).masked_fill(unseen, 0)
    swing = torch.maximum(high - patterns, patterns - low)
    swung = torch.minimum((swing * apart).sum(-2), apart.amax(-2)).sum(-2)
    largest = by_key.expand_as(high).masked_fill(unseen, 0).amax(-2)
    carried = torch.minimum((high * by_key).sum(-2), largest)
    together = lowrank.norm(M.movedim(-3, -2).flatten(-2))
    return Off(values.change(before, after).sum(-3), swung + together[..., None] * _norm(carried))


def intervals(scores: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest softmax of each score where scores move by at most ``moved``."""

    def of_others(s: Tensor) -> Tensor:
        """Logarithms of the sums of ``exp`` of all other scores."""
        top = s.argmax(-2, keepdim=True)
        rest = s.scatter(-2, top, -torch.inf).logsumexp(-2, keepdim=True)
        total = torch.logaddexp(rest, s.amax(-2, keepdim=True))
        return (total + torch.log1p(-(s - total).exp())).scatter(-2, top, rest)

    low, high = scores - moved, scores + moved
    return torch.sigmoid(low - of_others(high)), torch.sigmoid(high - of_others(low))


def _normalize(target: Transformer, z: Tensor) -> Tensor:
    """Coordinates of normalized tokens; without a norm the tokens."""
    return z if target.norm is None else target.basis().mT @ target.normalize(z)


def turn(target: Transformer, z: Tensor, off: Tensor) -> Tensor:
    """How far a norm's outputs can be from those of ``z`` for tokens up to ``off`` away."""
    if target.norm is None:
        return off
    if target.norm == "layer":
        z = z - z.mean(-2, keepdim=True)
    size = (z.square().sum(-2) + target.width * target.eps).sqrt()
    # Nothing turns a token that is not off, whatever its size.
    sine = torch.where(off > 0, off / size, 0)
    cosine = (1 - sine.square()).clamp(min=0).sqrt()
    chord = torch.where(sine < 1, sine * (2 / (1 + cosine)).sqrt(), 2)
    return chord * target.width**0.5


def _distances(columns: Tensor, others: Tensor) -> Tensor:
    """Between columns of two matrices."""
    return torch.cdist(columns.mT, others.mT, compute_mode="donot_use_mm_for_euclid_dist")


def _norm(columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm(columns, dim=-2)
