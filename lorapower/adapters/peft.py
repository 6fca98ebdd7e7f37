"""Adapters in the files of the library ``peft``, which is not needed to write them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from ..errors import InputError
from ..lowrank import LowRank
from . import files

# What peft takes for a name of no module at all, where else it would insist on one.
NO_MODULES = "dummy-target-modules"


def write(
    folder: Path, module: nn.Sequential, updates: Sequence[LowRank], biases: Sequence[Tensor]
) -> None:
    """The configuration and the weights for the ``Linear`` layers of a module."""
    layers = _layers(module, updates)
    adapted = {name: u for name, u in zip(layers, updates, strict=True) if u.rank}
    config = _config({name: update.rank for name, update in adapted.items()}, bool(biases))
    tensors = {}
    for name, update in adapted.items():
        place, dtype = f"base_model.model.{name}", layers[name].weight.dtype
        tensors[f"{place}.lora_A.weight"] = update.right.mT.to(dtype)
        tensors[f"{place}.lora_B.weight"] = update.left.to(dtype)
    for (name, layer), change in zip(layers.items(), biases, strict=bool(biases)):
        inner = ".base_layer" if name in adapted else ""
        if "bias" in dict(layer.named_parameters()):
            bias = (layer.bias.detach().cpu() + change.cpu()).to(layer.bias.dtype)
            tensors[f"base_model.model.{name}{inner}.bias"] = bias
        elif change.any():
            raise InputError(
                "module",
                allowed="with biases where these are tuned",
                given=f"none in layer {name}",
                remedy="make the layer with bias=True, and zeros for them",
            )
    owned = {name: files.owned(values) for name, values in tensors.items()}
    files.put(folder / "adapter_model.safetensors", safetensors.torch.save(owned, {"format": "pt"}))
    files.put(folder / "adapter_config.json", json.dumps(config, indent=2).encode())


def _layers(module: nn.Sequential, updates: Sequence[LowRank]) -> dict[str, nn.Linear]:
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


def _config(ranks: dict[str, int], biases: bool) -> dict[str, object]:
    # Only a pattern matches whole names: "0" in a list would match "1.0" too.
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    largest = max(ranks.values(), default=1)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": "|".join(map(re.escape, ranks)) or NO_MODULES,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
    }
