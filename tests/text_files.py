"""A small copy of GLUE as the library ``datasets`` reads it, and a tiny encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoint_files import pair

from records.texts import GLUE

# Sentences as they occur, with quotation marks that are not closed, and separators of lines.
ONE = [
    'He said: "I will not go.',
    "Our friends won't buy this analysis, let alone the next one.",
    "a gorgeous , witty , seductive movie .",
    '"" The Matrix Reloaded "" was in its opening weekend .',
    "A man\u2028is playing a flute.",
    "Weisz\x85 is good.",
    "The \u00f6re is a coin.",
    "  It hurts.  ",
]
OTHER = [
    "She said so.",
    'It was "" good "" .',
    "A person is playing an instrument.",
    "What is the Battle of Chojnice?",
    'He\'s a "star"',
    "Nobody left",
    "No.",
    "It is 3 o'clock.",
]


def write_glue(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    """Write these rows of each task as its training and validation sets."""
    head = ["---", "configs:"]
    for task, content in rows.items():
        head += [f"- config_name: {task}", "  data_files:"]
        for split in ("train", *GLUE[task].validation):
            head += [f"  - split: {split}", f"    path: {task}/{split}.jsonl"]
            file = folder / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "README.md").write_text("\n".join([*head, "---", ""]))
    return folder


def examples(task: str) -> list[dict[str, Any]]:
    """Eight rows, and in QQP one without a text."""
    about = GLUE[task]
    rows = []
    for i, both in enumerate(zip(ONE, OTHER, strict=True)):
        label: float = i % about.classes if about.classes else 5 * i / 7
        rows.append(dict(zip(about.columns, both, strict=False)) | {"label": label})
    if task == "qqp":
        rows.append({"question1": "", "question2": "Was he?", "label": 0})
    return rows


def write_copy(folder: Path) -> str:
    """Write a copy of GLUE; return its folder."""
    return str(write_glue(folder, {task: examples(task) for task in GLUE}))


def save_roberta(folder: Path) -> str:
    """Write a tiny random RoBERTa with a tokenizer; return its folder."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"max_position_embeddings": 33, "type_vocab_size": 2}
    return pair(folder, "roberta", "RobertaModel", **sizes)[0]
