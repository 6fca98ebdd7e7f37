"""Directions, in metrics and in function space, against differences of outputs and algebra."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from checkpoint_files import Patch
from hypothesis import given
from hypothesis import strategies as st

from loraplan import Pair, Planner, _effect, _randomness
from loraplan import pair as pair_module
from loraplan._effect import Moments, find_directions
from loraplan._lowrank import LowRank
from loraplan._streams import TextStates, advance, stream

TEXTS = files.texts()
TIED: dict[str, Any] = {"tie_word_embeddings": True}
PARTS: list[tuple[str, dict[str, Any]]] = [
    ("BertForSequenceClassification", {}),
    ("DistilBertModel", {}),
    ("GPT2LMHeadModel", {}),
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", TIED),
    ("Qwen3ForCausalLM", TIED | {"num_key_value_heads": 1}),
    ("GemmaForCausalLM", {"hidden_size": 20}),
    ("Gemma2ForCausalLM", {}),
    ("Gemma2ForCausalLM", {"tie_word_embeddings": False, "hidden_size": 28}),
    ("Gemma3ForCausalLM", {}),
    ("Gemma3TextForSequenceClassification", {"hidden_size": 32}),
    ("Gemma3TextModel", {"use_bidirectional_attention": True}),
    ("ModernBertForSequenceClassification", {}),
    ("ModernBertModel", {"hidden_size": 32}),
    ("Olmo2ForCausalLM", {}),
    ("Olmo3ForCausalLM", TIED),
    ("SmolLM3ForCausalLM", {}),
    ("StableLmForCausalLM", {}),
    ("Starcoder2ForCausalLM", {}),
]


# In two metrics


def normal(seed: int, *shape: int) -> torch.Tensor:
    return _randomness.normal(_randomness.generator(seed, "drawn"), *shape)


def metric_root(rows: torch.Tensor, ridge: float) -> torch.Tensor:
    """``R`` with ``RᵀR`` the second moment of rows and a ridge; the identity where all are 0."""
    level, identity = rows.square().mean(), torch.eye(rows.shape[1], dtype=rows.dtype)
    if not level:
        return identity
    moment = rows.mT @ rows / len(rows) + ridge * level * identity
    return torch.linalg.cholesky(moment, upper=True)


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 60), st.integers(1, 8))
def test_directions_are_those_of_plain_decompositions(
    seed: int, out: int, into: int, rows: int
) -> None:
    """In both metrics, about the mean or not; of an adapter's factors as of their product."""
    E = normal(seed, out, 5) @ normal(seed + 1, 5, into)
    about = Moments(1 + normal(seed + 2, rows, into), normal(seed + 3, rows, out) / 100)
    bias, most = bool(seed % 2), min(4, out, into)
    mean = about.inputs.mean(0) * bias
    Z = metric_root(about.inputs - mean, about.ridge).mT
    R = metric_root(about.outputs, about.ridge)
    U, values, _ = torch.linalg.svd(R @ E @ Z, full_matrices=False)
    U, values = U[:, :most], values[:most]
    nearest = torch.linalg.pinv(R) @ U @ U.mT @ R @ E
    single = Moments(about.inputs.float(), about.outputs.float())
    factors = LowRank(normal(seed, out, 5).float(), normal(seed + 1, 5, into).mT.float())
    for change in (E.float(), factors):
        found = find_directions(change, single, most, bias=bias)
        taken = values[: len(found.values)]
        torch.testing.assert_close(
            found.values.double(), taken, rtol=1e-3, atol=1e-4 * float(taken[0])
        )
        off = R @ (found.update.matrix().double() - nearest) @ Z
        assert off.norm() <= 1e-3 * values.norm()
        torch.testing.assert_close(found.shift.double(), E @ mean, rtol=1e-3, atol=1e-3)


def test_large_changes_are_multiplied_by_rows(tmp_path: Path, monkeypatch: Patch) -> None:
    change = files.low_rank(words=True)
    pair = Pair.open(*files.pair(tmp_path, "LlamaForCausalLM", change=change))
    pair = pair.with_words(pair.words)
    monkeypatch.setattr(pair_module, "LARGE", 100)
    monkeypatch.setattr(pair_module, "_ROWS", 7)
    for name, module in pair.modules.items():
        sliced, whole = pair.multiplier(name), pair.change(name)
        assert type(sliced).__name__ == "Sliced"
        assert [*sliced.shape] == [*module.shape] == [*whole.shape]
        torch.testing.assert_close(sliced @ torch.eye(module.shape[1]), whole)
        torch.testing.assert_close(sliced.mT @ torch.eye(module.shape[0]), whole.mT)


def test_what_no_output_depends_on_gets_no_rank() -> None:
    about, E = Moments(normal(1, 5, 3).float(), torch.zeros(5, 4)), normal(0, 4, 3).float()
    one = find_directions(E, about, 3, bias=True)
    assert one.values.numel() == 0
    assert torch.allclose(one.shift, E @ about.inputs.mean(0))


# In function space


def squares(network: Any, planner: Planner, targets: list[torch.Tensor]) -> float:
    """Half of the mean squared distance of a whole network's outputs from others."""
    total = 0.0
    with torch.no_grad():
        for batch, target in zip(planner.texts.fit, targets, strict=True):
            found = files.outputs(network, batch, planner.pair.task)
            total += float((found.double() - target.double()).square().sum())
    return total / 2 / sum(len(batch.input_ids) for batch in planner.texts.fit)


def tuned(folder: Path, architecture: str, max_rank: int, **options: Any) -> Planner:
    """A planner of a small pair, of which all matrices changed."""
    change = files.low_rank(words=True)
    pair = Pair.open(*files.pair(folder, architecture, change=change, **options))
    return Planner(pair, TEXTS, max_rank=max_rank, carry="all")


def moved(planner: Planner, gains: torch.Tensor) -> Any:
    """A whole network with the tuned weights, but other gains of the candidates."""
    network = planner.pair.network(planner.with_gains(gains - 1))
    with torch.no_grad():
        for name, module in planner.modules.items():
            rest, place = planner.pair.change(name), network.get_submodule(name)
            place.weight.add_(rest.mT if module.transposed else rest)
            if planner.frees_bias(module):
                place.bias.sub_(planner.weighted[name].shift)
    return network


def differentiate(
    planner: Planner, draw: Callable[[int, torch.Tensor], list[torch.Tensor]]
) -> torch.Tensor:
    """Products of what ``draw`` makes of the outputs of texts to fit to with all directions."""
    found = planner.slopes(planner.modules).collect_derivatives(planner._decompose, draw)
    return torch.cat(found[: len(planner.texts.fit)])


@pytest.fixture(autouse=True)
def in_single_precision(monkeypatch: Patch) -> None:
    """So that differences of outputs can be told from rounding."""
    monkeypatch.setattr(
        _effect, "autocast_bfloat16", lambda *_: torch.autocast("cpu", enabled=False)
    )


@pytest.mark.parametrize(("architecture", "options"), files.usually(PARTS))
def test_slopes_are_differences_of_what_is_lost(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Also of embeddings, of heads, and of what both share."""
    planner = tuned(tmp_path, architecture, max_rank=3, **options)
    pair, readout, fit = planner.pair, planner.readout, planner.texts.fit
    whole = pair.network()
    passes = [TextStates(stream(pair, which, planner.device), fit) for which in ("tuned", "base")]
    advance(passes)
    # Any outputs that the tuned head can give are as good to keep a distance from.
    far, targets = passes[1].states, []
    for batch, found, other in zip(fit, passes[0].states, far, strict=True):
        with torch.no_grad():
            given = files.outputs(whole, batch, pair.task)
            near, wanted = (torch.pdist(rows) for rows in (readout.rows(found), given))
            torch.testing.assert_close(near, wanted, rtol=1e-3, atol=1e-4)
            target = other
            if pair.task == "language":
                logits = torch.cat([*readout.network.logits(other)], -1)
                target = logits - logits.mean(-1, keepdim=True)
            targets.append(target)
    gains = torch.ones(len(planner.candidates.costs), dtype=torch.float64)
    slopes_of = planner.slopes(planner.modules)

    def towards(i: int, values: torch.Tensor) -> list[torch.Tensor]:
        # Those of texts to select by are not looked at.
        rows = slopes_of.rows(far[i])[0] if i < len(fit) else values
        return [rows.detach() - values]

    texts = sum(len(batch.input_ids) for batch in fit)
    slopes = (
        torch.cat(slopes_of.collect_derivatives(planner._decompose, towards)[: len(fit)]).sum(0)
        / texts
    )
    words = [planner.candidates.places[name].start for name in planner.pair.words]
    assert words
    assert planner.modules.keys() > planner.pair.words.keys()
    for d in [*slopes.abs().argsort(descending=True)[:3].tolist(), *words]:
        lost = []
        for size in (0.02, -0.02):
            other = gains.clone()
            other[d] += size
            # Biases, where they are free, go with it, and what the candidates lack is as tuned.
            lost.append(squares(moved(planner, other), planner, targets))
        slope = -(lost[0] - lost[1]) / 0.04
        assert slope == pytest.approx(float(slopes[d]), rel=0.03, abs=1e-6)


@pytest.mark.parametrize("architecture", ["DistilBertModel", "GPT2LMHeadModel"])
def test_sketches_have_the_second_moments(architecture: str, tmp_path: Path) -> None:
    """Those of the derivatives of all outputs, one after the other."""
    planner = tuned(tmp_path, architecture, max_rank=1)
    batches, probes = planner.texts.fit, 200
    # The place of each row in its text: one output of every text at a time.
    places = [torch.cat([torch.arange(int(n)) for n in b.attention_mask.sum(1)]) for b in batches]

    def each(i: int, values: torch.Tensor) -> list[torch.Tensor]:
        if i >= len(batches):
            return [torch.zeros_like(values)]
        units = torch.eye(values.shape[1])
        return [
            (places[i] == place)[:, None] * unit
            for place in range(int(places[i].max()) + 1)
            for unit in units
        ]

    texts = sum(len(batch.input_ids) for batch in batches)
    rows = differentiate(planner, each)
    exact = rows.mT @ rows / texts
    draw = _randomness.generator(0, "sketch")
    rows = differentiate(planner, lambda _, v: _effect.draw_rows(draw, v, 0, probes))
    assert torch.dist(rows.mT @ rows / len(rows), exact) < 0.05 * exact.norm()


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_what_is_carried_counts_as_what_is_lost_without_it(
    architecture: str, tmp_path: Path
) -> None:
    def change(name: str, value: torch.Tensor) -> torch.Tensor | None:
        rows = torch.zeros_like(value)
        rows[1:9:2] = 0.1
        return rows if "position" in name else files.low_rank()(name, value)

    planner = Planner(Pair.open(*files.pair(tmp_path, architecture, change=change)), TEXTS)
    kinds = [*planner.costs]
    assert {*kinds} >= ({"norm"} if "Llama" in architecture else {"norm", "bias", "embedding"})
    for place, kind in enumerate(kinds, len(planner.candidates.costs) - len(kinds)):
        gains = torch.ones_like(planner.candidates.costs)
        for gain in (1.0, 0.0):
            gains[place] = gain
            adapter = planner.with_gains(gains)
            assert (kind in adapter.carried) == bool(gain)
            lost = float(planner.run((adapter, "select"))[0].squares.mean())
            predicted = _effect.predict(planner.sketches[1], gains)
            if kind != "bias":
                # By few random outputs of language models.
                rel = 1e-2 if "Bert" in architecture else 0.3
                assert predicted == pytest.approx(lost, rel=rel, abs=1e-6)


def drawn(seed: int, rows: int, modules: int, ranks: int) -> tuple[Any, torch.Tensor]:
    """Candidates of modules of different cost, and a sketch whose directions add up coherently."""
    candidates: Any = object.__new__(_effect.Candidates)
    candidates.costs = torch.arange(1.0, modules + 1, dtype=torch.float64).repeat_interleave(ranks)
    return candidates, normal(seed, rows, 1) + normal(seed + 1, rows, modules * ranks)


def objective(features: torch.Tensor, alpha: float, gains: torch.Tensor) -> float:
    """What is minimized, written out."""
    H = features.mT @ features / len(features)
    shrunk = (1 - alpha) * H + alpha * H.diagonal().diag()
    fit = (gains - 1) @ shrunk @ (gains - 1)
    floor = _effect._FLOOR * H.diagonal().mean() * (gains - 1)[gains != 0].square().sum()
    return float(fit + floor)


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 4), st.integers(1, 3))
def test_gains_are_the_best(seed: int, rows: int, modules: int, ranks: int) -> None:
    candidates, sketch = drawn(seed, rows, modules, ranks)
    alpha = (0.03, 0.3, 0.9)[seed % 3]
    most = float(candidates.costs.sum())
    choice = _effect.GreedySelection(candidates, sketch, alpha, most)
    for budget in (most, most / 2):
        gains = choice.gains(budget)
        taken = gains != 0
        assert candidates.costs[taken].sum() <= budget
        best = objective(sketch, alpha, gains)
        draw = _randomness.generator(seed, "elsewhere")
        for _ in range(5):
            moved = gains + 0.1 * taken * _randomness.normal(draw, len(gains))
            assert objective(sketch, alpha, moved) >= best - 1e-9


def test_candidates_lose_less_where_losses_add_up(tmp_path: Path, monkeypatch: Patch) -> None:
    """At one rank everywhere, for a tuning that all modules share."""
    places = files.pair(tmp_path, change=files.low_rank(rank=6, size=0.2))
    planner = Planner(Pair.open(*places), TEXTS, max_rank=8, carry="all")
    number = planner.parameters(1)
    assert planner.error(planner.candidate(number)) < 0.8 * planner.error(planner.uniform(number))
    least = [planner.smallest(error).parameters for error in (0.5, 0.3, 0.1)]
    assert all(a <= b for a, b in itertools.pairwise(least))
    assert planner.error(planner.smallest(0.1)) <= 0.1
    # Also where the size that is predicted is much too small.
    monkeypatch.setattr(_effect, "predict_least", lambda *_: 20)
    assert planner.error(planner.smallest(0.1)) <= 0.1


def test_the_search_of_the_smallest_ends_where_directions_cost_little(tmp_path: Path) -> None:
    """Between two numbers that differ by one there is nothing left to try."""
    small: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}

    def values_alone(name: str, value: torch.Tensor) -> torch.Tensor | None:
        return files.low_rank(1)(name, value) if name.endswith("value.weight") else None

    steps: list[str] = []

    def count(stage: str, *_: int) -> None:
        steps.append(stage)
        assert steps.count("searching the smallest adapter") < 50

    pair = Pair.open(*files.pair(tmp_path, change=values_alone, **small))
    planner = Planner(pair, TEXTS, modules="value", carry="none", report=count)
    assert planner.parameters(1) == 32
    adapter = planner.smallest(0.5)
    assert adapter.parameters in (16, 32)
    assert planner.error(adapter) <= 0.5
