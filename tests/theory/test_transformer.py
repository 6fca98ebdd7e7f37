"""Transformers, their segments and adaptations, against numpy and against the theorem."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import batch_shapes, dtypes, normal, seeds

from lorapower import InputError, SingularError, bounds, randomness
from lorapower.bounds.narrow_heads import narrow_head_ranks
from lorapower.constructions import adapt_transformer
from lorapower.constructions.narrow_heads import adapt_narrow_heads
from lorapower.networks import Gap, Transformer, segments

ADAPTED = Transformer.random(1, 1, 1).adapted_kinds
FULL = dict.fromkeys(ADAPTED, 4)


def tokens(network: Transformer, length: int = 7, *, seed: int = 0) -> Any:
    return normal(5, *network.batch_shape, network.width, length, seed=seed).to(network.dtype)


def mean_square(values: torch.Tensor) -> torch.Tensor:
    """Over sequences, coordinates and tokens, one for each network."""
    return values.double().square().mean((0, -2, -1))


def relative_error(adapted: Transformer, target: Transformer, x: torch.Tensor) -> torch.Tensor:
    return mean_square(adapted(x) - target(x)) / mean_square(target(x))


@given(st.integers(1, 3), st.integers(1, 3), batch_shapes, seeds)
def test_weights_one_by_one_are_the_network(
    depth: int, heads: int, batch: tuple[int, ...], seed: int
) -> None:
    network = Transformer.random(depth, 3, heads, head_size=2, batch_shape=batch, seed=seed)
    assert len(network.weights) == len(network.weight_names) == depth * (4 * heads + 2) + 1
    names = dict(zip(network.weight_names, network.weights, strict=True))
    last = names[f"W_K of block {depth}, head {heads}"]
    assert torch.equal(last, network.W_K[..., -1, -1, :, :])
    assert torch.equal(names[f"W_2 of block {depth}"], network.W_2[..., -1, :, :])


sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 6))


@given(sizes, batch_shapes, st.booleans(), dtypes, st.booleans(), seeds)
@example((2, 1, 2, 1), (2, 2), False, torch.float32, False, 339)  # small adapted weights
def test_exact_at_the_threshold_segment_by_segment(
    sizes: tuple[int, ...], batch: Any, alike: bool, dtype: Any, saturated: bool, seed: int
) -> None:
    (depth, width, heads, length), other = sizes, batch if alike else ()
    scale = 1.0 if saturated else width**-0.5
    frozen, target = (
        Transformer.random(depth, width, heads, scale=scale, batch_shape=shape, seed=s, dtype=dtype)
        for shape, s in ((batch, seed), (other, seed + 1))
    )
    rank = int(bounds.transformer_ranks(frozen, target).largest().max())
    assert rank == -(-width // 2)
    solution = adapt_transformer(frozen, target, rank, throw=False)
    adapted = solution.adapters.merge(frozen)
    assert adapted.batch_shape == batch
    assert torch.equal(adapted.W_1, frozen.W_1)
    assert torch.equal(adapted.W_2[..., :-1, :, :], frozen.W_2[..., :-1, :, :])
    x = tokens(adapted, length, seed=seed)
    ours, theirs = adapted.trace(x), target.trace(x)
    assert solution.condition_number.shape == batch
    allowed = (100 * torch.finfo(dtype).eps * solution.condition_number.double()) ** 2
    z = x
    for l, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
        # Heads may cancel, in very small networks above all.
        V, O, W_1 = (w[..., l, :, :, :] for w in (target.W_V, target.W_O, target.W_1.unsqueeze(-3)))
        sent = torch.sum(O.abs() @ V.abs() @ z.abs().unsqueeze(-3) @ wanted.patterns, -3)
        terms = W_1.abs().squeeze(-3) @ sent + target.b_1[..., l, :, None].abs()
        off = mean_square(mine.preactivations - wanted.preactivations)
        assert (off <= allowed * mean_square(terms)).all()
        z = wanted.outputs
        off = mean_square((mine.patterns - wanted.patterns).flatten(-3, -2))
        assert (off <= allowed).all()
    # So may the outputs' terms, and activations are off by what their own terms allow.
    terms = target.W_2[..., -1, :, :].abs() @ terms + target.b_2[..., -1, :, None].abs()
    allowed = (allowed * mean_square(target.W_out.abs() @ terms)).sqrt()
    # Merging rounds an adapted weight by what the frozen weight allows, which may be far larger.
    W_2, b_2 = (w[..., -1, :, :].abs() for w in (adapted.W_2, adapted.b_2.unsqueeze(-1)))
    merging = adapted.W_out.abs() @ frozen.W_2[..., -1, :, :].abs() + frozen.W_out.abs() @ W_2
    merging = merging @ ours[-1].preactivations.abs() + frozen.W_out.abs() @ b_2
    allowed += 2 * torch.finfo(dtype).eps * mean_square(merging).sqrt()
    assert (mean_square(adapted(x) - target(x)) <= allowed**2).all()


def test_a_segment_that_is_reached_needs_nothing() -> None:
    frozen, target = (Transformer.random(1, 5, 2, scale=0.4, seed=s) for s in (1, 2))
    target = target.replace(W_Q=frozen.W_Q, W_K=frozen.W_K)
    ranks = bounds.transformer_ranks(frozen, target)
    assert ranks["query_key"].tolist() == [[0, 0]]
    assert ranks["value_output"].tolist() == [[3, 3]]
    assert ranks["output"] == 3
    each = dict.fromkeys(ADAPTED, 3) | {"W_Q": 0, "W_K": 0}
    solution = adapt_transformer(frozen, target, each)
    assert relative_error(solution.adapters.merge(frozen), target, tokens(frozen)) < 1e-20


def of_rank(k: int, rows: bool, columns: bool, *, width: int = 5, size: int = 3) -> Gap:
    """A segment of a narrow head, whose target has rank ``k``, and may share rows and columns."""
    draw = randomness.generator(0, "narrow", k, rows, columns)
    G, H = randomness.normal(draw, 2, width, width)
    (Y, C), (X, A) = (randomness.normal(draw, 2, *s) for s in ((size, width), (width, size)))
    C[:1] = randomness.normal(draw, 1, size) @ Y if rows else C[:1]
    A[:, :1] = X @ randomness.normal(draw, size, 1) if columns else A[:, :1]
    A[:, k:], C[k:] = 0, 0
    return Gap([G, Y, X, H], [G, C, A, H])


def assert_needs(gap: Gap, ranks: list[int], size: int, least: float) -> None:
    """The ranks on the inner side, on the outer side and together; below them errors are larger."""
    for inner, outer in product(range(size + 1), repeat=2):
        enough = inner >= ranks[0] and outer >= ranks[1] and inner + outer >= ranks[2]
        missed = float(adapt_narrow_heads(gap, inner, outer).rounding_error)
        assert (missed < 1e-10) if enough else (missed > least)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(False, False), (True, False), (True, True)])
def test_a_narrow_target_of_any_rank_needs_what_is_said(k: int, rows: bool, columns: bool) -> None:
    gap = of_rank(k, rows, columns)
    assert_needs(gap, [int(rank) for rank in narrow_head_ranks(gap)[:3]], 3, 1e-4)


def test_frozen_halves_of_lower_rank_need_what_is_said() -> None:
    draw, eye = randomness.generator(0, "lower"), torch.eye(5).double()
    (x, a, y, b), Y = randomness.normal(draw, 4, 5), randomness.normal(draw, 2, 5)
    Y[0], zero = y, torch.zeros(5, 2).double()
    X, A = torch.stack([x, 0 * x], 1), torch.stack([2 * x, a], 1)
    # The frozen X reads one of two units, and Y fills the other with what the target does not use.
    hidden = Gap([eye, Y, X, eye], [eye, torch.stack([y, b]), A, eye])
    silent = Gap([eye, Y, zero, eye], [eye, torch.stack([y, b]), A, eye])
    empty = Gap([eye, zero.mT, zero, eye], [eye, torch.stack([y, b]), A, eye])
    for gap, ranks in ((hidden, [1, 1, 3]), (silent, [1, 2, 3]), (empty, [2, 2, 2])):
        assert torch.stack(narrow_head_ranks(gap)[:3]).tolist() == ranks
        assert_needs(gap, ranks, 2, 1e-7)


@pytest.mark.parametrize(("width", "size"), [(12, 4), (40, 6), (40, 20)])
def test_rows_that_take_the_place_of_hidden_ones_are_as_large(width: int, size: int) -> None:
    """The frozen X hides half of the units; else the system for X would lose all digits."""
    (Y, C), (X, A) = normal(2, size, width), normal(2, width, size)
    X = X * (torch.arange(size) < size // 2)
    eye = torch.eye(width).double()
    gap = Gap([eye, Y, X, eye], [eye, C, A, eye])
    found = adapt_narrow_heads(gap, size, size)
    assert found.rounding_error < 1e-12 * gap.rounding_scale
    assert found.condition_numbers.max() < 1e3


def test_narrow_heads_of_two_ranks_are_adapted_in_one_batch() -> None:
    gaps = [of_rank(k, False, False) for k in (3, 1)]
    sides = ([getattr(gap, side).weights for gap in gaps] for side in ("frozen", "target"))
    both = Gap(*([*map(torch.stack, zip(*side, strict=True))] for side in sides))
    assert narrow_head_ranks(both).inner.tolist() == [
        int(narrow_head_ranks(gap).inner) for gap in gaps
    ]
    assert (adapt_narrow_heads(both, 3, 3).rounding_error < 1e-10).all()


def test_heads_wider_than_the_tokens_are_like_square_ones() -> None:
    frozen, target = (Transformer.random(1, 4, 2, head_size=6, scale=0.4, seed=s) for s in (1, 2))
    solution = adapt_transformer(frozen, target, 2)
    assert relative_error(solution.adapters.merge(frozen), target, tokens(frozen)) < 1e-20


def test_segments_are_of_square_layers_and_ranks_of_kinds() -> None:
    wide, small = Transformer.random(2, 4, 1, hidden=8), Transformer.random(1, 4, 1)
    several: Any = [1, 2]
    assert wide(tokens(wide)).shape == (5, 4, 7)
    with pytest.raises(InputError, match="W_1 must be square"):
        segments(wide, wide)
    with pytest.raises(InputError, match="one integer, or one for each of W_Q, W_K"):
        adapt_transformer(small, small, several)


@pytest.mark.parametrize(("kind", "owner"), [("W_1", ""), ("W_2", ""), ("W_2", "target's ")])
def test_singular_layers_are_named(kind: str, owner: str) -> None:
    networks = {"": Transformer.random(2, 4, 1, seed=1), "target's ": Transformer.random(2, 4, 1)}
    broken = getattr(networks[owner], kind).clone()
    broken[0, 1] = broken[0, 0]
    networks[owner] = networks[owner].replace(**{kind: broken})
    with pytest.raises(
        InputError, match=f"^{owner}{kind} of block 1 must be non-singular; got one"
    ):
        adapt_transformer(networks[""], networks["target's "], 2)


def test_a_segment_that_cannot_be_reached_is_named() -> None:
    frozen, target = (Transformer.random(2, 4, 2, seed=s) for s in (1, 2))
    zero = torch.zeros_like(frozen.W_Q)
    frozen = frozen.replace(W_Q=zero, W_K=zero)
    with pytest.raises(SingularError, match=r"query–key segment of block \d, head \d"):
        adapt_transformer(frozen, target, 2)
    frozen = Transformer.random(1, 4, 1, batch_shape=(2,))
    frozen = frozen.replace(W_out=torch.zeros(4, 4, dtype=torch.float64))
    ranks = FULL | {"W_2": 4, "W_out": 0}
    with pytest.raises(SingularError, match=r"output segment of batch member 0 \(one of 2 "):
        adapt_transformer(frozen, Transformer.random(1, 4, 1, seed=2), ranks)
