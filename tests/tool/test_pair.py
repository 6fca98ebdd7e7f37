"""Pairs of checkpoints: what is read, what differs, what is refused; and the texts for them."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoint_files as files
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorapower import randomness
from lorapower.checkpoints import Pair, _texts, read_texts
from lorapower.checkpoints._models import Checkpoint
from lorapower.errors import InputError

ARCHITECTURES = [
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertModel"),
    ("camembert", "CamembertForSequenceClassification"),
    ("roberta", "RobertaForSequenceClassification"),
    ("roberta", "RobertaModel"),
    ("xlm-roberta", "XLMRobertaForSequenceClassification"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("distilbert", "DistilBertModel"),
    ("gpt2", "GPT2LMHeadModel"),
    ("gpt2", "GPT2ForSequenceClassification"),
    ("gpt2", "GPT2Model"),
    ("llama", "LlamaForCausalLM"),
    ("llama", "LlamaForSequenceClassification"),
    ("mistral", "MistralForCausalLM"),
    ("phi3", "Phi3ForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
    ("qwen3", "Qwen3ForSequenceClassification"),
    ("gemma", "GemmaForCausalLM"),
    ("gemma2", "Gemma2ForCausalLM"),
    ("gemma2", "Gemma2ForSequenceClassification"),
    ("gemma3_text", "Gemma3ForCausalLM"),
    ("gemma3_text", "Gemma3TextForSequenceClassification"),
    ("gemma3_text", "Gemma3TextModel"),
    ("modernbert", "ModernBertForSequenceClassification"),
    ("modernbert", "ModernBertModel"),
    ("olmo2", "Olmo2ForCausalLM"),
    ("olmo3", "Olmo3ForCausalLM"),
    ("smollm3", "SmolLM3ForCausalLM"),
    ("stablelm", "StableLmForCausalLM"),
    ("starcoder2", "Starcoder2ForCausalLM"),
]


@pytest.mark.parametrize(("kind", "architecture"), ARCHITECTURES)
def test_pairs_know_modules_and_all_else(kind: str, architecture: str, tmp_path: Path) -> None:
    pair = Pair.open(*files.pair(tmp_path, kind, architecture))
    network = pair.network()
    stored = dict(network.named_parameters())
    weights = {f"{name}.weight" for name in pair.modules}
    others = {other.name for other in pair.others}
    assert weights <= stored.keys()
    assert not weights & others
    # Together they are all that differs, and the tuned weights are the base's with them.
    different = {
        name
        for name in stored
        if not pair.base.has(name) or not torch.equal(pair.base.read(name), pair.tuned.read(name))
    }
    assert others <= different <= weights | others
    for module in pair.modules.values():
        assert torch.equal(
            pair.change(module.name), pair.weight("tuned", module) - pair.weight("base", module)
        )
        assert pair.change(module.name).shape == module.shape
        inside = "attn" in module.name or "attention" in module.name
        kind = "other" if "pooler" in module.name else "attention" if inside else "mlp"
        assert module.kind == kind
    assert {"attention", "mlp"} <= {module.kind for module in pair.modules.values()}
    pair.fill(network, "base")
    for name, value in network.named_parameters():
        assert torch.equal(value, pair.base.read(name))
    assert sum(pair.not_low_rank.values()) == sum(other.size for other in pair.others)


def test_a_base_without_prefix_or_head(tmp_path: Path) -> None:
    base, tuned = files.pair(tmp_path)

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for key in [*weights]:
            value = weights.pop(key)
            if not key.startswith("classifier"):
                new = key.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
                weights[new] = value
        # Of the head of its own training, and a buffer of older files.
        weights |= {"cls.bias": torch.zeros(3), "embeddings.position_ids": torch.arange(64)}

    files.alter(Path(base), rename)
    pair = Pair.open(base, tuned)
    assert {o.name for o in pair.others if o.kind == "head"} == {
        "classifier.weight",
        "classifier.bias",
    }
    network = pair.network()
    pair.fill(network, "base")
    assert torch.equal(network.classifier.weight, pair.tuned.read("classifier.weight"))


def test_checkpoints_in_several_files(tmp_path: Path) -> None:
    base, tuned = files.pair(tmp_path)
    for place in map(Path, (base, tuned)):
        weights = load_file(place / "model.safetensors")
        where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(weights)}
        for part in set(where.values()):
            save_file({n: w for n, w in weights.items() if where[n] == part}, place / part)
        (place / "model.safetensors").unlink()
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert len(Pair.open(base, tuned).modules) == 13
    Path(base, "part-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"a folder without part-1\.safetensors"):
        Pair.open(base, tuned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_in_single(dtype: torch.dtype, tmp_path: Path) -> None:
    pair = Pair.open(*files.pair(tmp_path, dtype=dtype))
    assert pair.network().dtype == torch.float32
    assert pair.change(next(iter(pair.modules))).dtype == torch.float32


INDEX = "model.safetensors.index.json"
WEIGHT = "bert.encoder.layer.0.attention.self.query.weight"
EMBEDDING = "bert.embeddings.word_embeddings.weight"
# What is done to the weights of a folder, or to its files, and what is said of it.
WEIGHTS: list[tuple[str, Any]] = [
    ("of one shape with the other", lambda w: w.update({WEIGHT: torch.ones(3, 3)})),
    ("resize both vocabularies", lambda w: w.update({EMBEDDING: torch.ones(70, 24)})),
    (f"got one without {WEIGHT}", lambda w: w.pop(WEIGHT)),
    ("got one with strange", lambda w: w.update(strange=torch.ones(2))),
    ("type i8", lambda w: w.update(q=torch.ones(2).char())),
    ("type f8_e4m3", lambda w: w.update(q=torch.ones(2).to(torch.float8_e4m3fn))),
]
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("quantized by gptq: .*before", {"quantization_config": {"quant_method": "gptq"}}),
    ("quantized by bitsandbytes: .*before", {"quantization_config": {"load_in_8bit": True}}),
    ("quantized by some method: .*before", {"quantization_config": {"bits": 3}}),
    ("type 'albert'", {"model_type": "albert"}),
    ("type 'qwen3_moe'", {"model_type": "qwen3_moe"}),
    ("type 'gemma3'", {"model_type": "gemma3"}),
    ("got BertForMaskedLM", {"architectures": ["BertForMaskedLM"]}),
    ("got MyBertModel", {"architectures": ["MyBertModel"]}),
]
FILES: list[tuple[str, Any]] = [
    *[(match, functools.partial(files.alter, change=change)) for match, change in WEIGHTS],
    *[(match, functools.partial(files.configure, **values)) for match, values in CONFIGS],
    ("an adapter by LoRA", lambda p: (p / "adapter_config.json").write_text("{}")),
    ("without config.json: name the", lambda p: (p / "config.json").unlink()),
    ("without model.safetensors", lambda p: (p / "model.safetensors").unlink()),
    ("which is damaged", lambda p: (p / "model.safetensors").write_bytes(b"damaged")),
    *[
        (r"index\.json, which is damaged", lambda p, index=index: (p / INDEX).write_text(index))
        for index in ("{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}')
    ],
]


def test_what_cannot_be_planned_for_is_refused(tmp_path: Path) -> None:
    base, tuned = files.pair(tmp_path / "whole")
    for match, alter in FILES:
        place = tmp_path / "altered"
        shutil.copytree(tuned, place)
        alter(place)
        with pytest.raises(InputError, match=f"tuned must be .*{match}"):
            Pair.open(base, str(place))
        shutil.rmtree(place)
    place = Path(shutil.copytree(tuned, tmp_path / "strange"))
    files.configure(place, num_hidden_layers="two")
    with pytest.raises(InputError, match=r"model must be .* error for field 'num_hidden_layers'"):
        Pair.open(base, str(place))
    files.alter(Path(base), lambda w: w.pop(WEIGHT))
    with pytest.raises(InputError, match="base must be with all weights of the blocks"):
        Pair.open(base, tuned)
    _, other = files.pair(tmp_path / "gpt2", "gpt2", "GPT2LMHeadModel")
    with pytest.raises(InputError, match="tuned must be of type 'bert', like the base; got gpt2"):
        Pair.open(tuned, other)


# Entries of the tuned configuration with which the base's weights are another function.
OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "BertForSequenceClassification", {"layer_norm_eps": 0.1}),
    ("bert", "BertForSequenceClassification", {"hidden_act": "relu"}),
    ("bert", "BertModel", {"num_attention_heads": 2}),
    ("bert", "BertModel", {"is_decoder": True}),
    ("gpt2", "GPT2LMHeadModel", {"scale_attn_weights": False}),
    ("llama", "LlamaForCausalLM", {"rms_norm_eps": 0.1}),
    ("llama", "LlamaForCausalLM", {"num_attention_heads": 2}),
    ("llama", "LlamaForCausalLM", {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    ("gemma2", "Gemma2ForCausalLM", {"final_logit_softcapping": 9.0}),
    ("gemma2", "Gemma2ForCausalLM", {"sliding_window": 2}),
    ("modernbert", "ModernBertForSequenceClassification", {"classifier_pooling": "mean"}),
    ("gpt2", "GPT2ForSequenceClassification", {"pad_token_id": 7}),
    ("roberta", "RobertaModel", {"pad_token_id": 1}),
    ("qwen2", "Qwen2ForCausalLM", {"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
]


@pytest.mark.parametrize(("kind", "architecture", "entries"), OTHERS, ids=str)
def test_other_configurations_are_refused_by_name(
    kind: str, architecture: str, entries: dict[str, Any], tmp_path: Path
) -> None:
    """Adapters are served with the base's: weights alone are what they carry."""
    base, tuned = files.pair(tmp_path, kind, architecture, pad_token_id=0)
    before = Pair.open(base, tuned).tuned.config
    files.configure(Path(tuned), **entries)
    (name, value), *_ = sorted(entries.items())
    match = re.escape(f"{name} {value!r} instead of {getattr(before, name)!r}")
    with pytest.raises(InputError, match=f"tuned must be with the base's .*; got {match}"):
        Pair.open(base, tuned)


SAME: dict[str, Any] = {
    "use_cache": False,
    "id2label": {"0": "bad", "1": "good"},
    "label2id": {"bad": 0, "good": 1},
    "hidden_dropout_prob": 0.5,
    "attn_pdrop": 0.5,
    "classifier_dropout": 0.5,
    "attention_dropout": 0.5,
    "eos_token_id": 3,
    "initializer_range": 0.5,
    "dtype": "bfloat16",
    "transformers_version": "4.1",
    "unsloth_version": "1",
    "max_position_embeddings": 99,
    "max_window_layers": 1,
    "chunk_size_feed_forward": 2,
    "position_embedding_type": "absolute",
    "transformers.js_config": {"dtype": "q4"},
    "sentence_transformers": {"version": "1"},
}


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("bert", "BertForSequenceClassification"),
        ("gpt2", "GPT2ForSequenceClassification"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
    ],
)
def test_entries_that_change_no_function_may_differ(
    kind: str, architecture: str, tmp_path: Path
) -> None:
    base, tuned = files.pair(tmp_path, kind, architecture, pad_token_id=0)
    # Positions that are learned are weights.
    learned = {"max_position_embeddings"} if kind in ("bert", "gpt2") else set()
    network = Pair.open(base, tuned).network()
    files.configure(Path(tuned), **{n: v for n, v in SAME.items() if n not in learned})
    if not architecture.endswith("CausalLM"):
        files.configure(Path(tuned), tie_word_embeddings=kind == "gpt2")
        files.configure(Path(base), tie_word_embeddings=kind != "gpt2")
    pair = Pair.open(base, tuned)
    ids = torch.arange(4, 24).reshape(2, 10)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        one, other = (each(**given).logits for each in (network, pair.network()))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    # What only one of them pads with is none of the network's, which does not compute it.
    files.configure(Path(base), pad_token_id=None)
    Pair.open(base, tuned)


def test_weights_of_the_base_that_no_network_of_its_configuration_has(tmp_path: Path) -> None:
    base, tuned = files.pair(tmp_path / "deep", "llama", "LlamaForCausalLM", num_hidden_layers=3)
    for place in map(Path, (base, tuned)):
        files.configure(place, num_hidden_layers=2)
    with pytest.raises(InputError, match=r"base must be of as many blocks .* got model\.layers\.2"):
        Pair.open(base, tuned)
    tied: dict[str, Any] = {"tie_word_embeddings": True}
    base, tuned = files.pair(tmp_path / "tied", "llama", "LlamaForCausalLM", **tied)

    def head(weights: dict[str, torch.Tensor], more: float) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + more

    for place in map(Path, (base, tuned)):
        files.alter(place, functools.partial(head, more=0.0))
    Pair.open(base, tuned)
    for place in map(Path, (base, tuned)):
        files.alter(place, functools.partial(head, more=1.0))
        with pytest.raises(InputError, match=r"lm_head\.weight.* tie_word_embeddings"):
            Pair.open(base, tuned)
        files.alter(place, functools.partial(head, more=0.0))


def test_code_of_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = files.pair(tmp_path)
    files.configure(Path(tuned), model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    Path(tuned, "mine.py").write_text("raise SystemExit")
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    with pytest.raises(InputError, match=f"^model must be .*{tuned}") as refused:
        Pair.open(base, tuned)
    assert "contains custom code" in str(refused.value.__cause__)


def test_weights_that_are_not_finite_are_refused_when_read(tmp_path: Path) -> None:
    base, tuned = files.pair(tmp_path)
    files.alter(Path(tuned), lambda w: w[WEIGHT].view(-1)[:2].fill_(torch.nan))
    pair = Pair.open(base, tuned)
    with pytest.raises(InputError, match=rf"tuned must be of finite weights; got {WEIGHT} with 2"):
        pair.network()


def test_missing_folders_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="base must be a folder that exists"):
        Checkpoint("base", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match="'somebody/model': no such folder, and the hub did not give it"
    ):
        Checkpoint("base", "somebody/model")


def test_checkpoints_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = files.pair(tmp_path)
    asked = []

    def fetched(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, tuple(allow_patterns)))
        return tuned

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    pair = Pair.open(base, "somebody/tuned")
    assert [name for name, _ in asked] == ["somebody/tuned"]
    assert "*.safetensors" in asked[0][1]
    assert "*.bin" not in asked[0][1]
    assert pair.tuned.source == "somebody/tuned"


class TestTexts:
    config = SimpleNamespace(
        model_type="bert",
        hidden_size=8,
        num_hidden_layers=2,
        vocab_size=64,
        max_position_embeddings=10,
    )

    def prepared(
        self, given: Any, test: Any = None, *, seed: int = 0, budget: float | None = None
    ) -> _texts.Texts:
        pair: Any = SimpleNamespace(
            tokenizer=files.words(), tuned=SimpleNamespace(config=self.config)
        )
        return _texts.prepare(pair, given, test, tokens=128, seed=seed, budget=budget)

    def test_parts_share_nothing_and_lose_nothing(self) -> None:
        given = files.texts(160)
        found = self.prepared([*given, *given[:20], "  "])
        there = [
            tuple(row[mask.bool()].tolist())
            for part in (found.fit, found.select, found.test)
            for batch in part
            for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        assert len(there) == len(set(given))
        assert _texts.count(found.test) == 80
        assert (_texts.count(found.fit), _texts.count(found.select)) == (60, 20)
        assert found.cut == sum(len(text.split()) > 10 for text in given)

    def test_budgets_are_kept(self) -> None:
        given = files.texts(400)
        for budget in (700, 1000, 10**6):
            found = self.prepared(given, budget=budget)
            planning, stated = [*found.fit, *found.select], found.test
            number = _texts.count(planning)
            assert number == _texts.count(stated)
            tokens = sum(int(batch.attention_mask.sum()) for batch in planning)
            assert tokens == pytest.approx(budget, rel=0.1) or number == 200
        # How many texts state errors does not depend on their own lengths.
        others = [text + " and more" for text in files.texts(200, 1)]
        for held_out in (files.texts(200, 1), others):
            found = self.prepared(files.texts(200), held_out, budget=900)
            assert _texts.count(found.test) == _texts.count([*found.fit, *found.select])
        with pytest.raises(InputError, match=r"^budget must be at least \d+ tokens, for 60 texts"):
            self.prepared(given, budget=50)

    def test_texts_are_known_in_the_order_in_which_they_were_drawn(self) -> None:
        """Batches sort them by length, and limits that bet on one after another need it."""
        given = files.texts(200)
        found = self.prepared(given, seed=1)
        rows = [
            row[mask.bool()].tolist()
            for batch in found.test
            for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        lengths = np.array([*map(len, rows)])
        assert (np.diff(lengths) >= 0).all()
        places = torch.cat([batch.drawn for batch in found.test]).tolist()
        drawn = [row for _, row in sorted(zip(places, rows, strict=True))]
        order = np.random.default_rng(randomness.number(1, "planning texts")).permutation(200)
        tokens = files.words()([given[i] for i in order[:100]], truncation=True, max_length=10)
        assert drawn == tokens["input_ids"]

    def test_one_seed_is_one_choice(self) -> None:
        parts = [self.prepared(files.texts(160), seed=seed).test[0] for seed in (1, 1, 2)]
        one, same, other = (part.input_ids.tolist() for part in parts)
        assert one == same != other

    def test_large_networks_get_small_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = self.config
        units = config.hidden_size * config.num_hidden_layers
        monkeypatch.setattr(_texts, "LOAD", 25 * 16 * units)
        for batch in self.prepared(files.texts(160)).fit:
            assert batch.input_ids.numel() <= 25 or len(batch.input_ids) == 1

    @pytest.mark.parametrize(
        ("given", "held_out", "name"),
        [
            ([], None, "texts"),
            (files.texts(119), None, "texts"),
            ([*files.texts(60)] * 3, None, "texts"),
            (files.texts(60), files.texts(59, 1), "held_out"),
            (files.texts(80), files.texts(80), "held_out"),
            ("one text", None, "texts"),
            ([*files.texts(140), "half of one \ud83d"], None, "texts"),
            (files.texts(60), [*files.texts(60, 1), "\udc00"], "held_out"),
        ],
    )
    def test_too_few_or_wrong_ones_are_refused(self, given: Any, held_out: Any, name: str) -> None:
        with pytest.raises(InputError, match=f"^{name} must be"):
            self.prepared(given, held_out)

    def test_files_of_texts(self, tmp_path: Path) -> None:
        plain, lines = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
        plain.write_text("one\ntwo ü\n", encoding="utf-8")
        lines.write_text('{"text": "one"}\n\n{"text": "two ü"}\n', encoding="utf-8")
        assert read_texts(plain) == read_texts(lines) == ["one", "two ü"]
        lines.write_text('{"text": "one", "label": 1}\n{"text": "two", "label": "no"}\n')
        assert read_texts(lines) == {"one": 1, "two": "no"}
        lines.write_text('{"text": "one", "label": 1}\n{"text": "two"}\n')
        assert read_texts(lines) == ["one", "two"]
        lines.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
        plain.write_bytes(b"one\rtwo\r")
        assert read_texts(plain) == read_texts(lines) == ["one", "two"]
        lines.write_text('{"messages": [{"role": "user", "content": "one"}]}\n')
        with pytest.raises(InputError, match=r"line 1: .*: write what the model is given"):
            read_texts(lines)
        lines.write_text('{"words": "one"}\n')
        plain.write_bytes(b"\xff\xfe")
        for wrong in (lines, plain, tmp_path / "nowhere"):
            with pytest.raises(InputError, match=f"^texts must be .*{wrong.name}"):
                read_texts(wrong)
