"""Files of adapters: what peft, vLLM, SGLang and llama.cpp make of the same ones.

Of servers only the rules are here, from the sources of vLLM 0.33.0, SGLang 0.5.23 and
llama-cpp-python 0.3.36, which has llama.cpp 0.5.0.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import checkpoint_files as files
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import loraplan
from loraplan import InputError, _export, _randomness, _texts, lab, save_peft
from loraplan._export import REPORT
from loraplan._limits import ratio
from loraplan._lowrank import LowRank

TEXTS = files.texts()
QUERY, KEY, VALUE = (f"model.layers.0.self_attn.{end}_proj" for end in "qkv")
# vllm/model_executor/models/llama.py:475 and bert.py:467: what is packed into one module.
PACKED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value")
Factors = dict[str, tuple[Tensor, Tensor]]
LLAMA = {*PACKED[0], *PACKED[1], "o_proj", "down_proj"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Keys and values have 12 rows, fewer than ranks of 16."""
    return files.pair(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def values(llama: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An adapter of rank 3 for values of the first block alone."""
    folder = tmp_path_factory.mktemp("values")
    draw = _randomness.generator(0, "values")
    left, right = (_randomness.normal(draw, n, 3, dtype=torch.float32) for n in (12, 24))
    network = files.loaded(llama[0], "LlamaForCausalLM")
    save_peft(folder, network, {VALUE: LowRank(left, right)})
    files.configure(folder, base_model_name_or_path=llama[0])
    return llama[0], str(folder)


def read(folder: Path) -> tuple[dict[str, Any], Factors]:
    """The configuration of an adapter, and ``A`` and ``B`` by module; nothing else is there."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in tensors}
    found = {
        name: tuple(tensors.pop(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
        for name in names
    }
    assert not tensors
    return json.loads((folder / "adapter_config.json").read_text()), found  # type: ignore


def require_groups(factors: Collection[str]) -> None:
    """What is packed with a module has factors too."""
    for owner, _, end in (name.rpartition(".") for name in factors):
        for group in PACKED:
            assert end not in group or all(f"{owner}.{other}" in factors for other in group)


def by_vllm(config: dict[str, Any], factors: Factors) -> dict[str, Tensor]:
    # vllm/lora/peft_helper.py:53 and :188: what is refused.
    assert not config["modules_to_save"]
    assert config["bias"] == "none"
    assert not config["use_dora"]
    # vllm/config/lora.py:27: a server has room for 64, or by default (:34) for 16.
    assert max(config["r"], *config["rank_pattern"].values(), 0) <= 64
    # Before it read patterns, and in :131 for modules without one, the scale was alpha / r.
    return {name: config["lora_alpha"] / config["r"] * B @ A for name, (A, B) in factors.items()}


def by_sglang(config: dict[str, Any], factors: Factors) -> dict[str, Tensor]:
    # sglang/srt/lora/utils.py:292: of patterns only "all" and "all-linear".
    assert isinstance(config["target_modules"], list)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} <= LLAMA
    for A, B in factors.values():
        # mem_pool.py:908 and :1265: buffers have the shape that config["r"] says.
        assert A.shape[0] == B.shape[1] == config["r"]
    # lora.py:282 and :499: looks for others beside queries and gates.
    require_groups(factors)
    # lora.py:71
    return {name: config["lora_alpha"] / config["r"] * B @ A for name, (A, B) in factors.items()}


def by_llama_cpp(config: dict[str, Any], factors: Factors) -> dict[str, Tensor]:
    # convert_lora_to_gguf.py:528 keeps one alpha; src/llama-adapter.h:53 has each tensor's rank.
    return {name: config["lora_alpha"] / A.shape[0] * B @ A for name, (A, B) in factors.items()}


def by_peft(base: str, folder: Path) -> dict[str, Tensor]:
    """What peft adds to weights; a fresh network of transformers loads it."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in files.loaded(base, "LlamaForCausalLM", folder).named_modules()
        if hasattr(module, "lora_A")
    }


# What is served is the base's configuration

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE = {"rope_theta": 1e4, "rope_type": "default"}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [2.0] * 3, "long_factor": [3.0] * 3, "partial_rotary_factor": 1.0}
# Entries that tuned models have others of than their base.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {"rope_parameters": YARN, "max_position_embeddings": 256}),
    ("LlamaForCausalLM", {"rms_norm_eps": 0.1}),
    ("BertForSequenceClassification", {"layer_norm_eps": 0.1, "hidden_act": "relu"}),
    ("BertModel", {"num_attention_heads": 2, "is_decoder": True}),
    ("GPT2LMHeadModel", {"scale_attn_weights": False}),
    (
        "Phi3ForCausalLM",
        {"rope_parameters": ROPE | LONG | {"rope_type": "longrope"}}
        | {"max_position_embeddings": 256, "original_max_position_embeddings": 64},
    ),
    (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": [SLIDING, FULL]},
    ),
    ("Gemma2ForCausalLM", {"final_logit_softcapping": 0.2, "query_pre_attn_scalar": 9}),
    ("Gemma3ForCausalLM", {"rope_parameters": {SLIDING: ROPE, FULL: YARN}}),
    ("ModernBertForSequenceClassification", {"local_attention": 2}),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [0, 1]}),
    ("StableLmForCausalLM", {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}),
]
# Of one of each type all entries are the same; usually of those that are not above.
SAME = files.usually([(a, {}) for a in files.SOME], re.compile("Bert|GPT2|GemmaFor").match)


@pytest.mark.parametrize(("architecture", "entries"), files.usually(OTHERS) + SAME, ids=str)
def test_what_is_lost_is_lost_where_it_is_served(
    architecture: str, entries: dict[str, Any], tmp_path: Path
) -> None:
    """Networks that transformers and peft load afresh lose what is stated."""

    def rows_too(name: str, value: Tensor) -> Tensor | None:
        if "wte" in name or "embed" in name:
            # Some rows of embeddings, which may be tied to the head; positions too.
            update = torch.zeros_like(value)
            update[5:9] = 0.05
            return update
        return files.low_rank()(name, value)

    change = None if entries else rows_too
    base, tuned = files.pair(tmp_path, architecture, change=change, seed=3, pad_token_id=0)
    files.configure(Path(tuned), **entries)
    out = tmp_path / "out"
    plan = loraplan.extract(base, tuned, TEXTS, out, size=0.015)
    full = files.save_merged(tmp_path / "full", plan)
    planner, texts = plan.planner, files.apart(plan.planner.texts.test)
    networks = [files.loaded(place, architecture) for place in (tuned, base, full)]
    networks.append(files.loaded(base, architecture, out))
    wanted, before, *found = (files.plain(network, texts) for network in networks)
    errors = [float((rows - wanted).norm() / (before - wanted).norm()) for rows in found]
    assert errors == pytest.approx(2 * [plan.measured.error], rel=1e-3)
    # Where entries differ all of the change in weights is not all of the effect.
    most = lab.measure(planner, planner.candidate(planner.most)).error
    assert most > 0.02 if entries else most < 1e-4
    values = networks[1].config.to_dict(), networks[0].config.to_dict()
    assert plan.report()["differing"] == {
        name: tuple(config[name] for config in values) for name in entries
    }
    # Of a check too.
    checked = loraplan.check(out, tuned, files.texts(140, 1), base=base)
    assert checked.differing == plan.measured.differing
    # An adapter that cannot reach what entries change keeps next to nothing: 1 up to rounding.
    assert 0.02 * bool(entries) < checked.error < 1 + 1e-6
    # A plan knows the numbers before they are written.
    config, report = (json.loads((out / n).read_text()) for n in ("adapter_config.json", REPORT))
    assert config["base_model_name_or_path"] == base
    numbers = sum(part.numel() for part in load_file(out / "adapter_model.safetensors").values())
    size = sum(file.stat().st_size for file in out.glob("adapter_*"))
    assert (plan.measured.error, numbers, size) == (report["error"], plan.numbers, plan.size)
    assert (numbers, size) == (report["numbers"], report["bytes"])
    estimate = _export.estimate(planner.pair, plan.adapter)
    assert estimate == pytest.approx((numbers, size), rel=0.3)
    assert estimate[0] == numbers
    card = (out / _export.CARD).read_text()
    assert f"base_model: {base}" in card
    assert f"| numbers in all | {numbers:,} |" in card


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_all_embeddings_are_carried_by_their_changed_rows(
    architecture: str, tmp_path: Path
) -> None:
    """Positions and types too, and the network read back is the tuned one."""

    def some_rows(name: str, value: Tensor) -> Tensor | None:
        update = torch.zeros_like(value)
        update[1:9:2] = 0.1
        return update if "embeddings.weight" in name or "wte" in name or "wpe" in name else None

    base, tuned = files.pair(tmp_path, architecture, change=some_rows)
    options: Any = {"modules": "attention", "carry": "all"}
    plan = loraplan.extract(base, tuned, TEXTS, tmp_path / "out", size=1.0, **options)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rows = [value for name, value in tensors.items() if ".token_adapter." in name]
    assert {len(value) for value in rows} <= {1, 4}
    written = sum(value.numel() for value in rows)
    assert plan.planner.pair.not_low_rank == {"embedding": written}
    assert plan.numbers == sum(value.numel() for value in tensors.values())
    assert _export.estimate(plan.planner.pair, plan.adapter)[0] == plan.numbers
    again = files.loaded(base, architecture, tmp_path / "out").merge_and_unload()
    wanted = files.loaded(tuned, architecture).state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, wanted[name])
    assert plan.measured.error < 1e-6


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertForSequenceClassification"])
def test_errors_in_bfloat16_are_those_of_networks_in_it(architecture: str, tmp_path: Path) -> None:
    base, tuned = files.pair(tmp_path, architecture)
    out = tmp_path / "out"
    plan = loraplan.extract(base, tuned, TEXTS, out, size=0.015)
    full = files.save_merged(tmp_path / "full", plan)
    pair, fresh = plan.planner.pair, files.texts(140, 1)
    batches, *_ = _texts.prepare_all(pair, fresh, 128)
    effect = files.distances(pair.network("base"), pair.network(), batches, pair.task).numpy()
    for standin, place in ((out, full), (tuned, tuned)):
        checked = loraplan.check(standin, tuned, fresh, base=base, dtype="bfloat16")
        options: Any = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
        network = files.loaded(place, architecture, **options)
        squares = files.distances(network, pair.network(), batches, pair.task).numpy()
        assert checked.error == pytest.approx(ratio(squares, effect), rel=1e-6)
        assert checked.error > 1e-3


KINDS: list[tuple[str, Any, dict[str, Any]]] = [
    ("dora", peft.LoraConfig, {"use_dora": True, "target_modules": "all-linear"}),
    # Which start from the base's own weights, and change them.
    ("pissa", peft.LoraConfig, {"init_lora_weights": "pissa", "target_modules": "all-linear"}),
    ("ia3", peft.IA3Config, {}),
    ("loha", peft.LoHaConfig, {"target_modules": ["q_proj", "down_proj"], "r": 3}),
    ("vera", peft.VeraConfig, {"target_modules": ["q_proj", "o_proj"], "r": 3}),
    ("oft", peft.OFTConfig, {"target_modules": ["q_proj", "up_proj"], "oft_block_size": 4, "r": 0}),
    ("norms", peft.LNTuningConfig, {"target_modules": ["input_layernorm"]}),
]


@pytest.mark.parametrize(("kind", "config", "options"), KINDS, ids=[kind[0] for kind in KINDS])
def test_any_adapter_is_measured_as_peft_runs_it(
    kind: str, config: Any, options: dict[str, Any], llama: tuple[str, str], tmp_path: Path
) -> None:
    base, tuned = llama
    network = files.loaded(base, "LlamaForCausalLM")
    with warnings.catch_warnings(action="ignore"), _randomness.seeded(0, kind):
        made = peft.get_peft_model(network, config(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for value in made.parameters():
                if value.requires_grad:
                    value.add_(0.1 * torch.randn_like(value))
        made.save_pretrained(str(tmp_path))
        given = TEXTS[:129]
        found, half = (
            loraplan.check(tmp_path, tuned, given, base=base, dtype=dtype)
            for dtype in ("float32", "bfloat16")
        )
    wanted, decisions = files.lost(base, tuned, tmp_path, "LlamaForCausalLM", given)
    assert (found.texts, found.decisions) == (len(given), decisions)
    assert found.error == pytest.approx(wanted, rel=1e-4)
    assert abs(found.error - 1) > 1e-3
    assert half.error == pytest.approx(found.error, rel=0.05)


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("which", ["llama", "values"])
def test_all_readers_read_the_same(
    which: str, rank: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base, tuned = request.getfixturevalue(which)
    options: Any = {"one_rank": rank, "size": 0.04 if rank == 4 else 1.0}
    plan = loraplan.extract(base, tuned, TEXTS, tmp_path / "out", **options)
    config, factors = read(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    wanted = by_peft(base, tmp_path / "out")
    for reader in (by_vllm, by_sglang, by_llama_cpp):
        torch.testing.assert_close(reader(config, factors), wanted)
    # Ranks are those that are needed, and the size is that of files.
    assert 0 < max(plan.ranks.values()) <= rank
    assert {name for name, needed in plan.ranks.items() if needed} <= factors.keys()
    written = sum(A.numel() + B.numel() for A, B in factors.values())
    assert plan.adapter.parameters <= plan.numbers == written
    again = loraplan.plan(base, tuned, TEXTS, **options)
    assert again.numbers == written
    assert again.size == pytest.approx(plan.size, rel=0.1)
    if which == "llama":
        assert 0 < plan.adapter.parameters <= plan.planner.parameters(rank)
    else:
        # Of the change of values alone, which have no room of their own.
        assert factors.keys() == {QUERY, KEY, VALUE}
        assert not any(wanted[name].any() for name in (QUERY, KEY))
        assert plan.measured.error < 1e-4


@pytest.mark.parametrize(
    "architecture",
    [f"{kind}ForSequenceClassification" for kind in ("Llama", "Bert")]
    + ["GPT2LMHeadModel", "Phi3ForCausalLM"],
)
def test_heads_stay_the_base_s(architecture: str, tmp_path: Path) -> None:
    pair = files.pair(tmp_path, architecture)
    plan = loraplan.extract(*pair, TEXTS, tmp_path / "out", one_rank=8, size=0.06)
    config, factors = read(tmp_path / "out")
    assert config["task_type"] == ("CAUSAL_LM" if plan.planner.pair.task == "language" else None)
    assert (config["modules_to_save"], config["trainable_token_indices"]) == (None, None)
    assert all(A.shape[0] == B.shape[1] == 8 for A, B in factors.values())
    assert 0 < len(factors) <= len(plan.planner.modules)
    require_groups(factors)


# Adapters of any network, read by peft

NAMES = "0", "2.0", "3", "10.1"


def normal(seed: int, *shape: int) -> Tensor:
    return _randomness.normal(_randomness.generator(seed, "adapters for peft"), *shape)


def stack() -> nn.Sequential:
    """Nested, and with names that are ends of others: 0 of 2.0, and 0 and 2.0 of 10.0."""
    module = nn.Sequential(
        nn.Linear(5, 7),
        nn.ReLU(),
        nn.Sequential(nn.Linear(7, 4), nn.Dropout(0.5), nn.ReLU()),
        nn.Linear(4, 6),
        *[nn.Dropout(0.3)] * 6,
        nn.Sequential(nn.ReLU(), nn.Linear(6, 3)),
    )
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(seed, *parameter.shape))
    return module.eval()


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("ranks", [[2, 1, 3, 2], [0, 1, 0, 2], [3, 0, 2, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peft_computes_what_the_merged_network_does(
    tmp_path: Path, dtype: torch.dtype, ranks: list[int], biases: bool
) -> None:
    module, tuned = stack().to(dtype), stack().to(dtype)
    if biases:
        with torch.no_grad():
            for name in NAMES:
                tuned.get_parameter(f"{name}.bias").add_(1)
    # Numbers take the type of the module.
    updates = {}
    for name, rank in zip(NAMES, ranks, strict=True):
        sides = module.get_parameter(f"{name}.weight").shape
        updates[name] = LowRank(*(normal(k, side, rank) for k, side in enumerate(sides)))
    merged = copy.deepcopy(tuned)
    with torch.no_grad():
        for name, update in updates.items():
            merged.get_parameter(f"{name}.weight").add_(update.matrix().to(dtype))
    save_peft(tmp_path / "new" / "folder", tuned, updates, biases=biases)
    x = normal(0, 20, 5).to(dtype)
    before, wanted = module(x), merged(x)
    loaded: Any = peft.PeftModel.from_pretrained(module, str(tmp_path / "new" / "folder"))
    rtol = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(loaded(x), wanted, rtol=rtol, atol=rtol)
    assert (biases or any(ranks)) == (not torch.allclose(loaded(x), before))
    kind = peft.tuners.lora.LoraLayer
    adapted = {n for n, layer in loaded.base_model.model.named_modules() if isinstance(layer, kind)}
    assert adapted == {name for name, update in updates.items() if update.rank}
    if any(ranks):
        alone = loaded.merge_and_unload()
        torch.testing.assert_close(alone(x), wanted, rtol=rtol, atol=rtol)


def test_updates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    thin = LowRank(torch.zeros(7, 1), torch.zeros(4, 1))
    batch = LowRank(torch.zeros(2, 7, 1), torch.zeros(2, 5, 1))
    for updates, said in (
        ({"5.0": thin}, r"updates must be of linear modules and embeddings .* one of '5.0'"),
        ({"1": thin}, r"one of '1'"),
        ({"0": thin}, r"updates must be of the size of their modules, \(7, 5\) for '0'"),
        ({"0": batch}, r"got \[2, 7, 5\]"),
    ):
        with pytest.raises(InputError, match=said):
            save_peft(tmp_path, stack(), updates)
    assert not any(tmp_path.iterdir())
