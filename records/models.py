"""Packaged encoders and language models, and how they are trained."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from lorapower.checkpoints._libraries import quiet, require
from lorapower.checkpoints._models import LANGUAGE as LANGUAGE
from lorapower.checkpoints._models import PACKAGED as PACKAGED
from lorapower.checkpoints._models import has_bfloat16, load, some
from lorapower.errors import InputError


def encoder(model: str) -> Any:
    """The encoder with its weights as shipped; none that it uses may be missing."""
    return shipped(model)[0]


def shipped(model: str) -> tuple[Any, set[str]]:
    """The encoder, and the names of its weights that are not shipped and drawn anew each time."""
    require("checkpoints")
    from transformers import AutoModel

    return _whole(AutoModel, model)


def language(model: str) -> Any:
    """The language model in float32 with its weights as shipped; none may be missing."""
    require("checkpoints")
    from transformers import AutoModelForCausalLM

    return _whole(AutoModelForCausalLM, model, dtype=torch.float32)[0]


def _whole(kind: Any, model: str, **options: Any) -> tuple[Any, set[str]]:
    """A network, and which weights it lacks; a pooling layer's may be there, unused."""
    network, about = load(kind, model, output_loading_info=True, **options)
    missing = set(about["missing_keys"])
    if needed := sorted(key for key in missing if not key.startswith("pooler.")):
        given = f"{model!r}, which lacks {some(needed)}"
        raise InputError("model", allowed="one whose weights are all there", given=given)
    return network, missing


def passes() -> dict[str, bool]:
    """Options that have a ``Trainer`` pass texts in bfloat16 where the processor has it."""
    if torch.cuda.is_available():
        return {"bf16": has_bfloat16("cuda")}
    return {"bf16": True, "use_cpu": True} if has_bfloat16("cpu") else {}


def train(
    trainer: Any,
    network: Any,
    samples: Sequence[Any],
    collator: Any,
    *,
    warmup_steps: float = 0.1,
    **options: Any,
) -> tuple[Any, Any]:
    """Train by a ``Trainer`` that says and writes nothing; return it and its training's result.

    ``warmup_steps`` below 1 are a part of all.
    """
    from transformers import PrinterCallback, TrainingArguments

    with tempfile.TemporaryDirectory() as unused, quiet():
        arguments = TrainingArguments(
            output_dir=unused,
            warmup_steps=warmup_steps,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        made = trainer(model=network, args=arguments, train_dataset=samples, data_collator=collator)
        made.remove_callback(PrinterCallback)
        return made, made.train()
