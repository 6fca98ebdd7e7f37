"""Short texts that stand for those of every task, and tiny models to tune on them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import transformers

from lorapower import randomness
from records import language, texts
from records.texts import Examples

# Sentences as they occur, with quotation marks that are not closed, and separators of lines.
LINES = [
    'He said: "I will not go.',
    "Our friends won't buy this analysis, let alone the next one.",
    "a gorgeous , witty , seductive movie .",
    '"" The Matrix Reloaded "" was in its opening weekend .',
    "A man\u2028is playing a flute.",
    "Weisz\x85 is good.",
    "The \u00f6re is a coin.",
    "  It hurts.  ",
]
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}


@contextmanager
def shown(lines: Sequence[str]) -> Iterator[dict[str, Examples]]:
    """Let these be all texts that there are, in each part, of two classes by turns."""
    labels = tuple(float(i % 2) for i in range(len(lines)))
    parts = dict.fromkeys(texts.PARTS, Examples(tuple(lines), labels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "read", lambda task, part: parts[part])
        language._tokenize.cache_clear()
        yield parts
    language._tokenize.cache_clear()


def save_bert(folder: Path) -> str:
    """Write a tiny random BERT with a tokenizer; return its folder."""
    sizes = SIZES | {"max_position_embeddings": 32, "type_vocab_size": 2}
    return files.pair(folder, "BertModel", num_attention_heads=2, **sizes)[0]


def save_llama(folder: Path) -> str:
    """Write a tiny random Llama with a tokenizer that has no token for padding."""
    tokenizer = copy.deepcopy(files.byte_words())
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = files.SIZES | files.DECODER | SIZES | {"pad_token_id": None}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)
    with randomness.seeded(0, "Llama"):
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
