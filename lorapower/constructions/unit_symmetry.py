"""The same function with its hidden units in another order and of other sizes [thm-needed]."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import randomness
from ..bounds.transformer import savable_ranks
from ..networks.attention import SHAPES, Settings
from ..networks.decoder import Decoder
from ..networks.gap import Gap
from ..networks.segmentation import ADAPTED, Segments, segments

# Of so many directions the one with the mildest factors is taken.
_TRIALS = 16

# Of each kind of weight the units, as rows.
_Units = dict[str, Float[Tensor, "units _"]]
_Match = tuple[Int[Tensor, " units"], Float[Tensor, " units"], Float[Tensor, " units"]]


def save_ranks(
    frozen: Decoder, target: Decoder, gaps: Segments[Gap], ranks: Mapping[str, int]
) -> tuple[Decoder, Segments[Gap]]:
    """Align the target's units where ranks by kind of weight lack one that this saves.

    Return the target, which is the same function, and its gaps. Source: [thm-needed].
    """
    lacking = _lacking(gaps, ranks, frozen.settings)
    if not lacking:
        return target, gaps
    aligned = _align(target, gaps, lacking)
    return aligned, segments(frozen, aligned)


def _feed_forward(gaps: Segments[Gap]) -> dict[str, Gap]:
    """Name the gaps of feed-forward layers by their weights."""
    return {ADAPTED[name][0]: gaps[name] for name in ("inner", "up", "outer") if name in gaps}


def _lacking(gaps: Segments[Gap], ranks: Mapping[str, int], settings: Settings) -> set[str]:
    """Name the feed-forward weights whose ranks lack one, where scales of units can save these."""
    savable, most = savable_ranks(settings)
    lacking = set()
    for kind, gap in _feed_forward(gaps).items():
        inputs, *_, outputs = gap.frozen.widths
        units, full = (inputs, outputs) if kind == "W_2" else (outputs, inputs)
        if ranks[kind] < full - 1 or units < full:
            return set()
        if ranks[kind] < full:
            lacking.add(kind)
    return lacking if lacking <= set(savable) and len(lacking) <= most else set()


def _align(target: Decoder, gaps: Segments[Gap], saved: Collection[str]) -> Decoder:
    """Order and scale the target's units, which saves one rank on each of these weights.

    Factors ``c_k`` with ``c_k (W̄ x)_k = (W x)_k`` for some ``x`` make the difference of a weight
    vanish on ``x``. Factors of ReLUs are positive, so units are ordered such that signs agree. A
    block stays as it is where none of these differences has full rank, and without such ``x``, as
    may be where units are parallel.
    """
    sides: dict[str, tuple[Tensor, Tensor]] = {}
    unrelated = torch.zeros(gaps["inner"].batch_shape, dtype=torch.bool)
    for kind, gap in _feed_forward(gaps).items():
        pair = gap.frozen.product(), gap.target.product()
        sides[kind] = (pair[0].mT, pair[1].mT) if kind == "W_2" else pair
        if kind in saved:
            unrelated = unrelated | (gap.rank == sides[kind][0].shape[-1]).cpu()
    batch = gaps["inner"].batch_shape[:-1]
    dims = len(target.batch_shape)
    parts = {k: p.expand(*batch, *p.shape[dims:]).clone() for k, p in target.parameters.items()}
    of_units = [kind for kind in target.parameters if SHAPES[kind][:2] == ("blocks", "hidden")]
    generator = randomness.generator(0, "alignment")
    for place in map(tuple, unrelated.nonzero().tolist()):
        frozen, wanted = ({kind: pair[i][place] for kind, pair in sides.items()} for i in (0, 1))
        tries = [_match(frozen, wanted, saved, target.settings, generator) for _ in range(_TRIALS)]
        matches = [match for match in tries if match is not None]
        if not matches:
            continue
        order, first, second = min(matches, key=_spread)
        for kind in of_units:
            parts[kind][place] = parts[kind][place][order]
        parts["W_2"][place] = parts["W_2"][place][:, order] / (first * second)
        for kind in of_units:
            factor = second if kind.endswith("3") else first
            parts[kind][place] *= factor if kind.startswith("b") else factor[:, None]
    return Decoder(parts, target.settings)


def _spread(match: _Match) -> float:
    """Measure by how much factors scale units, where digits are lost."""
    return float(torch.stack([*match[1:], match[1] * match[2]]).abs().log().abs().max())


def _match(
    frozen: _Units,
    target: _Units,
    saved: Collection[str],
    settings: Settings,
    generator: torch.Generator,
) -> _Match | None:
    """Find an order, and factors ``λ`` and ``μ``, for a random direction of each weight."""
    is_relu, is_gated = settings.activation == "relu", settings.gated
    x = {
        kind: randomness.normal(generator, rows.shape[1]).to(rows) for kind, rows in frozen.items()
    }
    order = torch.arange(len(frozen["W_1"]), device=frozen["W_1"].device)
    of_both = is_gated and {"W_3", "W_2"} <= {*saved}
    if is_relu and ("W_1" in saved or of_both or not is_gated):
        kind = "W_1" if "W_1" in saved else "W_2"
        a, b = frozen[kind], target[kind]
        if kind == "W_2" and is_gated:
            # Factors of W_3 have either sign, which those of W_2 have to share.
            a, b = ((w["W_3"] @ x["W_3"]).sign()[:, None] * w[kind] for w in (frozen, target))
        balanced = _balance(a, b, generator)
        if balanced is None:
            return None
        x[kind] = balanced
        # Sorted, positive meets positive, and large meets large.
        order[(a @ balanced).argsort()] = (b @ balanced).argsort()

    def ratio(kind: str) -> Tensor:
        return (frozen[kind] @ x[kind]) / (target[kind] @ x[kind])[order]

    first = second = torch.ones_like(frozen["W_1"][:, 0])
    if is_relu and "W_1" in saved:
        first = ratio("W_1")
    if "W_3" in saved:
        second = ratio("W_3")
    if "W_2" in saved and is_gated and not of_both:
        second = 1 / (ratio("W_2") * first)
    elif "W_2" in saved:
        first = 1 / (ratio("W_2") * second)
    usable = first.isfinite() & second.isfinite() & (second != 0)
    # Between a row and its negative there may be an arc of rounding, in which signs do not agree.
    usable &= first > 0 if is_relu else first != 0
    return (order, first, second) if usable.all() else None


def _balance(
    a: Float[Tensor, "units n"], b: Float[Tensor, "units n"], generator: torch.Generator
) -> Float[Tensor, " n"] | None:
    """Look for a direction with equally many positive products with the rows of both.

    From ``x`` to ``−x`` the difference of the two numbers goes from some ``q`` to ``−q``, by one at
    a time: each row changes sign at one angle. Of the arcs without difference, take the widest.
    """
    u, v = (randomness.normal(generator, a.shape[1]).to(a) for _ in range(2))
    rows = torch.cat([a, b])
    side = torch.cat([a.new_ones(len(a)), -b.new_ones(len(b))])
    along, across = rows @ u, rows @ v
    angle = torch.atan2(-along, across) % torch.pi
    turned = angle.argsort()
    steps = -2 * side * along.sign()
    counts = torch.cat([(side * along.sign()).sum()[None], steps[turned]]).cumsum(0)
    ends = torch.cat([angle.new_zeros(1), angle[turned], angle.new_full((1,), torch.pi)])
    widths = torch.where(counts == 0, ends.diff(), 0)
    if not widths.max() > 0:
        return None
    place = widths.argmax()
    middle = (ends[place] + ends[place + 1]) / 2
    return middle.cos() * u + middle.sin() * v
