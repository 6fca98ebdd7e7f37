"""Decoders: next tokens, the last token's class, facts, and what of a language model is tuned."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import checkpoint_files as files
import numpy as np
import pandas as pd
import pytest
import text_files
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from lorapower import randomness
from records import facts, language, models, recipes, texts, unpack
from records.language import Lora, Method, Part, Problem, Setting, Targets, Whole
from records.texts import Examples, find

LINES = [*files.texts()[:30], *(text[:9] for text in files.texts()[:10])]
SIZES = {"hidden_size": 16, "intermediate_size": 24}
# Numbers of an adapter of rank 1 in a layer: queries, keys, values, outputs; feed-forward.
KEYS, VALUES = 2 * 16 + (16 + 8), (16 + 8) + 2 * 16
NUMBERS: dict[Targets, int] = {
    "all": KEYS + VALUES + 3 * (16 + 24),
    "attention": KEYS + VALUES,
    "feed-forward": 3 * (16 + 24),
    "queries and keys": KEYS,
}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Llama with a tokenizer that has no token for padding, in a folder."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = copy.deepcopy(files.byte_words())
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = files.SIZES | files.DECODER | SIZES | {"pad_token_id": None}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)
    with randomness.seeded(0, "Llama"):
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def shown() -> Iterator[dict[str, Examples]]:
    """All texts that there are, by part."""
    with text_files.shown(LINES) as parts:
        yield parts


@pytest.fixture
def tiny(llama: str, shown: dict[str, Examples]) -> Problem:
    return Problem(task="movies-next", model=llama, head="own", epochs=1, batch=4, tokens=24)


def tokens(llama: str, *, end: str) -> list[torch.Tensor]:
    tokenizer = models.tokenizer(llama)
    return [torch.tensor(tokenizer(line + end)["input_ids"][:24]) for line in LINES]


def build(problem: Problem, method: Method | None = None) -> Any:
    return language.prepare(Setting(problem=problem, method=method or Whole(kind="head")))


def test_next_tokens_are_answered_as_for_each_text_alone(
    tiny: Problem, shown: dict[str, Examples]
) -> None:
    network = models.decoder(tiny.model).eval()
    every, losses = tokens(tiny.model, end="</s>"), []
    for ids in every:
        with torch.no_grad():
            logits = network(input_ids=ids[None]).logits[0, :-1].double()
        losses.append(-torch.log_softmax(logits, 1).gather(1, ids[1:, None]).mean().item())
    lengths = {len(ids) for ids in every}
    assert max(lengths) == 24 > 2 * min(lengths)  # some are cut off, some padded
    assert sum(ids[-1] == network.config.eos_token_id for ids in every) >= 10
    found = language.answer(network, tiny)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    unlabelled = Examples(shown["test"].texts, (math.nan,) * len(LINES))
    shown.update(dict.fromkeys(texts.PARTS, unlabelled))
    language._tokenize.cache_clear()
    np.testing.assert_array_equal(language.answer(network, tiny), found)


def test_without_training_the_base_is_measured(tiny: Problem) -> None:
    found = language.tune(Setting(problem=tiny, method=Whole(kind="head")))
    assert found.parameters == 0
    assert math.isnan(found.training_loss)
    given = language.answer(models.decoder(tiny.model), tiny)
    np.testing.assert_allclose(unpack(found.answers), given, rtol=1e-6)
    assert found.loss == pytest.approx(given.mean())
    assert found.score == -found.loss
    assert math.isnan(found.accuracy)
    np.testing.assert_array_equal(find(tiny.task).contributions(given, given), -given)


def test_the_trained_network_is_handed_over(tiny: Problem) -> None:
    kept: list[Any] = []
    method = Lora(rank=2, learning_rate=1e-2)
    found = language.tune(Setting(problem=tiny, method=method), kept.append)
    (network,) = kept
    given = language.answer(network, tiny)
    np.testing.assert_allclose(unpack(found.answers), given, rtol=1e-6)
    assert np.abs(given - language.answer(build(tiny), tiny)).min() > 1e-4


def test_fewer_texts_are_asked(tiny: Problem) -> None:
    setting = Setting(problem=tiny, method=Lora(rank=2, learning_rate=1e-2))
    every, third = language.tune(setting), language.tune(setting, stride=3)
    np.testing.assert_allclose(unpack(third.answers), unpack(every.answers)[::3], rtol=1e-5)
    assert third.loss == pytest.approx(unpack(every.answers)[::3].mean())


@pytest.mark.parametrize("recipe", recipes.RATES)
def test_a_recipe_is_scored_on_two_parts(
    recipe: Any, tiny: Problem, shown: dict[str, Examples]
) -> None:
    shown["test"] = Examples(shown["test"].texts[::2], shown["test"].labels[::2])
    method = Part(pattern="", rank=2, learning_rate=1e-3, recipe=recipe)
    both = [tiny.replace(part=part) for part in ("test", "validation")]
    (found,) = recipes.work([Setting(problem=both[0], method=method)])
    test, validation = (language.tune(Setting(problem=p, method=method)) for p in both)
    assert found.loss == pytest.approx(test.loss, rel=1e-5)
    assert found.validation == pytest.approx(validation.score, rel=1e-5)
    assert found.parameters == 2 * 2 * NUMBERS["all"]


def test_all_weights_learn_an_easy_text(tiny: Problem, shown: dict[str, Examples]) -> None:
    same = Examples(("A man is playing a guitar.",) * 40, (0.0,) * 40)
    shown.update(dict.fromkeys(texts.PARTS, same))
    before, after = language.measure(
        [
            Setting(problem=tiny.replace(epochs=4), method=method)
            for method in (Whole(kind="head"), Whole(learning_rate=1e-2))
        ]
    )
    assert after.loss < before.loss / 3


@pytest.mark.parametrize("targets", NUMBERS)
def test_adapters_are_on_the_named_layers_alone(targets: Targets, tiny: Problem) -> None:
    network = build(tiny, Lora(targets=targets, rank=2))
    tuned = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
    assert sum(tuned.values()) == 2 * 2 * NUMBERS[targets]  # of rank 2, in two layers
    if targets == "queries and keys":
        layers = {f"layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qk"}
        ends = [f"{layer}.lora_{factor}" for layer in layers for factor in "AB"]
        assert len(tuned) == len(ends)
        assert all(any(end in name for name in tuned) for end in ends)


def test_equal_ranks_are_within_half_a_rank(llama: str) -> None:
    for rank in (1, 2):
        ranks = language.equal_ranks(llama, rank, "own", [*NUMBERS])
        for targets, number in NUMBERS.items():
            assert abs(ranks[targets] * number - rank * NUMBERS["all"]) <= number / 2
    # Keys and values of 8 have no higher rank.
    assert language.equal_ranks(llama, 8, "own", [*NUMBERS])["queries and keys"] == 8


def test_a_decoder_tells_classes_from_the_last_token(tiny: Problem) -> None:
    sign = tiny.replace(task="movies")
    network = build(sign).eval()
    classes = []
    for ids in tokens(tiny.model, end=""):
        with torch.no_grad():
            hidden = network.model(input_ids=ids[None]).last_hidden_state[0, -1]
        classes.append((network.score.weight @ hidden).argmax().item())
    assert {*classes} == {0, 1}
    np.testing.assert_array_equal(language.answer(network, sign), classes)


# Facts


@pytest.fixture
def to_learn(llama: str, monkeypatch: pytest.MonkeyPatch) -> facts.Problem:
    """Eight facts for a tiny model, any of whose tokens are words."""
    monkeypatch.setattr(facts, "words", lambda model: np.arange(10, 74))
    return facts.Problem(number=8, passes=60, model=llama)


def test_words_are_words() -> None:
    found = facts.words(models.LANGUAGE)
    tokenizer = models.tokenizer(models.LANGUAGE)
    said = [tokenizer.decode([token]) for token in found]
    assert len({*said}) == len(said) > 10_000
    assert all(word[0] == " " and word[1:].islower() and len(word) > 3 for word in said)


@given(st.integers(1, 3000), st.integers(0, 99))
def test_facts_have_keys_of_their_own(number: int, seed: int) -> None:
    rows = facts.facts(facts.Problem(number=number, seed=seed))
    assert rows.shape == (number, facts.KEY + 1 + facts.VALUE)
    assert len(np.unique(rows[:, : facts.KEY], axis=0)) == number
    assert len({*rows[:, facts.KEY]}) == 1
    other = facts.facts(facts.Problem(number=number, seed=seed + 1))
    assert (rows != other).any()
    np.testing.assert_array_equal(rows, facts.facts(facts.Problem(number=number, seed=seed)))


@pytest.mark.parametrize("method", [Whole(learning_rate=1e-2), Lora(rank=8, learning_rate=1e-2)])
def test_facts_are_learned_and_said(method: Method, to_learn: facts.Problem) -> None:
    (found,) = facts.work([facts.Setting(problem=to_learn, method=method)])
    losses = unpack(found.losses)
    assert found.recall > 0.5
    assert found.parameters > 0
    assert found.score == pytest.approx(-losses.mean(), rel=1e-6)
    assert found.bits == pytest.approx(8 * 2 * 6 - losses.sum() / math.log(2), rel=1e-6)


# DoRA has a number for each output of both blocks' layers: queries, keys, values and outputs, and
# those of the feed-forward part.
@pytest.mark.parametrize(
    ("recipe", "more"),
    [("dora", 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16)), ("pissa", 0), ("lora+", 0)],
)
def test_recipes_start_at_the_base_and_learn(
    recipe: Any, more: int, to_learn: facts.Problem
) -> None:
    rate = 1e-2 if recipe != "lora+" else 1e-3
    method = Part(pattern="layers", rank=8, learning_rate=rate, recipe=recipe)
    base, tokens = models.decoder(to_learn.model), torch.from_numpy(facts.facts(to_learn))
    expected = base(tokens).logits
    network = language.ready(base, method, 0, half=False)
    torch.testing.assert_close(network(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    longer = to_learn.replace(passes=2 * to_learn.passes)
    (found,) = facts.work([facts.Setting(problem=longer, method=method)])
    assert found.parameters == 2 * 8 * NUMBERS["all"] + more
    assert found.recall > 0.5


def test_outputs_learn_faster_by_lora_plus(to_learn: facts.Problem) -> None:
    method = Part(pattern="mlp", rank=2, learning_rate=1e-3, recipe="lora+")
    network = language.ready(models.decoder(to_learn.model), method, 0, half=False)
    groups = language.optimizer_of(network, method).param_groups
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    for name, p in network.named_parameters():
        if p.requires_grad:
            assert rates[p] == pytest.approx(1e-3 * (language.RATIO if "lora_B" in name else 1))
    assert language.optimizer_of(network, method.replace(recipe="plain")) is None
    assert language.optimizer_of(network, Lora()) is None


def test_best_rates_are_those_of_the_search() -> None:
    one, rows = Part(pattern=facts.BLOCK, rank=2), []
    ways = one, one.replace(recipe="dora"), Lora(rank=2), Lora(targets="attention", rank=2)
    for k, way in enumerate([*ways, Whole(kind="full")]):
        for number, seed in ((facts.SEARCHED, 0), (facts.SEARCHED, 1), (16, 0)):
            for rate in (1e-3, 2e-3, 4e-3):
                method = way.replace(learning_rate=rate).model_dump()
                best = 1e-3 * 2 ** (k % 3) if (number, seed) == (facts.SEARCHED, 0) else 4e-3
                score = -abs(rate - best)
                about: dict[str, Any] = {"number": number, "seed": seed, "score": score}
                about |= {"passes": facts.PASSES, "pretrained": True, "method": method["kind"]}
                rows.append(method | about)
    found = facts.at_best_rates(pd.DataFrame(rows))
    assert len(found) == 3 * 5
    by_way = found.groupby(["place", "recipe"]).learning_rate.unique().map(list).to_dict()
    assert by_way == {
        ("one block", "plain"): [1e-3],
        ("one block", "dora"): [2e-3],
        ("all blocks", "plain"): [4e-3],
        ("attention", "plain"): [1e-3],
        ("full tuning", "plain"): [2e-3],
    }


def test_reciting_is_greedy_decoding(to_learn: facts.Problem) -> None:
    network = models.decoder(to_learn.model)
    rows = facts.facts(to_learn)
    tokens = torch.from_numpy(rows)
    # Half of the facts have the value that the model says.
    start = tokens[:, : -facts.VALUE]
    said = network.generate(start, max_new_tokens=facts.VALUE, do_sample=False)
    rows[::2] = said[::2]
    losses, right = facts.recite(network, rows)
    np.testing.assert_array_equal(right, (rows == said.numpy()).all(1))
    assert right[::2].all()
    scores = network(torch.from_numpy(rows)).logits.log_softmax(-1).detach().numpy()
    by_hand = [-sum(scores[i, j - 1, rows[i, j]] for j in (-2, -1)) for i in range(len(rows))]
    np.testing.assert_allclose(losses, by_hand, rtol=1e-5)
