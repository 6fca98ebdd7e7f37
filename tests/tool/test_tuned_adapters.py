"""Adapters of peft in place of a tuned checkpoint: the same function and changes; refusals."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import checkpoint_files as files
import huggingface_hub
import peft
import pytest
import torch
import transformers
from test_pair import ARCHITECTURES
from torch import Tensor

from lorapower import InputError, lowrank, randomness
from lorapower.checkpoints import Pair, extract
from lorapower.checkpoints._models import quiet

TASKS = {
    "Classification": "SEQ_CLS",
    "LM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "Model": "FEATURE_EXTRACTION",
}


def task_of(architecture: str) -> str:
    return next(task for end, task in TASKS.items() if architecture.endswith(end))


def loaded(base: str, architecture: str) -> Any:
    with quiet():
        return getattr(transformers, architecture).from_pretrained(base).eval()


def train(folder: Path, base: str, architecture: str, *, seed: int = 0, **options: Any) -> str:
    """Write an adapter by peft whose trained parameters have random changes; returns its folder."""
    config: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": "all-linear",
        "task_type": task_of(architecture),
    } | options
    with quiet(), warnings.catch_warnings(action="ignore"):
        with randomness.seeded(seed, "started adapters"):
            wrapped = peft.get_peft_model(loaded(base, architecture), peft.LoraConfig(**config))
        draw = randomness.generator(seed, "trained adapters")
        with torch.no_grad():
            for value in wrapped.parameters():
                if value.requires_grad:
                    change = randomness.normal(draw, *value.shape, dtype=torch.float32)
                    value.add_(0.1 * change)
        wrapped.save_pretrained(str(folder))
    return str(folder)


def by_peft(base: str, architecture: str, *adapters: str) -> Any:
    with quiet(), warnings.catch_warnings(action="ignore"):
        network = loaded(base, architecture)
        wrapped = peft.PeftModel.from_pretrained(network, adapters[0], adapter_name="0")
        for number, adapter in enumerate(adapters[1:], 1):
            wrapped.load_adapter(adapter, adapter_name=str(number))
        return wrapped.eval()


def outputs(network: Any) -> Tensor:
    draw = randomness.generator(0, "tokens")
    ids = torch.randint(4, len(files.byte_words()), (3, 7), generator=draw)
    if network.config.pad_token_id is None:
        network.config.pad_token_id = 0
    with torch.no_grad():
        made = network(input_ids=ids, attention_mask=torch.ones_like(ids))
    values: Tensor = made.logits if "logits" in made else made.last_hidden_state
    return values


def require_same(pair: Pair, wrapped: Any) -> None:
    """The outputs of both networks are equal, and what each parameter changes by."""
    network = pair.network()
    wanted, before = outputs(wrapped), outputs(loaded(pair.base.source, pair.architecture))
    torch.testing.assert_close(outputs(network), wanted, rtol=1e-5, atol=1e-5)
    if before.shape == wanted.shape:
        assert (wanted - before).abs().max() > 1e-2
    if pair.tuned.config.tie_word_embeddings and wrapped.peft_config["0"].ensure_weight_tying:
        # It would add what is one twice.
        return
    merged = dict(copy.deepcopy(wrapped).merge_and_unload().named_parameters())
    for name, module in pair.modules.items():
        found, weight = pair.change(name), merged[f"{name}.weight"]
        change = (weight.mT if module.transposed else weight) - pair.weight("base", module)
        torch.testing.assert_close(found, change, rtol=1e-5, atol=1e-6)
        update = pair.update(name)
        if update is not None:
            torch.testing.assert_close(update.matrix(), change, rtol=1e-5, atol=1e-6)
    different = {
        name
        for name, value in merged.items()
        if name.rpartition(".")[0] not in pair.modules or name.endswith(".bias")
        if not pair.base.has(name) or not torch.equal(value, pair.base.read(name))
    }
    assert {other.name for other in pair.others} == different


@pytest.mark.parametrize(("kind", "architecture"), ARCHITECTURES)
def test_adapters_are_what_peft_computes(kind: str, architecture: str, tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path, kind, architecture)
    # It ends in the name of a head, which peft saves whole.
    adapter = train(tmp_path / "adapter", base, architecture, exclude_modules=["pre_classifier"])
    pair = Pair.open(base, adapter)
    assert (pair.architecture, pair.tuned.source) == (architecture, adapter)
    require_same(pair, by_peft(base, architecture, adapter))
    assert all(pair.update(name).rank == 3 for name in pair.modules)  # type: ignore[union-attr]


BERT, GPT, LLAMA = (
    ("bert", "BertForSequenceClassification"),
    ("gpt2", "GPT2LMHeadModel"),
    ("llama", "LlamaForCausalLM"),
)
TIED: dict[str, Any] = {"tie_word_embeddings": True}
OPTIONS: list[tuple[tuple[str, str], dict[str, Any], dict[str, Any]]] = [
    (BERT, {}, {"use_rslora": True, "r": 4}),
    (BERT, {}, {"rank_pattern": {"query": 2, r"layer\.1\..*output\.dense": 5}}),
    (
        BERT,
        {},
        {"alpha_pattern": {"0.attention.self.key": 9}, "rank_pattern": {"key": 1}, "use_rslora": 1},
    ),
    (BERT, {}, {"bias": "all"}),
    (BERT, {}, {"bias": "lora_only", "target_modules": ["query", "value"]}),
    (BERT, {}, {"lora_bias": True}),
    (BERT, {}, {"exclude_modules": ["key", "bert.encoder.layer.0.output.dense"]}),
    (BERT, {}, {"modules_to_save": ["pooler", "LayerNorm", "word_embeddings"]}),
    (BERT, {}, {"modules_to_save": ["1.output.dense"], "target_modules": ["query"]}),
    (BERT, {}, {"target_modules": ["query", "word_embeddings"]}),
    (BERT, {}, {"target_modules": ["query", "classifier"]}),
    (BERT, {}, {"trainable_token_indices": {"word_embeddings": [3, 5, 8]}}),
    (BERT, {}, {"layers_to_transform": [1], "target_modules": ["query", "dense"]}),
    (GPT, {}, {"fan_in_fan_out": True, "bias": "all", "target_modules": ["c_proj", "c_attn"]}),
    (GPT, {}, {"trainable_token_indices": [3, 5, 8]}),
    (LLAMA, {}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    (LLAMA, {}, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    (LLAMA, {}, {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}}),
    (LLAMA, TIED, {"trainable_token_indices": [3, 5, 8]}),
    (LLAMA, TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    (
        LLAMA,
        TIED,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
]


@pytest.mark.parametrize(("which", "sizes", "options"), OPTIONS, ids=str)
def test_options_of_peft(
    which: tuple[str, str], sizes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    base, _ = files.pair(tmp_path, *which, **sizes)
    adapter = train(tmp_path / "adapter", base, which[1], **options)
    pair = Pair.open(base, adapter)
    require_same(pair, by_peft(base, which[1], adapter))


def merged_by_hand(base: str, architecture: str, weights: dict[str, float]) -> dict[str, Tensor]:
    """The base's parameters plus weighted changes of merged adapters."""
    start = dict(loaded(base, architecture).named_parameters())
    total = {name: value.detach().clone() for name, value in start.items()}
    for adapter, weight in weights.items():
        merged = by_peft(base, architecture, adapter).merge_and_unload()
        for name, value in merged.named_parameters():
            total[name] += weight * (value.detach() - start[name])
    return total


@pytest.mark.parametrize("which", [BERT, GPT, LLAMA], ids=str)
def test_several_adapters_with_weights(which: tuple[str, str], tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path, *which)
    one: dict[str, Any] = {
        "r": 2,
        "target_modules": ["key", "query", "c_attn", "c_proj", "q_proj", "up_proj"],
    }
    some: dict[str, Any] = {"r": 3, "use_rslora": True}
    # A head of their own would not be weighted by peft.
    options = [one, some] if which != BERT else [o | {"task_type": None} for o in (one, some)]
    first, second = (
        train(tmp_path / str(seed), base, which[1], seed=seed, **o)
        for seed, o in enumerate(options)
    )
    weights = {first: 0.7, second: -0.4}
    pair = Pair.open(base, weights)
    assert pair.tuned.source == f"0.7 × {first} + -0.4 × {second}"
    wrapped = by_peft(base, which[1], first, second)
    with warnings.catch_warnings(action="ignore"):
        wrapped.add_weighted_adapter(["0", "1"], [0.7, -0.4], "both", combination_type="cat")
    wrapped.set_adapter("both")
    torch.testing.assert_close(outputs(pair.network()), outputs(wrapped), rtol=1e-5, atol=1e-5)
    ranks = {pair.update(name).rank for name in pair.modules}  # type: ignore[union-attr]
    assert ranks == {3, 5}
    for name in pair.modules:
        update = pair.update(name)
        assert update is not None
        change = pair.weight("tuned", pair.modules[name]) - pair.weight("base", pair.modules[name])
        torch.testing.assert_close(update.matrix(), change, rtol=1e-5, atol=1e-6)
        assert int(lowrank.rank(update.matrix(), scale=1.0)) <= update.rank


def test_weights_scale_all_that_changes(tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path, *BERT)
    options: list[dict[str, Any]] = [
        {"bias": "all", "target_modules": ["query", "word_embeddings"]},
        {"lora_bias": True, "modules_to_save": ["word_embeddings", "LayerNorm"]},
        {"trainable_token_indices": {"word_embeddings": [3, 5]}, "modules_to_save": ["1.output"]},
    ]
    weights = {
        train(tmp_path / str(seed), base, BERT[1], seed=seed, **o): weight
        for seed, (o, weight) in enumerate(zip(options, (0.5, 1.0, -2.0), strict=True))
    }
    pair = Pair.open(base, weights)
    network = pair.network()
    for name, value in merged_by_hand(base, BERT[1], weights).items():
        torch.testing.assert_close(network.get_parameter(name), value, rtol=1e-5, atol=1e-5)
    assert pair.update("bert.encoder.layer.1.output.dense") is None
    assert pair.update("bert.encoder.layer.0.output.dense") is not None


def beheaded(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "classifier" in name]:
        del tensors[name]


def test_a_head_that_the_base_lacks(tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path, *BERT, num_labels=3)
    adapters = [train(tmp_path / str(s), base, BERT[1], seed=s) for s in range(2)]
    wrapped = by_peft(base, BERT[1], adapters[0])
    files.alter(
        Path(base), beheaded, architectures=["BertForMaskedLM"], id2label=None, label2id=None
    )
    pair = Pair.open(base, adapters[0])
    assert {o.name for o in pair.others} == {"classifier.weight", "classifier.bias"}
    assert pair.tuned.config.num_labels == 3
    torch.testing.assert_close(outputs(pair.network()), outputs(wrapped), rtol=1e-5, atol=1e-5)
    # Half of the change, and the head as it is.
    half = Pair.open(base, {adapters[0]: 0.5})
    assert half.tuned.read("classifier.bias").equal(pair.tuned.read("classifier.bias"))
    name = next(iter(pair.modules))
    torch.testing.assert_close(2 * half.change(name), pair.change(name))
    with pytest.raises(InputError, match="tuned must be adapters with one head"):
        Pair.open(base, dict.fromkeys(adapters, 0.5))
    headless = shutil.copytree(adapters[0], tmp_path / "headless")
    files.alter(headless, beheaded)
    with pytest.raises(InputError, match=r"headless', without .*classifier.*: train it with"):
        Pair.open(base, str(headless))
    # No task, but a head.
    files.configure(Path(adapters[0]), task_type=None)
    assert Pair.open(base, adapters[0]).task == "classification"


def test_adapters_without_a_task(tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path, *BERT)
    headless = train(tmp_path / "headless", base, "BertModel", task_type=None)
    require_same(Pair.open(base, headless), by_peft(base, "BertModel", headless))
    adapter = train(tmp_path / "adapter", base, BERT[1], task_type=None, target_modules=["value"])
    require_same(Pair.open(base, adapter), by_peft(base, BERT[1], adapter))
    # Names with that of the body are not of the body alone.
    files.configure(Path(adapter), task_type="FEATURE_EXTRACTION")
    with pytest.raises(InputError, match=r"which it lacks: name its own base, .*task_type"):
        Pair.open(base, adapter)


def test_the_tokenizer_is_the_adapters_if_it_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it comes from the hub."""
    base, _ = files.pair(tmp_path, *BERT)
    adapter = train(tmp_path / "adapter", base, BERT[1])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: adapter)
    pair = Pair.open(base, "somebody/adapter")
    assert pair.tuned.source == "somebody/adapter"
    assert pair.tokenizer("w1 w2") == files.byte_words()("w1 w2")
    files.words().save_pretrained(adapter)
    again = Pair.open(base, {adapter: 1})
    assert again.tokenizer("w1 w2").input_ids == [5, 6]
    name = next(iter(pair.modules))
    assert pair.change(name).equal(again.change(name))


KEY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    (r"another kind \(use_dora\): merge it", {"use_dora": True}),
    ("of type LOHA: merge it", {"peft_type": "LOHA"}),
    (r"\(alora_invocation_tokens\)", {"alora_invocation_tokens": [1, 2]}),
    ("started by pissa_niter_4.*: save", {"init_lora_weights": "pissa_niter_4"}),
    ("of TOKEN_CLS", {"task_type": "TOKEN_CLS"}),
    ("made for 'org/other': name that", {"base_model_name_or_path": "org/other"}),
    ("does not fit .*mismatch", {"r": 4}),
    ("does not fit", {"r": 0}),
    ("does not fit", {"lora_alpha": "many"}),
]
TENSORS: list[tuple[str, Any]] = [
    (f"{KEY} has 2 entries .*NaN", lambda t: t[KEY].view(-1)[:2].fill_(torch.nan)),
    ("1 entries .*infinite", lambda t: t[KEY].view(-1)[:1].fill_(-torch.inf)),
    ("with all its factors; .* without .*lora_A", lambda t: t.pop(KEY)),
    ("does not fit .*mismatch", lambda t: t.update({KEY: torch.ones(3, 9)})),
    ("without .*classifier.weight: train it", dict.clear),
    (
        "with .*strange.weight, which it lacks: name its own base",
        lambda t: t.update({"base_model.model.strange.weight": torch.ones(2)}),
    ),
]


def untrained(tensors: dict[str, Tensor]) -> None:
    beheaded(tensors)
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


REFUSALS: list[tuple[str, Any]] = [
    *[(match, functools.partial(files.configure, **values)) for match, values in CONFIGS],
    *[(match, functools.partial(files.alter, change=change)) for match, change in TENSORS],
    (
        "of which nothing is left: name one that was trained",
        functools.partial(files.alter, change=untrained, modules_to_save=None),
    ),
    ("config.json peft reads", lambda p: (p / "adapter_config.json").write_text("{")),
    ("file is missing or damaged", lambda p: (p / "adapter_model.safetensors").unlink()),
    ("file is missing or damaged", lambda p: (p / "adapter_model.safetensors").write_bytes(b"no")),
]


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path / "whole", *BERT)
    adapter = train(tmp_path / "adapter", base, BERT[1])
    for match, alter in REFUSALS:
        place = tmp_path / "altered"
        shutil.copytree(adapter, place)
        alter(place)
        with pytest.raises(InputError, match=f"tuned must be .*{match}"):
            Pair.open(base, str(place))
        shutil.rmtree(place)


def test_adapters_of_other_bases(tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path, *BERT)
    adapter = train(tmp_path / "adapter", base, BERT[1])
    # A folder that was moved keeps its name; one in the cache has it above.
    moved = shutil.copytree(base, tmp_path / "elsewhere" / "base")
    Pair.open(str(moved), adapter)
    cached = "/cache/hub/models--org--base/snapshots/0a1b2c"
    files.configure(Path(adapter), base_model_name_or_path=cached)
    Pair.open(str(moved), adapter)
    files.configure(Path(adapter), base_model_name_or_path=None)
    Pair.open(str(moved), adapter)
    files.configure(Path(adapter), base_model_name_or_path="org/other")
    with pytest.raises(InputError, match="base must be a checkpoint with all its weights"):
        Pair.open(adapter, base)
    with pytest.raises(
        InputError, match=r"made for 'org/other': name that base, or say .*--any-base"
    ):
        Pair.open(base, adapter)
    pair = Pair.open(base, adapter, any_base=True)
    require_same(pair, by_peft(base, BERT[1], adapter))
    deep, _ = files.pair(tmp_path / "deep", *BERT, num_hidden_layers=1)
    with pytest.raises(InputError, match="which it lacks: name its own base, 'org/other'"):
        Pair.open(deep, adapter, any_base=True)
    wide, _ = files.pair(tmp_path / "wide", *BERT, hidden_size=28)
    with pytest.raises(InputError, match=r"which does not fit .*mismatch.*: name the base"):
        Pair.open(wide, adapter, any_base=True)


def test_weights_that_cancel_or_are_none(tmp_path: Path) -> None:
    base, tuned = files.pair(tmp_path, *LLAMA)
    adapter = train(tmp_path / "adapter", base, LLAMA[1])
    same = str(shutil.copytree(adapter, tmp_path / "same"))
    third = str(shutil.copytree(adapter, tmp_path / "third"))
    cancelling: list[dict[str, float]] = [
        {adapter: 1, same: -1},
        {adapter: 0},
        {adapter: 0.1, same: 0.2, third: -0.3},
    ]
    for weights in cancelling:
        with pytest.raises(InputError, match=r"tuned must be .* nothing is left"):
            Pair.open(base, weights)
    assert Pair.open(base, {adapter: 1, same: -0.999}).change("model.layers.0.mlp.up_proj").any()
    wrong: list[Any] = [{}, None, {adapter: "1"}, {adapter: torch.nan}]
    for weights in wrong:
        with pytest.raises(InputError, match=r"^(tuned|weight of .*) must be"):
            Pair.open(base, weights)
    with pytest.raises(
        InputError, match=r"several have weights; got .*tuned without adapter_config"
    ):
        Pair.open(base, {adapter: 1, tuned: 1})
    other = train(tmp_path / "other", base, "LlamaModel")
    with pytest.raises(InputError, match=r"adapters of one task; got CAUSAL_LM of .*, FEATURE_EXT"):
        Pair.open(base, {adapter: 1, other: 1})


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["lm_head"]}], ids=str
)
def test_embeddings_that_are_the_head_change_as_one(
    options: dict[str, Any], tmp_path: Path
) -> None:
    base, _ = files.pair(tmp_path, *LLAMA, **TIED)
    adapter = train(tmp_path / "adapter", base, LLAMA[1], **options)
    with pytest.raises(InputError, match="alone: train with ensure_weight_tying=True, or save"):
        Pair.open(base, adapter)
    # As the message says.
    network = loaded(base, LLAMA[1])
    network.config.tie_word_embeddings = False
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    untied = str(tmp_path / "untied" / "base")
    network.save_pretrained(untied)
    require_same(Pair.open(untied, adapter), by_peft(untied, LLAMA[1], adapter))


def test_a_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path, *LLAMA)
    adapter = train(tmp_path / "adapter", base, LLAMA[1], modules_to_save=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.weight"
    files.alter(Path(adapter), lambda t: t.update({name: torch.ones(304, 24)}))
    with pytest.raises(InputError, match=r"does not fit .*: name the base .* vocabulary"):
        Pair.open(base, adapter)
    rows = train(tmp_path / "rows", base, LLAMA[1], trainable_token_indices=[3, 5])
    files.configure(Path(rows), trainable_token_indices=[3, 400])
    with pytest.raises(InputError, match=r"does not fit .*: name the base .* vocabulary"):
        Pair.open(base, rows)


def test_an_adapter_is_shrunk_to_what_is_asked_for(tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path, *BERT)
    options: dict[str, Any] = {"bias": "all", "modules_to_save": ["1.output.LayerNorm"]}
    adapter = train(tmp_path / "adapter", base, BERT[1], r=6, **options)
    made = extract(base, adapter, files.texts(), tmp_path / "out", rank=6)
    assert made.measured.error < 1e-4
    assert max(made.ranks.values()) <= 6
    smaller = extract(base, adapter, files.texts(), tmp_path / "small", error=0.5)
    assert smaller.adapter.parameters < made.adapter.parameters
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert (report["tuned"], report["not_low_rank"].keys()) == (adapter, {"bias", "norm", "head"})
    wanted, found = by_peft(base, BERT[1], adapter), by_peft(base, BERT[1], str(tmp_path / "out"))
    torch.testing.assert_close(outputs(found), outputs(wanted), rtol=1e-4, atol=1e-4)
    # What was written is an adapter of the base again.
    again, pair = Pair.open(base, str(tmp_path / "out")), made.planner.pair
    assert again.others == pair.others
    for name in pair.modules:
        torch.testing.assert_close(again.change(name), pair.change(name), rtol=1e-4, atol=1e-5)
