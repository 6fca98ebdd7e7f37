"""Random facts: what is drawn, learned and recited, and the recipes that learn them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import text_files
import torch

import records
from records import facts, language, models, unpack
from records.facts import FactProblem, FactRun
from records.language import Lora, Method, Whole

# Numbers of adapters of rank 1 on all layers of both blocks, and outputs of these layers.
NUMBERS = 2 * (2 * 16 + 2 * (16 + 8) + 2 * 16 + 3 * (16 + 24))
OUTPUTS = 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_files.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def to_learn(llama: str, monkeypatch: pytest.MonkeyPatch) -> FactProblem:
    """Eight facts for a tiny model, any of whose tokens are words."""
    monkeypatch.setattr(facts, "words", lambda model: np.arange(10, 74))
    return FactProblem(number=8, passes=120, model=llama)


# DoRA has a number more for each output.
@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        (Whole(learning_rate=1e-2), None),
        (Lora(rank=8, learning_rate=1e-2), 8 * NUMBERS),
        (Lora(targets="layers", rank=8, learning_rate=1e-2, recipe="dora"), 8 * NUMBERS + OUTPUTS),
        (Lora(targets="layers", rank=8, learning_rate=1e-2, recipe="pissa"), 8 * NUMBERS),
        (Lora(targets="layers", rank=8, learning_rate=1e-3, recipe="lora+"), 8 * NUMBERS),
    ],
    ids=["whole", "lora", "dora", "pissa", "lora+"],
)
def test_training_starts_at_the_base_and_learns_facts(
    method: Method, numbers: int | None, to_learn: FactProblem
) -> None:
    rows = facts.facts(to_learn)
    assert len(np.unique(rows[:, : facts.KEY], axis=0)) == to_learn.number
    base, tokens = models.decoder(to_learn.model), torch.from_numpy(rows)
    expected = base(tokens).logits
    network = language.ready(base, method, 0, half=False)
    torch.testing.assert_close(network(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    (found,) = facts.work([FactRun(problem=to_learn, method=method)])
    losses = unpack(found.losses)
    assert found.recall > 0.5
    assert found.parameters == numbers or numbers is None
    assert found.score == pytest.approx(-losses.mean(), rel=1e-6)
    assert found.bits == pytest.approx(8 * 2 * 6 - losses.sum() / math.log(2), rel=1e-6)


def test_recorded_runs_at_the_best_rates_are_those_of_the_search() -> None:
    recorded = records.read("facts").fillna({"recipe": "plain"})
    of_way = ["parameters", "recipe"]
    searched = recorded.query("seed == 0 and number == @facts.SEARCHED and passes == @facts.PASSES")
    best = searched.loc[searched.groupby(of_way).score.idxmax(), [*of_way, "learning_rate"]]
    found = facts.at_best_rates(recorded)
    assert len(found.merge(best)) == len(found) == len(recorded.merge(best))
    assert {*found.place} >= {"one block", "ten blocks", "all blocks", "full tuning"}


def test_reciting_is_greedy_decoding(to_learn: FactProblem) -> None:
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
    # In bfloat16 where the processor has it, as the records were made.
    half = models.has_bfloat16("cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        scores = network(torch.from_numpy(rows)).logits.float().log_softmax(-1).numpy()
    by_hand = [-sum(scores[i, j - 1, rows[i, j]] for j in (-2, -1)) for i in range(len(rows))]
    np.testing.assert_allclose(losses, by_hand, rtol=1e-5)
