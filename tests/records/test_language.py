"""Encoders and decoders: what of them is tuned, on which texts, and what runs find."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import checkpoint_files as files
import numpy as np
import pandas as pd
import peft
import pytest
import text_files
import torch
import transformers
from conftest import ROOT

import records
from records import language, models, unpack
from records.language import TARGETS, Lora, Method, TextProblem, TextRun, Whole
from records.texts import Examples

LINES = [*files.texts()[:30], *(text[:9] for text in files.texts()[:10])]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_files.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_files.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Iterator[dict[str, Examples]]:
    """All texts that there are, by part: for the decoder more, of its words."""
    lines = LINES if "following" in request.fixturenames else text_files.LINES
    with text_files.shown(lines) as parts:
        yield parts


@pytest.fixture
def sign(bert: str, shown: dict[str, Examples]) -> TextProblem:
    """For the encoder: the class of a text."""
    return TextProblem(model=bert, epochs=1, batch=4, tokens=16)


@pytest.fixture
def following(llama: str, shown: dict[str, Examples]) -> TextProblem:
    """For the decoder: the next tokens."""
    shared: dict[str, Any] = {"epochs": 1, "batch": 4, "tokens": 24}
    return TextProblem(task="movies-next", model=llama, head="own", **shared)


def tune(problem: TextProblem, method: Method | None = None) -> language.TextResults:
    (found,) = language.measure([TextRun(problem=problem, method=method or Lora(rank=2))])
    return found


def build(problem: TextProblem, method: Method | None = None) -> Any:
    return language.prepare(TextRun(problem=problem, method=method or Whole(kind="head")))


def tuned(network: Any) -> dict[str, int]:
    return {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}


# Networks


def test_pretrained_weights_are_those_shipped_and_random_ones_are_not(sign: TextProblem) -> None:
    shipped = models.load(transformers.AutoModel, sign.model).state_dict()
    for pretrained in (True, False):
        own = build(sign.replace(pretrained=pretrained)).base_model.state_dict()
        same = [torch.equal(own[k], shipped[k]) for k in own if "dense.weight" in k]
        assert all(same) if pretrained else not any(same)


def test_what_is_tuned(sign: TextProblem) -> None:
    def of(method: Method) -> set[str]:
        return {*tuned(build(sign, method))}

    adapters = {t: {n for n in of(Lora(targets=t, rank=2)) if "lora_" in n} for t in TARGETS}
    # Query, key, value and output of two layers; with the two of each perceptron.
    assert (len(adapters["attention"]), len(adapters["all"])) == (2 * 2 * 4, 2 * 2 * 6)
    assert adapters["attention"] | adapters["feed-forward"] == adapters["all"]
    assert not adapters["attention"] & adapters["feed-forward"]
    some = {name for name in adapters["all"] if ".query." in name or ".key." in name}
    assert adapters["queries and keys"] == some
    for names in (of(Lora(rank=2)), of(Whole(kind="final"))):
        assert len([n for n in names if "classifier" in n]) == 2
    final = {n for n in of(Whole(kind="final")) if "classifier" not in n}
    assert final
    assert all("layer.1." in name for name in final)
    network = build(sign)
    assert {name.split(".")[0] for name in tuned(network)} == {"classifier"}
    every = {name for name, _ in network.named_parameters()}
    assert of(Whole()) == every
    linear = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    assert of(Whole(kind="linear")) == {n for n in every if n.rpartition(".")[0] in linear}


def test_the_mean_head_is_linear_on_the_tokens_that_are_there(sign: TextProblem) -> None:
    network = build(sign).eval()
    ids = torch.arange(4, 10)
    with torch.no_grad():
        encoder = models.load(transformers.AutoModel, sign.model).eval()
        hidden = encoder(input_ids=ids[None]).last_hidden_state[0]
        wanted = network.classifier.weight @ hidden.mean(0) + network.classifier.bias
        padded = torch.cat([ids, torch.ones(3, dtype=torch.long)])[None]
        mask = torch.tensor([[1] * 6 + [0] * 3])
        found = network(input_ids=padded, attention_mask=mask, labels=torch.tensor([1]))
    torch.testing.assert_close(found["logits"][0], wanted, rtol=1e-4, atol=1e-5)
    wanted_loss = -torch.log_softmax(wanted, 0)[1]
    torch.testing.assert_close(found["loss"], wanted_loss, rtol=1e-4, atol=1e-5)


# Answers


def tokens(model: str, *, end: str) -> list[torch.Tensor]:
    tokenizer = models.tokenizer(model)
    return [torch.tensor(tokenizer(line + end)["input_ids"][:24]) for line in LINES]


def test_next_tokens_are_answered_as_for_each_text_alone(
    following: TextProblem, shown: dict[str, Examples]
) -> None:
    network = models.decoder(following.model).eval()
    every, losses = tokens(following.model, end="</s>"), []
    for ids in every:
        with torch.no_grad():
            logits = network(input_ids=ids[None]).logits[0, :-1].double()
        losses.append(-torch.log_softmax(logits, 1).gather(1, ids[1:, None]).mean().item())
    lengths = {len(ids) for ids in every}
    assert max(lengths) == 24 > 2 * min(lengths)  # some are cut off, some padded
    found = language.answer(network, following)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    # Without training the base is measured.
    untrained = tune(following, Whole(kind="head"))
    np.testing.assert_allclose(unpack(untrained.answers), losses, rtol=1e-5)
    assert untrained.parameters == 0
    assert untrained.score == pytest.approx(-np.mean(losses), rel=1e-5)


def test_a_decoder_tells_classes_from_the_last_token(following: TextProblem) -> None:
    problem = following.replace(task="movies")
    network = build(problem).eval()
    classes = []
    for ids in tokens(problem.model, end=""):
        with torch.no_grad():
            hidden = network.model(input_ids=ids[None]).last_hidden_state[0, -1]
        classes.append((network.score.weight @ hidden).argmax().item())
    assert {*classes} == {0, 1}
    np.testing.assert_array_equal(language.answer(network, problem), classes)


def test_the_adapter_to_paste_is_the_one_that_ran(following: TextProblem) -> None:
    """Chapter 12's, of which there are records; the default has peft's own scale."""
    text = (ROOT / "chapters" / "12-language.ipynb").read_text(encoding="utf-8")
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
    (block,) = (cell.split("```")[1] for cell in cells if "```python\nfrom peft" in cell)
    shown: dict[str, Any] = {}
    exec(block.removeprefix("python\n"), shown)
    pasted, given = shown["adapter"], shown["arguments"]
    ways = [Lora(rank=pasted.r, recipe=recipe) for recipe in ("plain", "default")]
    with models.quiet():
        networks = [peft.get_peft_model(models.decoder(following.model), pasted)]
    networks += [build(following, way) for way in ways]
    scales = [
        {m.scaling["default"] for m in network.modules() if hasattr(m, "lora_A")}
        for network in networks
    ]
    assert scales == [{1.0}, {1.0}, {0.5}]
    assert tuned(networks[0]) == tuned(networks[1]) == tuned(networks[2])
    columns = {
        "rank": pasted.r,
        "learning_rate": given.learning_rate,
        "batch": given.per_device_train_batch_size,
        "epochs": given.num_train_epochs,
    }
    recorded = records.read("recipes").query("recipe == 'plain'")
    assert recorded[[*columns]].drop_duplicates().to_dict("records") == [columns]
    assert (given.warmup_steps, given.weight_decay) == (0.1, 0)


# Runs


def test_runs_repeat_bit_by_bit_and_print_nothing(
    sign: TextProblem, shown: dict[str, Examples], capfd: pytest.CaptureFixture[str]
) -> None:
    sign = sign.replace(tokens=28)
    one, again, other = (tune(sign.replace(seed=seed)) for seed in (0, 0, 1))
    assert capfd.readouterr() == ("", "")
    assert one.training_loss == again.training_loss != other.training_loss
    right = unpack(one.answers) == shown["validation"].labels
    assert one.score == right.mean()
    assert one.baseline == 0.5
    lengths = [len(models.tokenizer(sign.model)(text)["input_ids"]) for text in text_files.LINES]
    assert one.cut_off == np.mean(np.array(lengths) > 28)


def test_what_full_tuning_changed_is_described(sign: TextProblem) -> None:
    before = {name: torch.arange(384.0).reshape(16, 24) for name in ("one", "two")}
    change = torch.zeros(16, 24)
    # 9, 4, 1, 1 of 15: one direction has more than half, three have more than nine tenths.
    change[range(4), range(4)] = torch.tensor([3.0, 2.0, 1.0, 1.0])
    after = {"one": before["one"] + change, "two": before["two"] + 2 * change}
    table = pd.DataFrame(json.loads(language._changes(before, after)))
    assert table[["layer", "half", "most"]].to_numpy().tolist() == [["one", 1, 3], ["two", 1, 3]]
    np.testing.assert_allclose(table[["1", "2", "4"]], [[1, 2 / 3, 1 / 3]] * 2, rtol=1e-5)
    size = math.sqrt(15) / float(before["one"].norm())
    np.testing.assert_allclose(table.norm, [size, 2 * size], rtol=1e-5)
    (unchanged, _) = json.loads(language._changes(before, before))
    assert (unchanged["norm"], unchanged["1"]) == (0, 0)
    changes = json.loads(tune(sign, Whole()).changes)
    assert len(changes) == 12
    assert all(row["norm"] > 0 for row in changes)
