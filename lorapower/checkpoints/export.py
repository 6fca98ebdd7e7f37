"""Adapters as folders that peft reads, written as a whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import _hub as hub
from ..adapters.peft import NO_MODULES
from ..errors import InputError, ResultsError
from .adapter import Adapter
from .families import PEFT_TASKS
from .pair import Pair

ADAPTER, REPORT, CARD = "adapter_config.json", "report.json", "README.md"


def place(out: Path | str, force: bool) -> Path:
    """The folder to write to; raises `InputError` for one that exists, unless ``force`` is given.

    Even then one that is no adapter's is left alone.
    """
    folder = Path(out).expanduser()
    above = next(place for place in folder.absolute().parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(
            "out", allowed="in a folder that can be written to", given=f"{folder}, in {above}"
        )
    if not folder.exists():
        return folder
    if not force:
        raise InputError(
            "out",
            allowed="a folder that does not exist",
            given=str(folder),
            remedy="name another, or replace it with --force (force=True)",
        )
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / ADAPTER).is_file()):
        raise InputError(
            "out", allowed="a new folder, or one with an adapter to replace", given=str(folder)
        )
    return folder


@contextlib.contextmanager
def written(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when all is in it, and is gone if anything fails."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield partial
            partial.chmod(0o755)
            for file in partial.iterdir():
                file.chmod(0o644)
            old = partial.with_name(f"{partial.name}.old")
            if folder.exists():
                folder.rename(old)
            try:
                partial.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ResultsError(
            folder,
            f"cannot be written ({error.strerror or error})",
            remedy="make room or give access, or name another folder",
        ) from error


def save(
    folder: Path, pair: Pair, network: Any, adapter: Adapter, *, leave: Collection[str] = ()
) -> None:
    """Write an adapter through peft; the network is used up.

    Factors with a rank and a scale of 1 for each module; biases as they become (peft's
    ``bias="all"``); heads, norms and position embeddings that differ as modules to save; of word
    embeddings the rows that differ. What is in ``leave`` is not written.
    """
    from peft import LoraConfig, get_peft_model

    biases = {f"{name}.bias": values for name, values in adapter.biases.items()}
    pair.fill(network, "adapted", leave=leave, updates={n: v.clone for n, v in biases.items()})
    # What is to be saved is copied as it is now.
    whole, rows = _carried(pair, network, leave)
    kept = [o for o in pair.others if o.kind == "bias" and "bias" not in leave]
    patterns = {f"^{re.escape(name)}": rank for name, rank in adapter.ranks.items()}
    largest = max(adapter.ranks.values(), default=1)
    config = LoraConfig(
        task_type=PEFT_TASKS[pair.family.task],
        target_modules="|".join(map(re.escape, adapter.ranks)) or NO_MODULES,
        r=largest,
        lora_alpha=largest,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        lora_dropout=0.0,
        bias="all" if kept or biases else "none",
        fan_in_fan_out=any(pair.modules[name].transposed for name in adapter.ranks),
        modules_to_save=whole or None,
        trainable_token_indices=rows or None,
        inference_mode=True,
    )
    with hub.quiet(), warnings.catch_warnings():
        # It says of tied weights and of biases what is tested of what is read back.
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(network, config)
        inner: Any = wrapped.base_model.model
        with torch.no_grad():
            for name, factors in adapter.factors.items():
                module = inner.get_submodule(name)
                module.lora_A["default"].weight.copy_(factors.right.mT)
                module.lora_B["default"].weight.copy_(factors.left)
        # peft takes the name of the network it was given, which is made like the tuned one.
        wrapped.peft_config["default"].base_model_name_or_path = name_of(pair.base.source)
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)


def load(folder: Path | str, pair: Pair) -> Any:
    """A network of the pair with the base's weights and the adapter of a folder, read by peft.

    A head that the base lacks has to come with the adapter: without, outputs are NaN. Raises
    `InputError` for a folder that peft cannot read, or that does not fit.
    """
    from peft import PeftModel

    if not (Path(folder) / ADAPTER).is_file():
        raise InputError("adapter", allowed="a folder with an adapter of peft", given=str(folder))
    network = pair.network()
    nothing = {
        name: functools.partial(torch.full_like, parameter, torch.nan)
        for name, parameter in network.named_parameters()
        if not pair.base.has(name)
    }
    pair.fill(network, "base", updates=nothing)
    with hub.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return PeftModel.from_pretrained(network, str(folder)).eval().requires_grad_(False)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                "adapter",
                allowed="one that peft reads into the base",
                given=f"{folder} ({reason})",
            ) from error


def name_of(source: str) -> str:
    """What others call a checkpoint: a folder or a name on the hub."""
    return hub.PACKAGED_NAME if source == hub.PACKAGED else source


def size(folder: Path) -> int:
    """Bytes of an adapter's weights and configuration."""
    return sum(file.stat().st_size for file in folder.glob("adapter_*"))


def describe(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report, and a card for people."""
    text = json.dumps(report, indent=2, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(report), encoding="utf-8")


def card(report: Mapping[str, Any]) -> str:
    """The model card of a report, in Markdown."""
    ranks = report["ranks"]
    upper = report["error_upper"]
    limit = "no limit can be given" if upper is None else f"at most about {upper:.1%} at 95%"
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {name_of(report['base'])}",
        "tags: [lora, lorapower]",
        "---",
        "",
        f"# A low-rank adapter of {Path(report['tuned']).name} for {Path(report['base']).name}",
        "",
        f"It stands in for the fine-tuned model. Of what tuning changed in the outputs, "
        f"{report['error']:.1%} is lost (root mean square, {report['held_out_texts']} held-out "
        f"texts; for others like these {limit}).",
        "",
        "| | |",
        "| --- | --- |",
        f"| parameters of the factors | {report['parameters']:,} |",
        f"| modules with an adapter | {len(ranks)} of {report['modules']} |",
        f"| highest rank | {max(ranks.values(), default=0)} |",
        f"| bytes of the adapter's files | {report['adapter_bytes']:,} |",
    ]
    if report["agreement"] is not None:
        lines.append(
            f"| equal decisions | {report['agreement']:.1%} (at least "
            f"{report['agreement_lower']:.1%} at 95%) |"
        )
        lines.append(f"| mean KL divergence | {report['kl']:.2e} nats |")
    for kind, count in report["not_low_rank"].items():
        what = "left out" if kind in report["left_out"] else "carried over exactly"
        lines.append(f"| {kind}, {what} | {count:,} |")
    lines += ["", "`report.json` has the rank of each module and how all this was measured.", ""]
    return "\n".join(lines)


def _carried(
    pair: Pair, network: Any, leave: Collection[str]
) -> tuple[list[str], dict[str, list[int]]]:
    """Modules that are saved whole, and the rows that are of word embeddings."""
    words = network.get_input_embeddings()
    whole: dict[str, None] = {}
    rows: dict[str, list[int]] = {}
    for other in pair.others:
        owner = other.name.rpartition(".")[0]
        if other.kind in leave or other.kind == "bias":
            continue
        if network.get_submodule(owner) is words and pair.base.has(other.name):
            old, new = pair.base.read(other.name), pair.tuned.read(other.name)
            rows[owner] = (old != new).any(1).nonzero().flatten().tolist()
        elif owner.startswith(pair.prefix):
            whole[owner] = None
        else:
            # peft saves a head as a whole, and would look in vain for parts of it.
            whole[owner.partition(".")[0]] = None
    return [*whole], rows
