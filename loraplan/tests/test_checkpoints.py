"""Planning, writing and checking adapters for small pairs of checkpoints."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoint_files as files
import numpy as np
import pytest
import torch
from checkpoint_files import Patch
from huggingface_hub import ModelCard
from safetensors import SafetensorError

import loraplan
from loraplan import (
    Adapter,
    InputError,
    LoraplanError,
    Pair,
    Plan,
    Planner,
    ResultsError,
    _effect,
    _export,
    _measuring,
    _randomness,
    _streams,
    _texts,
    lab,
    workflow,
)
from loraplan._folders import write_folder
from loraplan._lowrank import LowRank
from loraplan._measuring import measure_networks
from loraplan._streams import stream

Places = tuple[str, str]
BERT, LLAMA = "BertForSequenceClassification", "LlamaForCausalLM"
TEXTS, FRESH = files.texts(140), files.texts(140, 1)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return files.pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def planner(places: Places) -> Planner:
    return Planner(Pair.open(*places), TEXTS, max_rank=8, carry="all")


@pytest.fixture(scope="module")
def planned(places: Places) -> Plan:
    return loraplan.plan(*places, TEXTS, size=1.0)


# What is measured


def test_errors_are_those_of_plain_code(planner: Planner) -> None:
    adapter = planner.uniform(planner.parameters(1))
    found = lab.measure(planner, adapter)

    networks = [planner.pair.network(which) for which in (adapter, "tuned", "base")]
    f, g, h = (files.plain(network, files.apart(planner.texts.test)) for network in networks)
    error = ((f - g).square().sum() / (h - g).square().sum()).sqrt()
    assert found.error == pytest.approx(float(error), rel=1e-4)
    assert found.agreement == float((f.argmax(1) == g.argmax(1)).double().mean())
    kl = (g.softmax(1) * (g.log_softmax(1) - f.log_softmax(1))).sum(1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-3)
    variation = (g.softmax(1) - f.softmax(1)).abs().sum(1).mean() / 2
    assert found.acceptance == pytest.approx(1 - float(variation), rel=1e-3)
    (measurement,) = planner.run((adapter, "test"))
    compared = measurement.compare()
    assert measurement.squares == pytest.approx(compared.squares, rel=1e-3)
    assert np.array_equal(measurement.differing, compared.differing)
    ways = (stream(planner.pair, which, planner.device) for which in ("base", "tuned"))
    base, tuned = measure_networks([(way, planner.test) for way in ways])
    assert (planner.test.error(base.squares), planner.test.error(tuned.squares)) == (1, 0)


@pytest.mark.parametrize(("architecture", "every"), [(BERT, 1), ("BertModel", 2)])
def test_moments_are_those_of_plain_code(
    architecture: str, every: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Of every second batch, where all have twice as many tokens as are wanted."""
    planner = Planner(Pair.open(*files.pair(tmp_path, architecture)), TEXTS)
    tokens = _texts.count_tokens(planner.texts.fit)
    monkeypatch.setattr(_effect, "MOMENT_TOKENS", tokens // every)
    name = next(n for n in planner.modules if n.endswith("1.intermediate.dense"))
    one = lab.moments(planner, [name])[name]
    kept: dict[str, Any] = {}

    def watch(_: Any, inputs: Any, outputs: Any) -> None:
        outputs.retain_grad()
        kept.update(x=inputs[0].detach(), y=outputs)

    network = planner.pair.network()
    place = network.get_submodule(name)
    place.weight.requires_grad_(True)
    place.register_forward_hook(watch)
    probes = _randomness.generator(0, "probes")
    gradients, inputs = [], []
    for batch in planner.texts.fit[every // 2 :: every]:
        found = files.outputs(network, batch, planner.pair.task)
        drawn = _randomness.normal(probes, *found.shape).to(found)
        (found * drawn).sum().backward()
        gradients.append(kept["y"].grad[batch.attention_mask.bool()])
        inputs.append(kept["x"][batch.attention_mask.bool()])
    g, x = torch.cat(gradients), torch.cat(inputs)
    assert torch.allclose(one.outputs, g, rtol=1e-3, atol=1e-5)
    assert torch.allclose(one.inputs, x, rtol=1e-3, atol=1e-5)


# Candidates


def test_candidates_cost_no_more_than_asked(planner: Planner) -> None:
    for rank in (0, 1, 3, 8):
        number = planner.parameters(rank)
        for adapter in (planner.candidate(number), planner.uniform(number)):
            costs = [planner.modules[name].cost * rank for name, rank in adapter.ranks.items()]
            assert adapter.parameters == sum(costs)
            assert max(adapter.ranks.values(), default=0) <= 8
        assert planner.candidate(number).parameters <= number
        # It is for no module of rank 0, whatever that costs.
        assert planner.uniform(number).parameters == max(number, planner.parameters(1))
        assert planner.uniform(number).ranks.keys() == planner.modules.keys()
    for adapter in (planner.candidate(planner.most), planner.uniform(planner.most)):
        assert planner.error(adapter) < 1e-5


def test_each_module_alone(planner: Planner) -> None:
    """A little of its change is lost as predicted, where biases make up for what they can."""
    names, gains = (
        [*planner.modules],
        torch.ones(len(planner.candidates.costs), dtype=torch.float64),
    )
    nothing = planner.losses(gains)
    assert nothing.keys() == planner.modules.keys()
    assert max(nothing.values()) < 1e-5
    for name in (names[0], names[-1]):
        some = gains.clone()
        some[planner.candidates.places[name]] = 0.9
        adapter = planner.with_gains(some)
        lost = planner.losses(adapter.gains)
        assert lost[name] == pytest.approx(planner.error(adapter), rel=0.1)
        assert max(lost[other] for other in names if other != name) < 1e-5 < lost[name]


def test_modules_of_a_kind_and_of_a_name(places: Places) -> None:
    some = Planner(Pair.open(*places), TEXTS, modules="attention", max_rank=4)
    assert {module.kind for module in some.modules.values()} == {"attention"}
    assert some.candidate(some.most).ranks.keys() <= some.modules.keys()
    one = Planner(Pair.open(*places), TEXTS, modules=r"layer\.1.*query", max_rank=1)
    assert [*one.modules] == ["bert.encoder.layer.1.attention.self.query"]


# Plans


def test_sizes_are_those_of_files(places: Places, tmp_path: Path) -> None:
    """At most so many megabytes, of factors and of what is carried; never more with less."""
    lost = []
    for size in (0.008, 0.012, 0.03, 1.0):
        plan = loraplan.extract(*places, TEXTS, tmp_path / str(size), size=size)
        assert plan.reached
        assert plan.size <= 1e6 * size
        table = plan.table()
        cost = ((table["out"] + table["in"]) * table["rank"]).sum()
        assert cost == plan.adapter.parameters <= plan.numbers
        lost.append(plan.measured.error)
    assert lost[0] > 10 * lost[-1]
    assert lost[-1] < 1e-4
    assert {"bias", "norm"} <= {*plan.adapter.carried}


def test_sizes_are_listed(places: Places) -> None:
    table = loraplan.prices(*places, TEXTS)
    assert table.bytes.is_monotonic_increasing
    assert table.same.iloc[-1] == 1
    assert table.own_effect.iloc[-1] < 0.01 < table.error[0]
    assert loraplan.plan(*places, TEXTS).promise == loraplan.Promise("same", 0.9)


@pytest.mark.parametrize(
    ("architecture", "modules", "seed", "beaten"),
    [("LlamaForCausalLM", "up_proj", 48, False), (BERT, "value", 0, True)],
)
def test_no_plan_loses_more_than_one_without_factors_or_the_base(
    architecture: str, modules: str, seed: int, beaten: bool, tmp_path: Path
) -> None:
    """One step of a module far from the tuned network may lead anywhere."""
    base, tuned = files.pair(tmp_path, architecture, change=files.low_rank(seed=seed))
    options: dict[str, Any] = {"modules": modules, "max_rank": 1}
    options["carry"] = "all"
    planner = Planner(Pair.open(base, tuned), TEXTS, **options)
    nothing = planner.error(planner.candidate(0))
    for made in (planner.no_worse(planner.candidate(planner.most)), planner.smallest(nothing / 2)):
        assert planner.error(made) <= nothing
    plan = loraplan.extract(base, tuned, TEXTS, tmp_path / "out", size=0.015, **options)
    assert (plan.measured.error > 1) == beaten
    assert plan.reached == (tmp_path / "out").is_dir() == (not beaten)
    if not beaten:
        # On texts for selection factors lose more.
        assert planner.error(planner.candidate(planner.most)) > nothing
        assert plan.adapter.parameters == 0


@pytest.mark.parametrize(("kind", "share"), [("error", 0.05), ("same", 0.9)])
def test_plans_are_certified(places: Places, tmp_path: Path, kind: str, share: float) -> None:
    out, asked = tmp_path / "out", {kind: share}
    plan = loraplan.extract(*places, TEXTS, out, **asked)  # type: ignore[arg-type]
    assert plan.reached
    measured = plan.measured
    assert measured.own_effect <= 0.05 if kind == "error" else measured.same >= 0.9
    report = json.loads((out / _export.REPORT).read_text())
    assert (report["promised"], report["reached"]) == ({"kind": kind, "share": share}, True)
    # Others are no limits after a search.
    assert ("same" in report, "own_effect" in report) == (kind == "same", kind == "error")
    if kind == "error":
        # A smaller one would miss; decisions of this pair are those of its base.
        number = plan.adapter.parameters // 4
        (small,) = plan.planner.run((plan.planner.candidate(number), "test"))
        assert plan.planner.test.summarize(small.compare()).own_effect > 0.05
    # What ends the search is what is printed of its end.
    (end,) = plan.planner.run((plan.adapter, "test"))
    for share in np.linspace(0.01, 0.99, 40):
        one = loraplan.Promise(kind, float(share))  # type: ignore[arg-type]
        assert one.passes(end) == one.holds(measured)
    # Checks keep nothing, and say more with more texts.
    kept = {file: file.read_bytes() for file in out.iterdir()}
    few, many, again = (
        loraplan.check(out, places[1], some, base=places[0])
        for some in (FRESH[:50], FRESH, FRESH[::-1])
    )
    assert kept == {file: file.read_bytes() for file in out.iterdir()}
    assert (few.texts, many.texts) == (50, 140)
    assert few.own_effect >= many.own_effect
    assert few.same_repeated < many.same_repeated <= many.same < 1
    assert many.same_repeated == again.same_repeated
    # The base that an adapter names is the default, and the same file gives the same plan.
    assert loraplan.check(out, places[1], FRESH).own_effect == many.own_effect
    assert loraplan.plan(*places, TEXTS[::-1], **asked).ranks == plan.ranks  # type: ignore[arg-type]


# Answers


ANSWERED = "GPT2LMHeadModel", LLAMA, "Gemma2ForCausalLM"
ROOM: dict[str, Any] = {"max_position_embeddings": 160}


def generated(network: Any, ids: torch.Tensor, ends: list[int], most: int = 64) -> list[int]:
    """A greedy answer, by the plainest code."""
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < most and (not answer or answer[-1] not in ends):
            rows = network(
                input_ids=torch.cat([ids, torch.tensor(answer, dtype=torch.int64)])[None]
            )
            answer.append(int(rows.logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("architecture", ANSWERED)
def test_one_pass_says_which_answers_are_the_same(
    architecture: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """As if both models had answered, some prompts with one token and some with as many as may be.

    Logits of such small networks are near each other.
    """
    monkeypatch.setattr(_measuring, "_TIE", 1e-6)
    base, tuned = files.pair(
        tmp_path,
        architecture,
        change=files.low_rank(size=0.1),
        eos_token_id=[2, *range(40, 100)],
        **ROOM,
    )
    given = [loraplan.Text(text) for text in FRESH[:60]]
    found = loraplan.check(base, tuned, given, answers=True)
    pair = Pair.open(base, tuned)
    batches, *_ = _texts.prepare_all(pair, given, 128)
    networks = [files.loaded(place, architecture) for place in (tuned, base)]
    answers = [[generated(n, ids, pair.ends) for n in networks] for ids in files.apart(batches)]
    same = sum(one == other for one, other in answers)
    lengths = [len(one) for one, _ in answers]
    assert 0 < same < 60, lengths
    assert min(lengths) < max(lengths)
    assert found.decisions == sum(lengths)
    assert found.verified == 60
    assert found.same_answers == 1 - loraplan.binomial_limit(60 - same, 60)
    first = sorted(
        len(one) if one == other else next(i for i, (x, y) in enumerate(zip(one, other)) if x != y)  # noqa: B905
        for one, other in answers
    )
    assert first[0] <= found.first_tokens <= max(lengths)
    assert 0 <= found.in_bfloat16 <= 1
    # The tuned model keeps its own; answers that are not its are none to keep.
    own = loraplan.check(tuned, tuned, given, answers=True)
    assert own.same_answers == 1 - loraplan.binomial_limit(0, 60)
    order = [int(place) for batch in batches for place in batch.places]
    known = {k: one for k, (one, _) in zip(order, answers, strict=True)}
    wrong = [t._replace(answer=known[k] if k % 2 else [5, 6]) for k, t in enumerate(given)]
    monkeypatch.setattr(_measuring, "_TIE", math.inf)
    assert loraplan.check(tuned, tuned, given, answers=True).verified == 0
    monkeypatch.setattr(_measuring, "_TIE", 1e-6)
    half = loraplan.check(tuned, tuned, wrong, answers=True)
    right = sum(known[k][:2] == [5, 6] and len(known[k]) == 3 for k in range(0, 60, 2)) + 30
    assert (half.verified, half.same_answers) == (
        right,
        1 - loraplan.binomial_limit(60 - right, 60),
    )


def test_answers_may_be_words(tmp_path: Path) -> None:
    base, tuned = files.pair(tmp_path, LLAMA, **ROOM)
    pair = Pair.open(base, tuned)
    text = loraplan.Text("w1 w2", answer=" w3 w4")
    batch = _texts.prepare_all(pair, [text], 128)[0][0]
    prompt, answer = (pair.tokenizer(words).input_ids for words in ("w1 w2", " w3 w4"))
    assert batch.input_ids[0].tolist() == prompt + answer
    assert batch.labels.tolist() == [*answer, pair.ends[0]]
    # What comes after the end is not looked at, and tokens need not name it.
    for other in (answer, [*answer, pair.ends[0], 5]):
        again = _texts.prepare_all(pair, [text._replace(answer=other)], 128)[0][0]
        assert again.labels.tolist() == batch.labels.tolist()
    assert batch.counts("language") == [len(answer) + 1]
    assert batch.counted[0].tolist() == [0] * (len(prompt) - 1) + [1] * (len(answer) + 1)
    with pytest.raises(InputError, match=r"answer must be words, or tokens of the model from 0"):
        _texts.prepare_all(pair, [text._replace(answer=[10**6])], 128)


def test_answers_are_promised(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(_measuring, "_TIE", 1e-6)
    base, tuned = files.pair(
        tmp_path, LLAMA, change=files.low_rank(size=0.1), eos_token_id=[*range(2, 60)], **ROOM
    )
    plan = loraplan.plan(base, tuned, TEXTS, same_answers=0.7)
    assert plan.reached
    assert plan.measured.same_answers >= 0.7
    assert plan.measured.verified == plan.measured.texts
    again = loraplan.plan(base, tuned, TEXTS, same_answers=0.99)
    assert not again.reached


def dequantized(folder: Path, place: str) -> str:
    """A checkpoint rounded to eight bits a row, as a file of such weights would be read."""
    network = files.loaded(place, LLAMA)
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim == 2:
                step = value.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
                value.copy_((value / step).round() * step)
    network.save_pretrained(folder)
    Pair.open(place, place).tokenizer.save_pretrained(folder)
    return str(folder)


def test_anything_that_loads_may_stand_in(tmp_path: Path) -> None:
    """It is measured as transformers runs it: in shares of the effect, and in decisions."""
    base, tuned = files.pair(tmp_path, LLAMA)
    out = tmp_path / "out"
    plan = loraplan.extract(base, tuned, TEXTS, out, size=0.015)
    merged = files.save_merged(tmp_path / "merged", plan)
    half = files.loaded(merged, LLAMA).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    plan.planner.pair.tokenizer.save_pretrained(tmp_path / "half")
    eight = dequantized(tmp_path / "eight", tuned)
    ids = files.apart(_texts.prepare_all(plan.planner.pair, FRESH, 128)[0])
    wanted, before = (files.plain(files.loaded(place, LLAMA), ids) for place in (tuned, base))
    for standin, dtype in [
        (merged, torch.float32),
        (str(tmp_path / "half"), torch.float32),
        (eight, torch.float32),
        (tuned, torch.float32),
        (tuned, torch.bfloat16),
    ]:
        options: Any = {"dtype": dtype, "attn_implementation": "eager"}
        rows = files.plain(files.loaded(standin, LLAMA, **options), ids).float()
        name = str(dtype).removeprefix("torch.")
        found = loraplan.check(standin, tuned, FRESH, base=base, dtype=name)
        error = float((rows - wanted).norm() / (before - wanted).norm())
        assert found.error == pytest.approx(error, rel=1e-5, abs=1e-6)
        equal = (rows.argmax(-1) == wanted.argmax(-1)).float().mean()
        assert found.agreement == pytest.approx(float(equal), abs=1e-6)
        alone = loraplan.check(standin, tuned, FRESH, dtype=name)
        assert alone.same == found.same
        assert math.isnan(alone.error)
        assert math.isnan(alone.own_effect)
    # The adapter is what was merged, and with a tuned adapter the base is its own.
    one, same = (loraplan.check(each, tuned, FRESH, base=base).error for each in (out, merged))
    assert one == pytest.approx(same, rel=1e-4)
    other = loraplan.check(merged, out, FRESH)
    assert other.error < 1e-4
    # Where all of 140 texts have the same decisions.
    assert other.same == 1 - loraplan.mean_limit(np.zeros(140)) > 0.97


@pytest.mark.parametrize(("architecture", "bias"), [(BERT, 0), ("BertModel", 0), (BERT, 0.3)])
def test_equal_matrices_need_no_factors(architecture: str, bias: float, tmp_path: Path) -> None:
    def change(name: str, value: torch.Tensor) -> torch.Tensor | None:
        return bias * torch.ones_like(value) if name.endswith("bias") else None

    places = files.pair(tmp_path, architecture, change=change)
    plan = loraplan.extract(*places, TEXTS, tmp_path / "out")
    assert plan.reached
    assert plan.adapter.parameters == 0
    assert {*plan.shares.values()} <= {0.0}
    assert plan.planner.equal == (not bias)
    assert plan.measured.error == 0 or bias
    # Without a head nothing is decided.
    assert math.isnan(plan.measured.agreement) == (architecture == "BertModel")


# Adapters in files


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (BERT, {}),
        ("GPT2LMHeadModel", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("LlamaForCausalLM", {"tie_word_embeddings": False}),
        ("Gemma2ForCausalLM", {"tie_word_embeddings": True}),
        ("Gemma3ForCausalLM", {"tie_word_embeddings": False}),
        ("ModernBertModel", {}),
    ],
)
def test_embeddings_and_heads_get_factors(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    change = files.low_rank(size=0.2, words=True)
    base, tuned = files.pair(tmp_path, architecture, change=change, **options)
    out = tmp_path / "out"
    plan = loraplan.extract(base, tuned, TEXTS, out, size=0.02)
    full = files.save_merged(tmp_path / "full", plan)
    pair = plan.planner.pair
    more = pair.task == "language" and bool(plan.adapter.carried)
    assert ("leaves out norms without a word" in (out / _export.CARD).read_text()) == more
    assert pair.words.keys() == plan.planner.modules.keys() & pair.words.keys()
    assert any(plan.ranks[name] for name in pair.words)
    assert not pair.not_low_rank.keys() & {"embedding"}
    # What peft reads lost what was measured, and what is merged does.
    tied = architecture.startswith("GPT2") or options.get("tie_word_embeddings", False)
    assert ("merge_and_unload" in (out / _export.CARD).read_text()) == tied
    loaded = _export.load(out, Pair.open(base, tuned), torch.device("cpu"))
    whole, reference = Pair.open(base, full).network(), plan.planner.test
    (measurement,) = measure_networks([(loaded, reference)])
    wanted = files.distances(whole, pair.network(), reference.batches, pair.task)
    rounding = 1e-6 * reference.effect.max()
    assert measurement.squares == pytest.approx(wanted.numpy(), rel=1e-3, abs=rounding)
    error = reference.error(wanted.numpy())
    assert plan.measured.error == pytest.approx(error, rel=1e-4, abs=1e-6)
    # As a tuned model it has these factors, and no more.
    again = Pair.open(base, str(out))
    again = again.with_words(again.words)
    for name, factors in plan.adapter.factors.items():
        same = again.multiplier(name)
        assert isinstance(same, LowRank)
        assert same.rank <= factors.rank
        torch.testing.assert_close(same.matrix(), factors.matrix(), rtol=1e-4, atol=1e-5)
    # Row by row they are exact, at many more numbers; or they stay.
    beside = Planner(Pair.open(base, tuned), TEXTS, modules="layer|h\\.")
    assert not {module.kind for module in beside.modules.values()} & {"embedding", "head"}
    assert beside.pair.not_low_rank["embedding"] > plan.adapter.parameters / 4


def test_what_was_written_is_replaced(places: Places, tmp_path: Path, monkeypatch: Patch) -> None:
    out = tmp_path / "out"
    out.mkdir()  # An empty one is as good as none.
    loraplan.extract(*places, TEXTS, out, size=0.015)
    there, before = [*out.iterdir()], (out / _export.CARD).read_text()
    assert {file.name for file in there} == {*_export.FILES}
    assert {file.stat().st_mode & 0o777 for file in there} == {0o644}
    loraplan.extract(*places, TEXTS, out, size=0.02, overwrite=True)
    assert (out / _export.CARD).read_text() != before
    assert [*tmp_path.iterdir()] == [out]
    # What its reader has put there is theirs, also while a plan is made.
    monkeypatch.setattr(workflow, "plan", lambda *_, **__: pytest.fail("work is done"))
    with pytest.raises(InputError, match="or replace it with --overwrite"):
        loraplan.extract(*places, TEXTS, out, size=0.015)
    (out / "notes").write_text("mine")
    with pytest.raises(InputError, match=r"out must be .*, with notes"):
        loraplan.extract(*places, TEXTS, out, size=0.015, overwrite=True)
    with (
        pytest.raises(ResultsError, match="this command has not written"),
        write_folder(out, own=_export.FILES),
    ):
        pass
    assert (out / "notes").read_text() == "mine"


def test_nothing_half_written_looks_finished(
    planned: Plan, tmp_path: Path, monkeypatch: Patch
) -> None:
    def full(folder: Path, *_: object) -> None:
        (folder / "begun").write_text("begun")
        raise SafetensorError("No space left")

    monkeypatch.setattr(workflow, "plan", lambda *_, **__: planned)
    monkeypatch.setattr(_export, "save", full)
    with pytest.raises(ResultsError, match=r"cannot be written \(No space left") as told:
        loraplan.extract("base", "tuned", TEXTS, tmp_path / "out")
    assert told.value.path == tmp_path / "out"
    assert not [*tmp_path.iterdir()]


def test_what_was_there_comes_back(tmp_path: Path, monkeypatch: Patch) -> None:
    out, rename = tmp_path / "out", Path.rename
    with write_folder(out) as partial:
        (partial / "old").write_text("old")

    def refused(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(KeyboardInterrupt), write_folder(out, own=["old"]) as partial:
        (partial / "new").write_text("new")
    assert (out / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_closed_folders_are_refused_at_once(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"^out must be in a folder that can be written to"):
        loraplan.extract("nowhere", "nowhere", TEXTS, tmp_path / "out")


def test_memory_is_asked_for_before_any_work(places: Places, monkeypatch: Patch) -> None:
    said: list[str] = []
    planner = Planner(Pair.open(*places), TEXTS, report=lambda stage, *_: said.append(stage))
    assert re.fullmatch(r"passing texts \(about 0\.5 GB of memory, .* GB free\)", said[0])
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1e8))
    monkeypatch.setattr(_streams, "advance", lambda *_: pytest.fail("texts are passed"))
    with pytest.raises(InputError, match=r"free memory must be about 0.5 GB .*; got 0\.1 GB"):
        Planner(planner.pair, TEXTS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("architecture", [BERT, "LlamaForCausalLM"])
def test_another_device_plans_the_same(architecture: str, tmp_path: Path) -> None:
    places = files.pair(tmp_path, architecture, change=files.low_rank(words=True))
    plans = [loraplan.plan(*places, TEXTS, size=0.02, device=d) for d in ("cpu", "cuda")]
    errors = [plan.measured.error for plan in plans]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_a_wrong_adapter_is_not_written(planned: Plan, tmp_path: Path, monkeypatch: Patch) -> None:
    save = _export.save

    def spoiled(folder: Path, pair: Pair, adapter: Adapter, rank: int | None) -> None:
        save(folder, pair, adapter._replace(factors={}))

    monkeypatch.setattr(workflow, "plan", lambda *_, **__: planned)
    monkeypatch.setattr(_export, "save", spoiled)
    with pytest.raises(LoraplanError, match="nothing was written"):
        loraplan.extract("base", "tuned", TEXTS, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_cards_say_what_is_promised(places: Places, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(workflow, "is_dequantized", lambda _: True)
    (Path(places[0]) / "README.md").write_text("---\nlicense: mit\n---\n")
    loraplan.extract(*places, TEXTS, tmp_path / "0", size=1.0, made_by="loraplan extract")
    loraplan.extract(*places, TEXTS, tmp_path / "1", same=0.9)
    monkeypatch.setattr(_measuring, "quantile_limit", lambda *_, **__: math.inf)
    loraplan.extract(*places, TEXTS, tmp_path / "2", size=1.0)
    assert json.loads((tmp_path / "2" / _export.REPORT).read_text())["own_effect"] is None
    one, other = ((tmp_path / k / _export.CARD).read_text() for k in "01")
    assert "Nothing is certified" in one
    assert 'from_pretrained(base, "FOLDER")' in one
    assert "num_labels=2)" in one
    assert "| made by | `loraplan extract` |" in one
    assert "At least 90% of decisions are the tuned model's, on average over texts" in other
    for card in (one, other):
        about: Any = ModelCard(card).data
        assert about.base_model_relation == "adapter"
        assert (about.license, about.library_name) == ("mit", "peft")
        assert about.pipeline_tag == "text-classification"
        assert "weights were dequantized" in card
    (result,) = about.eval_results
    assert (result.metric_type, result.metric_value) == ("same", 0.9)
