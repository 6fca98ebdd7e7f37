"""Residual transformers: what they compute, how they are written otherwise, and their adapters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from decoder_modules import decoder
from hypothesis import given
from hypothesis import strategies as st
from strategies import PRENORM, normal, residual_pair, seeds
from torch import Tensor

from lorapower import InputError, bounds, lowrank, randomness
from lorapower.adapters import Adapters, Tuned
from lorapower.constructions import attention_only, transformer
from lorapower.networks import Transformer, from_decoder, to_decoder
from lorapower.networks.transformer import ACTIVATIONS, PARTS
from lorapower.training import descend
from records.models import DoublePrecision

activations = st.sampled_from(sorted(ACTIVATIONS))
norms = st.sampled_from(["layer", "rms"])
kinds = st.fixed_dictionaries({"activation": activations, "norm": norms, "causal": st.booleans()})
decoders = st.fixed_dictionaries(
    {
        "gated": st.booleans(),
        "groups": st.integers(1, 2),
        "rotary": st.none() | st.sampled_from([2.0, 10.0, 1e4]),
        "head_size": st.sampled_from([2, 4, 6, 8]),
    }
)


def relative(network: Transformer, target: Transformer, x: Tensor) -> float:
    wanted, found = target(x), network(network.fill(x))
    if not network.settings.final_norm:
        torch.testing.assert_close(found, network.fill(found[..., : target.width, :]))
    return float((found[..., : target.width, :] - wanted).square().mean() / wanted.var())


def by_hand(network: Transformer, z: Tensor) -> Tensor:
    """The definition, token by token."""
    p, settings = network.parameters, network.settings

    def norm(z: Tensor, place: str, l: Any) -> Tensor:
        if settings.norm is None:
            return z
        columns = []
        for token in z.mT:
            one = token - token.mean() if settings.norm == "layer" else token
            g, s = p[f"g_{place}"][l], p[f"s_{place}"][l]
            columns.append(g * one / (one.square().mean() + settings.eps).sqrt() + s)
        return torch.stack(columns, 1)

    for l in range(network.depth):
        n = norm(z, "1", l)
        u = z.clone() if settings.residual else torch.zeros_like(z)
        u += p["b_O"][l][:, None] if "b_O" in p else 0
        for h in range(network.heads):
            queries = p["W_Q"][l, h] @ n + (p["b_Q"][l, h][:, None] if "b_Q" in p else 0)
            group = h * len(p["W_K"][l]) // network.heads
            keys = p["W_K"][l, group] @ n + (p["b_K"][l, group][:, None] if "b_K" in p else 0)
            if settings.rotary is not None:
                queries, keys = (turned(part, settings.rotary) for part in (queries, keys))
            for j in range(z.shape[1]):
                seen = j + 1 if settings.causal else z.shape[1]
                pattern = (keys[:, :seen].mT @ queries[:, j]).softmax(0)
                u[:, j] += p["W_O"][l, h] @ p["W_V"][l, group] @ (n[:, :seen] @ pattern)
        reads = norm(u, "2", l)
        active = ACTIVATIONS[settings.activation](p["W_1"][l] @ reads + p["b_1"][l][:, None])
        if "W_3" in p:
            active = active * (p["W_3"][l] @ reads + p["b_3"][l][:, None])
        made = p["W_2"][l] @ active + p["b_2"][l][:, None]
        z = u + made if settings.residual else made
    if "W_out" in p:
        return p["W_out"] @ z
    return norm(z, "f", ...) if settings.final_norm else z


def turned(x: Tensor, base: float) -> Tensor:
    """Pairs of coordinates as complex numbers, turned by their positions."""
    half = len(x) // 2
    steps = base ** (-torch.arange(half).double() / half)
    angles = steps[:, None] * torch.arange(x.shape[1]).double()
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag])


@given(st.integers(1, 2), st.integers(1, 6), kinds, decoders, st.data(), seeds)
def test_it_computes_what_the_definition_says(
    depth: int, width: int, kind: Any, decodes: Any, data: st.DataObject, seed: int
) -> None:
    options = kind | {"residual": data.draw(st.booleans(), "residual"), "head_size": 3}
    if data.draw(st.booleans(), "without norms"):
        options["norm"] = None
    if options["norm"] is not None or options["residual"]:
        options |= decodes
    if options["norm"] is not None:
        options["final_norm"] = data.draw(st.booleans(), "final norm")
    network = Transformer.random(depth, width, 2, hidden=width + 2, seed=seed, **options)
    x = normal(width, 4, seed=seed)
    expected, trace = by_hand(network, x.clone()), network.trace(x)
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(network.output(trace[-1].outputs), expected)
    for block in trace:
        torch.testing.assert_close(block.patterns.sum(-2), torch.ones(2, 4).double())


def test_a_constant_token_has_no_direction() -> None:
    network = Transformer.random(1, 4, 1, eps=0.0, **PRENORM)
    x = torch.ones(4, 1).double()
    assert not network.normalize(x).any()
    assert network(x).isfinite().all()


FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2Model": {},
    "GPT2LMHeadModel": {"activation_function": "relu"},
    "LlamaModel": {},
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "MistralModel": {"head_dim": 6},
    "MistralForSequenceClassification": {"sliding_window": 32},
    "Qwen2Model": {},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
}


def computed(module: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the first block, and the last hidden state, as columns."""
    states = module.base_model(ids, output_hidden_states=True)
    return states.hidden_states[0].mT, states.last_hidden_state.mT


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_modules_of_transformers_compute_the_same(name: str, heads: int, groups: int) -> None:
    ids = 2 + torch.arange(36).reshape(4, 9) * 7 % 28
    with DoublePrecision():
        module, other = (
            decoder(name, heads, groups, seed=seed, **FAMILIES[name]) for seed in (0, 1)
        )
        network, target = from_decoder(module), from_decoder(other)
        assert network.groups == (heads if name[0] == "G" else groups)
        for each, given in ((network, module), (target, to_decoder(target, module))):
            x, y = computed(given, ids)
            assert float((each(x) - y).abs().max()) <= 1e-12 * float(y.abs().max())
        inner = from_decoder(module, final_norm=False)
    torch.testing.assert_close(inner.trace(x)[-1].outputs, network.trace(x)[-1].outputs)
    again = from_decoder(to_decoder(network, module))
    for a, b in zip(network.weights + network.biases, again.weights + again.biases, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@given(
    st.integers(1, 3),
    st.integers(4, 8),
    st.integers(1, 9),
    st.integers(1, 20),
    kinds,
    decoders,
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_the_ranks_of_the_theorem_are_exact(
    depth: int,
    width: int,
    head_size: int,
    hidden: int,
    kind: Any,
    decodes: Any,
    final: bool,
    gains: bool,
    seed: int,
) -> None:
    options = kind | decodes | {"final_norm": final, "hidden": hidden}
    if options["rotary"] is None:
        options["head_size"] = head_size
    frozen, target = residual_pair(seed, depth, width, 2, **options)
    if not gains:
        vectors = ("g_1", "s_1", "g_2", "s_2")
        target = target.replace(**{name: getattr(frozen, name) for name in vectors})
    found = transformer.adapt(frozen, target, bounds.transformer_ranks(frozen, target))
    assert found.success.all()
    x = normal(5, width, 4, seed=seed)
    merged = found.adapters.merge(frozen)
    # Rounding grows with the condition of what is solved.
    worst = float(found.condition_number)
    assert relative(merged, target, x) < max(1e-20, (1e-15 * worst) ** 2)
    torch.testing.assert_close(merged.g_1, target.g_1)
    for update, name in zip(found.adapters.updates, frozen.weight_names, strict=True):
        assert update.rank <= min(getattr(frozen, name.split()[0]).shape[-2:])


@given(st.sampled_from([2, 6]), st.integers(0, 6), seeds)
def test_what_is_called_a_success_is_one(head_size: int, rank: int, seed: int) -> None:
    """Of targets whose scores are singular: some query bias may complete them, or none."""
    frozen, target = residual_pair(seed, 1, 6, 1, head_size=head_size)
    names = zip(target.weight_names, target.weights, strict=True)
    flat = target.with_parameters([0 * w if n[:3] == "W_Q" else w for n, w in names])
    ranks = dict.fromkeys(frozen.weight_kinds, 6)
    ranks |= dict.fromkeys(PARTS["attention"], min(rank, head_size))
    found = transformer.adapt(frozen, flat, ranks, throw=False)
    exact = all(float(part.spectral_error.max()) < 1e-9 for part in found.solutions.values())
    if exact and found.success:
        assert relative(found.adapters.merge(frozen), flat, normal(9, 6, 4, seed=seed)) < 1e-18
    elif not found.success:
        refused = "non-singular on what norms let through|exactly or not at all"
        with pytest.raises(InputError, match=refused):
            transformer.adapt(frozen, flat, ranks)


@st.composite
def shapes(draw: Any) -> tuple[dict[str, Any], Transformer, Transformer]:
    """Draw two unrelated networks of which [thm-needed] speaks, and their sides ``m, S, F, d``."""
    width, norm = draw(st.integers(4, 9)), draw(norms)
    activation = draw(st.sampled_from(["relu", "gelu", "silu"]))
    options = {"norm": norm, "activation": activation, "gated": draw(st.booleans())}
    options |= {"final_norm": draw(st.booleans()), "head_size": draw(st.integers(1, 11))}
    m = width - (norm == "layer")
    written = m if options["final_norm"] else width
    scales = (activation == "relu") + options["gated"]
    least = [written, m + written - 1, 2 * m + written - 2][scales]
    options["hidden"] = least + draw(st.integers(0, 5))
    heads = draw(st.integers(1, 3))
    pair = residual_pair(draw(seeds), draw(st.integers(1, 2)), width, heads, **options)
    return options | {"m": m, "written": written}, *pair


def count_says_enough(sides: dict[str, Any], frozen: Transformer, ranks: dict[str, int]) -> bool:
    """Compare dimensions: what changes of these ranks and scales of units leave fixed."""
    target = residual_pair(1, 1, frozen.width, 1, **{k: sides[k] for k in ("norm", "head_size")})[1]
    V, written = target.basis(), torch.eye(frozen.width).double()
    if sides["written"] < frozen.width:
        written = V.mT
    one = [frozen.parameters[kind][0, 0] for kind in PARTS["attention"]]
    other = [target.parameters[kind][0, 0] for kind in PARTS["attention"]]
    for (first, second), (Q, K), end in (
        (("W_Q", "W_K"), (0, 1), V.mT),
        (("W_V", "W_O"), (2, 3), written),
    ):
        sides_of = [(end @ w[K].mT if K == 1 else end @ w[K], w[Q] @ V) for w in (one, other)]
        (X, Y), (X_goal, Y_goal) = sides_of
        M = X_goal @ Y_goal
        rank = torch.linalg.matrix_rank
        needs = rank(torch.cat([M, Y])) - rank(Y), rank(torch.cat([M, X], 1)) - rank(X)
        a, b = (min(ranks[kind], frozen.width, len(Y)) for kind in (first, second))
        if a < needs[0] or b < needs[1] or a + b < rank(M - X @ Y):
            return False
    F, relu, gated = sides["hidden"], sides["activation"] == "relu", sides["gated"]
    ends = {"W_1": sides["m"], "W_2": sides["written"]} | ({"W_3": sides["m"]} if gated else {})
    for count in range(1, 4):
        for some in itertools.combinations(ends, count):
            fixed = sum(max(0, F - ranks[k]) * max(0, ends[k] - ranks[k]) for k in some)
            # Scales of ReLUs act on W_1 and W_2, those of gated units on W_3 and W_2.
            of_units = [{"W_1", "W_2"}] * relu + [{"W_3", "W_2"}] * gated
            if fixed > F * sum(bool(kinds & {*some}) for kinds in of_units):
                return False
    return True


@given(shapes(), st.data())
def test_ranks_suffice_where_dimensions_do(shape: Any, data: Any) -> None:
    sides, frozen, _ = shape
    ends = dict.fromkeys(PARTS["attention"], min(sides["head_size"], frozen.width))
    ends |= dict.fromkeys(PARTS["mlp"], frozen.width)
    ranks = {
        kind: max(0, ends[kind] - data.draw(st.integers(0, 2), label=kind))
        for kind in frozen.weight_kinds
    }
    enough = count_says_enough(sides, frozen, ranks)
    assert bounds.ranks_suffice(frozen, ranks) == enough
    more = {kind: rank + 1 for kind, rank in ranks.items()}
    assert bounds.ranks_suffice(frozen, more) >= enough


@given(shapes(), st.data())
def test_every_vertex_is_exact_with_frozen_gains(shape: Any, data: Any) -> None:
    _, frozen, drawn = shape
    target = drawn.with_norms(frozen)
    ranks = dict.fromkeys(frozen.weight_kinds, 20)
    for kind in data.draw(st.permutations(frozen.weight_kinds)):
        while ranks[kind] and bounds.ranks_suffice(frozen, ranks | {kind: ranks[kind] - 1}):
            ranks[kind] -= 1
    used = {kind: min(rank, *frozen.parameters[kind].shape[-2:]) for kind, rank in ranks.items()}
    found = transformer.adapt(frozen, target, used)
    merged = found.adapters.merge(frozen)
    for kind in ("g_1", "s_1", "g_2", "s_2"):
        assert torch.equal(merged.parameters[kind], frozen.parameters[kind])
    for update, kind in zip(found.adapters.updates, frozen.kind_of_weight, strict=True):
        assert update.rank <= used[kind]
    x = normal(5, frozen.width, 4)
    assert relative(merged, drawn, x) < max(1e-20, (1e-15 * float(found.condition_number)) ** 2)
    # Of these ranks none can be lowered.
    for kind in frozen.weight_kinds:
        assert not used[kind] or not bounds.ranks_suffice(frozen, used | {kind: used[kind] - 1})


def test_units_are_ordered_block_by_block() -> None:
    """A block, or a member, that needs no rank takes none from the others."""
    options: Any = {"activation": "relu", "head_size": 3, "hidden": 12}
    frozen, drawn = residual_pair(0, 2, 6, 1, **options)
    target = drawn.with_norms(frozen)
    ranks, x = bounds.necessary_ranks(frozen), normal(5, 1, 6, 4)
    same = {kind: target.parameters[kind].clone() for kind in ("W_1", "b_1", "W_2", "b_2")}
    for kind, part in same.items():
        part[0] = frozen.parameters[kind][0]
    near = target.replace(**same)
    stacks = {k: torch.stack([frozen.parameters[k], p]) for k, p in target.parameters.items()}
    for goal in (near, target.replace(W_2=frozen.W_2), Transformer(stacks, target.settings)):
        found = transformer.adapt(frozen, goal, ranks).adapters.merge(frozen)
        assert relative(found, goal, x) < 1e-20


def test_units_that_cannot_be_ordered_stay() -> None:
    """Of as many rows and their negatives, an odd number, no two sides are equal."""
    frozen, _ = residual_pair(0, 1, 6, 1, norm="rms", head_size=2, hidden=11, activation="relu")
    target, x = frozen.replace(W_1=-frozen.W_1, W_2=-frozen.W_2), normal(5, 6, 4)
    errors = []
    for rank in (4, 5, 6):
        ranks = {"W_Q": 2, "W_K": 2, "W_V": 2, "W_O": 2, "W_1": rank, "W_2": 6}
        found = transformer.adapt(frozen, target, ranks)
        errors.append(relative(found.adapters.merge(frozen), target, x))
    assert errors[0] > errors[1] > errors[2]


@given(shapes())
def test_necessary_ranks_are_a_vertex(shape: Any) -> None:
    _, frozen, _ = shape
    ranks = bounds.necessary_ranks(frozen)
    assert bounds.ranks_suffice(frozen, ranks)
    for kind, rank in ranks.items():
        assert not rank or not bounds.ranks_suffice(frozen, ranks | {kind: rank - 1})


@given(st.integers(1, 3), st.integers(4, 8), kinds, decoders, st.booleans(), seeds)
def test_other_norms_write_the_same_function(
    depth: int, width: int, kind: Any, decodes: Any, final: bool, seed: int
) -> None:
    options = kind | decodes | {"final_norm": final}
    other, network = residual_pair(seed, depth, width, 2, **options)
    written = network.with_norms(other)
    assert torch.equal(written.g_1, other.g_1)
    assert torch.equal(written.s_2, other.s_2)
    assert relative(written, network, normal(5, width, 4, seed=seed)) < 1e-24


def test_the_counts_of_packed_weights() -> None:
    assert bounds.packed_rank(768, 12, 64) == 612
    assert bounds.packed_rank(768, 12, 64, rotary=True) == 749
    # Each head by itself, with rotary positions, needs all of its rank.
    assert bounds.packed_rank(768, 1, 64, rotary=True) == 64
    # Without, one head is not packed.
    assert [bounds.packed_rank(8, 1, d) for d in (2, 3, 8)] == [2, 3, 4]
    grouped: Any = {"groups": 3, "norm": "rms"}
    assert bounds.packed_rank(576, 9, 64, rotary=True, **grouped) == 576 - 13
    values = bounds.packed_rank(576, 9, 64, part="values", **grouped)
    assert (576 - values) ** 2 <= 3 * 64**2 < (577 - values) ** 2


def test_packed_weights_need_no_more_rank_than_they_have() -> None:
    grouped: Any = {"groups": 3, "rotary": 1e4, "gated": True, "norm": "rms", "head_size": 64}
    _, target = residual_pair(0, 1, 576, 9, hidden=1536, activation="silu", **grouped)
    attention = {"W_Q": 563, "W_K": 192, "W_V": 192, "W_O": 466}
    layer = {"W_1": 576, "W_3": 575, "W_2": 576}
    assert bounds.necessary_ranks(target, packed=True) == attention | layer


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_attention_is_taken_away_though_values_become_singular(norm: Any) -> None:
    frozen, _ = residual_pair(0, 1, 6, 1, norm=norm)
    names = zip(frozen.weight_names, frozen.weights, strict=True)
    target = frozen.with_parameters([0 * w if n[:3] == "W_V" else w for n, w in names])
    v = normal(6, 200)
    ranks = [3 * (name[:3] in ("W_V", "W_O")) for name in frozen.weight_names]
    built = attention_only(frozen, target, v, ranks).merge(frozen)
    assert bounds.far_error(built, target, v, 1e5)[0] < 1e-16
    # The feed-forward layers are equal.
    assert bounds.attention_floor(frozen, target, v).value < 1e-28


def test_descent_lowers_the_error_and_moves_what_may_move() -> None:
    frozen, target = residual_pair(1, 1, 5, 1)
    x, others = normal(60, 5, 3), normal(60, 5, 3, seed=1)
    pairs = (x, target(x)), (others, target(others))
    moving = torch.tensor([name.startswith("b_2") for name in frozen.bias_names])
    ranks = frozen.ranks(1, "attention")
    draw = randomness.generator(0, "factors")
    updates = tuple(
        lowrank.LowRank(0.1 * randomness.normal(draw, o, R), 0.1 * randomness.normal(draw, i, R))
        for (o, i), R in zip([w.shape for w in frozen.weights], ranks, strict=True)
    )
    zeros = tuple(torch.zeros_like(b) for b in frozen.biases)
    start = Adapters(updates, zeros, Tuned(torch.tensor(ranks), moving))
    found = descend(frozen, start, *pairs, 30)

    def error(adapters: Adapters) -> float:
        return float((adapters.merge(frozen)(others) - pairs[1][1]).square().mean())

    assert error(found) < error(start)
    for change, moves in zip(found.bias_updates, moving.tolist(), strict=True):
        assert bool(change.any()) == moves
    assert found.ranks == start.ranks
