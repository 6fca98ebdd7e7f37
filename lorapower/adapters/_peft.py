"""Adapters in the format of the library ``peft``, written by ``peft`` itself."""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from .. import _hub
from ..errors import InputError
from ..lowrank import LowRank
from . import _files

CONFIG = "adapter_config.json"
# A name that peft accepts where no module is named.
_NO_MODULES = "dummy-target-modules"


def wrap(network: Any, ranks: Mapping[str, int], *, biases: bool = False, **options: Any) -> Any:
    """Give a network's named modules adapters of their ranks, scaled by 1, maybe all its biases."""
    _hub.require("checkpoints", "peft")
    from peft import LoraConfig, get_peft_model

    # Only a pattern matches whole names: "0" in a list would match "1.0" too.
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    largest = max(ranks.values(), default=1)
    config = LoraConfig(
        target_modules="|".join(map(re.escape, ranks)) or _NO_MODULES,
        r=largest,
        lora_alpha=largest,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        bias="all" if biases else "none",
        inference_mode=True,
        **options,
    )
    with warnings.catch_warnings():
        # It warns about tied weights and biases; what is read back is tested for these.
        warnings.simplefilter("ignore")
        return get_peft_model(network, config)


def save(
    folder: Path | str,
    network: Any,
    updates: Mapping[str, LowRank],
    *,
    base: str | None = None,
    **options: Any,
) -> None:
    """Write updates of named modules and what `wrap` keeps with them; uses the network up."""
    wrapped = wrap(network, {name: update.rank for name, update in updates.items()}, **options)
    with torch.no_grad():
        for name, update in updates.items():
            module = wrapped.base_model.model.get_submodule(name)
            module.lora_A["default"].weight.copy_(update.right.mT)
            module.lora_B["default"].weight.copy_(update.left)
    wrapped.peft_config["default"].base_model_name_or_path = base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)


def estimate(network: Any, ranks: Mapping[str, int], **options: Any) -> tuple[int, int]:
    """Numbers and approximate bytes that `save` would write; uses the network up."""
    from peft import get_peft_model_state_dict

    wrapped = wrap(network, ranks, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    about = wrapped.peft_config["default"].to_dict()
    # In addition to 4 bytes a number: each tensor's entry in the header, and the configuration.
    return numbers, 4 * numbers + 160 * len(tensors) + len(json.dumps(about, default=list))


def size(folder: Path) -> tuple[int, int]:
    """Numbers in an adapter's file, and bytes of its files."""
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        with safetensors.safe_open(weights, framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    else:
        tensors = torch.load(weights.with_suffix(".bin"), weights_only=True, map_location="cpu")
        shapes = [tensor.shape for tensor in tensors.values()]
    size = sum(file.stat().st_size for file in folder.glob("adapter_*"))
    return sum(map(math.prod, shapes)), size


def write(
    folder: Path, module: nn.Sequential, updates: Sequence[LowRank], biases: Sequence[Tensor]
) -> None:
    """Write the configuration and the weights for the ``Linear`` layers of a module."""
    layers = _layers(module, updates)
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
        save(partial, tuned, adapted, biases=bool(biases))
        for name in ("adapter_model.safetensors", CONFIG):
            _files.put(folder / name, Path(partial, name).read_bytes())


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
