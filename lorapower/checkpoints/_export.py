"""Adapters in folders: written by peft with a report and a card, merged, and read back."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from .. import _checks
from ..errors import InputError, ResultsError
from . import _libraries, _peft_files
from . import _models as hub
from ._measuring import megabytes, percent
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


def claim(name: str, place: Path | str, force: bool, sign: str) -> Path:
    """The folder to write to, which must not exist or, with ``force``, have the file ``sign``."""
    folder = _checks.path(name, place).expanduser()
    above = next(place for place in folder.absolute().parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        allowed = "in a folder that can be written to"
        raise InputError(name, allowed=allowed, given=f"{folder}, in {above}")
    if not folder.exists():
        return folder
    if not force:
        remedy = "name another, or replace it with --force (force=True)"
        allowed = "a folder that does not exist"
        raise InputError(name, allowed=allowed, given=str(folder), remedy=remedy)
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / sign).is_file()):
        allowed = f"a new folder, or one with {sign} to replace"
        raise InputError(name, allowed=allowed, given=str(folder))
    return folder


def overlap(first: Path, second: Path) -> bool:
    """Whether a folder is the other, or in it."""
    first, second = first.resolve(), second.resolve()
    return first.is_relative_to(second) or second.is_relative_to(first)


@contextlib.contextmanager
def write(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is complete and is gone if anything fails."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            yield new
            for file in new.iterdir():
                file.chmod(0o644)
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except ResultsError:
        raise
    except (OSError, SafetensorError) as error:
        raise ResultsError(
            folder,
            f"cannot be written ({getattr(error, 'strerror', None) or error})",
            remedy="make room or give access, or name another folder",
        ) from error


def peft_options(pair: Pair, network: Any, adapter: Adapter) -> dict[str, Any]:
    """What `_peft_files.save_peft` is to keep beside the factors, without what is in ``leave``."""
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
    with _libraries.quiet():
        _peft_files.save_peft(
            folder, network, adapter.factors, base=hub.public_name(pair.base.source), **options
        )


def save_merged(folder: Path, pair: Pair, adapter: Adapter) -> Any:
    """Write the base with an adapter merged into it, and the tokenizer; return the network."""
    merged = pair.network()
    # peft would add what embeddings and a tied head share twice.
    pair.put(merged, adapter)
    with _libraries.quiet():
        merged.config.use_cache = True
        merged.save_pretrained(folder)
        merged.config.use_cache = False
        hub.tokenizer(str(pair.tuned.folder)).save_pretrained(folder)
    return merged


def load(folder: Path | str, pair: Pair, device: torch.device | str = "cpu") -> Any:
    """A network with the base's weights and an adapter read by peft; NaN for a head in neither."""
    from peft import PeftModel

    if not (_checks.path("adapter", folder) / _peft_files.PEFT_CONFIG).is_file():
        raise InputError("adapter", allowed="a folder with an adapter of peft", given=str(folder))
    network = pair.network()
    nothing = {
        name: functools.partial(torch.full_like, parameter, torch.nan)
        for name, parameter in network.named_parameters()
        if not pair.base.has(name)
    }
    pair.fill(network, "base", updates=dict(nothing))
    with _libraries.quiet(), warnings.catch_warnings(action="ignore"):
        try:
            adapted = PeftModel.from_pretrained(network, str(folder))
            return adapted.eval().requires_grad_(False).to(device)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            given = f"{folder} ({' '.join(str(error).split())})"
            allowed = "one that peft reads into the base"
            raise InputError("adapter", allowed=allowed, given=given) from error


def _short(source: str) -> str:
    """The last part of a checkpoint's name, or of adapters' with their weights."""
    parts = [part.rpartition(" × ") for part in source.split(" + ")]
    return " + ".join(weight + times + Path(place).name for weight, times, place in parts)


def describe(folder: Path, report: Mapping[str, Any], modules: pd.DataFrame) -> None:
    """Write the report, and a card for people with the table of modules."""
    text = json.dumps(report, indent=2, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    (folder / CARD).write_text(_card(report, modules), encoding="utf-8")


def _card(report: Mapping[str, Any], modules: pd.DataFrame) -> str:
    """The model card of a report, in Markdown."""
    ranks, error = report["ranks"], f"{report['error']:.1%}"
    upper = report["error_upper"]
    limit = "no limit can be given" if upper is None else f"at most about {upper:.1%} at 95%"
    rows = {
        "parameters of the factors": f"{report['parameters']:,}",
        "numbers carried in all": f"{report['carried']:,}",
        "size of the adapter's files": megabytes(report["adapter_bytes"]),
        "modules with an adapter": f"{len(ranks)} of {report['modules']}",
        "highest rank": f"{max(ranks.values(), default=0)}",
    }
    if report["agreement"] is not None:
        least = f"{report['agreement_lower']:.1%}"
        rows["equal decisions"] = f"{report['agreement']:.1%} (at least {least} at 95%)"
        rows["mean KL divergence"] = f"{report['kl']:.2e} nats"
    for kind, number in report["not_low_rank"].items():
        what = "left out" if kind in report["left_out"] else "carried over exactly"
        rows[f"{kind}, {what}"] = f"{number:,}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    notes = "".join(
        f"\n{note}\n"
        for holds, note in (
            (report["base_dequantized"], _DEQUANTIZED),
            (report["ties_embeddings"], _TIED),
        )
        if holds
    )
    by_module = "\n".join(
        f"| {row['module']} | {row['out']}×{row['in']} | {row['rank']} | {percent(row['lost'])} |"
        for row in modules.to_dict("records")
    )
    return f"""---
library_name: peft
base_model: {hub.public_name(report["base"])}
tags: [lora, lorapower]
---

# A low-rank adapter of {_short(report["tuned"])} for {_short(report["base"])}

It stands in for the fine-tuned model. Of what tuning changed in the outputs, {error} is lost \
(root mean square, {report["held_out_texts"]} held-out texts; for others like these {limit}). The \
first number is an estimate, the limit is the cautious one.

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
