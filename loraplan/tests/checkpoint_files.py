"""Small pairs of checkpoints of all architectures, with random weights, and texts for them."""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraplan import _randomness
from loraplan._models import quiet

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
DECODER = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 1.5}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "camembert": SIZES | {"pad_token_id": 0},
    "roberta": SIZES | {"pad_token_id": 0},
    "xlm-roberta": SIZES | {"pad_token_id": 0},
    "distilbert": {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}
    | {"max_position_embeddings": 64},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": SIZES | DECODER,
    "mistral": SIZES | DECODER,
    "phi3": SIZES | DECODER,
    "qwen2": SIZES | DECODER,
    "qwen3": SIZES | DECODER | {"head_dim": 8},
    "gemma": SIZES | DECODER | {"head_dim": 10},
    "gemma2": SIZES | DECODER | GEMMA | SLIDING | {"final_logit_softcapping": 2.0},
    "gemma3_text": SIZES | DECODER | GEMMA | SLIDING,
    "modernbert": SIZES
    | {"local_attention": 4, "global_attn_every_n_layers": 2}
    | {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))},
    "olmo2": SIZES | DECODER,
    "olmo3": SIZES | DECODER | SLIDING,
    "smollm3": SIZES | DECODER | {"no_rope_layers": [1, 0]},
    "stablelm": SIZES | DECODER | {"use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": SIZES | DECODER | {"sliding_window": 5},
}
# Classes of transformers by the ends of their names.
STARTS = {
    "ForSequenceClassification": "Bert Camembert Roberta XLMRoberta DistilBert GPT2 Llama Qwen3 "
    "Gemma2 Gemma3Text ModernBert",
    "ForCausalLM": "Llama Mistral Phi3 Qwen2 Qwen3 Gemma Gemma2 Gemma3 Olmo2 Olmo3 SmolLM3 "
    "StableLm Starcoder2",
    "LMHeadModel": "GPT2",
    "Model": "Bert Roberta DistilBert GPT2 Gemma3Text ModernBert",
}
ARCHITECTURES = [start + end for end, starts in STARTS.items() for start in starts.split()]
# One of each type.
SOME = [*{getattr(transformers, a).config_class: a for a in reversed(ARCHITECTURES)}.values()]
# Of these types each is read in a way of its own; the others are like them.
USUAL = re.compile("(Bert|GPT2|Llama|Gemma2|ModernBert)(For|LM|Model)")
CONFIG_FILES = "adapter_config.json", "config.json"
Patch = pytest.MonkeyPatch
Change = Callable[[str, torch.Tensor], torch.Tensor | None]


def usually(cases: Sequence[Any], usual: Callable[[str], Any] = USUAL.match) -> list[Any]:
    """Leave cases of other than the usual architectures to nightly runs."""
    each = [(case,) if isinstance(case, str) else case for case in cases]
    nightly = pytest.mark.nightly
    return [pytest.param(*case, marks=() if usual(case[0]) else nightly) for case in each]


def loaded(
    place: str | Path, architecture: str, adapter: str | Path | None = None, **options: Any
) -> Any:
    """A network as transformers loads it, maybe with an adapter as peft does."""
    with quiet(), warnings.catch_warnings(action="ignore"):
        network: Any = getattr(transformers, architecture).from_pretrained(place, **options)
        if adapter is not None:
            network = peft.PeftModel.from_pretrained(network, str(adapter))
        return network.eval()


def save_merged(folder: Path, plan: Any) -> str:
    """Write the base with an adapter merged into it, and the tokenizer."""
    pair = plan.planner.pair
    pair.network(plan.adapter).save_pretrained(folder)
    pair.tokenizer.save_pretrained(folder)
    return str(folder)


def outputs(network: Any, batch: Any, task: str) -> torch.Tensor:
    """What a whole network gives, by its own forward: a row for each text or token.

    Hidden states as they are; logits minus their mean.
    """
    result = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    rows = batch.rows(result.last_hidden_state if task == "encoder" else result.logits).float()
    return rows if task == "encoder" or rows.shape[-1] == 1 else rows - rows.mean(-1, keepdim=True)


def distances(one: Any, other: Any, batches: Sequence[Any], task: str) -> torch.Tensor:
    """Squared distances of two whole networks' outputs, of each text."""
    found = []
    with torch.no_grad():
        for batch in batches:
            off = outputs(one, batch, task).double() - outputs(other, batch, task).double()
            found += [part.square().sum() for part in off.split(batch.counts(task))]
    return torch.stack(found)


def apart(batches: Sequence[Any]) -> list[torch.Tensor]:
    """The tokens of each text."""
    pairs = (zip(b.input_ids, b.attention_mask.bool(), strict=True) for b in batches)
    return [ids[there] for pair in pairs for ids, there in pair]


@torch.no_grad()
def plain(network: Any, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Outputs for texts, one at a time, minus their mean where they are logits."""
    found = [network(input_ids=ids[None]) for ids in texts]
    if "logits" not in found[0]:
        return torch.cat([each.last_hidden_state[0].double() for each in found])
    logits = torch.cat([each.logits.flatten(0, -2).double() for each in found])
    return logits - logits.mean(-1, keepdim=True)


def lost(
    base: str, tuned: str, adapter: str | Path, architecture: str, given: Sequence[str]
) -> tuple[float, int]:
    """What an adapter loses as peft runs it, on texts one at a time, and their tokens."""
    tokens = [torch.tensor(byte_words()(text).input_ids) for text in given]
    ways = (base, adapter), (tuned, None), (base, None)
    networks = (loaded(place, architecture, other) for place, other in ways)
    adapted, wanted, before = (plain(network, tokens) for network in networks)
    return float((adapted - wanted).norm() / (before - wanted).norm()), sum(map(len, tokens))


def texts(number: int = 140, seed: int = 0) -> list[str]:
    """Different sentences of some of `WORDS`."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(3, 12))) for _ in range(number)]


def words() -> Any:
    """A tokenizer that knows `WORDS`."""
    known = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", model_max_length=64
    )


def short(tokenizer: Any, task: str) -> Any:
    """What texts need of a pair, which takes ten tokens."""
    config = SimpleNamespace(model_type="bert", hidden_size=8, num_hidden_layers=2)
    config.max_position_embeddings = 10
    tuned = SimpleNamespace(config=config)
    return SimpleNamespace(tokenizer=tokenizer, padding=0, tuned=tuned, config=config, task=task)


@functools.cache
def byte_words() -> Any:
    """A tokenizer of bytes and what they often are together in `texts`, as decoders have."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts(), vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=64
    )


def alter(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **values: Any) -> None:
    """Change the tensors of a checkpoint or an adapter, and entries of its configuration."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    configure(folder, **values)


def configure(folder: Path, **values: Any) -> None:
    """Change entries of the configuration of a checkpoint or an adapter; ``None`` takes one out."""
    file = next(file for file in map(folder.joinpath, CONFIG_FILES) if file.is_file())
    about = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: v for name, v in about.items() if v is not None}))


def low_rank(rank: int = 3, size: float = 0.4, seed: int = 0, *, words: bool = False) -> Change:
    """Matrices of blocks change by ones of this rank, with a decaying spectrum; biases a little.

    With ``words`` their embeddings and heads of language models do as well.
    """
    draw = _randomness.generator(seed, "changes")

    def normal(*shape: int) -> torch.Tensor:
        return _randomness.normal(draw, *shape, dtype=torch.float32)

    def change(name: str, value: torch.Tensor) -> torch.Tensor | None:
        if re.search("lm_head|wte|embed_tokens|word_embed|tok_embed", name):
            if not words:
                return None
        elif "embed" in name or "wpe" in name:
            return None
        if value.ndim == 1:
            return size / 20 * normal(*value.shape)
        left, right = (normal(n, rank) for n in value.shape)
        return size * value.std() * (left * 0.5 ** torch.arange(rank)) @ right.mT

    return change


def pair(
    folder: Path,
    architecture: str = "BertForSequenceClassification",
    *,
    change: Change | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> tuple[str, str]:
    """Write a base and a tuned checkpoint; returns their folders."""
    made = byte_words()
    kind: Any = getattr(transformers, architecture)
    described: Any = kind.config_class
    config = described(vocab_size=len(made), **CONFIGS[described.model_type] | options)
    with _randomness.seeded(seed, "checkpoints"), quiet():
        network = kind(config).to(dtype)
        with torch.no_grad():
            # Drawn so small that attention would not see what tuning changes.
            for name, value in network.named_parameters():
                if value.ndim == 2 and "embed" not in name and "wte" not in name:
                    value.mul_(4)
        places = []
        for name in ("base", "tuned"):
            place = folder / name
            network.save_pretrained(place)
            made.save_pretrained(place)
            places.append(str(place))
            change = change or low_rank(seed=seed)
            with torch.no_grad():
                for key, value in network.named_parameters():
                    update = change(key, value)
                    if update is not None:
                        value.add_(update.to(dtype))
    return places[0], places[1]
