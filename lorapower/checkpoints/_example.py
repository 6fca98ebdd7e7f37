"""An example to try the command on: a base, two models tuned from it, and texts."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import randomness
from ..errors import InputError
from ._folders import require_free, write_folder
from ._models import PACKAGED, load, place, quiet, require_libraries, tokenizer

# Rated snippets of film reviews, with the sign of the rating, and what the folder says of them.
_MOVIES, _ABOUT = (Path(__file__).with_name(f"_movies.{end}") for end in ("jsonl.gz", "md"))
# The files of texts and the number of each; all texts before these are to tune on.
_FILES = {"movies.jsonl": 240, "others.jsonl": 120}
_BATCH = 16


def write(folder: Path, *, seed: int, report: Callable[[str, int, int], None]) -> None:
    """Write the example to a folder, which must be new or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError("DIR", allowed="a new folder, or an empty one", given=str(folder))
    require_free("DIR", folder, overwrite=False)
    require_libraries()
    base = place(PACKAGED)
    lines = gzip.decompress(_MOVIES.read_bytes()).decode().splitlines(keepends=True)
    with write_folder(folder) as new, randomness.seeded(seed, "example"):
        shutil.copytree(base, new / "base", copy_function=shutil.copyfile)
        shutil.copyfile(_ABOUT, new / "README.md")
        for name, number in reversed(_FILES.items()):
            (new / name).write_text("".join(lines[-number:]), encoding="utf-8")
            del lines[-number:]
        tuned, adapted = _classifier(), _with_lora(_classifier())
        samples = [json.loads(line) for line in lines]
        draw = randomness.generator(seed, "order of snippets")
        _train(tuned, samples, 1e-4, draw, lambda *done: report("tuning all weights", *done))
        _train(adapted, samples, 2e-3, draw, lambda *done: report("tuning by LoRA", *done))
        with quiet():
            tuned.save_pretrained(new / "tuned")
            tokenizer(PACKAGED).save_pretrained(new / "tuned")
            adapted.save_pretrained(new / "lora", save_embedding_layers=False)


def _classifier() -> Any:
    from transformers import AutoModelForSequenceClassification

    return load(AutoModelForSequenceClassification, PACKAGED, num_labels=2)


def _with_lora(network: Any) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules="all-linear")
    with quiet():
        adapted = get_peft_model(network, config)
    adapted.peft_config["default"].base_model_name_or_path = "base"
    return adapted


def _train(
    network: Any,
    samples: list[dict[str, Any]],
    rate: float,
    draw: torch.Generator,
    show: Callable[[int, int], None],
) -> None:
    """Show each text once to AdamW; its rate rises for a tenth of the steps, then falls to 0."""
    from transformers import get_linear_schedule_with_warmup

    # Texts of one length together need no padding, and dropout would cost a third of the time.
    samples = sorted(samples, key=lambda sample: len(sample["text"]))
    batches = [samples[k : k + _BATCH] for k in range(0, len(samples), _BATCH)]
    order = torch.randperm(len(batches), generator=draw).tolist()
    read, weights = tokenizer(PACKAGED), [w for w in network.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, len(order) // 10, len(order))
    for done, k in enumerate(order, 1):
        texts = [sample["text"] for sample in batches[k]]
        labels = torch.tensor([sample["label"] for sample in batches[k]])
        batch = read(texts, padding=True, return_tensors="pt")
        network(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        show(done, len(order))
