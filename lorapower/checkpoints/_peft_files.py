"""Adapters in files, as peft writes and reads them."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import InputError
from ..lowrank import LowRank
from ._libraries import require

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A name that peft accepts where no module is named.
_NO_MODULES = "dummy-target-modules"
_TYING = "embed_tokens"


def save_peft(
    folder: Path | str,
    network: nn.Module,
    updates: Mapping[str, LowRank],
    *,
    biases: bool = False,
    base: str | None = None,
    **options: Any,
) -> None:
    """Write updates ``ΔW = A Bᵀ`` of a network's modules as an adapter that peft reads.

    The network gets peft's layers within, as ``peft.get_peft_model`` has it: pass a copy if it is
    still needed. Updates of rank 0 are left out.

    Parameters
    ----------
    folder : Path or str
        Gets the configuration and the weights.
    network : torch.nn.Module
        Any network.
    updates : mapping
        Updates, ``[out, in]``, by the names of linear modules and embeddings. (The weight of an
        embedding, ``[words, width]``, is transposed: its ``in`` are words.)
    biases : bool
        Whether all biases are written too, as they are in the network.
    base : str, optional
        The name of the base for the configuration.
    **options
        Other entries of ``peft.LoraConfig``, such as ``modules_to_save``.

    Raises
    ------
    InputError
        For modules that the network lacks, and for updates of other sizes than theirs.
    OSError
        If the folder cannot be written.
    """
    for name, update in updates.items():
        _require_fit(network, name, update)
    kept = {name: update for name, update in updates.items() if update.rank}
    ranks = {name: update.rank for name, update in kept.items()}
    wrapped = _wrap(network, ranks, biases=biases, **options)
    with torch.no_grad():
        for name, update in kept.items():
            module = wrapped.base_model.model.get_submodule(name)
            A, B = module_factors(module)
            A.copy_(update.right.mT)
            B.copy_(update.left)
    wrapped.peft_config["default"].base_model_name_or_path = base
    with warnings.catch_warnings(action="ignore"):
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)


def estimate_peft(network: Any, ranks: Mapping[str, int], **options: Any) -> tuple[int, int]:
    """Count the numbers that `save_peft` would write, and about how many bytes they take."""
    from peft import get_peft_model_state_dict

    wrapped = _wrap(network, ranks, **options)
    with warnings.catch_warnings(action="ignore"):
        tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    about = wrapped.peft_config["default"].to_dict()
    # In addition to 4 bytes a number: each tensor's entry in the header, and the configuration.
    return numbers, 4 * numbers + 160 * len(tensors) + len(json.dumps(about, default=list))


def measure_peft(folder: Path) -> tuple[int, int]:
    """Count the numbers in an adapter's file, and the bytes of its files."""
    from safetensors import safe_open

    weights = folder / PEFT_WEIGHTS
    if weights.is_file():
        with safe_open(weights, framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    else:
        tensors = torch.load(weights.with_suffix(".bin"), weights_only=True, map_location="cpu")
        shapes = [tensor.shape for tensor in tensors.values()]
    size = sum(file.stat().st_size for file in folder.glob("adapter_*"))
    return sum(map(math.prod, shapes)), size


def _wrap(network: Any, ranks: Mapping[str, int], *, biases: bool = False, **options: Any) -> Any:
    """Give a network's named modules adapters of their ranks, scaled by 1, maybe all its biases."""
    require("checkpoints")
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


def module_factors(module: Any) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Find the factors ``A`` and ``B`` of a module that peft has wrapped, ``ΔW = B A``."""
    if isinstance(module.base_layer, nn.Embedding):
        return module.lora_embedding_A["default"], module.lora_embedding_B["default"]
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def _require_fit(network: nn.Module, name: str, update: LowRank) -> None:
    """Refuse an update of a module that is not there or has other sizes."""
    module = dict(network.named_modules()).get(name)
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        allowed = "of linear modules and embeddings of the network"
        raise InputError("updates", allowed=allowed, given=f"one of {name!r}")
    # Of all these modules only nn.Linear keeps its weight as [out, in].
    needed = tuple(weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1])
    given = update.left.shape[-2], update.right.shape[-2]
    if given != needed or update.left.ndim != 2:
        allowed = f"of the size of their modules, {needed} for {name!r}"
        raise InputError("updates", allowed=allowed, given=f"{[*update.left.shape[:-2], *given]}")
