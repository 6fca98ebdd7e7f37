"""An adapter of peft in place of a tuned checkpoint: the same function and changes; refusals."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import checkpoint_files as files
import huggingface_hub
import peft
import pytest
import torch
from checkpoint_files import Patch
from torch import Tensor

from loraplan import InputError, Pair, _randomness, check, extract
from loraplan._models import quiet

TASKS = {"Classification": "SEQ_CLS", "LM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
TASKS |= {"Model": "FEATURE_EXTRACTION"}
BERT, GPT, LLAMA = "BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"
TIED: dict[str, Any] = {"tie_word_embeddings": True}


def train(folder: Path, base: str, architecture: str, *, seed: int = 0, **options: Any) -> str:
    """Write an adapter by peft whose trained parameters have random changes; returns its folder."""
    config: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": "all-linear",
        "task_type": next(task for end, task in TASKS.items() if architecture.endswith(end)),
    } | options
    with quiet(), warnings.catch_warnings(action="ignore"):
        with _randomness.seeded(seed, "started adapters"):
            network = files.loaded(base, architecture)
            wrapped = peft.get_peft_model(network, peft.LoraConfig(**config))
        draw = _randomness.generator(seed, "trained adapters")
        with torch.no_grad():
            for value in wrapped.parameters():
                if value.requires_grad:
                    change = _randomness.normal(draw, *value.shape, dtype=torch.float32)
                    value.add_(0.1 * change)
        wrapped.save_pretrained(str(folder))
    return str(folder)


def outputs(network: Any) -> Tensor:
    draw = _randomness.generator(0, "tokens")
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
    wanted, before = outputs(wrapped), outputs(files.loaded(pair.base.source, pair.architecture))
    torch.testing.assert_close(outputs(network), wanted, rtol=1e-5, atol=1e-5)
    if before.shape == wanted.shape:
        assert (wanted - before).abs().max() > 1e-2
    if pair.tuned.config.tie_word_embeddings and wrapped.peft_config["default"].ensure_weight_tying:
        # It would add what is one twice.
        return
    merged = dict(copy.deepcopy(wrapped).merge_and_unload().named_parameters())
    for name, module in pair.modules.items():
        found, weight = pair.change(name), merged[f"{name}.weight"]
        change = (weight.mT if module.transposed else weight) - pair.weight("base", module)
        torch.testing.assert_close(found, change, rtol=1e-5, atol=1e-6)
        unit = torch.eye(module.shape[1])
        torch.testing.assert_close(pair.multiplier(name) @ unit, change, rtol=1e-5, atol=1e-6)
    different = {
        name
        for name, value in merged.items()
        if name.rpartition(".")[0] not in pair.modules or name.endswith(".bias")
        if not pair.base.has(name) or not torch.equal(value, pair.base.read(name))
    }
    assert {other.name for other in pair.others} == different


OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
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
    (BERT, {}, {"modules_to_save": ["pooler", "LayerNorm", "word_embeddings"]}),
    (BERT, {}, {"target_modules": ["query", "classifier"]}),
    (BERT, {}, {"trainable_token_indices": {"word_embeddings": [3, 5, 8]}}),
    (GPT, {}, {"fan_in_fan_out": True, "bias": "all", "target_modules": ["c_proj", "c_attn"]}),
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


# It ends in the name of a head, which peft saves whole.
LINEAR = {"exclude_modules": ["pre_classifier"]}


@pytest.mark.parametrize(
    ("architecture", "sizes", "options"),
    files.usually([(a, {}, LINEAR) for a in files.ARCHITECTURES]) + OPTIONS,
    ids=str,
)
def test_adapters_are_what_peft_computes(
    architecture: str, sizes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    base, _ = files.pair(tmp_path, architecture, **sizes)
    adapter = train(tmp_path / "adapter", base, architecture, **options)
    pair = Pair.open(base, adapter)
    assert (pair.architecture, pair.tuned.source) == (architecture, adapter)
    require_same(pair, files.loaded(base, architecture, adapter))
    ranks = {getattr(pair.multiplier(name), "rank", None) for name in pair.modules}
    assert ranks == {3} or options is not LINEAR


def test_one_side_of_what_is_tied(tmp_path: Path) -> None:
    """It is refused as a tuned model, also where the flag for both ties nothing, and checked."""
    for architecture, words, sizes in ((GPT, "wte", {}), (LLAMA, "embed_tokens", TIED)):
        folder = tmp_path / words
        base, tuned = files.pair(folder, architecture, **sizes)
        options: dict[str, Any] = {
            "target_modules": [words],
            "ensure_weight_tying": architecture == GPT,
        }
        adapter = train(folder / "adapter", base, architecture, **options)
        with pytest.raises(InputError, match="changes embeddings alone"):
            Pair.open(base, adapter)
        texts = files.texts(129)
        wanted, _ = files.lost(base, tuned, adapter, architecture, texts)
        assert check(adapter, tuned, texts, base=base).error == pytest.approx(wanted, rel=1e-4)
    embeddings: dict[str, Any] = {"modules_to_save": ["embed_tokens"]}
    head: dict[str, Any] = {"target_modules": ["lm_head"]}
    for which, options in (("embeddings", embeddings), ("the head", head)):
        adapter = train(tmp_path / which, base, LLAMA, **options)
        with pytest.raises(InputError, match=f"{which} alone: train with ensure_weight_tying=True"):
            Pair.open(base, adapter)


def beheaded(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "classifier" in name]:
        del tensors[name]


def test_a_head_that_the_base_lacks(tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path, BERT, num_labels=3)
    adapter = train(tmp_path / "adapter", base, BERT)
    wrapped = files.loaded(base, BERT, adapter)
    files.alter(
        Path(base), beheaded, architectures=["BertForMaskedLM"], id2label=None, label2id=None
    )
    # It is told by its name without a task, too.
    for task in ("SEQ_CLS", None):
        files.configure(Path(adapter), task_type=task)
        pair = Pair.open(base, adapter)
        assert {o.name for o in pair.others} == {"classifier.weight", "classifier.bias"}
        assert (pair.task, pair.tuned.config.num_labels) == ("classification", 3)
        torch.testing.assert_close(outputs(pair.network()), outputs(wrapped), rtol=1e-5, atol=1e-5)
    files.alter(Path(adapter), beheaded, task_type="SEQ_CLS")
    with pytest.raises(InputError, match=r"adapter', without .*classifier.*: train it with"):
        Pair.open(base, adapter)


def test_adapters_without_a_task(tmp_path: Path, monkeypatch: Patch) -> None:
    base, _ = files.pair(tmp_path, BERT)
    headless = train(tmp_path / "headless", base, "BertModel", task_type=None)
    require_same(Pair.open(base, headless), files.loaded(base, "BertModel", headless))
    options: dict[str, Any] = {"task_type": None, "target_modules": ["value", "dense"]}
    adapter = train(tmp_path / "adapter", base, BERT, **options)
    # From the hub, and with the base's tokenizer unless it has its own.
    fetched = Mock(return_value=adapter)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    pair = Pair.open(base, "somebody/adapter")
    assert {call.args for call in fetched.mock_calls} == {("somebody/adapter",)}
    asked = {*fetched.call_args.kwargs["allow_patterns"]}
    assert asked & {"*.safetensors", "*.bin"} == {"*.safetensors"}
    require_same(pair, files.loaded(base, BERT, adapter))
    assert pair.tuned.source == "somebody/adapter"
    assert pair.tokenizer("w1 w2") == files.byte_words()("w1 w2")
    files.words().save_pretrained(adapter)
    assert Pair.open(base, adapter).tokenizer("w1 w2").input_ids == [5, 6]
    # Names with that of the body are not of the body alone.
    files.configure(Path(adapter), task_type="FEATURE_EXTRACTION")
    with pytest.raises(InputError, match=r"which it lacks: name its own base, .*task_type"):
        Pair.open(base, adapter)


def test_adapters_of_other_bases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, _ = files.pair(tmp_path, BERT)
    adapter = train(tmp_path / "adapter", base, BERT)
    # A folder that was moved keeps its name; one in the cache has it above.
    moved = str(shutil.copytree(base, tmp_path / "elsewhere" / "base"))
    for name in (base, "/cache/hub/models--org--base/snapshots/0a1b2c", None):
        files.configure(Path(adapter), base_model_name_or_path=name)
        Pair.open(moved, adapter)
    assert not caplog.text
    files.configure(Path(adapter), base_model_name_or_path="org/other")
    require_same(Pair.open(base, adapter), files.loaded(base, BERT, adapter))
    assert "names another base, 'org/other'" in caplog.text
    deep, _ = files.pair(tmp_path / "deep", BERT, num_hidden_layers=1)
    with pytest.raises(InputError, match="which it lacks: name its own base, 'org/other'"):
        Pair.open(deep, adapter)


def test_an_adapter_that_is_written_again_is_no_larger(tmp_path: Path) -> None:
    base, _ = files.pair(tmp_path, BERT)
    options: dict[str, Any] = {"bias": "all", "modules_to_save": ["1.output.LayerNorm"]}
    adapter = train(tmp_path / "adapter", base, BERT, **options)
    made = extract(base, adapter, files.texts(), tmp_path / "out", size=0.03, max_rank=9)
    assert made.measured.error < 1e-4
    assert max(made.ranks.values()) == 3
    assert {*made.report()["carried"]} == {"bias", "norm", "head"}
    wanted, found = (
        files.loaded(base, BERT, adapter),
        files.loaded(base, BERT, str(tmp_path / "out")),
    )
    torch.testing.assert_close(outputs(found), outputs(wanted), rtol=1e-4, atol=1e-4)
    # What was written is an adapter of the base again.
    again, pair = Pair.open(base, str(tmp_path / "out")), made.planner.pair
    assert again.others == pair.others
    for name in pair.modules:
        torch.testing.assert_close(again.change(name), pair.change(name), rtol=1e-4, atol=1e-5)
