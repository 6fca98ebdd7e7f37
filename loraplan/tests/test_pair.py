"""Pairs of checkpoints: what is read, what differs, what is refused; and the texts for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from checkpoint_files import Patch
from safetensors.torch import load_file, save_file
from tokenizers import processors

from loraplan import (
    Adapter,
    InputError,
    Pair,
    Text,
    _export,
    _models,
    _randomness,
    _texts,
    read_texts,
)
from loraplan._lowrank import LowRank
from loraplan._streams import TextStates, advance, stream


@pytest.mark.parametrize("architecture", files.usually(files.ARCHITECTURES))
def test_pairs_know_modules_and_all_else(architecture: str, tmp_path: Path) -> None:
    pair = Pair.open(*files.pair(tmp_path, architecture))
    network = pair.network()
    stored = dict(network.named_parameters())
    weights = {f"{name}.weight" for name in pair.modules}
    others = {other.name for other in pair.others}
    assert not weights & others
    # Together they are all that differs, and the tuned weights are the base's with them.
    different = {
        name
        for name in stored
        if not pair.base.has(name) or not torch.equal(pair.base.read(name), pair.tuned.read(name))
    }
    assert others <= different <= weights | others
    for module in pair.modules.values():
        inside = "attn" in module.name or "attention" in module.name
        kind = "other" if "pooler" in module.name else "attention" if inside else "mlp"
        assert module.kind == kind
    assert {"attention", "mlp"} <= {module.kind for module in pair.modules.values()}
    for name, value in pair.network("base").named_parameters():
        assert torch.equal(value, pair.base.read(name))
    assert sum(pair.not_low_rank.values()) == sum(other.size for other in pair.others)


@pytest.mark.parametrize(
    "architecture", files.usually(files.ARCHITECTURES, files.SOME.__contains__)
)
def test_blocks_make_a_network(architecture: str, tmp_path: Path) -> None:
    """Also adapted ones, and those that peft has put an adapter into."""
    pair = Pair.open(*files.pair(tmp_path, architecture, change=files.low_rank(words=True)))
    pair = pair.with_words(pair.words)
    batches = _texts.prepare(pair, files.texts(), None, tokens=64).select
    assert any(not batch.attention_mask.all() for batch in batches) or pair.task == "classification"
    draw = _randomness.generator(0, "factors")

    def drawn(side: int) -> torch.Tensor:
        return _randomness.normal(draw, side, 2, dtype=torch.float32) / 8

    adapter = Adapter({n: LowRank(*map(drawn, m.shape)) for n, m in pair.modules.items()}, {})
    device = torch.device("cpu")
    _export.save(tmp_path / "adapter", pair, adapter)
    read_back = _export.load(tmp_path / "adapter", pair, device)
    ways: list[Any] = ["base", "tuned", adapter]
    passes = [TextStates(stream(pair, which, device), batches) for which in ways]
    passes.append(TextStates(read_back, batches))
    advance(passes)
    for which, passed in zip([*ways, adapter], passes, strict=True):
        network = pair.network(which)
        for batch, states in zip(batches, passed.states, strict=True):
            found = states
            if pair.task == "language":
                found = torch.cat([*passed.network.logits(states)], -1)
                found = found - found.mean(-1, keepdim=True)
            with torch.no_grad():
                wanted = files.outputs(network, batch, pair.task)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


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
    heads = {o.name for o in pair.others if o.kind == "head"}
    assert heads == {"classifier.weight", "classifier.bias"}
    network = pair.network("base")
    assert torch.equal(network.classifier.weight, pair.tuned.read("classifier.weight"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_in_several_files_of_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = files.pair(tmp_path, dtype=dtype)
    for place in map(Path, (base, tuned)):
        weights = load_file(place / "model.safetensors")
        where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(weights)}
        for part in set(where.values()):
            save_file({n: w for n, w in weights.items() if where[n] == part}, place / part)
        (place / "model.safetensors").unlink()
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    pair = Pair.open(base, tuned)
    assert len(pair.modules) == 13
    assert {value.dtype for value in pair.network().parameters()} == {torch.float32}


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
    "architecture",
    [f"{kind}ForSequenceClassification" for kind in ("Bert", "GPT2")]
    + [f"{kind}ForCausalLM" for kind in ("Qwen2", "Gemma2")],
)
def test_entries_that_change_no_function_may_differ(architecture: str, tmp_path: Path) -> None:
    base, tuned = files.pair(tmp_path, architecture, pad_token_id=0)
    # Positions that are learned are weights.
    learned = {"max_position_embeddings"} if architecture[:4] in ("Bert", "GPT2") else set()
    network = Pair.open(base, tuned).network()
    files.configure(Path(tuned), **{n: v for n, v in SAME.items() if n not in learned})
    if not architecture.endswith("CausalLM"):
        files.configure(Path(tuned), tie_word_embeddings="GPT2" in architecture)
        files.configure(Path(base), tie_word_embeddings="GPT2" not in architecture)
    pair = Pair.open(base, tuned)
    ids = torch.arange(4, 24).reshape(2, 10)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        one, other = (each(**given).logits for each in (network, pair.network()))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    # What only one of them pads with is none of the network's, which does not compute it.
    files.configure(Path(base), pad_token_id=None)
    Pair.open(base, tuned)


@pytest.mark.parametrize("padding", [7, -1, None])
def test_padding_changes_no_output(padding: int | None, tmp_path: Path) -> None:
    """Classifiers of decoders look for the last token by what their configuration pads with."""
    places = files.pair(tmp_path, "LlamaForSequenceClassification")
    for place in places:
        files.configure(Path(place), pad_token_id=padding)
    pair = Pair.open(*places)
    batch = _texts.prepare(pair, files.texts(), None, tokens=64).fit[0]
    assert not batch.attention_mask.all()
    found = files.outputs(pair.network(), batch, pair.task)
    alone = files.plain(pair.network(), files.apart([batch])).float()
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_stored_and_tied_is_one(tmp_path: Path) -> None:
    def head(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    places = files.pair(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    for place in map(Path, places):
        files.alter(place, head)
    assert Pair.open(*places).tuned.config.tie_word_embeddings


def test_code_of_a_model_is_not_run(tmp_path: Path, monkeypatch: Patch) -> None:
    base, tuned = files.pair(tmp_path)
    files.configure(Path(tuned), model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    Path(tuned, "mine.py").write_text("raise SystemExit")
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    with pytest.raises(InputError, match=f"^model must be .*{tuned}") as refused:
        Pair.open(base, tuned)
    assert "contains custom code" in str(refused.value.__cause__)


# Texts


PAIR = files.short(files.words(), "classification")


def prepared(given: Any, held_out: Any = None, **options: Any) -> _texts.Texts:
    options = {"tokens": 128} | options
    return _texts.prepare(PAIR, given, held_out, **options)


def rows(batches: list[_texts.Batch]) -> list[list[int]]:
    return [text.tolist() for text in files.apart(batches)]


def test_parts_of_texts_share_nothing_and_lose_nothing() -> None:
    given = files.texts(178)
    found = prepared([*given, "  "])
    parts = found.fit, found.select, found.test
    assert [*map(_texts.count, parts)] == [67, 22, 89]
    there = {tuple(row) for part in parts for row in rows(part)}
    assert len(there) == len(set(given))
    assert found.cut == sum(len(text.split()) > 10 for text in given)
    assert not found.grouped


def test_repetitions_certify_as_often_as_they_are_drawn() -> None:
    given = [*files.texts(130), *["w1 w2 w3"] * 70]
    found = prepared(given)
    (common,) = files.words()(["w1 w2 w3"])["input_ids"]
    assert rows([*found.fit, *found.select]).count(common) == 1
    assert rows(found.test).count(common) > 20
    # The half with which errors are certified has lost those that were drawn last.
    assert _texts.count(found.test) == 89


def test_groups_are_divided_as_wholes_and_certify_once() -> None:
    given = [Text(text, group=str(i % 130)) for i, text in enumerate(files.texts(390))]
    tokens = files.words()([text.text for text in given], truncation=True, max_length=10)
    by_row = {tuple(row): t.group for row, t in zip(tokens["input_ids"], given, strict=True)}
    found = prepared(given)
    assert found.grouped
    planning, certifying = (
        [by_row[tuple(row)] for row in rows(part)]
        for part in ([*found.fit, *found.select], found.test)
    )
    assert len(certifying) == len({*certifying}) == 61
    assert not {*planning} & {*certifying}
    assert len(planning) == 195
    # Any text of a group may be the one.
    places = torch.cat([batch.places for batch in found.test])
    assert {*(places // 130).tolist()} == {0, 1, 2}
    checked, *_ = _texts.prepare_all(PAIR, given, 128)
    assert _texts.count(checked) == len({text.group for text in given})
    few = "groups, which count once each: 61 .*; got 121: give more documents, or no groups"
    with pytest.raises(InputError, match=few):
        prepared([Text(text, group=str(i % 121)) for i, text in enumerate(files.texts(390))])


def test_planning_texts_say_how_many_certify(monkeypatch: Patch) -> None:
    monkeypatch.setattr(_texts, "_TOKENS_OF_PART", 700)
    given, others = files.texts(300), files.texts(300, 1)
    for held_out in (others, [text + " and more" for text in others]):
        found = prepared(given, held_out)
        planning = [*found.fit, *found.select]
        assert _texts.count(planning) > _texts.count(found.test) == 89
        assert sum(map(len, rows(planning))) == pytest.approx(700, rel=0.1)
    assert _texts.count(prepared(given, others, thorough=True).test) == 251


def test_batches_are_small_or_have_little_padding(monkeypatch: Patch) -> None:
    """Those that errors are measured on have little; those of large networks are small."""
    found = prepared(files.texts(160))
    for batch in [*found.select, *found.test]:
        assert batch.attention_mask.sum() >= 0.8 * batch.input_ids.numel()
    assert len(found.test) > len(found.fit)
    monkeypatch.setattr(_texts, "_LOAD", 25 * 24 * PAIR.config.hidden_size)
    for batch in prepared(files.texts(160)).fit:
        assert batch.input_ids.numel() <= 25 or len(batch.input_ids) == 1


def test_files_of_texts(tmp_path: Path) -> None:
    plain, lines = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    for content, labels in {
        '{"text": "one"}\n\n{"text": "two ü"}\n': (None, None),
        '{"text": "one", "label": 1}\n{"text": "two ü", "label": "no"}\n': (1, "no"),
        '{"text": "one", "label": 1}\n{"text": "two ü"}\n': (1, None),
        '\ufeff{"text": "one"}\r\n{"text": "two ü"}\r\n': (None, None),
    }.items():
        lines.write_bytes(content.encode())
        assert read_texts(lines) == [*map(Text, ["one", "two ü"], labels)]
    for content in ("one\ntwo ü\n", "one\rtwo ü\r", "\ufeffone\r\n\r\ntwo ü", "\none\ntwo ü\n\n"):
        plain.write_bytes(content.encode())
        assert read_texts(plain) == [Text("one"), Text("two ü")]
    for content in (
        "label,text\n1,one\n,two ü\n",
        '\ufeffof,text,label\r\n,"one",1\r\n,two ü,\r\n',
    ):
        (tmp_path / "texts.csv").write_bytes(content.encode())
        assert read_texts(tmp_path / "texts.csv") == [Text("one", "1"), Text("two ü")]
    # Of documents between blank lines, and of a field.
    plain.write_text("one\ntwo\n \n\nthree\n\n")
    groups = [text.group for text in read_texts(plain)]
    assert groups == [f"document {number} of {plain}" for number in (1, 1, 2)]
    lines.write_text('{"text": "one", "of": 3}\n{"text": "two", "of": "a"}\n')
    assert read_texts(lines, group="of") == [Text("one", None, "3"), Text("two", None, "a")]


def test_chats_are_what_their_template_makes(tmp_path: Path) -> None:
    """Tokens of the text are those of the template, with one mark of the beginning."""
    file, adapter = tmp_path / "chats.JSONL", tmp_path / "adapter"
    chat = [{"role": "user", "content": "w1\nw2"}, {"role": "assistant", "content": "w3"}]
    file.write_text(json.dumps({"messages": chat, "label": 1, "of": "a"}) + "\r\n")
    adapter.mkdir()
    for begins in (False, True):
        made = copy.deepcopy(files.byte_words())
        made.bos_token = "<s>"
        made.chat_template = (
            "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        if begins:
            pieces = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
            made._tokenizer.post_processor = processors.TemplateProcessing(**pieces)
        made.save_pretrained(tmp_path / "base")
        models = [str(adapter), str(tmp_path / "base")]
        ((text, *rest),) = read_texts(file, group="of", models=models)
        assert rest == [1, "a", "w3</s>"]
        found = _models.tokenizer(models[1])
        asked: Any = {"add_generation_prompt": True, "return_dict": False}
        wanted = found.apply_chat_template(chat[:1], tokenize=True, **asked)
        assert found(text).input_ids == wanted
        assert text.startswith("<s>") != begins
        assert text.endswith("<assistant>")
