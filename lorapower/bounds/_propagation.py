"""What adapted segments lack, followed through a transformer [prop-transformer-error]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import lowrank
from ..networks._segments import Segments, missing_shift
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
        """Pick those of one block; ``dims`` counts the last dimensions, from blocks on."""
        return Maps(*(part.select(-dims - 1, l) for part in self))

    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """Compute ``M̂ after − M before``."""
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
    """Bound how far outputs of a plain transformer are off."""
    shift, steepest = missing_shift(target), _STEEPEST[target.settings.activation]
    before, off = x, torch.zeros_like(x[..., 0, :])
    for l, block in enumerate(target.trace(x)):
        shifted = before + shift[..., l - 1, :, None] if l else before
        scores, values = maps.query_key.block(l, 3), maps.value_output.block(l, 3)
        moved = attend(target, multiply(scores, before, shifted), values, before, off)
        hidden = block.preactivations
        before, after = target.activate(hidden), target.activate(hidden + moved.known)
        active = Off(after - before, steepest * moved.radius)
        off = active.length
    end = maps.output
    radius = lowrank.norm(end.reached)[..., None] * active.radius
    return Off(end.change(before, after), radius)


def follow_stream(target: Transformer, maps: Segments[Maps], z: Tensor) -> Off:
    """Bound how far outputs of a transformer that is not plain are off."""
    if "value_output" not in maps:
        maps = Segments({**maps, "value_output": _chain(target, maps.value, maps.sent)})
    stream, off = _Stream(target, maps), Off(torch.zeros_like(z), torch.zeros_like(z[..., 0, :]))
    for l, block in enumerate(target.trace(z)):
        u = target.attend(l, z, block.patterns)
        moved = stream.through_attention(l, z, off.length)
        off = stream.through_layer(l, u, block.preactivations, moved)
        z = block.outputs
    return stream.through_final_norm(z, off)


@dataclass(frozen=True)
class _Stream:
    """What errors of tokens become in the parts of a block, with the adapted network's maps."""

    target: Transformer
    maps: Segments[Maps]

    def through_attention(self, l: int, z: Tensor, off: Tensor) -> Off:
        """Bound how far ``U`` is off where the tokens ``z`` are off by these lengths."""
        target = self.target
        n, read = _normalize(target, z), turn(target, z, off)
        moved = attend(target, self._scores(l, n), self.maps.value_output.block(l, 3), n, read)
        if not target.settings.residual:
            return moved
        return Off(moved.known, moved.radius + off)

    def through_layer(self, l: int, u: Tensor, hidden: Tensor, off: Off) -> Off:
        """Bound how far the tokens after the feed-forward layer are off."""
        target, inner, outer = self.target, self.maps.inner.block(l, 2), self.maps.outer.block(l, 2)
        moved = self._moved(u, off)
        n, after_n = _normalize(target, u), _normalize(target, moved)
        read = turn(target, moved, off.radius)
        before, after = (target.activate(hidden + k) for k in (0, inner.change(n, after_n)))
        steepest = _STEEPEST[target.settings.activation]
        radius = steepest * lowrank.norm(inner.reached)[..., None] * read
        if target.settings.gated:
            up, factor = self.maps.up.block(l, 2), target.up(l, u)
            after_factor = factor + up.change(n, after_n)
            of_factor = lowrank.norm(up.reached)[..., None] * read
            radius = radius * (after_factor.abs().amax(-2) + of_factor)
            radius = radius + of_factor * after.abs().amax(-2)
            before, after = before * factor, after * after_factor
        added = Off(outer.change(before, after), lowrank.norm(outer.reached)[..., None] * radius)
        if not target.settings.residual:
            return added
        return Off(off.known + added.known, off.radius + added.radius)

    def through_final_norm(self, z: Tensor, off: Off) -> Off:
        """Bound how far outputs are off."""
        target = self.target
        if not target.settings.final_norm:
            return off
        moved, gains = self._moved(z, off), target.g_f
        known = gains[..., None] * (target.normalize(moved) - target.normalize(z))
        return Off(known, gains.abs().amax(-1)[..., None] * turn(target, moved, off.radius))

    def _moved(self, z: Tensor, off: Off) -> Tensor:
        """Add what is known of their error to tokens."""
        # Under a final LayerNorm segments write in the coordinates of what it reads.
        if off.known.shape[-2] < self.target.width:
            return z + self.target.basis() @ off.known
        return z + off.known

    def _scores(self, l: int, n: Tensor) -> Scores:
        target, V = self.target, self.target.basis()
        queries = target.b_Q[..., l, :, :, None]
        if target.settings.norm is not None:
            queries = queries + target.W_Q[..., l, :, :, :] @ target.s_1[..., l, None, :, None]
            V = target.g_1[..., l, None, :, None] * V
        if "query_key" in self.maps:
            constant = (target.W_K[..., l, :, :, :] @ V).mT @ queries
            return multiply(self.maps.query_key.block(l, 3), n, n, constant)
        query, key = self.maps.query.block(l, 3), self.maps.key.block(l, 3)
        return _multiply_apart(target, l, query, key, n, queries)


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
    """Compute ``keysᵀ (M queries + constant)``."""
    keys, queries = keys.unsqueeze(-3), queries.unsqueeze(-3)
    asked = maps.target @ queries + constant
    reached, M = asked - maps.lacking @ queries, maps.reached
    products = keys.mT @ asked, keys.mT @ reached
    return Scores(*products, M.mT @ keys, _norm(reached), lowrank.norm(M))


def _multiply_apart(
    target: Transformer, l: int, Q: Maps, K: Maps, n: Tensor, query_bias: Tensor
) -> Scores:
    """Compute scores of queries and keys with segments of their own, which may be rotated."""
    rotary, key_bias = (
        target.settings.rotary is not None,
        torch.zeros_like(query_bias[..., :1, :, :]),
    )
    if rotary:
        key_bias = target.b_K[..., l, :, :, None]
        if target.settings.norm is not None:
            key_bias = key_bias + target.W_K[..., l, :, :, :] @ target.s_1[..., l, None, :, None]
    n = n.unsqueeze(-3)

    def sides(Q: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = Q @ n + query_bias, K @ n + key_bias
        if rotary:
            queries, keys = target.rotate(queries), target.rotate(keys)
        return target.each_head(keys), queries

    keys, queries = sides(Q.target, K.target)
    scores = keys.mT @ queries
    keys, queries = sides(Q.reached, K.reached)
    of_query, of_key = lowrank.norm(Q.reached), target.each_head(lowrank.norm(K.reached), -1)
    by_key = of_key[..., None] * _norm(queries)
    return Scores(
        scores, keys.mT @ queries, of_query[..., None, None] * keys, by_key, of_key * of_query
    )


def _chain(target: Transformer, first: Maps, second: Maps) -> Maps:
    """Multiply values of groups of heads and what each head makes of them."""
    exact = second.target @ target.each_head(first.target)
    return Maps(exact, exact - second.reached @ target.each_head(first.reached))


def attend(
    target: Transformer,
    scores: Scores,
    values: Maps,
    read: Float[Tensor, "*batch size n"],
    off: Float[Tensor, "*batch n"],
) -> Off:
    """Bound how far all heads together are off, where what they read is off by ``off``."""
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
    """Bound the softmax of each score from both sides where scores move by at most ``moved``."""

    def of_others(s: Tensor) -> Tensor:
        """Compute logarithms of the sums of ``exp`` of all other scores."""
        top = s.argmax(-2, keepdim=True)
        rest = s.scatter(-2, top, -torch.inf).logsumexp(-2, keepdim=True)
        total = torch.logaddexp(rest, s.amax(-2, keepdim=True))
        return (total + torch.log1p(-(s - total).exp())).scatter(-2, top, rest)

    low, high = scores - moved, scores + moved
    return torch.sigmoid(low - of_others(high)), torch.sigmoid(high - of_others(low))


def _normalize(target: Transformer, z: Tensor) -> Tensor:
    """Compute coordinates of normalized tokens; without a norm the tokens."""
    return z if target.settings.norm is None else target.basis().mT @ target.normalize(z)


def turn(target: Transformer, z: Tensor, off: Tensor) -> Tensor:
    """Bound how far a norm's outputs are from those of ``z`` for tokens up to ``off`` away."""
    if target.settings.norm is None:
        return off
    if target.settings.norm == "layer":
        z = z - z.mean(-2, keepdim=True)
    size = (z.square().sum(-2) + target.width * target.settings.eps).sqrt()
    # Nothing turns a token that is not off, whatever its size.
    sine = torch.where(off > 0, off / size, 0)
    cosine = (1 - sine.square()).clamp(min=0).sqrt()
    chord = torch.where(sine < 1, sine * (2 / (1 + cosine)).sqrt(), 2)
    return chord * target.width**0.5


def _distances(columns: Tensor, others: Tensor) -> Tensor:
    """Compute distances between columns of two matrices."""
    return torch.cdist(columns.mT, others.mT, compute_mode="donot_use_mm_for_euclid_dist")


def _norm(columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm(columns, dim=-2)
