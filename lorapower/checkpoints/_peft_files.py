"""Files of adapters as ``peft`` has them."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..errors import InputError, ResultsError
from ..lowrank import LowRank
from ._libraries import require

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A name that peft accepts where no module is named.
_NO_MODULES = "dummy-target-modules"
_TYING = "embed_tokens"


def put(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ResultsError(
            path,
            f"cannot be written ({error.strerror or error})",
            remedy="make room or give access, or name another file",
        ) from error


def _wrap(network: Any, ranks: Mapping[str, int], *, biases: bool = False, **options: Any) -> Any:
    """Give a network's named modules adapters of their ranks, scaled by 1, maybe all its biases."""
    require("checkpoints", "peft")
    from peft import LoraConfig, get_peft_model

    # Only a pattern matches whole names: "0" in a list would match "1.0" too.
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    largest = max(ranks.values(), default=1)
    targets = [*map(re.escape, ranks)]
    if tied := _is_tied(network, ranks):
        # Which peft ties only where it finds one of these names alone.
        targets.append(_TYING)
    config = LoraConfig(
        target_modules="|".join(targets) or _NO_MODULES,
        ensure_weight_tying=tied,
        r=largest,
        lora_alpha=largest,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        bias="all" if biases else "none",
        inference_mode=True,
        **options,
    )
    with warnings.catch_warnings(action="ignore"):
        # It warns about tied weights and biases; what is read back is tested for these.
        return get_peft_model(network, config)


def _is_tied(network: Any, names: Collection[str]) -> bool:
    """Whether a head shares its weight with embeddings among modules of these names."""
    if not hasattr(network, "get_output_embeddings"):
        return False
    head = network.get_output_embeddings()
    modules = (network.get_submodule(name) for name in names)
    return head is not None and any(
        isinstance(module, nn.Embedding) and module.weight is head.weight for module in modules
    )


def save_peft(
    folder: Path | str,
    network: Any,
    updates: Mapping[str, LowRank],
    *,
    base: str | None = None,
    **options: Any,
) -> None:
    """Write updates of named modules and what `_wrap` keeps with them; uses the network up."""
    wrapped = _wrap(network, {name: update.rank for name, update in updates.items()}, **options)
    with torch.no_grad():
        for name, update in updates.items():
            module = wrapped.base_model.model.get_submodule(name)
            if isinstance(module.base_layer, nn.Embedding):
                A, B = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
            else:
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            A.copy_(update.right.mT)
            B.copy_(update.left)
    wrapped.peft_config["default"].base_model_name_or_path = base
    with warnings.catch_warnings(action="ignore"):
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)


def estimate_peft(network: Any, ranks: Mapping[str, int], **options: Any) -> tuple[int, int]:
    """Numbers and approximate bytes that `save_peft` would write; uses the network up."""
    from peft import get_peft_model_state_dict

    wrapped = _wrap(network, ranks, **options)
    with warnings.catch_warnings(action="ignore"):
        tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    about = wrapped.peft_config["default"].to_dict()
    # In addition to 4 bytes a number: each tensor's entry in the header, and the configuration.
    return numbers, 4 * numbers + 160 * len(tensors) + len(json.dumps(about, default=list))


def measure_peft(folder: Path) -> tuple[int, int]:
    """Numbers in an adapter's file, and bytes of its files."""
    weights = folder / PEFT_WEIGHTS
    if weights.is_file():
        with safetensors.safe_open(weights, framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    else:
        tensors = torch.load(weights.with_suffix(".bin"), weights_only=True, map_location="cpu")
        shapes = [tensor.shape for tensor in tensors.values()]
    size = sum(file.stat().st_size for file in folder.glob("adapter_*"))
    return sum(map(math.prod, shapes)), size


def write_peft(
    folder: Path, module: nn.Sequential, updates: Sequence[LowRank], biases: Sequence[Tensor]
) -> None:
    """Write the configuration and the weights for the ``Linear`` layers of a module."""
    layers = _linear_layers(module, updates)
    tuned = copy.deepcopy(module)
    for name, change in zip(layers, biases, strict=bool(biases)):
        bias = dict(tuned.get_submodule(name).named_parameters()).get("bias")
        if bias is not None:
            with torch.no_grad():
                bias.add_(change)
        elif change.any():
            raise InputError(
                "module",
                allowed="with biases where these are tuned",
                given=f"none in layer {name}",
                remedy="make the layer with bias=True, and zeros for them",
            )
    adapted = {name: u for name, u in zip(layers, updates, strict=True) if u.rank}
    with tempfile.TemporaryDirectory() as partial:
        save_peft(partial, tuned, adapted, biases=bool(biases))
        for name in (PEFT_WEIGHTS, PEFT_CONFIG):
            put(folder / name, Path(partial, name).read_bytes())


def _linear_layers(module: nn.Sequential, updates: Sequence[LowRank]) -> dict[str, nn.Linear]:
    """The ``Linear`` layers by name, which the updates must fit."""
    if not isinstance(module, nn.Sequential):
        raise InputError(
            "module", allowed="the network's torch.nn.Sequential", given=type(module).__name__
        )
    named = module.named_modules()
    layers = {name: layer for name, layer in named if isinstance(layer, nn.Linear)}
    expected = [(update.left.shape[-2], update.right.shape[-2]) for update in updates]
    given = [tuple(layer.weight.shape) for layer in layers.values()]
    if given != expected:
        raise InputError(
            "module", allowed=f"of Linear layers {expected}, as the adapters are", given=given
        )
    return layers
