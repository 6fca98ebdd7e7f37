"""Adapters in folders: written by peft with a report and a card, merged, and read back."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ._libraries import quiet
from ._measuring import Measured
from ._models import public_name, tokenizer
from ._peft_files import PEFT_CONFIG, save_peft
from .pair import Adapter, Pair

if TYPE_CHECKING:
    import pandas as pd

# What a card says where it matters.
_DEQUANTIZED = "The base's weights were dequantized; with weights of full precision errors differ."
_TIED = (
    "Do not merge it with `merge_and_unload` of peft: embeddings and head share their weight, to "
    "which that adds the factors twice. `lorapower extract --merged DIR` writes the merged model."
)
REPORT, CARD = "report.json", "README.md"
# ``task_type`` of an adapter in peft.
TASKS = {"classification": "SEQ_CLS", "language": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}


def peft_options(pair: Pair, network: Any, adapter: Adapter) -> dict[str, Any]:
    """Say what `save_peft` is to keep beside the factors, without what is in ``leave``."""
    words = network.get_input_embeddings()
    whole: dict[str, None] = {}
    rows: dict[str, list[int]] = {}
    biases = bool(adapter.biases)
    for other in pair.others:
        if other.kind in pair.leave:
            continue
        owner = other.name.rpartition(".")[0]
        if other.kind == "bias":
            biases = True
        elif network.get_submodule(owner) is words and pair.base.has(other.name):
            rows[owner] = pair.differing_rows(other.name)
        elif owner.startswith(pair.prefix):
            whole[owner] = None
        else:
            # peft saves a head as a whole, and would not find parts of it.
            whole[owner.partition(".")[0]] = None
    adapted = [pair.modules[name] for name in adapter.factors]
    # For classifiers peft saves heads unasked.
    headless = pair.task == "classification" and "head" in pair.leave
    return {
        "biases": biases,
        "task_type": None if headless else TASKS[pair.task],
        "fan_in_fan_out": any(
            module.transposed and module.kind != "embedding" for module in adapted
        ),
        "modules_to_save": [*whole] or None,
        "trainable_token_indices": rows or None,
    }


def save(folder: Path, pair: Pair, network: Any, adapter: Adapter) -> None:
    """Write an adapter through peft; the network is used up."""
    biases = {f"{name}.bias": values.clone for name, values in adapter.biases.items()}
    # Modules to save are copied as they are now.
    pair.fill(network, "adapted", updates=dict(biases))
    options = peft_options(pair, network, adapter)
    with quiet():
        save_peft(folder, network, adapter.factors, base=public_name(pair.base.source), **options)


def save_merged(folder: Path, pair: Pair, adapter: Adapter) -> Any:
    """Write the base with an adapter merged into it, and the tokenizer; return the network."""
    merged = pair.network()
    # peft would add what embeddings and a tied head share twice.
    pair.put(merged, adapter)
    with quiet():
        merged.config.use_cache = True
        merged.save_pretrained(folder)
        merged.config.use_cache = False
        tokenizer(str(pair.tuned.folder)).save_pretrained(folder)
    return merged


def load(folder: Path | str, pair: Pair, device: torch.device | str = "cpu") -> Any:
    """Load the base with an adapter read by peft; a head that is in neither is NaN."""
    from peft import PeftModel

    if not (Path(folder) / PEFT_CONFIG).is_file():
        raise InputError("adapter", allowed="a folder with an adapter of peft", given=str(folder))
    network = pair.network()
    nothing = {
        name: functools.partial(torch.full_like, parameter, torch.nan)
        for name, parameter in network.named_parameters()
        if not pair.base.has(name)
    }
    pair.fill(network, "base", updates=dict(nothing))
    with quiet(), warnings.catch_warnings(action="ignore"):
        try:
            adapted = PeftModel.from_pretrained(network, str(folder))
            return adapted.eval().requires_grad_(False).to(device)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            given = f"{folder} ({' '.join(str(error).split())})"
            allowed = "one that peft reads into the base"
            raise InputError("adapter", allowed=allowed, given=given) from error


def describe(
    folder: Path,
    report: Mapping[str, Any],
    modules: pd.DataFrame,
    totals: Sequence[tuple[str, str]],
) -> None:
    """Write the report, and a card for people with its totals and the table of modules."""
    text = json.dumps(report, indent=2, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    upper = report["error_upper"]
    limit = "no limit can be given" if upper is None else f"at most about {upper:.1%} at 95%"
    notes = f"\n{_DEQUANTIZED}\n" if report["base_dequantized"] else ""
    notes += f"\n{_TIED}\n" if report["ties_embeddings"] else ""
    table = "\n".join(f"| {name} | {value} |" for name, value in totals)
    by_module = "\n".join(
        f"| {row['module']} | {row['out']}×{row['in']} | {row['rank']} | {percent(row['lost'])} |"
        for row in modules.to_dict("records")
    )
    card = f"""---
library_name: peft
base_model: {public_name(report["base"])}
tags: [lora, lorapower]
---

# A low-rank adapter of {_short(report["tuned"])} for {_short(report["base"])}

It stands in for the fine-tuned model. Of what tuning changed in the outputs, \
{report["error"]:.1%} is lost (root mean square, {report["held_out_texts"]} held-out texts; for \
others like these {limit}). The first number is an estimate, the limit is the cautious one.

| | |
| --- | --- |
{table}

`report.json` says how all this was measured.
{notes}
## Ranks

The part lost is what the missing directions of a module alone would cost, predicted to first order.

| module | size | rank | part lost |
| --- | --- | --- | --- |
{by_module}
"""
    (folder / CARD).write_text(card, encoding="utf-8")


def _short(source: str) -> str:
    """The last part of a checkpoint's name, or of adapters' with their weights."""
    parts = [part.rpartition(" × ") for part in source.split(" + ")]
    return " + ".join(weight + times + Path(place).name for weight, times, place in parts)


def measured_rows(measured: Measured) -> list[tuple[str, str]]:
    """Name and write what an adapter loses, for people."""
    rows = [
        ("error (part of the effect that is lost)", percent(measured.error)),
        ("at most, at 95%", percent(measured.error_upper)),
    ]
    if math.isfinite(measured.agreement):
        rows += [
            ("equal decisions", percent(measured.agreement)),
            ("at least, at 95%", percent(measured.agreement_lower)),
            ("mean KL divergence, nats", f"{measured.kl:.2e}"),
        ]
    return [*rows, ("texts measured on", f"{measured.texts}")]


def size_rows(numbers: int, size: int, *, estimated: bool) -> list[tuple[str, str]]:
    """Name and write the size of an adapter's files, for people."""
    written = megabytes(size)
    return [
        ("numbers carried in all", f"{numbers:,}"),
        ("size of the adapter's files", f"about {written}" if estimated else written),
    ]


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace numbers that JSON does not have by ``None``."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def megabytes(size: int) -> str:
    """Write a size in bytes for people."""
    return f"{size / 1e6:.3g} MB"


def percent(share: float) -> str:
    """Write a share for people."""
    return f"{share:.1%}" if math.isfinite(share) else "–"
