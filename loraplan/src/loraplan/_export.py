"""Adapters in folders: written by peft with a report and a card, and read back."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._adapters import MergedCheckpoint, OneSidedError, module_factors, read_config, variant
from ._errors import InputError
from ._lowrank import LowRank
from ._models import PEFT_CONFIG, Rows, find, public_name, quiet
from ._promises import percent
from ._streams import Network
from .pair import Adapter, Pair

if TYPE_CHECKING:
    import pandas as pd

# What a card says where it matters.
_DEQUANTIZED = "The base's weights were dequantized; with weights of full precision losses differ."
_TIED = (
    "Do not merge it with `merge_and_unload` of peft: embeddings and head share their weight, to "
    "which that adds the factors twice."
)
_UNEQUAL = (
    "Its modules have different ranks, all with one `lora_alpha`, which peft and llama.cpp scale "
    "alike. vLLM and SGLang want one rank for all, which `--one-rank` writes."
)
_BESIDE = (
    "It carries more than factors, for peft. llama.cpp leaves out norms without a word, and its "
    "converter refuses biases, embeddings and heads; `--one-rank` writes factors alone."
)
# What the hub calls the task.
_PIPELINES = {
    "classification": "text-classification",
    "language": "text-generation",
    "encoder": "feature-extraction",
}
_AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "language": "AutoModelForCausalLM",
    "encoder": "AutoModel",
}
REPORT, CARD = "report.json", "README.md"
#: Names of all files of an adapter.
FILES = PEFT_CONFIG, "adapter_model.safetensors", REPORT, CARD
# What peft adds to the names of parameters within an adapter.
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.default)(?=\.)")
# Rows of embeddings that an adapter has.
_TOKENS = re.compile(r"(.*)\.token_adapter\.trainable_tokens_delta\.default")
# ``task_type`` of an adapter in peft.
_TASKS = {"classification": "SEQ_CLS", "language": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}
# A name that peft accepts where no module is named, and one of those among which it ties weights.
_NO_MODULES, _TYING = "dummy-target-modules", "embed_tokens"


def save_peft(
    folder: Path | str, network: nn.Module, updates: Mapping[str, LowRank], *, biases: bool = False
) -> None:
    """Write updates ``ΔW = A Bᵀ`` of a network's modules as an adapter that peft reads.

    The network gets peft's layers within: pass a copy if it is still needed. Updates of rank 0 are
    left out. Raises `InputError` for modules that the network lacks, and for updates of other sizes
    than theirs.

    Parameters
    ----------
    updates : mapping
        Updates, ``[out, in]``, by the names of linear modules and embeddings. (The weight of an
        embedding, ``[words, width]``, is transposed: its ``in`` are words.)
    biases : bool
        Whether all biases are written too, as they are in the network.
    """
    _write(folder, _attach(network, updates, biases=biases))


def _attach(network: nn.Module, updates: Mapping[str, LowRank], **options: Any) -> Any:
    """Give a network's modules the factors of updates as an adapter of peft."""
    modules = dict(network.named_modules())
    for name, update in updates.items():
        weight: Any = getattr(modules.get(name), "weight", None)
        if weight is None or weight.ndim != 2:
            allowed = "of linear modules and embeddings of the network"
            raise InputError("updates", allowed, f"one of {name!r}")
        # Of all these modules only nn.Linear keeps its weight as [out, in].
        needed = tuple(weight.shape[:: 1 if isinstance(modules[name], nn.Linear) else -1])
        if tuple(update.shape) != needed or update.left.ndim != 2:
            allowed = f"of the size of their modules, {needed} for {name!r}"
            given = [*update.left.shape[:-2], *update.shape]
            raise InputError("updates", allowed, str(given))
    kept = {name: update for name, update in updates.items() if update.rank}
    wrapped = _wrap(network, {name: update.rank for name, update in kept.items()}, **options)
    model, alpha = wrapped.base_model.model, wrapped.peft_config["default"].lora_alpha
    for name, update in kept.items():
        # All readers multiply by one alpha, and divide by the rank of a module.
        sides = update.right.mT, update.left * (update.rank / alpha)
        module = model.get_submodule(name)
        for factor, values in zip(module_factors(module), sides, strict=True):
            if factor.is_meta:
                _set(module, next(n for n, v in module.named_parameters() if v is factor), values)
            else:
                # In place, as a tied head has views of them.
                factor.data.copy_(values)
    return wrapped


def _set(module: nn.Module, name: str, values: Tensor) -> None:
    """Give a parameter of a module, which is on no device, its values."""
    owner, _, part = name.rpartition(".")
    module.get_submodule(owner)._parameters[part] = nn.Parameter(values.clone().contiguous())


def _write(folder: Path | str, wrapped: Any, base: str | None = None) -> None:
    """Write an adapter that is in a network."""
    config = wrapped.peft_config["default"]
    config.base_model_name_or_path = base
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    with quiet():
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)


def _wrap(network: Any, ranks: Mapping[str, int], *, biases: bool = False, **options: Any) -> Any:
    """Give a network's named modules adapters of their ranks, maybe all its biases."""
    from peft import LoraConfig, get_peft_model

    largest = max(ranks.values(), default=1)
    equal = len({*ranks.values()}) == 1
    patterns = {} if equal else {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    targets = [*map(re.escape, ranks)]
    head: Any = getattr(network, "get_output_embeddings", lambda: None)()
    adapted = [network.get_submodule(name) for name in ranks if head is not None]
    tied = any(isinstance(m, nn.Embedding) and m.weight is head.weight for m in adapted)
    if tied:
        # Which peft ties only where it finds one of these names alone.
        targets.append(_TYING)
    # SGLang reads no pattern, but "0" in a list would match "1.0" too.
    others = (name for name, _ in network.named_modules())
    ambiguous = any(other.endswith(f".{name}") for other in others for name in ranks)
    listable = equal and not tied and not ambiguous
    config = LoraConfig(
        target_modules=[*ranks] if listable else "|".join(targets) or _NO_MODULES,
        ensure_weight_tying=tied,
        r=largest,
        lora_alpha=largest,
        rank_pattern=patterns,
        bias="all" if biases else "none",
        inference_mode=True,
        **options,
    )
    with quiet():
        # It warns about tied weights and biases; what is read back is tested for these.
        return get_peft_model(network, config)


def _peft_options(pair: Pair, adapter: Adapter) -> dict[str, Any]:
    """Say what `save_peft` is to keep beside the factors."""
    whole: dict[str, None] = {}
    rows: dict[str, list[int]] = {}
    biases = bool(adapter.biases)
    for other in pair.others:
        if pair.base.has(other.name) and other.kind not in adapter.carried:
            continue
        owner = other.name.rpartition(".")[0]
        if other.kind == "bias":
            biases = True
        elif other.kind == "embedding" and pair.base.has(other.name):
            rows[owner] = pair.differing_rows(other.name)
        elif owner.startswith(pair.prefix):
            whole[owner] = None
        else:
            # peft saves a head as a whole, and would not find parts of it.
            whole[owner.partition(".")[0]] = None
    adapted = [pair.modules[name] for name in adapter.factors]
    # For classifiers peft saves heads unasked.
    own = any(other.kind == "head" and not pair.base.has(other.name) for other in pair.others)
    headless = pair.task == "classification" and not (own or "head" in adapter.carried)
    return {
        "biases": biases,
        "task_type": None if headless else _TASKS[pair.task],
        "fan_in_fan_out": any(m.transposed and m.kind != "embedding" for m in adapted),
        "modules_to_save": [*whole] or None,
        "trainable_token_indices": rows or None,
    }


def _pad(pair: Pair, adapter: Adapter, rank: int | None) -> Adapter:
    """The same adapter with one rank for servers, by zeros, if there is to be one.

    Modules that servers compute as one (`Module.fused`) get factors together.
    """
    if rank is None:
        return adapter
    together = {pair.modules[name].fused for name in adapter.factors}
    factors = {}
    for name, module in pair.modules.items():
        if module.fused in together:
            nothing = LowRank(*(torch.zeros(side, 0) for side in module.shape))
            update = adapter.factors.get(name, nothing)
            zeros = (0, rank - update.rank)
            sides = (nn.functional.pad(side, zeros) for side in (update.left, update.right))
            factors[name] = LowRank(*sides)
    return adapter._replace(factors=factors)


def save(folder: Path, pair: Pair, adapter: Adapter, rank: int | None = None) -> None:
    """Write an adapter through peft, for servers with one ``rank`` for all its modules."""
    adapter = _pad(pair, adapter, rank)
    read = pair.reader(adapter._replace(factors={}))
    skeleton = pair.skeleton("base")
    words, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    tied = head is not None and head.weight is words.weight
    embeds = any(pair.modules[name].kind == "embedding" for name in adapter.factors)
    # A head that is tied to embeddings with factors needs them, to share them, on a device.
    network = pair.network("base", read) if tied and embeds else pair.build(empty=True)
    options = _peft_options(pair, adapter)
    with quiet():
        wrapped = _attach(network, adapter.factors, **options)
        model = wrapped.base_model.model
        # What tied parameters share is under the names of both.
        for name, value in [*model.named_parameters(remove_duplicate=False)]:
            plain, rows = _WRAPPED.sub("", name), None
            if token := _TOKENS.fullmatch(name):
                if token[1] not in options["trainable_token_indices"]:
                    continue  # a tied head, which has the rows of its embeddings
                plain = f"{token[1]}.weight"
                rows = torch.tensor(options["trainable_token_indices"][token[1]])
            elif not (".modules_to_save." in name or name.endswith(".bias")):
                continue
            if value.is_meta:
                _set(model, name, read(plain, rows))
        _write(folder, wrapped, public_name(pair.base.source))


def load(
    folder: Path | str, pair: Pair, device: torch.device, dtype: torch.dtype = torch.float32
) -> Network:
    """Load the base with an adapter of peft; a head that is in neither is NaN.

    LoRA is merged, weight by weight. What is not is computed by peft in a whole network.
    """
    place = Path(folder)
    about: dict[str, Any] = {"device": device, "dtype": dtype}
    if not (place / PEFT_CONFIG).is_file():
        raise InputError("standin", "a folder with an adapter of peft", str(folder))
    config = read_config("standin", str(folder), place)
    known: Any = pair.base
    if config.is_prompt_learning:
        given = f"{folder}, of type {config.peft_type.value}, whose prompts have own outputs"
        raise InputError("standin", "one that changes weights", given)

    def read(name: str, rows: Rows = None) -> Tensor:
        if known.has(name):
            return known.read(name, rows)
        return torch.full_like(pair.tuned.read(name, rows), torch.nan)

    with suppress(OneSidedError):
        if not variant(config):
            known = merged = MergedCheckpoint(pair.base, str(folder), place, "standin")
            merged.fit(pair.build(empty=True))
            return Network(pair, pair.skeleton("base"), read, **about)
    known = pair.base
    whole = _wrap_whole(place, pair.network("base", read), merge=dtype != torch.float32)
    made = Network(pair, whole, read, **about)
    own = len(pair.skeleton("base").get_submodule(pair.blocks))
    if len(made.blocks) != own:
        allowed, given = f"one that keeps all {own} blocks", f"{folder}, with {len(made.blocks)}"
        raise InputError("standin", allowed, given)
    return made


def _wrap_whole(folder: Path, network: Any, *, merge: bool) -> Any:
    """Have peft put an adapter into a network, or merge it, as some buffers stay in float32."""
    from peft import PeftModel

    with quiet():
        # Else an adapter of which it finds nothing would be none.
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            adapted: Any = PeftModel.from_pretrained(network, str(folder))
            adapted = adapted.merge_and_unload() if merge else adapted.get_base_model()
            return adapted.eval().requires_grad_(False)
        except Exception as error:  # whatever peft raises for a folder like any other
            given = f"{folder} ({' '.join(str(error).split())})"
            raise InputError("standin", "one that peft reads into the base", given) from error


def estimate(pair: Pair, adapter: Adapter, rank: int | None = None) -> tuple[int, int]:
    """Count the numbers that ``save`` would write, and about how many bytes they take."""
    from peft import get_peft_model_state_dict

    adapter = _pad(pair, adapter, rank)
    network = pair.build(empty=True)
    wrapped = _wrap(network, adapter.ranks, **_peft_options(pair, adapter))
    with quiet():
        tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    about = wrapped.peft_config["default"].to_dict()
    # In addition to 4 bytes a number: each tensor's entry in the header, and the configuration.
    return numbers, 4 * numbers + 160 * len(tensors) + len(json.dumps(about, default=list))


def measure(source: str) -> int:
    """Count the bytes of a model's or an adapter's weights."""
    file = Path(source).expanduser()
    files = [file] if file.is_file() else find("standin", source).glob("*.safetensors")
    return sum(each.stat().st_size for each in files)


def measure_peft(folder: Path) -> tuple[int, int]:
    """Count the numbers in an adapter's file, and the bytes of its files."""
    from peft import load_peft_weights

    tensors = load_peft_weights(str(folder), device="cpu", local_files_only=True)
    size = sum(file.stat().st_size for file in folder.glob("adapter_*"))
    return sum(tensor.numel() for tensor in tensors.values()), size


def describe(
    folder: Path, report: Mapping[str, Any], modules: pd.DataFrame, made_by: str = ""
) -> None:
    """Write the report, and a card for people in the form of the hub's cards."""
    from huggingface_hub import EvalResult, ModelCardData

    text = json.dumps(report, indent=2, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    base, tuned, task = public_name(report["base"]), report["tuned"], report["task"]
    promised, pipeline = report["promised"] if report["reached"] else None, _PIPELINES[task]
    result = promised and EvalResult(
        task_type=pipeline,
        dataset_type="texts",
        dataset_name=f"{report['texts']} texts that chose nothing",
        metric_type=promised["kind"],
        metric_name=report["certificate"].partition(",")[0],
        metric_value=promised["share"],
    )
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="peft",
        license=_find_license(find("base", report["base"])),
        pipeline_tag=pipeline,
        tags=["lora", "loraplan"],
        model_name=Path(tuned).name,
        eval_results=[result] if result else None,
    )
    rows = {
        "size of the files": megabytes(report["bytes"]),
        "numbers in all": f"{report['numbers']:,}",
        "numbers in factors": f"{report['parameters']:,}",
        "carried as tuned": ", ".join(report["carried"]) or "nothing but factors",
        "decisions as the tuned model's, on these texts": percent(report["agreement"] or math.nan),
        "lost of tuning's effect, over these texts": percent(report["error"] or math.nan),
        "texts cut off": f"{report['cut']} after {report['options']['tokens']} tokens",
        "versions": ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        "made by": f"`{made_by}`" if made_by else "`loraplan.extract`",
    }
    classes = f", num_labels={report['labels']}" * (task == "classification")
    notes = [_DEQUANTIZED] * report["base_dequantized"] + [_TIED] * report["ties_embeddings"]
    notes += [_UNEQUAL] * (task == "language" and len({*report["ranks"].values()}) > 1)
    notes += [_BESIDE] * (task == "language" and bool(report["carried"]))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    by_module = "\n".join(
        f"| {name} | {out}×{into} | {rank} | {percent(lost)} |"
        for name, _, out, into, rank, lost in modules.itertuples(index=False)
    )
    card = f"""---
{data.to_yaml()}
---

# A low-rank adapter of {Path(tuned).name} for {Path(report["base"]).name}

It stands in for the tuned model. {report["certificate"]}

```python
from peft import PeftModel
from transformers import {_AUTO[task]}
base = {_AUTO[task]}.from_pretrained("{base}"{classes})
model = PeftModel.from_pretrained(base, "FOLDER")
```

| | |
| --- | --- |
{table}

It is a plain folder of peft, and trains on. `report.json` says how all this was measured.

{"".join(f"{note}{chr(10)}{chr(10)}" for note in notes)}## Ranks

The part lost is what the missing directions of a module alone would cost, predicted to first order.

| module | size | rank | part lost |
| --- | --- | --- | --- |
{by_module}
"""
    (folder / CARD).write_text(card, encoding="utf-8")


def _find_license(folder: Path) -> str | None:
    """The licence that a model's own card names."""
    from huggingface_hub import ModelCard

    try:
        found: str | None = ModelCard.load(folder / "README.md").data.license
    except (OSError, ValueError):
        return None
    return found


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace numbers that JSON does not have by ``None``."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def megabytes(size: int) -> str:
    """Write a size in bytes for people."""
    return f"{size / 1e6:.3g} MB"
