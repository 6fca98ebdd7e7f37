"""Encoders, what of them is tuned, and what runs find."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import text_files
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from lorapower import InputError, randomness
from records import language, models, texts, unpack
from records.language import TARGETS, Found, Lora, Method, Problem, Setting, Whole
from records.texts import Examples


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny encoder in a folder."""
    return text_files.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def shown() -> Iterator[dict[str, Examples]]:
    """All texts that there are, by part."""
    with text_files.shown(text_files.LINES) as parts:
        yield parts


@pytest.fixture
def tiny(bert: str, shown: dict[str, Examples]) -> Problem:
    return Problem(model=bert, epochs=1, batch=4, tokens=16)


def measure(*problems: Problem, method: Method | None = None) -> list[Found]:
    method = method or Lora(rank=2)
    return language.measure([Setting(problem=problem, method=method) for problem in problems])


def build(problem: Problem, method: Method | None = None) -> Any:
    """A network, adapted if there is a method."""
    network = language._build(problem)
    return network if method is None else language._adapt(network, method, problem.seed)


def tuned(network: Any) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


# Encoders


def test_pretrained_weights_are_those_shipped_and_random_ones_are_not(tiny: Problem) -> None:
    shipped = models.encoder(tiny.model)[0].state_dict()
    for pretrained in (True, False):
        own = build(tiny.replace(pretrained=pretrained)).base_model.state_dict()
        same = [torch.equal(own[k], shipped[k]) for k in own if "dense.weight" in k]
        assert all(same) if pretrained else not any(same)


def test_heads_and_pooling_layers_that_are_not_shipped_depend_on_the_seed_alone(
    tmp_path: Path,
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1}
    config = transformers.BertConfig(num_attention_heads=2, intermediate_size=12, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    problem = Problem(model=str(tmp_path), head="own")

    def drawn(state: int, **changes: Any) -> torch.Tensor:
        with randomness.seeded(state, "state before"):
            network = build(problem.replace(**changes))
        return torch.cat([network.bert.pooler.dense.weight, network.classifier.weight])

    one = drawn(0, seed=1)
    assert torch.equal(one, drawn(1, seed=1))
    assert torch.equal(one, drawn(2, pretrained=False, seed=1))
    assert (one != drawn(0, seed=2)).all()


def test_what_is_tuned(tiny: Problem) -> None:
    def of(method: Method) -> set[str]:
        return tuned(build(tiny, method))

    adapters = {t: {n for n in of(Lora(targets=t, rank=2)) if "lora_" in n} for t in TARGETS}
    # Query, key, value and output of two layers; with the two of each perceptron.
    assert (len(adapters["attention"]), len(adapters["all"])) == (2 * 2 * 4, 2 * 2 * 6)
    assert adapters["attention"] | adapters["feed-forward"] == adapters["all"]
    assert not adapters["attention"] & adapters["feed-forward"]
    for names in (of(Lora(rank=2)), of(Whole(kind="final"))):
        assert len([n for n in names if "classifier" in n]) == 2
    final = {n for n in of(Whole(kind="final")) if "classifier" not in n}
    assert final
    assert all("layer.1." in name for name in final)
    network = build(tiny)
    assert {name.split(".")[0] for name in of(Whole(kind="head"))} == {"classifier"}
    every = {name for name, _ in network.named_parameters()}
    assert of(Whole()) == every
    linear = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    assert of(Whole(kind="linear")) == {n for n in every if n.rpartition(".")[0] in linear}


def test_the_mean_head_is_linear_on_the_tokens_that_are_there(tiny: Problem) -> None:
    network = build(tiny).eval()
    ids = torch.arange(4, 10)
    with torch.no_grad():
        encoder = models.encoder(tiny.model)[0].eval()
        hidden = encoder(input_ids=ids[None]).last_hidden_state[0]
        wanted = network.classifier.weight @ hidden.mean(0) + network.classifier.bias
        padded = torch.cat([ids, torch.ones(3, dtype=torch.long)])[None]
        mask = torch.tensor([[1] * 6 + [0] * 3])
        found = network(input_ids=padded, attention_mask=mask, labels=torch.tensor([1]))
    torch.testing.assert_close(found["logits"][0], wanted, rtol=1e-4, atol=1e-5)
    wanted_loss = -torch.log_softmax(wanted, 0)[1]
    torch.testing.assert_close(found["loss"], wanted_loss, rtol=1e-4, atol=1e-5)


def test_lacking_and_torn_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = text_files.save_bert(tmp_path)
    path = Path(folder, "model.safetensors")
    weights = load_file(path)
    lacking = {name: w for name, w in weights.items() if "layer.1.output.dense" not in name}
    save_file(lacking, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"whose weights are all there; got .* lacks .*layer\.1\."):
        models.encoder(folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="model must be a folder with a configuration, weights"):
        models.encoder(folder)


# Runs


def test_what_is_not_usable_is_refused(tiny: Problem, tmp_path: Path) -> None:
    for problem, rank, message in (
        (tiny, 17, r"rank must be .* from 1 to 16 \(the weight of .* 17"),
        (tiny.replace(tokens=33), 1, "tokens must be .* 8 to 32"),
        (tiny.replace(model=str(tmp_path)), 1, "model must be a folder with a configuration"),
    ):
        with pytest.raises(InputError, match=message):
            language.prepare(Setting(problem=problem, method=Lora(rank=rank)))


def test_the_score_is_that_of_the_answers(tiny: Problem, shown: dict[str, Examples]) -> None:
    (found,) = measure(tiny.replace(tokens=28))
    right = unpack(found.answers) == shown["validation"].labels
    assert found.score == found.accuracy == right.mean()
    assert math.isnan(found.loss)
    assert found.baseline == 0.5
    assert 0 <= found.cut_off < 1


def test_runs_repeat_bit_by_bit_and_print_nothing(
    tiny: Problem, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny.replace(tokens=32)  # all that the model takes
    one, again, other = measure(tiny, tiny, tiny.replace(seed=1))
    assert capfd.readouterr() == ("", "")
    assert one.training_loss == again.training_loss
    assert one.training_loss != other.training_loss


def test_training_learns_what_is_easy(tiny: Problem, shown: dict[str, Examples]) -> None:
    lines = ("No.", "a gorgeous , witty , seductive movie .")
    shown.update(dict.fromkeys(texts.PARTS, Examples(16 * lines, 16 * (0.0, 1.0))))
    problem = tiny.replace(epochs=10, batch=8, tokens=24)
    (found,) = measure(problem, method=Lora(rank=2, learning_rate=1e-2))
    assert found.baseline == 0.5
    assert found.score == 1


@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.integers(0, 40), st.integers(0, 5)
)
def test_each_epoch_shows_the_same_samples_once(
    number: int, batch: int, epochs: int, samples: int, seed: int
) -> None:
    problem = Problem(batch=batch, epochs=epochs, samples=samples, seed=seed)
    lengths = np.random.default_rng(seed).integers(3, 40, number)
    steps = language._batches(problem, lengths)
    size = min(samples or number, number)
    each = len(steps) // epochs
    assert each == sum(
        -(-part // batch) for part in np.diff([*range(0, size, language.POOL * batch), size])
    )
    shown = [
        sorted(text for step in steps[i * each : (i + 1) * each] for text in step)
        for i in range(epochs)
    ]
    assert shown == [sorted({*shown[0]})] * epochs
    assert len(shown[0]) == size
    assert max(map(len, steps)) <= batch


def test_batches_depend_on_the_seed_alone_and_have_texts_of_about_one_length() -> None:
    lengths = np.full(100, 20)
    one, again, other = (
        language._batches(Problem(samples=50, seed=seed, pretrained=pretrained), lengths)
        for seed, pretrained in ((0, True), (0, False), (1, True))
    )
    assert one == again != other
    fewer = language._batches(Problem(samples=10), lengths)
    assert {i for step in fewer for i in step} < {i for step in one for i in step}
    lengths = np.random.default_rng(0).integers(5, 60, 4000)
    steps = language._batches(Problem(batch=32, epochs=1), lengths)
    assert sum(len(step) * lengths[step].max() for step in steps) < 1.15 * lengths.sum()
    # Short and long ones come in turn.
    means = np.array([lengths[step].mean() for step in steps])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_numbers_tuned_and_texts_cut_off_are_reported(tiny: Problem) -> None:
    tokenizer = models.tokenizer(tiny.model)
    lengths = np.array([len(tokenizer(text)["input_ids"]) for text in text_files.LINES])
    head = 2 * 16 + 2
    attention, perceptron = 2 * 4 * 2 * (16 + 16), 2 * 2 * 2 * (16 + 24)
    sizes = {"attention": attention, "feed-forward": perceptron, "all": attention + perceptron}
    for tokens, (targets, size) in zip((16, 24, 28), sizes.items(), strict=True):
        method = Lora(targets=targets, rank=2)  # type: ignore[arg-type]
        (found,) = measure(tiny.replace(tokens=tokens), method=method)
        assert found.parameters == head + size
        assert found.cut_off == np.mean(lengths > tokens)


def test_what_full_tuning_changed_is_described(tiny: Problem) -> None:
    before = {name: torch.arange(384.0).reshape(16, 24) for name in ("one", "two")}
    change = torch.zeros(16, 24)
    # 9, 4, 1, 1 of 15: one direction has more than half, three have more than nine tenths.
    change[range(4), range(4)] = torch.tensor([3.0, 2.0, 1.0, 1.0])
    after = {"one": before["one"] + change, "two": before["two"] + 2 * change}
    table = pd.DataFrame(json.loads(language._changes(before, after)))
    assert [*table["layer"]] == ["one", "two"]
    assert table[["half", "most"]].to_numpy().tolist() == [[1, 3]] * 2
    np.testing.assert_allclose(table[["1", "2", "4"]], [[1, 2 / 3, 1 / 3]] * 2, rtol=1e-5)
    assert table[["8", "16"]].abs().to_numpy().max() < 1e-5
    for norm, scale, weight in zip(table["norm"], (1, 2), before.values(), strict=True):
        assert norm == pytest.approx(scale * math.sqrt(15) / float(weight.norm()), rel=1e-5)
    (unchanged, _) = json.loads(language._changes(before, before))
    assert (unchanged["norm"], unchanged["1"]) == (0, 0)
    (found,) = measure(tiny, method=Whole())
    table = pd.DataFrame(json.loads(found.changes))
    assert len(table) == 12
    assert (table["norm"] > 0).all()
