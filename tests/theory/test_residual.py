"""Residual transformers: what they compute, how they are written otherwise, and their adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_modules import decoder
from hypothesis import given
from hypothesis import strategies as st
from strategies import PRENORM, normal, residual_pair, seeds
from torch import Tensor

from lorapower import InputError, bounds
from lorapower.constructions import adapt_attention, adapt_transformer
from lorapower.networks import Decoder, Transformer, from_decoder, to_decoder
from lorapower.networks.attention import ACTIVATIONS, PARTS
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


def relative(network: Decoder, target: Decoder, x: Tensor) -> float:
    wanted, found = target(x), network(network.fill(x))
    if not network.settings.final_norm:
        torch.testing.assert_close(found, network.fill(found[..., : target.width, :]))
    return float((found[..., : target.width, :] - wanted).square().mean() / wanted.var())


def by_hand(network: Transformer | Decoder, z: Tensor) -> Tensor:
    """The definition; a plain network has neither residual connections nor norms."""
    p, settings = network.parameters, network.settings

    def norm(z: Tensor, place: str, l: Any) -> Tensor:
        if settings.norm is None:
            return z
        z = z - z.mean(0) if settings.norm == "layer" else z
        gain, shift = (p[f"{kind}_{place}"][l][:, None] for kind in "gs")
        return gain * z / (z.square().mean(0) + settings.eps).sqrt() + shift

    def affine(kind: str, l: Any, x: Tensor) -> Tensor:
        made, bias = p[f"W_{kind}"][l] @ x, p.get(f"b_{kind}")
        return made if bias is None else made + bias[l][:, None]

    for l in range(network.depth):
        n, u = norm(z, "1", l), z if settings.residual else torch.zeros_like(z)
        u = u + p["b_O"][l][:, None] if "b_O" in p else u
        for h in range(network.heads):
            group = h * len(p["W_K"][l]) // network.heads
            queries, keys = affine("Q", (l, h), n), affine("K", (l, group), n)
            if settings.rotary is not None:
                queries, keys = (turned(part, settings.rotary) for part in (queries, keys))
            scores = keys.mT @ queries
            if settings.causal:
                scores = scores.masked_fill(torch.ones_like(scores).tril(-1).bool(), -torch.inf)
            u = u + p["W_O"][l, h] @ p["W_V"][l, group] @ n @ scores.softmax(0)
        reads = norm(u, "2", l)
        active = ACTIVATIONS[settings.activation](affine("1", l, reads))
        made = affine("2", l, active * affine("3", l, reads) if "W_3" in p else active)
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
    if is_plain := options["norm"] is None and not options["residual"]:
        options = {name: options[name] for name in ("activation", "causal", "head_size")}
    else:
        options |= decodes
        options["final_norm"] = options["norm"] is not None and data.draw(st.booleans(), "final")
    cls: Any = Transformer if is_plain else Decoder
    network = cls.random(depth, width, 2, hidden=width + 2, seed=seed, **options)
    x = normal(width, 4, seed=seed)
    expected, trace = by_hand(network, x.clone()), network.trace(x)
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(network.output(trace[-1].outputs), expected)
    for block in trace:
        torch.testing.assert_close(block.patterns.sum(-2), torch.ones(2, 4).double())


def test_a_constant_token_has_no_direction() -> None:
    network = Decoder.random(1, 4, 1, eps=0.0, **PRENORM)
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


sizes = st.tuples(st.integers(1, 3), st.integers(4, 8), st.integers(1, 9), st.integers(1, 20))


@given(sizes, kinds, decoders, st.booleans(), st.booleans(), seeds)
def test_the_ranks_of_the_theorem_are_exact(
    sizes: tuple[int, ...], kind: Any, decodes: Any, final: bool, gains: bool, seed: int
) -> None:
    depth, width, head_size, hidden = sizes
    options = kind | decodes | {"final_norm": final, "hidden": hidden}
    if options["rotary"] is None:
        options["head_size"] = head_size
    frozen, target = residual_pair(seed, depth, width, 2, **options)
    if not gains:
        vectors = ("g_1", "s_1", "g_2", "s_2")
        target = target.replace(**{name: getattr(frozen, name) for name in vectors})
    found = adapt_transformer(frozen, target, bounds.transformer_ranks(frozen, target))
    assert found.success.all()
    x = normal(5, width, 4, seed=seed)
    merged = found.adapters.merge(frozen)
    # Rounding grows with the condition of what is solved.
    worst = float(found.condition_number)
    assert relative(merged, target, x) < max(1e-20, (1e-15 * worst) ** 2)
    torch.testing.assert_close(merged.g_1, target.g_1)
    for update, name in zip(found.adapters.updates, frozen.weight_names, strict=True):
        assert update.rank <= min(getattr(frozen, name.split()[0]).shape[-2:])


@given(seeds)
def test_the_ranks_of_the_theorem_are_exact_without_norms(seed: int) -> None:
    frozen, target = residual_pair(seed, 2, 6, 2, norm=None)
    found = adapt_transformer(frozen, target, bounds.transformer_ranks(frozen, target))
    bound = max(1e-20, (1e-15 * float(found.condition_number)) ** 2)
    assert relative(found.adapters.merge(frozen), target, normal(5, 6, 4, seed=seed)) < bound


@given(st.sampled_from([2, 6]), st.integers(0, 6), seeds)
def test_what_is_called_a_success_is_one(head_size: int, rank: int, seed: int) -> None:
    """Of targets whose scores are singular: some query bias may complete them, or none."""
    frozen, target = residual_pair(seed, 1, 6, 1, head_size=head_size)
    names = zip(target.weight_names, target.weights, strict=True)
    flat = target.with_parameters([0 * w if n[:3] == "W_Q" else w for n, w in names])
    ranks = dict.fromkeys(frozen.weight_kinds, 6)
    ranks |= dict.fromkeys(PARTS["attention"], min(rank, head_size))
    found = adapt_transformer(frozen, flat, ranks, throw=False)
    solutions = found.solutions.values()
    exact = all(float(each.spectral_error.max()) < 1e-9 for each in solutions)
    if exact and found.success:
        assert relative(found.adapters.merge(frozen), flat, normal(9, 6, 4, seed=seed)) < 1e-18
    elif not found.success:
        refused = "non-singular on what norms let through|exactly or not at all"
        with pytest.raises(InputError, match=refused):
            adapt_transformer(frozen, flat, ranks)


@st.composite
def unrelated(draw: Any) -> tuple[Decoder, Decoder]:
    """Draw two networks of which [thm-needed] speaks, with hidden units enough."""
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
    return residual_pair(draw(seeds), draw(st.integers(1, 2)), width, heads, **options)


@given(unrelated(), st.data())
def test_every_vertex_is_exact_with_frozen_gains(pair: Any, data: Any) -> None:
    frozen, drawn = pair
    target = drawn.with_norms(frozen)
    ranks = dict.fromkeys(frozen.weight_kinds, 20)
    for kind in data.draw(st.permutations(frozen.weight_kinds)):
        while ranks[kind] and bounds.ranks_suffice(frozen, ranks | {kind: ranks[kind] - 1}):
            ranks[kind] -= 1
    used = {kind: min(rank, *frozen.parameters[kind].shape[-2:]) for kind, rank in ranks.items()}
    found = adapt_transformer(frozen, target, used)
    merged = found.adapters.merge(frozen)
    for kind in ("g_1", "s_1", "g_2", "s_2"):
        assert torch.equal(merged.parameters[kind], frozen.parameters[kind])
    for update, kind in zip(found.adapters.updates, frozen.kind_of_weight, strict=True):
        assert update.rank <= used[kind]
    x = normal(5, frozen.width, 4)
    assert relative(merged, drawn, x) < max(1e-20, (1e-15 * float(found.condition_number)) ** 2)


def test_units_are_ordered_block_by_block() -> None:
    """A block, or a member, that needs no rank takes none from the others."""
    options: Any = {"activation": "relu", "head_size": 3, "hidden": 12}
    frozen, drawn = residual_pair(0, 2, 6, 1, **options)
    target = drawn.with_norms(frozen)
    ranks = {"W_Q": 3, "W_K": 2, "W_V": 2, "W_O": 3, "W_1": 4, "W_2": 6}
    x = normal(5, 1, 6, 4)
    same = {kind: target.parameters[kind].clone() for kind in ("W_1", "b_1", "W_2", "b_2")}
    for kind, part in same.items():
        part[0] = frozen.parameters[kind][0]
    near = target.replace(**same)
    stacks = {k: torch.stack([frozen.parameters[k], p]) for k, p in target.parameters.items()}
    for goal in (near, target.replace(W_2=frozen.W_2), Decoder(stacks, target.settings)):
        found = adapt_transformer(frozen, goal, ranks).adapters.merge(frozen)
        assert relative(found, goal, x) < 1e-20


def test_units_that_cannot_be_ordered_stay() -> None:
    """Of as many rows and their negatives, an odd number, no two sides are equal."""
    frozen, _ = residual_pair(0, 1, 6, 1, norm="rms", head_size=2, hidden=11, activation="relu")
    target, x = frozen.replace(W_1=-frozen.W_1, W_2=-frozen.W_2), normal(5, 6, 4)
    errors = []
    for rank in (4, 5, 6):
        ranks = {"W_Q": 2, "W_K": 2, "W_V": 2, "W_O": 2, "W_1": rank, "W_2": 6}
        found = adapt_transformer(frozen, target, ranks)
        errors.append(relative(found.adapters.merge(frozen), target, x))
    assert errors[0] > errors[1] > errors[2]


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
    assert bounds.necessary_ranks(target) == attention | layer


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_attention_is_taken_away_though_values_become_singular(norm: Any) -> None:
    frozen, _ = residual_pair(0, 1, 6, 1, norm=norm)
    names = zip(frozen.weight_names, frozen.weights, strict=True)
    target = frozen.with_parameters([0 * w if n[:3] == "W_V" else w for n, w in names])
    v = normal(6, 200)
    ranks = [3 * (name[:3] in ("W_V", "W_O")) for name in frozen.weight_names]
    built = adapt_attention(frozen, target, v, ranks).merge(frozen)
    assert bounds.far_error(built, target, v, 1e5)[0] < 1e-16
    # The feed-forward layers are equal.
    assert bounds.attention_floor(frozen, target, v).value < 1e-28
