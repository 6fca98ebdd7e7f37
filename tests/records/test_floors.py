"""The floor of adapters on all modules: what it counts, and what attains it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from strategies import PRENORM, normal, residual_pair
from torch import Tensor

from lorapower import bounds, lowrank, randomness
from lorapower.networks import Transformer
from records.floors import WholeFloor


def bare(network: Transformer) -> Transformer:
    """Take away hidden biases and second shifts."""
    kinds = {"b_1", "b_3", "s_2"} & {*network.kinds}
    return network.replace(**{kind: 0 * getattr(network, kind) for kind in kinds})


def bare_pair(seed: int, *sizes: int, **options: Any) -> tuple[Transformer, Transformer]:
    frozen, target = (bare(network) for network in residual_pair(seed, *sizes, **options))
    return frozen, target


def of_values(network: Transformer, k: Tensor) -> Tensor:
    """What attention adds behind many equal far tokens ``k``."""
    added = torch.zeros_like(k)
    for l in range(network.depth):
        for h in range(network.heads):
            group = h * network.groups // network.heads
            read = network.g_1[l][:, None] * k + network.s_1[l][:, None]
            added = added + network.W_O[l, h] @ network.W_V[l, group] @ read
    return added


WHOLE: list[dict[str, Any]] = [
    {"activation": "gelu", "causal": True},
    {"norm": "rms", "activation": "gelu_tanh", "groups": 1, "rotary": 10.0},
    {"gated": True, "activation": "silu", "groups": 1},
    {"norm": "rms", "gated": True},
]


@pytest.mark.parametrize("options", WHOLE)
def test_without_rank_the_floor_is_the_variance_of_what_it_counts(options: Any) -> None:
    options = PRENORM | options
    frozen, target = (
        bare(Transformer.random(L, 5, 2, head_size=4, seed=L, **options)) for L in (1, 2)
    )
    floor, v = WholeFloor(frozen, target).at(0), normal(5, 40_000)
    n = bounds.directions(frozen, target, v)
    values = of_values(target, n) - of_values(frozen, n)
    assert float(floor.values) == pytest.approx(float(values.var(-1).mean()), rel=0.03)
    # Single tokens far out: what attention adds is affine.
    x = 1e7 * torch.stack([n, -n]).permute(2, 0, 1)[..., None]
    added = (target(x) - frozen(x))[..., 0]
    odd, even = ((added[:, 0] + sign * added[:, 1]).mT / 2 for sign in (-1, 1))
    part = even if options.get("gated") else odd - values + values.mean(-1, keepdim=True)
    assert float(floor.feed_forward) == pytest.approx(float(part.var(-1).mean()), rel=0.03)
    assert float(floor.value) == pytest.approx(float(floor.values + floor.feed_forward))
    # Of given tokens the covariance counts: also of few that lie in a plane.
    for k in (v[:, :50], v[:, :2] @ normal(2, 30, seed=1)):
        found = WholeFloor(frozen, target).at(0, k)
        k = bounds.directions(frozen, target, k)
        values = of_values(target, k) - of_values(frozen, k)
        assert float(found.values) == pytest.approx(float(values.var(-1, correction=0).mean()))
        assert found.feed_forward == floor.feed_forward


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_values_of_limited_rank_attain_the_floor_on_long_far_sequences(norm: Any) -> None:
    frozen, target = residual_pair(4, 1, 5, 1, norm=norm)
    frozen, target = (n.replace(W_Q=0.1 * n.W_Q, b_Q=0.1 * n.b_Q) for n in (frozen, target))
    v = normal(5, 12, seed=4)
    k, V = bounds.directions(frozen, target, v), frozen.basis()
    read = k - k.mean(1, keepdim=True)
    gap = of_values(target, k) - of_values(frozen, k)
    gap = gap - gap.mean(1, keepdim=True)
    for r in range(frozen.dimension):
        U = lowrank.svd(gap).U[:, :r]
        # Feed-forward layers, gains and scores are the target's, W_V and W_O differ by rank r.
        change = U @ U.mT @ gap @ torch.linalg.pinv(frozen.g_1[0][:, None] * (V @ (V.mT @ read)))
        W_O = frozen.W_O + change @ torch.linalg.inv(frozen.W_V[0, 0])
        built = target.replace(W_V=frozen.W_V, W_O=W_O, g_1=frozen.g_1, s_1=frozen.s_1)
        b_O = built.b_O + (of_values(target, k) - of_values(built, k)).mean(1)
        built = built.replace(b_O=b_O)
        each = []
        for i in range(12):
            x = 1e7 * torch.cat([k[:, [i]].expand(5, 999), k[:, [i - 5]]], 1)
            each.append((built(x) - target(x))[:, -1].square().mean())
        floor = WholeFloor(frozen, target).at({"W_V": r}, v)
        assert floor.feed_forward == 0
        assert float(sum(each) / 12) == pytest.approx(float(floor.value), rel=0.01)
        assert WholeFloor(frozen, target).at({"W_O": r}, v).value == floor.value


def orthogonal(frozen: Transformer, sizes: list[float]) -> tuple[Tensor, Tensor]:
    """Rows that read orthogonal directions of norms, and orthogonal columns of these sizes."""
    V, count = frozen.basis(), len(sizes)
    rows = (V / frozen.g_2[0][:, None])[:, :count].mT
    return rows, torch.linalg.qr(normal(8, 8)).Q[:, :count] * torch.tensor(sizes)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_flipped_units_attain_the_floor_of_ungated_layers(norm: Any) -> None:
    """A unit with the opposite sign differs by a linear map."""
    frozen = bare(residual_pair(0, 1, 8, 1, norm=norm)[0])
    rows, columns = orthogonal(frozen, [4.0, 3.0, 2.0, 1.0])
    W_1, W_2 = frozen.W_1.clone(), frozen.W_2.clone()
    W_1[0, :4], W_2[0, :, :4] = rows, columns
    frozen, V = frozen.replace(W_1=W_1, W_2=W_2), frozen.basis()

    def flipped(count: int) -> Transformer:
        other = W_1.clone()
        other[0, :count] *= -1
        return frozen.replace(W_1=other)

    for r in range(5):
        floor = WholeFloor(frozen, flipped(4)).at({"W_1": r // 2, "W_2": r - r // 2})
        wanted = sum(s * s for s in [4, 3, 2, 1][r:]) / frozen.dimension
        assert float(floor.value) == pytest.approx(wanted, abs=1e-12)
        error, _ = bounds.far_error(flipped(r), flipped(4), torch.cat([V, -V], 1), 1e7)
        assert float(error) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("kind", ["W_2", "W_3"])
def test_products_of_units_attain_the_floor_of_gated_layers(norm: Any, kind: str) -> None:
    """Two units of opposite signs add up to a product of what they read."""
    frozen = bare(residual_pair(0, 1, 8, 1, norm=norm, gated=True, hidden=6)[0])
    rows, columns = orthogonal(frozen, [3.0, 2.0, 1.0] * 2)
    signs = torch.tensor([1.0, -1.0])[:, None, None]
    parts = {
        "W_1": (signs * rows[:3]).flatten(0, 1)[None],
        "W_3": (signs * rows[3:]).flatten(0, 1)[None],
        "W_2": torch.cat([columns[:, :3]] * 2, 1)[None],
    }

    def without(count: int) -> Transformer:
        less = parts[kind].clone()
        units = [j for j in range(6) if j % 3 < count]
        (less.mT if kind == "W_2" else less)[0, units] = 0
        return frozen.replace(**parts | {kind: less})

    target, others = without(0), (0, 1, 2) if kind == "W_2" else (0, 1)
    v = normal(8, 20_000)
    for r in others:
        floor = WholeFloor(without(3), target).at({kind: r})
        # Adapted with rank r, all but r of the products are still missing.
        adapted = target.replace(**{kind: without(3).parameters[kind]})
        more = parts[kind] - without(r).parameters[kind]
        adapted = adapted.replace(**{kind: getattr(adapted, kind) + more})
        assert lowrank.rank(more[0]) == r
        error, noise = bounds.far_error(adapted, target, v, 1e7)
        assert abs(error - floor.value) < 3 * noise < 0.1 * floor.value


@pytest.mark.parametrize("options", [*WHOLE, {"depth": 2, "heads": 2, "gated": True}])
def test_no_adapters_are_below_the_floor_of_all_modules(options: Any) -> None:
    sizes = {"depth": 1, "heads": 1} | options
    frozen, target = bare_pair(7, sizes.pop("depth"), 8, sizes.pop("heads"), **sizes)
    floor = WholeFloor(frozen, target).at(1)
    assert floor.values > 0.02
    draw = randomness.generator(7, "far pairs")
    k, n = bounds.directions(frozen, target, randomness.normal(draw, 8, 80)).chunk(2, 1)
    x = 1e6 * torch.cat([k.mT[..., None].expand(40, 8, 199), n.mT[..., None]], 2)
    for seed in range(6):
        draw, weights = randomness.generator(seed, "adapters"), []
        for W, wanted in zip(frozen.weights, target.weights, strict=True):
            best = lowrank.truncated_svd(wanted - W, 1)
            out = best.left + 0.1 * seed * randomness.normal(draw, *best.left.shape)
            weights.append(W + out @ best.right.mT)
        b_O = frozen.b_O + seed * randomness.normal(draw, *frozen.b_O.shape) / 9
        adapted = frozen.with_parameters(weights).replace(b_O=b_O)
        assert (adapted(x) - target(x))[..., -1].square().mean() > floor.value


@pytest.mark.parametrize("options", WHOLE)
def test_the_floor_of_all_modules_falls_to_zero_with_rank(options: Any) -> None:
    frozen, target = bare_pair(8, 1, 8, 1, **options)
    found = [WholeFloor(frozen, target).at(R) for R in range(10)]
    for more, less in itertools.pairwise(found):
        assert all(a >= b for a, b in zip(more, less, strict=True))
    assert found[1].feed_forward > 0 or options.get("gated")
    assert found[0].feed_forward > 0
    assert found[3].values > 0 == found[4].value == found[9].value
    assert WholeFloor(frozen, frozen).at(0).value == 0


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_layers_count_only_where_their_parity_is_known(gated: bool) -> None:
    frozen, target = bare_pair(9, 1, 6, 1, gated=gated)
    whole = WholeFloor(frozen, target).at(0)
    assert whole.feed_forward > 0
    for kind in {"b_1", "b_3", "s_2"} & {*frozen.kinds}:
        biased = target.replace(**{kind: getattr(target, kind) + 1})
        for one, two in ((frozen, biased), (biased, frozen)):
            floor = WholeFloor(one, two).at(0)
            assert floor.feed_forward == 0 < floor.values == floor.value
    other = bare(residual_pair(9, 1, 6, 1, gated=not gated)[0])
    assert WholeFloor(other, target).at(0).feed_forward == 0


def test_forms_of_wide_networks_are_unfolded_both_ways() -> None:
    frozen, target = bare_pair(3, 2, 70, 1, head_size=2, hidden=3, gated=True)
    V, forms = frozen.basis(), torch.zeros(70, 69, 69).double()
    for sign, network in ((-1, frozen), (1, target)):
        for l in range(2):
            gate, up = (W[l] * network.g_2[l] @ V for W in (network.W_1, network.W_3))
            forms += sign * torch.einsum("of,fi,fj->oij", network.W_2[l], gate, up) / 2
    forms = (forms + forms.mT) / 2
    forms -= torch.eye(69) * forms.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    outer, inner = (lowrank.spectrum(x.flatten(1)).square() for x in (forms, forms.movedim(1, 0)))
    for out, into in ((0, 0), (1, 0), (0, 1), (2, 1)):
        left = outer[out:].sum() - 2 * inner[:into].sum()
        floor = WholeFloor(frozen, target).at({"W_2": out, "W_3": into})
        assert left > 0
        assert float(floor.feed_forward) == pytest.approx(2 * 70 / (69 * 71) * float(left))
