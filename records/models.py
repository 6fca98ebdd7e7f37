"""Packaged encoders and language models, how they are read, and how they are trained."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from loraplan.lab import LANGUAGE as LANGUAGE
from loraplan.lab import PACKAGED as PACKAGED
from loraplan.lab import has_bfloat16 as has_bfloat16
from loraplan.lab import load as load
from loraplan.lab import package_folder as package_folder
from loraplan.lab import public_name as public_name
from loraplan.lab import quiet as quiet
from loraplan.lab import tokenizer as tokenizer

with warnings.catch_warnings():
    # Libraries import it, and without widgets in a notebook it warns of plain bars.
    warnings.filterwarnings("ignore", "IProgress not found")
    import tqdm.auto  # noqa: F401


class DoublePrecision(TorchFunctionMode):
    """Compute in double precision what modules of ``transformers`` force to single precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        named = {name: widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(widened, args), **named)


def decoder(model: str) -> Any:
    """Load a language model in float32."""
    from transformers import AutoModelForCausalLM

    return load(AutoModelForCausalLM, model, dtype=torch.float32)


def save(network: Any, model: str, folder: Any) -> None:
    """Save a trained network, or its adapter of peft, with the tokenizer of the model tuned."""
    options = {}
    if hasattr(network, "peft_config"):
        network.peft_config["default"].base_model_name_or_path = public_name(model)
        # Asks the hub otherwise whether words were added.
        options["save_embedding_layers"] = False
    with quiet():
        network.save_pretrained(folder, **options)
        tokenizer(model).save_pretrained(folder)


def precision() -> dict[str, bool]:
    """Choose the options by which a ``Trainer`` computes in bfloat16 where the processor has it."""
    if torch.cuda.is_available():
        return {"bf16": has_bfloat16("cuda")}
    return {"bf16": True, "use_cpu": True} if has_bfloat16("cpu") else {}


def train(
    network: Any,
    samples: Sequence[Any],
    collator: Any,
    *,
    trainer: Any = None,
    optimizer: Any = None,
    warmup_steps: float = 0.1,
    **options: Any,
) -> Any:
    """Train by a ``Trainer`` that prints and writes nothing; return what its training returns.

    ``warmup_steps`` below 1 are a share of all steps; ``options`` are those of
    ``TrainingArguments``, ``trainer`` is a subclass of ``Trainer``, and ``optimizer`` takes the
    steps, if others.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

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
        made = (trainer or Trainer)(
            model=network,
            args=arguments,
            train_dataset=samples,
            data_collator=collator,
            optimizers=(optimizer, None),
        )
        made.remove_callback(PrinterCallback)
        return made.train()
